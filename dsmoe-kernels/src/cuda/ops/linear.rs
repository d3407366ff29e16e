//! A linear layer without a bias, `y = x W^T`, and its backward pass; see [`crate::ops::linear`].

use half::bf16;

use super::matmul::{Form, Product};
use super::{Matrix, Result, gemv};
use crate::cuda::Float;

/// Sets `y` to `x W^T`. For a few tokens it reads the weights once, in a kernel of this crate.
#[derive(Debug)]
pub struct Forward<'a, T: Float> {
    /// `[T, outputs]`
    pub y: &'a mut Matrix<T>,
    /// `[T, inputs]`
    pub x: &'a Matrix<bf16>,
    /// `[outputs, inputs]`
    pub w: &'a Matrix<bf16>,
}

impl<T: Float> Forward<'_, T> {
    /// Queues the op, or returns the error of the device or of cuBLASLt.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Forward { y, x, w } = self;
        match (1..=gemv::FEW).contains(&x.rows()) {
            true => gemv::Linear { y, x, w }.run(),
            false => Product { out: y, a: x, b: w, form: Form::Nt, add: false }.run(),
        }
    }
}

/// Sets `dx` to `dy W`, or adds it. With `W` stored transposed, this is the forward pass.
#[derive(Debug)]
pub struct BackwardInput<'a, T: Float> {
    /// `[T, inputs]`
    pub dx: &'a mut Matrix<T>,
    /// `[T, outputs]`
    pub dy: &'a Matrix<bf16>,
    /// `[outputs, inputs]`
    pub w: &'a Matrix<bf16>,
    /// Adds to `dx` instead of setting it.
    pub add: bool,
}

impl<T: Float> BackwardInput<'_, T> {
    /// Queues the op, or returns the error of the device or of cuBLASLt.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let BackwardInput { dx, dy, w, add } = self;
        Product { out: dx, a: dy, b: w, form: Form::Nn, add }.run()
    }
}

/// Adds `dy^T x` to `dw`.
#[derive(Debug)]
pub struct BackwardWeight<'a> {
    /// `[outputs, inputs]`
    pub dw: &'a mut Matrix<f32>,
    /// `[T, outputs]`
    pub dy: &'a Matrix<bf16>,
    /// `[T, inputs]`
    pub x: &'a Matrix<bf16>,
}

impl BackwardWeight<'_> {
    /// Queues the op, or returns the error of the device or of cuBLASLt.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let BackwardWeight { dw, dy, x } = self;
        Product { out: dw, a: dy, b: x, form: Form::Tn, add: true }.run()
    }
}
