//! Linear layer, with or without bias, torch layout.
//!
//! ```text
//! forward   y = x W^T (+ b)     x [rows, inputs], W [outputs, inputs], b [outputs], y [rows, outputs]
//! backward  dx = dy W           set
//!           dW += dy^T x        added to
//!           db += sum over the rows of dy, blocks of rows in their order        added to
//! ```
//! Sums are f32. [`Forward`] packs W in every call; decoding calls [`ForwardPacked`], whose rows have the same bits.

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{BLOCK, block_rows, each};
use crate::add::Add;
use crate::buf::with_spare;
use crate::isa::Isa;
use crate::matmul::{Mat, Matmul, Packed, Precision, multiply_packed};

/// The sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of x and y: tokens.
    pub rows: usize,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of y.
    pub outputs: usize,
    /// The precision to which x, W and dy are rounded.
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

/// Sets `y = x W^T`, plus the bias if there is one.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[rows, outputs]`, set.
    pub y: &'a mut [f32],
    /// `[rows, inputs]`
    pub x: &'a [f32],
    /// `[outputs, inputs]`
    pub w: &'a [f32],
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
    /// The sizes.
    pub dims: Dims,
}

/// Sets `y = x W^T`, plus the bias if there is one, for packed weights and any number of rows; x is rounded to the weights'
/// precision.
#[derive(Debug)]
pub struct ForwardPacked<'a> {
    /// `[rows, outputs]`, set.
    pub y: &'a mut [f32],
    /// `[rows, inputs]`
    pub x: &'a [f32],
    /// The weights.
    pub w: &'a Packed,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
    /// Rows of x and y: tokens.
    pub rows: usize,
}

/// Does as [`ForwardPacked`] for several layers with the same input, such as queries, keys and values.
#[derive(Debug)]
pub struct ForwardPackedEach<'a, const N: usize> {
    /// `[rows, outputs]` of each layer, set.
    pub ys: [&'a mut [f32]; N],
    /// `[rows, inputs]`
    pub x: &'a [f32],
    /// The weights.
    pub ws: [&'a Packed; N],
    /// `[outputs]` of each layer.
    pub biases: [Option<&'a [f32]>; N],
    /// Rows of x and y: tokens.
    pub rows: usize,
}

/// Sets `dx = dy W`, or adds to it.
#[derive(Debug)]
pub struct BackwardInput<'a> {
    /// `[rows, inputs]`, set; with `add`, added to.
    pub dx: &'a mut [f32],
    /// `[rows, outputs]`
    pub dy: &'a [f32],
    /// `[outputs, inputs]`
    pub w: &'a [f32],
    /// The sizes.
    pub dims: Dims,
    /// Adds to `dx`: for inputs that feed several layers.
    pub add: bool,
}

/// Adds `dy^T x` to `dw`.
#[derive(Debug)]
pub struct BackwardWeight<'a> {
    /// `[outputs, inputs]`, added to.
    pub dw: &'a mut [f32],
    /// `[rows, outputs]`
    pub dy: &'a [f32],
    /// `[rows, inputs]`
    pub x: &'a [f32],
    /// The sizes.
    pub dims: Dims,
}

/// Adds the sum of the rows of `dy` to `db`.
#[derive(Debug)]
pub struct BackwardBias<'a> {
    /// `[outputs]`, added to.
    pub db: &'a mut [f32],
    /// `[rows, outputs]`
    pub dy: &'a [f32],
    /// The sizes.
    pub dims: Dims,
}

run_on_current_tier!(Forward, ForwardPacked, BackwardInput, BackwardWeight, BackwardBias);

/// Adds the bias to every row of `y`.
pub(crate) fn add_bias(op: &str, isa: Isa, y: &mut [f32], bias: Option<&[f32]>, outputs: usize) {
    let Some(bias) = bias else { return };
    assert_eq!(bias.len(), outputs, "{op}: bias of {} values for {outputs} outputs", bias.len());
    if outputs > 0 {
        let blocks = y.par_chunks_mut(block_rows(outputs) * outputs);
        each(blocks, |y| isa.run(kernel::AddBias { y, bias }));
    }
}

