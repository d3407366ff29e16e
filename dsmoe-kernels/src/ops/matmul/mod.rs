//! Dense matrix product of strided f32 views: `C = A B` or `C += A B`.
//!
//! ```text
//! forward   C[i,j] (+)= sum_k A[i,k] B[k,j]      A [m,k], B [k,n], C [m,n]
//! backward  dA = dC B^T,  dB = A^T dC            two more products: see [`Mat::t`]
//! ```
//! With [`Precision::Bf16`] A and B are rounded to bf16 first. Sums are f32. Every value of C is a sum over k in one fixed
//! order (chains of a few hundred multiply-adds, added up), so the bits depend neither on the number of threads nor on the
//! cut into tasks.

mod block;
mod mat;
mod pack;
mod packed;
pub(crate) mod picked;
mod product;
pub mod reference;
#[cfg(test)]
mod tests;
mod tile;

pub(crate) use block::{At, Block, Left, Panels, Sink, tiles};
pub use mat::{Mat, Precision};
pub(crate) use pack::{PANEL, Source};
pub use packed::Packed;
pub(crate) use packed::{PackPanel, panel_len, panels};
pub(crate) use product::{
    Grid, Operands, PackRight, RIGHT_LEN, ROUND, Rows, for_tasks, for_tasks_when, right_len, right_panels,
    storage, tasks_for, with_right,
};

use crate::isa::Isa;

/// Sets `C = A B`, or adds to it.
#[derive(Debug)]
pub struct Matmul<'a> {
    /// Row-major `[m, n]`, set; with `accumulate`, added to.
    pub c: &'a mut [f32],
    /// `[m, k]`
    pub a: Mat<'a>,
    /// `[k, n]`
    pub b: Mat<'a>,
    /// Adds to `c`.
    pub accumulate: bool,
    /// The precision that A and B are rounded to.
    pub precision: Precision,
}

/// Sets `C = A W^T` for a packed W; A is rounded to the weights' precision.
#[derive(Debug)]
pub struct MatmulPacked<'a> {
    /// Row-major `[rows, outputs]`, set.
    pub c: &'a mut [f32],
    /// `[rows, inputs]`
    pub a: Mat<'a>,
    /// The weights.
    pub w: &'a Packed,
}

run_on_current_tier!(Matmul, MatmulPacked);

impl Matmul<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Shapes do not fit.
    pub fn run_on(self, isa: Isa) {
        let Matmul { c, a, b, accumulate, precision } = self;
        let (m, n, k) = (a.rows, b.cols, a.cols);
        assert_eq!([b.rows, c.len()], [k, m * n], "matmul: rows of b, values of c for a of [{m}, {k}]");
        let (a, b) = (Source::rows(a), Source::rows(b.t()));
        Operands { a, b, m, n, k, precision }.multiply(isa, c, accumulate, true);
    }
}

impl MatmulPacked<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Shapes do not fit.
    pub fn run_on(self, isa: Isa) {
        let MatmulPacked { c, a, w } = self;
        multiply_packed(isa, [c], a, [w]);
    }
}

/// Sets every C to `A W^T`, as one loop over all of them.
pub(crate) fn multiply_packed<const N: usize>(
    isa: Isa,
    mut cs: [&mut [f32]; N],
    a: Mat<'_>,
    ws: [&Packed; N],
) {
    for (c, w) in cs.iter_mut().zip(ws) {
        let sizes = [a.cols, c.len()];
        assert_eq!(sizes, [w.inputs(), a.rows * w.outputs()], "MatmulPacked: columns of a, values of c");
        if a.cols == 0 {
            c.fill(0.0);
        }
    }
    if a.cols > 0 && cs.iter().any(|c| !c.is_empty()) {
        product::products_packed(isa, cs, a, ws);
    }
}
