//! Vector bodies.

use crate::simd::{Kernel, Simd, exp, max_of};

/// `(max, sum of e^(z - max))`. A NaN in z is in the sum.
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

/// The loss of one row of logits; with a `scale`, z becomes the gradient of `scale * loss`. Without a target the
/// loss and the gradient are 0.
pub(super) struct Row<'a> {
    pub(super) z: &'a mut [f32],
    pub(super) target: Option<usize>,
    pub(super) scale: Option<f32>,
}

impl Kernel for Row<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Row { z, target, scale } = self;
        let Some(target) = target else {
            if scale.is_some() {
                z.fill(0.0);
            }
            return 0.0;
        };
        let (max, sum) = softmax_sums(s, z);
        let loss = sum.ln() - (z[target] - max);
        if let Some(scale) = scale {
            let (m, factor) = (s.splat(max), s.splat(scale / sum));
            let head = z.len() - z.len() % S::LANES;
            for j in (0..head).step_by(S::LANES) {
                let p = exp(s, s.sub(s.load(&z[j..]), m));
                s.store(&mut z[j..], s.mul(p, factor));
            }
            if head < z.len() {
                let z = &mut z[head..];
                let p = exp(s, s.sub(s.load_tail(z), m));
                s.store_tail(z, s.mul(p, factor));
            }
            z[target] -= scale;
        }
        loss
    }
}

/// `z <- z - logsumexp(z)`.
pub(super) struct LogSoftmax<'a> {
    pub(super) z: &'a mut [f32],
}

impl Kernel for LogSoftmax<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (max, sum) = softmax_sums(s, self.z);
        let shift = sum.ln();
        for z in self.z.iter_mut() {
            *z = (*z - max) - shift;
        }
    }
}
