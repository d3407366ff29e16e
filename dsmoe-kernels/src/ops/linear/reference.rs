//! The definition of the linear layer, in f64.

use super::Dims;
use crate::matmul::reference::{matmul, transpose};

/// Returns `y = x W^T`.
pub fn forward(x: &[f64], w: &[f64], dims: Dims) -> Vec<f64> {
    matmul(x, &transpose(w, dims.outputs, dims.inputs), dims.rows, dims.inputs, dims.outputs)
}

/// Returns `y + b` of rows of y.
pub fn with_bias(y: &[f64], bias: &[f64]) -> Vec<f64> {
    y.iter().zip(bias.iter().cycle()).map(|(y, b)| y + b).collect()
}

/// Returns db: from `y[r] = x[r] W^T + b`, `db = sum over r of dy[r]`.
pub fn backward_bias(dy: &[f64], dims: Dims) -> Vec<f64> {
    (0..dims.outputs).map(|o| dy.iter().skip(o).step_by(dims.outputs).sum()).collect()
}

/// Returns `(dx, dW)`: from `y = x W^T`, `dx = dy W` and `dW = dy^T x`.
pub fn backward(dy: &[f64], x: &[f64], w: &[f64], dims: Dims) -> (Vec<f64>, Vec<f64>) {
    let dx = matmul(dy, w, dims.rows, dims.outputs, dims.inputs);
    let dw = matmul(&transpose(dy, dims.rows, dims.outputs), x, dims.outputs, dims.rows, dims.inputs);
    (dx, dw)
}
