//! Vector bodies.

use super::{LogSoftmaxRow, Logits};
use crate::simd::{Kernel, Simd, exp, max_of, soft_cap};

/// Returns `(max, sum of e^(z - max))`. A NaN in z makes the sum NaN.
#[inline(always)]
fn softmax_sums<S: Simd>(s: S, z: &[f32]) -> (f32, f32) {
    let max = max_of(s, z);
    let m = s.splat(max);
    let mut sums = [s.splat(0.0); 2];
    let pairs = z.len() - z.len() % (2 * S::LANES);
    for j in (0..pairs).step_by(2 * S::LANES) {
        sums[0] = s.add(sums[0], exp(s, s.sub(s.load(&z[j..]), m)));
        sums[1] = s.add(sums[1], exp(s, s.sub(s.load(&z[j + S::LANES..]), m)));
    }
    let mut rest = 0.0;
    for z in z[pairs..].chunks(S::LANES) {
        let mut lanes = [0.0; 64];
        s.store(&mut lanes, exp(s, s.sub(s.load_tail(z), m)));
        rest += lanes[..z.len()].iter().sum::<f32>();
    }
    (max, s.reduce_add(s.add(sums[0], sums[1])) + rest)
}

/// Returns the same as [`softmax_sums`] and sets z to e^(z - max).
#[inline(always)]
fn softmax_terms<S: Simd>(s: S, z: &mut [f32]) -> (f32, f32) {
    let max = max_of(s, z);
    (max, terms(s, z, max))
}

/// Sets z to e^(z - max) and returns the sum.
#[inline(always)]
fn terms<S: Simd>(s: S, z: &mut [f32], max: f32) -> f32 {
    let m = s.splat(max);
    let mut sums = [s.splat(0.0); 2];
    let pairs = z.len() - z.len() % (2 * S::LANES);
    for j in (0..pairs).step_by(2 * S::LANES) {
        for (i, sum) in sums.iter_mut().enumerate() {
            let z = &mut z[j + i * S::LANES..];
            let term = exp(s, s.sub(s.load(z), m));
            *sum = s.add(*sum, term);
            s.store(z, term);
        }
    }
    let mut rest = 0.0;
    for z in z[pairs..].chunks_mut(S::LANES) {
        let term = exp(s, s.sub(s.load_tail(z), m));
        s.store_tail(z, term);
        rest += z.iter().sum::<f32>();
    }
    s.reduce_add(s.add(sums[0], sums[1])) + rest
}

/// Returns the loss of one row of logits. With a `scale`, z becomes the gradient of `scale * loss`. Without a target the
/// loss and the gradient are 0.
pub(super) struct Row<'a> {
    pub(super) z: &'a mut [f32],
    pub(super) target: Option<usize>,
    pub(super) scale: Option<f32>,
}

impl Kernel for Row<'_> {
    type Output = f32;
    #[inline(always)]
    fn body<S: Simd>(self, s: S) -> f32 {
        let Row { z, target, scale } = self;
        let Some(target) = target else {
            if scale.is_some() {
                z.fill(0.0);
            }
            return 0.0;
        };
        let at_target = z[target];
        let (max, sum) = match scale {
            None => softmax_sums(s, z),
            Some(_) => softmax_terms(s, z),
        };
        if let Some(scale) = scale {
            let factor = s.splat(scale / sum);
            for z in z.chunks_mut(S::LANES) {
                let term = s.load_tail(z);
                s.store_tail(z, s.mul(term, factor));
            }
            z[target] -= scale;
        }
        sum.ln() - (at_target - max)
    }
}

/// Turns products into logits.
pub(super) struct Transform<'a> {
    pub(super) z: &'a mut [f32],
    pub(super) logits: Logits,
}

impl Kernel for Transform<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Transform { z, logits: Logits { scale, cap } } = self;
        multiply(s, z, scale);
        if let Some(cap) = cap {
            soft_cap(s, z, cap);
        }
    }
}

