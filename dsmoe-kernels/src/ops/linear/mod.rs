//! Linear layer without bias, torch layout.
//!
//! ```text
//! forward   y = x W^T          x [rows, inputs], W [outputs, inputs], y [rows, outputs]
//! backward  dx = dy W          set
//!           dW += dy^T x       added to
//! ```
//! f32 accumulation. Few rows (decoding) go through a kernel that streams W once; many through [`crate::matmul`].

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::isa::Isa;
use crate::matmul::{Mat, Packed, Precision, matmul, matmul_packed};

/// Sizes of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of x and y: tokens.
    pub rows: usize,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of y.
    pub outputs: usize,
    /// What x, W and dy are rounded to (few rows stay f32).
    pub precision: Precision,
}

impl Dims {
    fn check(self, op: &str, x: usize, w: usize, y: usize) {
        let Dims { rows, inputs, outputs, .. } = self;
        assert!(
            x == rows * inputs && w == outputs * inputs && y == rows * outputs,
            "{op}: x {x}, w {w}, y {y} values for {self:?}"
        );
    }
}

/// Up to this many rows the weights are streamed once, row by row.
const FEW_ROWS: usize = 4;

/// Sets `y = x W^T`.
///
/// # Panics
/// Lengths do not fit `dims`.
pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], dims: Dims) {
    forward_on(Isa::current(), y, x, w, dims);
}

/// [`forward`] on a given tier (the tier matters for few rows only).
pub fn forward_on(isa: Isa, y: &mut [f32], x: &[f32], w: &[f32], dims: Dims) {
    dims.check("linear::forward", x.len(), w.len(), y.len());
    if dims.rows <= FEW_ROWS {
        kernel::few_rows(isa, y, x, w, dims);
    } else {
        matmul(
            y,
            Mat::new(x, dims.rows, dims.inputs),
            Mat::new(w, dims.outputs, dims.inputs).t(),
            false,
            dims.precision,
        );
    }
}

/// Sets `y = x W^T` for packed weights and any number of rows; x is rounded to the weights' precision.
///
/// # Panics
/// Lengths do not fit.
pub fn forward_packed(y: &mut [f32], x: &[f32], w: &Packed, rows: usize) {
    assert!(
        x.len() == rows * w.inputs() && y.len() == rows * w.outputs(),
        "linear::forward_packed: x {}, y {} values for {rows} rows of [{}, {}]",
        x.len(),
        y.len(),
        w.outputs(),
        w.inputs()
    );
    matmul_packed(Isa::current(), y, Mat::new(x, rows, w.inputs()), w);
}

/// Sets `dx = dy W`.
///
/// # Panics
/// Lengths do not fit `dims`.
pub fn backward_input(dx: &mut [f32], dy: &[f32], w: &[f32], dims: Dims) {
    dims.check("linear::backward_input", dx.len(), w.len(), dy.len());
    matmul(
        dx,
        Mat::new(dy, dims.rows, dims.outputs),
        Mat::new(w, dims.outputs, dims.inputs),
        false,
        dims.precision,
    );
}

/// Adds `dy W` to `dx`: for inputs that feed several layers.
///
/// # Panics
/// Lengths do not fit `dims`.
pub fn backward_input_add(dx: &mut [f32], dy: &[f32], w: &[f32], dims: Dims) {
    dims.check("linear::backward_input_add", dx.len(), w.len(), dy.len());
    matmul(
        dx,
        Mat::new(dy, dims.rows, dims.outputs),
        Mat::new(w, dims.outputs, dims.inputs),
        true,
        dims.precision,
    );
}

/// Adds `dy^T x` to `dw`.
///
/// # Panics
/// Lengths do not fit `dims`.
pub fn backward_weight(dw: &mut [f32], dy: &[f32], x: &[f32], dims: Dims) {
    dims.check("linear::backward_weight", x.len(), dw.len(), dy.len());
    matmul(
        dw,
        Mat::new(dy, dims.rows, dims.outputs).t(),
        Mat::new(x, dims.rows, dims.inputs),
        true,
        dims.precision,
    );
}
