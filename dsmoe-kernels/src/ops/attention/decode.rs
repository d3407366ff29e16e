//! One query against all keys: bound by reading keys and values.

use crate::simd::{Kernel, Simd, dot, exp, max_of};

/// The heads of one group, `head_dim` values each in `q` and `out`. Key j starts at `j * stride`.
pub(super) struct Group<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) stride: usize,
    pub(super) visible: usize,
    pub(super) head_dim: usize,
}

impl Kernel for Group<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Group { out, q, k, v, stride, visible, head_dim } = self;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let heads = q.len() / head_dim;
        let mut p = vec![0.0; heads * visible];
        for j in 0..visible {
            let k = &k[j * stride..][..head_dim];
            for (h, q) in q.chunks_exact(head_dim).enumerate() {
                p[h * visible + j] = scale * dot(s, q, k);
            }
        }
        for (p, out) in p.chunks_exact_mut(visible).zip(out.chunks_exact_mut(head_dim)) {
            let total = softmax(s, p);
            let mut d = 0;
            while d + 4 * S::LANES <= head_dim {
                weighted::<S, 4>(s, &mut out[d..], p, &v[d..], stride, total);
                d += 4 * S::LANES;
            }
            while d + S::LANES <= head_dim {
                weighted::<S, 1>(s, &mut out[d..], p, &v[d..], stride, total);
                d += S::LANES;
            }
            if d < head_dim {
                let mut sum = s.splat(0.0);
                for (j, &p) in p.iter().enumerate() {
                    sum = s.fma(s.splat(p), s.load_tail(&v[j * stride + d..j * stride + head_dim]), sum);
                }
                s.store_tail(&mut out[d..], s.div(sum, s.splat(total)));
            }
        }
    }
}

/// Turns scores into e^(score - largest); returns their sum.
#[inline(always)]
fn softmax<S: Simd>(s: S, p: &mut [f32]) -> f32 {
    let largest = s.splat(max_of(s, p));
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

/// N vectors of `sum_j p[j] v[j] / total`.
#[inline(always)]
fn weighted<S: Simd, const N: usize>(s: S, out: &mut [f32], p: &[f32], v: &[f32], stride: usize, total: f32) {
    let mut sums = [s.splat(0.0); N];
    for (j, &p) in p.iter().enumerate() {
        let (p, v) = (s.splat(p), &v[j * stride..][..N * S::LANES]);
        for i in 0..N {
            sums[i] = s.fma(p, s.load(&v[i * S::LANES..]), sums[i]);
        }
    }
    for i in 0..N {
        s.store(&mut out[i * S::LANES..], s.div(sums[i], s.splat(total)));
    }
}