#[inline(always)]
fn multiply<S: Simd>(s: S, z: &mut [f32], factor: f32) {
    let factor = s.splat(factor);
    for z in z.chunks_mut(S::LANES) {
        let v = s.load_tail(z);
        s.store_tail(z, s.mul(v, factor));
    }
}

/// Does the same as [`Row`] for one row of products: z becomes the gradient of the products.
pub(super) struct TransformedRow<'a> {
    pub(super) z: &'a mut [f32],
    pub(super) target: Option<usize>,
    pub(super) scale: f32,
    pub(super) logits: Logits,
    /// Room for the logits.
    pub(super) capped: &'a mut [f32],
}

impl Kernel for TransformedRow<'_> {
    type Output = f32;
    #[inline(always)]
    fn body<S: Simd>(self, s: S) -> f32 {
        let TransformedRow { z, target, scale, logits, capped } = self;
        Transform { z, logits }.body(s);
        capped.copy_from_slice(z);
        let loss = Row { z, target, scale: Some(scale) }.body(s);
        TransformBackward { dz: z, capped, logits }.body(s);
        loss
    }
}

/// Turns the gradient of logits into that of the products.
pub(super) struct TransformBackward<'a> {
    pub(super) dz: &'a mut [f32],
    /// The logits.
    pub(super) capped: &'a [f32],
    pub(super) logits: Logits,
}

impl Kernel for TransformBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let TransformBackward { dz, capped, logits } = self;
        multiply(s, dz, logits.scale);
        if let Some(cap) = logits.cap {
            let (shrink, one) = (s.splat(1.0 / cap), s.splat(1.0));
            for (dz, z) in dz.chunks_mut(S::LANES).zip(capped.chunks(S::LANES)) {
                let t = s.mul(s.load_tail(z), shrink);
                let v = s.mul(s.load_tail(dz), s.sub(one, s.mul(t, t)));
                s.store_tail(dz, v);
            }
        }
    }
}

/// Returns the loss and the divergence of one row of logits `z` from the teacher's logits `u`. z becomes the gradient of
/// `scale * ((1 - weight) loss + weight divergence)`. Without a target all of them are 0. `u` is used up.
pub(super) struct DistilledRow<'a> {
    pub(super) z: &'a mut [f32],
    pub(super) u: &'a mut [f32],
    pub(super) target: Option<usize>,
    pub(super) scale: f32,
    pub(super) weight: f32,
}

/// Sums of e^z, of e^u, and of e^u (u - z), all less their maxima.
#[derive(Clone, Copy, Default)]
struct DistilledSums<T> {
    student: T,
    teacher: T,
    products: T,
}

/// Values of a row that are added in f32, before their sums are added in f64: rounding in lanes that add thousands of values
/// would show in a divergence, which is small beside the sums.
const SUMMED: usize = 1024;

/// Sets `z` to e^(z - max z) and `u` to e^(u - max u), and returns their sums.
#[inline(always)]
fn distilled_terms<S: Simd>(s: S, z: &mut [f32], u: &mut [f32], maxima: [f32; 2]) -> DistilledSums<f64> {
    let mut all = DistilledSums::default();
    for (z, u) in z.chunks_mut(SUMMED).zip(u.chunks_mut(SUMMED)) {
        let DistilledSums { student, teacher, products } = distilled_block(s, z, u, maxima);
        all.student += f64::from(student);
        all.teacher += f64::from(teacher);
        all.products += f64::from(products);
    }
    all
}

