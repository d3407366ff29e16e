//! The parts beside the experts of a DSMoE FFN: the router, of full or of low rank, and the linear term that makes up for
//! closed experts.
//!
//! ```text
//! full rank   z = x Y^T (+ b)                       Y [n, hidden]
//! rank r      l = x A^T,   z = l B^T (+ b)          A [r, hidden], B [n, r]
//! output      y += l C^T                            C [hidden, r], where there is one
//! ```
//! n is the number of gates. All values are f32 in every precision: rounded logits would open other experts.

#[cfg(feature = "cuda")]
use std::ops::Range;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::matmul::{Mat, Matmul, Packed};
use dsmoe_kernels::{Precision, linear};

use super::{split, split_mut};
use crate::params::TensorSpec;
#[cfg(feature = "cuda")]
use crate::params::padded;

/// Sizes of the router and of what is added to the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gating {
    pub(crate) hidden: usize,
    /// Gates (n).
    pub(crate) gates: usize,
    /// Rank of the router (r); none for a full one.
    pub(crate) rank: Option<usize>,
    pub(crate) bias: bool,
    /// True with the term `l C^T`, which needs a rank.
    pub(crate) correction: bool,
}

/// Tensors of a [`Gating`].
#[derive(Clone, Copy, Debug)]
pub(super) struct GatingWeights<'a> {
    /// Y or A.
    first: &'a [f32],
    /// B; empty at full rank.
    second: &'a [f32],
    bias: &'a [f32],
    /// C, transposed: `[r, hidden]`.
    pub(super) correction: &'a [f32],
}

/// A [`Gating`] for inference: its matrices in the order in which products read them.
#[derive(Debug)]
pub(super) struct PackedGating {
    gating: Gating,
    /// Y or A.
    first: Packed,
    /// B; none at full rank.
    second: Option<Packed>,
    bias: Vec<f32>,
    /// C, transposed: `[r, hidden]`.
    correction: Vec<f32>,
}

/// Operands of [`Gating::backward`].
pub(super) struct GatingBackward<'a> {
    /// Gradient of the input, added to.
    pub(super) dx: &'a mut [f32],
    /// Gradient of the tensors, added to.
    pub(super) grads: &'a mut [f32],
    /// Gradient of the logits.
    pub(super) dlogits: &'a [f32],
    /// Gradient of the output.
    pub(super) dy: &'a [f32],
    pub(super) x: &'a [f32],
    /// l of the forward.
    pub(super) low: &'a [f32],
    /// Memory for the gradient of l.
    pub(super) dlow: &'a mut Buf,
}

