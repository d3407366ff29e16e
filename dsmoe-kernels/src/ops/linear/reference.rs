//! The definition of the linear layer, in f64.

use super::Dims;
use crate::matmul::reference::{matmul, transpose};

/// Returns `y = x W^T`.
pub fn forward(x: &[f64], w: &[f64], dims: Dims) -> Vec<f64> {
    matmul(x, &transpose(w, dims.outputs, dims.inputs), dims.rows, dims.inputs, dims.outputs)
}

/// Returns `(dx, dW)`: from `y = x W^T`, `dx = dy W` and `dW = dy^T x`.
pub fn backward(dy: &[f64], x: &[f64], w: &[f64], dims: Dims) -> (Vec<f64>, Vec<f64>) {
    let dx = matmul(dy, w, dims.rows, dims.outputs, dims.inputs);
    let dw = matmul(&transpose(dy, dims.rows, dims.outputs), x, dims.outputs, dims.rows, dims.inputs);
    (dx, dw)
}