/// Does the same as [`distilled_terms`] for a part of the rows, with sums in f32.
#[inline(always)]
fn distilled_block<S: Simd>(
    s: S,
    z: &mut [f32],
    u: &mut [f32],
    [max_z, max_u]: [f32; 2],
) -> DistilledSums<f32> {
    let (m, n) = (s.splat(max_z), s.splat(max_u));
    let mut sums = [s.splat(0.0); 3];
    let whole = z.len() - z.len() % S::LANES;
    for j in (0..whole).step_by(S::LANES) {
        let (dz, du) = (s.sub(s.load(&z[j..]), m), s.sub(s.load(&u[j..]), n));
        let (of_z, of_u) = (exp(s, dz), exp(s, du));
        sums[0] = s.add(sums[0], of_z);
        sums[1] = s.add(sums[1], of_u);
        sums[2] = s.add(sums[2], s.mul(of_u, s.sub(du, dz)));
        s.store(&mut z[j..], of_z);
        s.store(&mut u[j..], of_u);
    }
    let [student, teacher, products] = sums.map(|sum| s.reduce_add(sum));
    let mut all = DistilledSums { student, teacher, products };
    for (z, u) in z[whole..].chunks_mut(S::LANES).zip(u[whole..].chunks_mut(S::LANES)) {
        let (dz, du) = (s.sub(s.load_tail(z), m), s.sub(s.load_tail(u), n));
        let mut lanes = [0.0; 64];
        s.store(&mut lanes, s.sub(du, dz));
        s.store_tail(z, exp(s, dz));
        s.store_tail(u, exp(s, du));
        for ((z, u), difference) in z.iter().zip(&*u).zip(lanes) {
            all.student += z;
            all.teacher += u;
            all.products += u * difference;
        }
    }
    all
}

impl Kernel for DistilledRow<'_> {
    type Output = [f32; 2];
    #[inline(always)]
    fn body<S: Simd>(self, s: S) -> [f32; 2] {
        let DistilledRow { z, u, target, scale, weight } = self;
        let Some(target) = target else {
            z.fill(0.0);
            return [0.0; 2];
        };
        let at_target = z[target];
        let maxima = [max_of(s, z), max_of(s, u)];
        let sums = distilled_terms(s, z, u, maxima);
        let of_z = s.splat((f64::from(scale) / sums.student) as f32);
        let of_u = s.splat((f64::from(scale * weight) / sums.teacher) as f32);
        for (z, u) in z.chunks_mut(S::LANES).zip(u.chunks(S::LANES)) {
            let v = s.sub(s.mul(s.load_tail(z), of_z), s.mul(s.load_tail(u), of_u));
            s.store_tail(z, v);
        }
        z[target] -= scale * (1.0 - weight);
        let log_student = sums.student.ln();
        let divergence = sums.products / sums.teacher - (sums.teacher.ln() - log_student);
        let loss = log_student - f64::from(at_target - maxima[0]);
        [loss as f32, divergence as f32]
    }
}

/// Does as [`DistilledRow`] with the teacher's most likely tokens `ids` and the logarithms `log_p` of their probabilities
/// and, last, of that of all others.
pub(super) struct TopRow<'a> {
    pub(super) z: &'a mut [f32],
    /// Room for a value per id.
    pub(super) near: &'a mut [f32],
    pub(super) ids: &'a [u32],
    pub(super) log_p: &'a [f32],
    pub(super) target: Option<usize>,
    pub(super) scale: f32,
    pub(super) weight: f32,
}

