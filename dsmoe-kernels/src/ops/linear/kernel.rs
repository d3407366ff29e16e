//! Vector bodies: the bias, its gradient, and `y = x W^T` for a few rows, whose time is that of reading W, so W is read once.

use super::Dims;
use crate::buf::SharedRows;
use crate::isa::Isa;
use crate::matmul::{for_tasks, tasks_for};
use crate::simd::{Kernel, Simd, axpy, dot};

/// Sets y; see [`super::Forward`].
pub(super) fn few_rows(isa: Isa, y: &mut [f32], x: &[f32], w: &[f32], dims: Dims) {
    let Dims { rows, inputs, outputs, .. } = dims;
    if rows == 0 || outputs == 0 {
        return;
    }
    let blocks = |y: &mut [f32]| {
        let (y, tasks) = (SharedRows::new(y, rows), tasks_for(rows * inputs * outputs).min(outputs));
        for_tasks(tasks, |task| {
            let outputs = task * outputs / tasks..(task + 1) * outputs / tasks;
            // SAFETY: tasks have different outputs.
            let y = unsafe { y.values(outputs.start * rows, outputs.len() * rows) };
            isa.run(Block { y, stride: rows, x, w: &w[outputs.start * inputs..], rows, inputs });
        });
    };
    if rows == 1 {
        blocks(y);
    } else {
        // y is token-major; the blocks are computed output-major and transposed, a copy of rows * outputs values.
        let mut columns = vec![0.0; rows * outputs];
        blocks(&mut columns);
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
