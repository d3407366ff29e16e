//! Vector bodies: the bias and its gradient.

use crate::simd::{Kernel, Simd, axpy};

/// Adds `bias` to every row of `y`.
pub(super) struct AddBias<'a> {
    pub(super) y: &'a mut [f32],
    pub(super) bias: &'a [f32],
}

impl Kernel for AddBias<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        for y in self.y.chunks_exact_mut(self.bias.len()) {
            axpy(s, y, 1.0, self.bias);
        }
    }
}

/// Adds the rows of `dy` to `sums`, in their order.
pub(super) struct SumRows<'a> {
    pub(super) sums: &'a mut [f32],
    pub(super) dy: &'a [f32],
}

impl Kernel for SumRows<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        for dy in self.dy.chunks_exact(self.sums.len()) {
            axpy(s, self.sums, 1.0, dy);
        }
    }
}
