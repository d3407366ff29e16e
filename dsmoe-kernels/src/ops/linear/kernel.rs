//! Vector bodies: the bias, its gradient, and `y = x W^T` for a few rows, whose time is that of reading W, so W is read once.

use rayon::prelude::*;

use super::Dims;
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, axpy, dot};

/// Weights read by one task.
const TASK_WEIGHTS: usize = 1 << 16;

/// Sets y; see [`super::Forward`].
pub(super) fn few_rows(isa: Isa, y: &mut [f32], x: &[f32], w: &[f32], dims: Dims) {
    let Dims { rows, inputs, outputs, .. } = dims;
    if rows == 0 || outputs == 0 {
        return;
    }
    let block = (TASK_WEIGHTS / inputs.max(1)).clamp(1, outputs);
    if rows == 1 {
        y.par_chunks_mut(block).enumerate().for_each(|(i, y)| {
            isa.run(Block { y, stride: 1, x, w: &w[i * block * inputs..], rows, inputs });
        });
    } else {
        // y is token-major; the blocks are computed output-major and transposed, a copy of rows * outputs values.
        let mut columns = vec![0.0; rows * outputs];
        columns.par_chunks_mut(block * rows).enumerate().for_each(|(i, y)| {
            isa.run(Block { y, stride: rows, x, w: &w[i * block * inputs..], rows, inputs });
        });
        for (o, column) in columns.chunks_exact(rows).enumerate() {
            for (t, &value) in column.iter().enumerate() {
                y[t * outputs + o] = value;
            }
        }
    }
}

/// Sets outputs `y[o * stride + t]` for the first weight rows of `w`.
struct Block<'a> {
    y: &'a mut [f32],
    stride: usize,
    x: &'a [f32],
    w: &'a [f32],
    rows: usize,
    inputs: usize,
}

impl Kernel for Block<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        for (o, y) in self.y.chunks_exact_mut(self.stride).enumerate() {
            let w = &self.w[o * self.inputs..][..self.inputs];
            for (t, y) in y[..self.rows].iter_mut().enumerate() {
                *y = dot(s, w, &self.x[t * self.inputs..][..self.inputs]);
            }
        }
    }
}

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
