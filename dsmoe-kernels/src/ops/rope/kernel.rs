//! Vector body.

use crate::simd::{Kernel, Simd};

/// Rotates the first `2 * cos.len()` values of the heads of one row; `direction` multiplies the sines.
pub(super) struct Rotate<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) head_dim: usize,
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    pub(super) direction: f32,
}

impl Kernel for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let half = self.cos.len();
        let direction = s.splat(self.direction);
        let head = half - half % S::LANES;
        for x in self.x.chunks_exact_mut(self.head_dim) {
            let (low, high) = x[..2 * half].split_at_mut(half);
            for j in (0..head).step_by(S::LANES) {
                let sin = s.mul(s.load(&self.sin[j..]), direction);
                let (a, b) = rotated(s, s.load(&low[j..]), s.load(&high[j..]), s.load(&self.cos[j..]), sin);
                s.store(&mut low[j..], a);
                s.store(&mut high[j..], b);
            }
            if head < half {
                let (low, high) = (&mut low[head..], &mut high[head..]);
                let sin = s.mul(s.load_tail(&self.sin[head..]), direction);
                let cos = s.load_tail(&self.cos[head..]);
                let (a, b) = rotated(s, s.load_tail(low), s.load_tail(high), cos, sin);
                s.store_tail(low, a);
                s.store_tail(high, b);
            }
        }
    }
}

#[inline(always)]
fn rotated<S: Simd>(s: S, low: S::V, high: S::V, cos: S::V, sin: S::V) -> (S::V, S::V) {
    (s.sub(s.mul(low, cos), s.mul(high, sin)), s.fma(high, cos, s.mul(low, sin)))
}