impl Gating {
    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        let Gating { hidden, gates, rank, .. } = *self;
        let mut tensors = match rank {
            None => vec![TensorSpec::router("router.weight", vec![gates, hidden])],
            Some(rank) => vec![
                TensorSpec::router("router.a.weight", vec![rank, hidden]),
                TensorSpec::router("router.b.weight", vec![gates, rank]),
            ],
        };
        if self.bias {
            tensors.push(TensorSpec::router("router.bias", vec![gates]));
        }
        if let Some(rank) = rank.filter(|_| self.correction) {
            tensors.push(TensorSpec::router("correction.weight", vec![rank, hidden]).transposed());
        }
        tensors
    }

    fn lens(&self) -> [usize; 4] {
        let Gating { hidden, gates, rank, .. } = *self;
        let optional = |is_there: bool, len: usize| if is_there { len } else { 0 };
        [
            rank.unwrap_or(gates) * hidden,
            rank.map_or(0, |rank| gates * rank),
            optional(self.bias, gates),
            optional(self.correction, rank.unwrap_or(0) * hidden),
        ]
    }

    /// Returns the ranges of its tensors from `start` on, in an FFN's part of the arena: Y or A, B, the bias, and C, transposed;
    /// those that are not there are empty.
    #[cfg(feature = "cuda")]
    pub(crate) fn ranges(&self, mut start: usize) -> [Range<usize>; 4] {
        self.lens().map(|len| {
            let range = start..start + len;
            start += padded(len);
            range
        })
    }

    /// Returns the views of the tensors, which start the block.
    pub(super) fn weights<'a>(&self, block: &'a [f32]) -> GatingWeights<'a> {
        let [first, second, bias, correction] = split(block, self.lens());
        GatingWeights { first, second, bias, correction }
    }

    /// Returns the length of l for that many tokens.
    pub(super) fn low_len(&self, tokens: usize) -> usize {
        tokens * self.rank.unwrap_or(0)
    }

    fn linear(rows: usize, inputs: usize, outputs: usize) -> linear::Dims {
        linear::Dims { rows, inputs, outputs, precision: Precision::F32 }
    }

    /// Sets the logits `[tokens, n]`, and l `[tokens, r]` at a low rank.
    pub(super) fn forward(&self, logits: &mut Buf, low: &mut Buf, x: &[f32], weights: GatingWeights<'_>) {
        let Gating { hidden, gates, rank, .. } = *self;
        let tokens = x.len() / hidden;
        logits.resize(tokens * gates);
        low.resize(self.low_len(tokens));
        let (x, w, inputs) = match rank {
            None => (x, weights.first, hidden),
            Some(rank) => {
                let dims = Gating::linear(tokens, hidden, rank);
                linear::Forward { y: low, x, w: weights.first, bias: None, dims }.run();
                (&low[..], weights.second, rank)
            }
        };
        let dims = Gating::linear(tokens, inputs, gates);
        linear::Forward { y: logits, x, w, bias: None, dims }.run();
        add_bias(logits, weights.bias);
    }

    /// Returns the gating for inference; its tensors start the block.
    pub(super) fn pack(self, block: &[f32]) -> PackedGating {
        let Gating { hidden, gates, rank, .. } = self;
        let GatingWeights { first, second, bias, correction } = self.weights(block);
        let pack = |w, rows, cols| Packed::new(Precision::F32, Mat::new(w, rows, cols));
        PackedGating {
            gating: self,
            first: pack(first, rank.unwrap_or(gates), hidden),
            second: rank.map(|rank| pack(second, gates, rank)),
            bias: bias.to_vec(),
            correction: correction.to_vec(),
        }
    }

    /// Adds the linear term to `y`, where there is one.
    pub(super) fn correct(&self, y: &mut [f32], low: &[f32], correction: &[f32]) {
        if let Some(rank) = self.rank.filter(|_| self.correction) {
            let dims = Gating::linear(y.len() / self.hidden, self.hidden, rank);
            linear::BackwardInput { dx: y, dy: low, w: correction, dims, add: true }.run();
        }
    }

    /// Adds the gradients of the input and of all tensors.
    pub(super) fn backward(&self, weights: GatingWeights<'_>, args: GatingBackward<'_>) {
        let Gating { hidden, gates, rank, .. } = *self;
        let GatingBackward { dx, grads, dlogits, dy, x, low, dlow } = args;
        let tokens = x.len() / hidden;
        let [dfirst, dsecond, dbias, dcorrection] = split_mut(grads, self.lens());
        match rank {
            None => {
                let dims = Gating::linear(tokens, hidden, gates);
                linear::BackwardWeight { dw: dfirst, dy: dlogits, x, dims }.run();
                linear::BackwardInput { dx, dy: dlogits, w: weights.first, dims, add: true }.run();
            }
            Some(rank) => {
                dlow.resize(tokens * rank);
                let dims = Gating::linear(tokens, rank, gates);
                // forward: z = l B^T
                linear::BackwardWeight { dw: dsecond, dy: dlogits, x: low, dims }.run();
                linear::BackwardInput { dx: dlow, dy: dlogits, w: weights.second, dims, add: false }.run();
                if self.correction {
                    self.backward_correction(dcorrection, dlow, low, dy, weights.correction);
                }
                // forward: l = x A^T
                let dims = Gating::linear(tokens, hidden, rank);
                linear::BackwardWeight { dw: dfirst, dy: dlow, x, dims }.run();
                linear::BackwardInput { dx, dy: dlow, w: weights.first, dims, add: true }.run();
            }
        }
        if self.bias {
            for row in dlogits.chunks_exact(gates) {
                dbias.iter_mut().zip(row).for_each(|(db, dz)| *db += dz);
            }
        }
    }

    /// Adds the gradients of C and of l through `y += l C^T`.
    fn backward_correction(
        &self,
        dcorrection: &mut [f32],
        dlow: &mut [f32],
        low: &[f32],
        dy: &[f32],
        correction: &[f32],
    ) {
        let (hidden, rank) = (self.hidden, self.rank.unwrap_or(0));
        let tokens = dy.len() / hidden;
        let dims = Gating::linear(tokens, hidden, rank);
        linear::BackwardWeight { dw: dcorrection, dy: low, x: dy, dims }.run();
        let (dy, correction) = (Mat::new(dy, tokens, hidden), Mat::new(correction, rank, hidden));
        Matmul { c: dlow, a: dy, b: correction.t(), accumulate: true, precision: Precision::F32 }.run();
    }
}

impl PackedGating {
    /// Does as [`Gating::forward`].
    pub(super) fn forward(&self, logits: &mut Buf, low: &mut Buf, x: &[f32]) {
        let rows = x.len() / self.gating.hidden;
        logits.resize(rows * self.gating.gates);
        low.resize(self.gating.low_len(rows));
        let multiply =
            |y: &mut [f32], x: &[f32], w| linear::ForwardPacked { y, x, w, bias: None, rows }.run();
        match &self.second {
            None => multiply(logits, x, &self.first),
            Some(second) => {
                multiply(low, x, &self.first);
                multiply(logits, low, second);
            }
        }
        add_bias(logits, &self.bias);
    }

    /// Does as [`Gating::correct`].
    pub(super) fn correct(&self, y: &mut [f32], low: &[f32]) {
        self.gating.correct(y, low, &self.correction);
    }

    /// Returns the bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        let second = self.second.as_ref().map_or(0, Packed::bytes);
        self.first.bytes() + second + size_of_val(&self.bias[..]) + size_of_val(&self.correction[..])
    }
}

/// Adds `bias`, where there is one, to every row of `logits`.
fn add_bias(logits: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        for row in logits.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(z, b)| *z += b);
        }
    }
}
