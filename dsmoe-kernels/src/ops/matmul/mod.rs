//! Dense matrix product of strided f32 views: `C = A B` or `C += A B`.
//!
//! ```text
//! forward   C[i,j] (+)= sum_k A[i,k] B[k,j]      A [m,k], B [k,n], C [m,n]
//! backward  dA = dC B^T,  dB = A^T dC            two more products: see [`Mat::t`]
//! ```
//! With [`Precision::Bf16`] A and B are rounded to bf16 first. Sums are f32: every value of C is a sum over k in one
//! fixed order (chains of a few hundred multiply-adds, added up), so neither the number of threads nor the way the product
//! is cut changes a bit.

mod block;
mod pack;
mod packed;
mod product;
pub mod reference;
#[cfg(test)]
mod tests;
mod tile;

pub(crate) use block::{At, Block, Left, Panels, Sink, tiles};
pub(crate) use pack::{PANEL, Source};
pub use packed::Packed;
pub(crate) use packed::{PackPanel, panel_len, panels};
pub(crate) use product::{
    Grid, Operands, PackRight, RIGHT_LEN, ROUND, Rows, for_tasks, right_len, right_panels, tasks_for,
    with_right,
};

use crate::isa::Isa;

/// What the operands of matrix products are rounded to; sums are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// To bf16, ties to even.
    Bf16,
}

impl Precision {
    /// `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// Bytes of a stored value.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

impl std::str::FromStr for Precision {
    type Err = String;
    fn from_str(name: &str) -> Result<Precision, String> {
        [Precision::F32, Precision::Bf16]
            .into_iter()
            .find(|precision| precision.name() == name)
            .ok_or_else(|| format!("unknown precision `{name}`; use f32 or bf16"))
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A borrowed matrix with arbitrary strides.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major `[rows, cols]`.
    ///
    /// # Panics
    /// `data` does not hold `rows * cols` values.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Mat<'a> {
        assert_eq!(data.len(), rows * cols, "matmul: {} values for a [{rows}, {cols}] matrix", data.len());
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows of length `cols` that start every `row_stride` values.
    ///
    /// # Panics
    /// The last row ends past `data`.
    pub fn with_stride(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Mat<'a> {
        assert!(
            rows == 0 || (row_stride >= cols && (rows - 1) * row_stride + cols <= data.len()),
            "matmul: {} values for [{rows}, {cols}] rows every {row_stride}",
            data.len()
        );
        Mat { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Mat<'a> {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    pub(crate) fn at(&self, row: usize, col: usize) -> f32 {
        self.data[row * self.row_stride + col * self.col_stride]
    }
}

/// `C = A B` (sets), or `C += A B` when `accumulate`. `c` is row-major `[a.rows, b.cols]`.
///
/// # Panics
/// Shapes do not fit.
pub fn matmul(c: &mut [f32], a: Mat<'_>, b: Mat<'_>, accumulate: bool, precision: Precision) {
    matmul_on(Isa::current(), c, a, b, accumulate, precision);
}

/// [`matmul`] on a given tier.
///
/// # Panics
/// As [`matmul`].
pub fn matmul_on(isa: Isa, c: &mut [f32], a: Mat<'_>, b: Mat<'_>, accumulate: bool, precision: Precision) {
    run(isa, c, a, b, accumulate, precision, true);
}

/// [`matmul`] on the calling thread alone: for products inside parallel tasks.
///
/// # Panics
/// As [`matmul`].
pub fn matmul_serial(
    isa: Isa,
    c: &mut [f32],
    a: Mat<'_>,
    b: Mat<'_>,
    accumulate: bool,
    precision: Precision,
) {
    run(isa, c, a, b, accumulate, precision, false);
}

/// `C = A W^T` for a packed `w`: A `[rows, inputs]`, `c` row-major `[rows, outputs]`. A is rounded to the weights'
/// precision.
///
/// # Panics
/// Shapes do not fit.
pub fn matmul_packed(isa: Isa, c: &mut [f32], a: Mat<'_>, w: &Packed) {
    assert!(
        a.cols == w.inputs() && c.len() == a.rows * w.outputs(),
        "matmul_packed: [{}, {}] x packed [{}, {}] into {} values",
        a.rows,
        a.cols,
        w.outputs(),
        w.inputs(),
        c.len()
    );
    if a.cols == 0 {
        c.fill(0.0);
    } else if !c.is_empty() {
        product::product_packed(isa, c, a, w);
    }
}

fn run(
    isa: Isa,
    c: &mut [f32],
    a: Mat<'_>,
    b: Mat<'_>,
    accumulate: bool,
    precision: Precision,
    parallel: bool,
) {
    assert!(
        a.cols == b.rows && c.len() == a.rows * b.cols,
        "matmul: [{}, {}] x [{}, {}] into {} values",
        a.rows,
        a.cols,
        b.rows,
        b.cols,
        c.len()
    );
    if c.is_empty() {
        return;
    }
    if a.cols == 0 {
        if !accumulate {
            c.fill(0.0);
        }
        return;
    }
    let operands = product::Operands {
        a: pack::Source::rows(a),
        b: pack::Source::rows(b.t()),
        m: a.rows,
        n: b.cols,
        k: a.cols,
        precision,
    };
    operands.multiply(isa, c, accumulate, parallel);
}