impl Kernel for TopRow<'_> {
    type Output = [f32; 2];
    #[inline(always)]
    fn body<S: Simd>(self, s: S) -> [f32; 2] {
        let TopRow { z, near, ids, log_p, target, scale, weight } = self;
        let Some(target) = target else {
            z.fill(0.0);
            return [0.0; 2];
        };
        let (at_target, max) = (z[target], max_of(s, z));
        // The others are summed alone: their share, as a difference of two sums, would lose its digits.
        for (near, &id) in near.iter_mut().zip(ids) {
            *near = std::mem::replace(&mut z[id as usize], f32::NEG_INFINITY) - max;
        }
        let others = f64::from(terms(s, z, max));
        let sum = others + near.iter().map(|&z| f64::from(z).exp()).sum::<f64>();
        let (log_sum, (of_teacher, log_of_teacher)) = (sum.ln(), norm_of(log_p));
        let (p_others, mut divergence) = (f64::from(log_p[ids.len()] - of_teacher).exp(), 0.0);
        let p_others = p_others / log_of_teacher.exp();
        if p_others > 0.0 {
            divergence += p_others * (p_others.ln() - (others.ln() - log_sum));
        }
        let [scale, weight] = [scale, weight].map(f64::from);
        multiply(s, z, (scale * (1.0 / sum - weight * p_others / others)) as f32);
        for ((&near, &id), &log_p) in near.iter().zip(ids).zip(log_p) {
            let [log_p, log_q] = [f64::from(log_p - of_teacher) - log_of_teacher, f64::from(near) - log_sum];
            let p = log_p.exp();
            if p > 0.0 {
                divergence += p * (log_p - log_q);
            }
            z[id as usize] = (scale * (log_q.exp() - weight * p)) as f32;
        }
        z[target] -= (scale * (1.0 - weight)) as f32;
        [(log_sum - f64::from(at_target - max)) as f32, divergence as f32]
    }
}

/// Returns the largest of some logarithms, and the logarithm of the sum of their exponentials over its own.
#[inline(always)]
fn norm_of(log_p: &[f32]) -> (f32, f64) {
    let max = log_p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (max, log_p.iter().map(|&log_p| f64::from(log_p - max).exp()).sum::<f64>().ln())
}

/// Sets the most likely tokens of one row of logits; `u` is used up.
pub(super) struct MostLikelyRow<'a> {
    pub(super) ids: &'a mut [u32],
    pub(super) log_p: &'a mut [f32],
    pub(super) u: &'a mut [f32],
}

/// Logits that are compared with the least of the most likely ones at a time.
const SCANNED: usize = 128;

impl Kernel for MostLikelyRow<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let MostLikelyRow { ids, log_p, u } = self;
        let top = ids.len();
        let mut found: Vec<(f32, u32)> = Vec::with_capacity(2 * top + SCANNED);
        let mut least = f32::NEG_INFINITY;
        for (block, values) in u.chunks(SCANNED).enumerate() {
            let first = block * SCANNED;
            let full = found.len() >= top;
            if full && max_of(s, values) <= least {
                continue;
            }
            for (i, &value) in values.iter().enumerate() {
                // A NaN is found, and then is in all results.
                if !full || value > least || value.is_nan() {
                    found.push((value, (first + i) as u32));
                }
            }
            if found.len() > 2 * top || found.len() >= top && !full {
                keep_most_likely(&mut found, top);
                least = found[top - 1].0;
            }
        }
        keep_most_likely(&mut found, top);
        let max = found[0].0;
        for (&(value, id), (to, log_p)) in found.iter().zip(ids.iter_mut().zip(log_p.iter_mut())) {
            (*to, *log_p) = (id, value - max);
            u[id as usize] = f32::NEG_INFINITY;
        }
        let others = if top == u.len() { 0.0 } else { f64::from(terms(s, u, max)) };
        let (log_p, of_others) = log_p.split_at_mut(top);
        let sum = others + log_p.iter().map(|&log_p| f64::from(log_p).exp()).sum::<f64>();
        let log_sum = sum.ln();
        log_p.iter_mut().for_each(|log_p| *log_p = (f64::from(*log_p) - log_sum) as f32);
        of_others[0] = (others.ln() - log_sum) as f32;
    }
}

/// Keeps the `top` largest, in falling order; of equals the one with the lower id comes first.
#[inline(always)]
fn keep_most_likely(found: &mut Vec<(f32, u32)>, top: usize) {
    found.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    found.truncate(top);
}

impl Kernel for LogSoftmaxRow<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let (max, sum) = softmax_sums(s, self.logits);
        let shift = sum.ln();
        for z in self.logits.iter_mut() {
            *z = (*z - max) - shift;
        }
    }
}
