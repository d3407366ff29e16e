//! Attention of one query, whose time is that of reading keys and values.

use super::dims::Dims;
use crate::simd::{Kernel, Simd, exp, max_of, soft_cap};

/// Keys whose scores are kept at a time.
const KEYS: usize = 256;
/// Heads that share a pass over the keys.
const HEADS: usize = 8;

/// The heads of one group, for a query that sees the first `visible` keys of `k`.
pub(super) struct Group<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) visible: usize,
    pub(super) dims: Dims,
}

impl Kernel for Group<'_> {
    type Output = ();
    /// Computes the softmax over blocks of keys. Until the last block, `out` holds the sum of `e^(score - largest so far) v`.
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Group { out, q, k, v, visible, dims } = self;
        let (head_dim, stride) = (dims.head_dim, dims.kv_width());
        let mut scores = [0.0; KEYS];
        for (q, out) in q.chunks(HEADS * head_dim).zip(out.chunks_mut(HEADS * head_dim)) {
            let (mut largest, mut totals) = ([f32::NEG_INFINITY; HEADS], [0.0; HEADS]);
            for first in (0..visible).step_by(KEYS) {
                let p = &mut scores[..KEYS.min(visible - first)];
                let (k, v) = (&k[first * stride..], &v[first * stride..]);
                let heads = q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
                for ((q, out), (largest, total)) in heads.zip(largest.iter_mut().zip(&mut totals)) {
                    score(s, p, q, k, stride, dims.scores.scale);
                    if let Some(cap) = dims.scores.cap {
                        soft_cap(s, p, cap);
                    }
                    let before = std::mem::replace(largest, largest.max(max_of(s, p)));
                    let sum = exponentials(s, p, *largest);
                    let kept = if first == 0 { 0.0 } else { exp_of(s, before - *largest) };
                    *total = *total * kept + sum;
                    add_values(s, out, kept, p, v, stride);
                }
            }
            for (out, total) in out.chunks_exact_mut(head_dim).zip(totals) {
                divide(s, out, total);
            }
        }
    }
}

/// Sets `p[j] = scale <q, k[j]>`.
#[inline(always)]
fn score<S: Simd>(s: S, p: &mut [f32], q: &[f32], k: &[f32], stride: usize, scale: f32) {
    let mut quads = p.chunks_exact_mut(4);
    let mut j = 0;
    for p in &mut quads {
        p.copy_from_slice(&dots::<S, 4>(s, q, &k[j * stride..], stride));
        j += 4;
    }
    for p in quads.into_remainder() {
        [*p] = dots::<S, 1>(s, q, &k[j * stride..], stride);
        j += 1;
    }
    p.iter_mut().for_each(|p| *p *= scale);
}

/// Returns `<q, k[j]>` of N keys.
#[inline(always)]
fn dots<S: Simd, const N: usize>(s: S, q: &[f32], k: &[f32], stride: usize) -> [f32; N] {
    let keys: [&[f32]; N] = std::array::from_fn(|j| &k[j * stride..][..q.len()]);
    let mut sums = [[s.splat(0.0); 2]; N];
    let mut d = 0;
    while d + 2 * S::LANES <= q.len() {
        let (first, second) = (s.load(&q[d..]), s.load(&q[d + S::LANES..]));
        for j in 0..N {
            sums[j][0] = s.fma(first, s.load(&keys[j][d..]), sums[j][0]);
            sums[j][1] = s.fma(second, s.load(&keys[j][d + S::LANES..]), sums[j][1]);
        }
        d += 2 * S::LANES;
    }
    while d < q.len() {
        let end = q.len().min(d + S::LANES);
        let part = s.load_tail(&q[d..end]);
        for j in 0..N {
            sums[j][0] = s.fma(part, s.load_tail(&keys[j][d..end]), sums[j][0]);
        }
        d = end;
    }
    // A loop: closures may not be inlined into the code of the tier.
    let mut dots = [0.0; N];
    for (dot, [a, b]) in dots.iter_mut().zip(sums) {
        *dot = s.reduce_add(s.add(a, b));
    }
    dots
}

/// Turns scores into e^(score - largest) and returns their sum.
#[inline(always)]
fn exponentials<S: Simd>(s: S, p: &mut [f32], largest: f32) -> f32 {
    let largest = s.splat(largest);
    let mut sum = s.splat(0.0);
    let head = p.len() - p.len() % S::LANES;
    for j in (0..head).step_by(S::LANES) {
        let e = exp(s, s.sub(s.load(&p[j..]), largest));
        sum = s.add(sum, e);
        s.store(&mut p[j..], e);
    }
    let tail = &mut p[head..];
    let e = exp(s, s.sub(s.load_tail(tail), largest));
    s.store_tail(tail, e);
    s.reduce_add(sum) + tail.iter().sum::<f32>()
}

/// Returns e^x with the rounding of the vector code.
#[inline(always)]
fn exp_of<S: Simd>(s: S, x: f32) -> f32 {
    let mut out = [0.0];
    s.store_tail(&mut out, exp(s, s.splat(x)));
    out[0]
}

/// Sets `out = kept out + sum_j p[j] v[j]`. The old values are not read if `kept` is 0.
#[inline(always)]
fn add_values<S: Simd>(s: S, out: &mut [f32], kept: f32, p: &[f32], v: &[f32], stride: usize) {
    let mut d = 0;
    while d + 4 * S::LANES <= out.len() {
        add_vectors::<S, 4>(s, &mut out[d..], kept, p, &v[d..], stride);
        d += 4 * S::LANES;
    }
    while d + S::LANES <= out.len() {
        add_vectors::<S, 1>(s, &mut out[d..], kept, p, &v[d..], stride);
        d += S::LANES;
    }
    if d < out.len() {
        let (width, out) = (out.len(), &mut out[d..]);
        let mut sum = start(s, kept, s.load_tail(out));
        for (j, &p) in p.iter().enumerate() {
            sum = s.fma(s.splat(p), s.load_tail(&v[j * stride + d..j * stride + width]), sum);
        }
        s.store_tail(out, sum);
    }
}

/// Does the same as [`add_values`] for N vectors.
#[inline(always)]
fn add_vectors<S: Simd, const N: usize>(
    s: S,
    out: &mut [f32],
    kept: f32,
    p: &[f32],
    v: &[f32],
    stride: usize,
) {
    let mut sums = [s.splat(0.0); N];
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = start(s, kept, s.load(&out[i * S::LANES..]));
    }
    for (j, &p) in p.iter().enumerate() {
        let (p, v) = (s.splat(p), &v[j * stride..][..N * S::LANES]);
        for i in 0..N {
            sums[i] = s.fma(p, s.load(&v[i * S::LANES..]), sums[i]);
        }
    }
    for (i, sum) in sums.into_iter().enumerate() {
        s.store(&mut out[i * S::LANES..], sum);
    }
}

#[inline(always)]
fn start<S: Simd>(s: S, kept: f32, out: S::V) -> S::V {
    if kept == 0.0 { s.splat(0.0) } else { s.mul(s.splat(kept), out) }
}

#[inline(always)]
fn divide<S: Simd>(s: S, out: &mut [f32], total: f32) {
    let total = s.splat(total);
    for out in out.chunks_mut(S::LANES) {
        let v = s.div(s.load_tail(out), total);
        s.store_tail(out, v);
    }
}