impl Forward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(self, isa: Isa) {
        let Forward { y, x, w, bias, dims } = self;
        dims.check("linear::Forward", x.len(), w.len(), y.len());
        let Dims { rows, inputs, outputs, precision } = dims;
        let (a, b) = (Mat::new(x, rows, inputs), Mat::new(w, outputs, inputs).t());
        Matmul { c: &mut *y, a, b, accumulate: false, precision }.run_on(isa);
        add_bias("linear::Forward", isa, y, bias, outputs);
    }
}

impl ForwardPacked<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let ForwardPacked { y, x, w, bias, rows } = self;
        ForwardPackedEach { ys: [y], x, ws: [w], biases: [bias], rows }.run_on(isa);
    }
}

impl<const N: usize> ForwardPackedEach<'_, N> {
    /// Runs the op on the tier of [`Isa::current`].
    ///
    /// # Panics
    /// Panics under the conditions of [`Self::run_on`].
    pub fn run(self) {
        self.run_on(Isa::current());
    }

    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let ForwardPackedEach { mut ys, x, ws, biases, rows } = self;
        for (y, w) in ys.iter().zip(ws) {
            let (inputs, outputs) = (w.inputs(), w.outputs());
            assert!(
                x.len() == rows * inputs && y.len() == rows * outputs,
                "linear::ForwardPacked: x {}, y {} values for {rows} rows of [{outputs}, {inputs}]",
                x.len(),
                y.len()
            );
        }
        let inputs = ws.first().map_or(0, |w| w.inputs());
        multiply_packed(isa, ys.each_mut().map(|y| &mut **y), Mat::new(x, rows, inputs), ws);
        for ((y, w), bias) in ys.into_iter().zip(ws).zip(biases) {
            add_bias("linear::ForwardPacked", isa, y, bias, w.outputs());
        }
    }
}

impl BackwardInput<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(self, isa: Isa) {
        let BackwardInput { dx, dy, w, dims, add } = self;
        dims.check("linear::BackwardInput", dx.len(), w.len(), dy.len());
        let Dims { rows, inputs, outputs, precision } = dims;
        let (a, b) = (Mat::new(dy, rows, outputs), Mat::new(w, outputs, inputs));
        Matmul { c: dx, a, b, accumulate: add, precision }.run_on(isa);
    }
}

impl BackwardWeight<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(self, isa: Isa) {
        let BackwardWeight { dw, dy, x, dims } = self;
        dims.check("linear::BackwardWeight", x.len(), dw.len(), dy.len());
        let Dims { rows, inputs, outputs, precision } = dims;
        let (a, b) = (Mat::new(dy, rows, outputs).t(), Mat::new(x, rows, inputs));
        Matmul { c: dw, a, b, accumulate: true, precision }.run_on(isa);
    }
}

impl BackwardBias<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(self, isa: Isa) {
        let BackwardBias { db, dy, dims: Dims { rows, outputs, .. } } = self;
        assert!(
            db.len() == outputs && dy.len() == rows * outputs,
            "linear::BackwardBias: db {}, dy {} values for {rows} rows of {outputs}",
            db.len(),
            dy.len()
        );
        if dy.is_empty() {
            return;
        }
        // A block's sums cost a row each: few of them.
        let block = (2 * BLOCK / outputs).max(8);
        with_spare(rows.div_ceil(block) * outputs, |sums| {
            let blocks = sums.par_chunks_mut(outputs).zip(dy.par_chunks(block * outputs));
            each(blocks, |(sums, dy)| {
                sums.fill(0.0);
                isa.run(kernel::SumRows { sums, dy });
            });
            for sums in sums.chunks_exact(outputs) {
                Add { y: db, x: sums, scale: 1.0 }.run_on(isa);
            }
        });
    }
}
