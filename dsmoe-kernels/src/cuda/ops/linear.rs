//! A linear layer, `y = x W^T`, and its backward pass; see [`crate::ops::linear`]. A bias is added by an op of its own.

use half::bf16;

use super::elementwise::SOURCE;
use super::matmul::{Form, Product};
use super::rms_norm::sum_partials;
use super::{Arg, Grid, Matrix, Result, gemv};
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

/// Adds `bias` to every row of `y`.
#[derive(Debug)]
pub struct AddBias<'a, T: Float> {
    /// `[T, outputs]`
    pub y: &'a mut Matrix<T>,
    /// `[outputs]`
    pub bias: &'a Matrix<f32>,
}

impl<T: Float> AddBias<'_, T> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let AddBias { y, bias } = self;
        assert_eq!(y.cols(), bias.len(), "cuda linear::add_bias");
        let entry = if T::F32 { "add_bias_f32" } else { "add_bias_bf16" };
        let args = [y.arg(), bias.arg(), Arg::I64(y.len() as i64), y.cols().into()];
        // SAFETY: a thread per value of y; the bias was checked to have one for each column.
        unsafe { SOURCE.launch(y.gpu(), entry, &[], Grid::row(y.len().div_ceil(256), 256), &args) }
    }
}

/// Parts of the sum over the rows.
const PARTS: usize = 256;

/// Returns the number of values of [`BackwardBias::partials`].
pub fn partials_len(tokens: usize, outputs: usize) -> usize {
    tokens.min(PARTS) * outputs
}

/// Adds the sum of the rows of `dy` to `db`.
#[derive(Debug)]
pub struct BackwardBias<'a> {
    /// `[outputs]`
    pub db: &'a mut Matrix<f32>,
    /// `[T, outputs]`
    pub dy: &'a Matrix<bf16>,
    /// Scratch memory of [`partials_len`] values.
    pub partials: &'a mut Matrix<f32>,
}

impl BackwardBias<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let BackwardBias { db, dy, partials } = self;
        let (rows, width) = (dy.rows(), dy.cols());
        assert!(
            db.len() == width && partials.len() >= partials_len(rows, width),
            "cuda linear::backward_bias: db {}, {} partials for {rows} rows of {width}",
            db.len(),
            partials.len()
        );
        let parts = rows.min(PARTS);
        let args = [partials.arg(), dy.arg(), rows.into(), width.into()];
        // SAFETY: a thread per column and part; the sizes were checked above.
        unsafe {
            SOURCE.launch(dy.gpu(), "sum_rows", &[], Grid::plane(width.div_ceil(128), parts, 128), &args)
        }?;
        sum_partials(db, partials, parts)
    }
}
