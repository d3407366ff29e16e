//! Cross-entropy of the next token, fused with the output head.
//!
//! ```text
//! logits  z = s h W^T                          h [T, hidden], W [vocab, hidden], s the scale of the logits
//!         with a cap c: z <- c tanh(z / c)
//! forward   losses[t] = logsumexp(z[t]) - z[t, targets[t]]            nats; 0 where the target is IGNORE
//! backward  dz[t] = scale (softmax(z[t]) - onehot(targets[t]))        0 where the target is IGNORE
//!           with a cap: dz <- dz (1 - (z / c)^2)
//!           dh = s dz W                        set
//!           dW += s dz^T h                     added to
//! ```
//! The op works on a few rows of logits at a time, at most [`CHUNK_BYTES`] of them (but at least one row), so that
//! `[T, vocab]` is never stored.

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{BLOCK, block_rows, each};
use crate::buf::{Buf, with_spare};
use crate::isa::Isa;
use crate::matmul::{Mat, Matmul, MatmulPacked, Packed, Precision};

/// A target that is not scored.
pub const IGNORE: u32 = u32::MAX;

/// Largest size of the logits kept at a time.
pub const CHUNK_BYTES: usize = 64 << 20;

/// Rows after which a larger product gains nothing.
const MAX_ROWS: usize = 512;

/// The sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// T, the number of tokens.
    pub tokens: usize,
    /// Columns of the hidden states.
    pub hidden: usize,
    /// Rows of the head.
    pub vocab: usize,
}

impl Dims {
    fn check(self, op: &str, losses: usize, hidden_states: usize, head: usize, targets: &[u32]) {
        let Dims { tokens, hidden, vocab } = self;
        assert!(
            losses == tokens
                && targets.len() == tokens
                && hidden_states == tokens * hidden
                && head == vocab * hidden
                && hidden > 0
                && vocab > 0,
            "cross_entropy::{op}: losses {losses}, hidden states {hidden_states}, head {head}, targets {} for {self:?}",
            targets.len()
        );
        for (t, &target) in targets.iter().enumerate() {
            assert!(
                target == IGNORE || (target as usize) < vocab,
                "cross_entropy::{op}: target {target} of token {t} in a vocabulary of {vocab}"
            );
        }
    }

    /// Returns the rows of logits kept at a time.
    pub fn chunk(self) -> usize {
        (CHUNK_BYTES / size_of::<f32>() / self.vocab).clamp(1, MAX_ROWS)
    }
}

/// The settings that turn products of hidden states and head into logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logits {
    /// Multiplies the products.
    pub scale: f32,
    /// The soft cap c of the scaled products, `c tanh(z / c)`; positive.
    pub cap: Option<f32>,
}

impl Default for Logits {
    /// Returns what leaves the products as they are.
    fn default() -> Logits {
        Logits { scale: 1.0, cap: None }
    }
}

impl Logits {
    /// Turns products of hidden states and head into logits, in place.
    pub fn apply(self, z: &mut [f32]) {
        self.apply_on(Isa::current(), z);
    }

    /// Does the same as [`Logits::apply`] on a given tier.
    pub fn apply_on(self, isa: Isa, z: &mut [f32]) {
        if self != Logits::default() {
            each(z.par_chunks_mut(BLOCK), |z| isa.run(kernel::Transform { z, logits: self }));
        }
    }
}

/// Sets `losses`.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[T]`, set.
    pub losses: &'a mut [f32],
    /// `[T, hidden]`
    pub hidden_states: &'a [f32],
    /// `[vocab, hidden]`
    pub head: &'a [f32],
    /// `[T]`: [`IGNORE`] or below `vocab`.
    pub targets: &'a [u32],
    /// The settings of the logits.
    pub logits: Logits,
    /// The sizes.
    pub dims: Dims,
}

/// Sets `losses` with a packed head. The hidden states are rounded to its precision.
#[derive(Debug)]
pub struct ForwardPacked<'a> {
    /// `[T]`, set.
    pub losses: &'a mut [f32],
    /// `[T, hidden]`
    pub hidden_states: &'a [f32],
    /// `[vocab, hidden]`
    pub head: &'a Packed,
    /// `[T]`: [`IGNORE`] or below `vocab`.
    pub targets: &'a [u32],
    /// The settings of the logits.
    pub logits: Logits,
    /// Work space.
    pub space: &'a mut Buf,
}

/// Sets `losses` and `dhidden` and adds to `dhead` the gradients of `scale * sum of losses`.
#[derive(Debug)]
pub struct ForwardBackward<'a> {
    /// `[T]`, set.
    pub losses: &'a mut [f32],
    /// `[T, hidden]`, set.
    pub dhidden: &'a mut [f32],
    /// `[vocab, hidden]`, added to.
    pub dhead: &'a mut [f32],
    /// `[T, hidden]`
    pub hidden_states: &'a [f32],
    /// `[vocab, hidden]`
    pub head: &'a [f32],
    /// `[T]`: [`IGNORE`] or below `vocab`.
    pub targets: &'a [u32],
    /// Multiplies the gradients.
    pub scale: f32,
    /// The settings of the logits.
    pub logits: Logits,
    /// The sizes.
    pub dims: Dims,
    /// Work space, and the precision of the products.
    pub scratch: &'a mut Scratch,
}

/// Turns one row of logits into log-probabilities, in place.
#[derive(Debug)]
pub struct LogSoftmaxRow<'a> {
    /// The row.
    pub logits: &'a mut [f32],
}

run_on_current_tier!(Forward, ForwardPacked, ForwardBackward, LogSoftmaxRow);

impl Forward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`, or a target is neither [`IGNORE`] nor below `vocab`.
    pub fn run_on(self, isa: Isa) {
        let Forward { losses, hidden_states, head, targets, logits, dims } = self;
        dims.check("Forward", losses.len(), hidden_states.len(), head.len(), targets);
        let chunk = dims.chunk();
        let mut space = vec![0.0; chunk.min(dims.tokens) * dims.vocab];
        let inputs = hidden_states.chunks(chunk * dims.hidden).zip(targets.chunks(chunk));
        for (losses, (h, targets)) in losses.chunks_mut(chunk).zip(inputs) {
            let z = &mut space[..targets.len() * dims.vocab];
            project(isa, z, h, head, dims, Precision::F32);
            rows(isa, losses, z, targets, Rows { scale: None, logits, vocab: dims.vocab });
        }
    }
}

impl ForwardPacked<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Panics under the conditions of [`Forward::run_on`].
    pub fn run_on(self, isa: Isa) {
        let ForwardPacked { losses, hidden_states, head, targets, logits, space } = self;
        let dims = Dims { tokens: losses.len(), hidden: head.inputs(), vocab: head.outputs() };
        let weights = head.outputs() * head.inputs();
        dims.check("ForwardPacked", losses.len(), hidden_states.len(), weights, targets);
        let chunk = dims.chunk();
        space.resize(chunk.min(dims.tokens) * dims.vocab);
        let inputs = hidden_states.chunks(chunk * dims.hidden).zip(targets.chunks(chunk));
        for (losses, (h, targets)) in losses.chunks_mut(chunk).zip(inputs) {
            let z = &mut space[..targets.len() * dims.vocab];
            MatmulPacked { c: z, a: Mat::new(h, targets.len(), dims.hidden), w: head }.run_on(isa);
            rows(isa, losses, z, targets, Rows { scale: None, logits, vocab: dims.vocab });
        }
    }
}

impl ForwardBackward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Panics under the conditions of [`Forward::run_on`].
    pub fn run_on(self, isa: Isa) {
        let ForwardBackward { losses, dhidden, dhead, hidden_states, head, targets, .. } = self;
        let (scratch, scale, logits, dims) = (self.scratch, self.scale, self.logits, self.dims);
        dims.check("ForwardBackward", losses.len(), hidden_states.len(), head.len(), targets);
        dims.check("ForwardBackward", losses.len(), dhidden.len(), dhead.len(), targets);
        let Dims { hidden, vocab, .. } = dims;
        scratch.reserve(dims);
        let precision = scratch.precision;
        let chunk = dims.chunk();
        let inputs = hidden_states.chunks(chunk * hidden).zip(targets.chunks(chunk));
        let outputs = losses.chunks_mut(chunk).zip(dhidden.chunks_mut(chunk * hidden));
        for ((losses, dh), (h, targets)) in outputs.zip(inputs) {
            let n = targets.len();
            let dz = &mut scratch.logits[..n * vocab];
            project(isa, dz, h, head, dims, precision);
            rows(isa, losses, dz, targets, Rows { scale: Some(scale), logits, vocab });
            let (dz, head, h) =
                (Mat::new(dz, n, vocab), Mat::new(head, vocab, hidden), Mat::new(h, n, hidden));
            Matmul { c: dh, a: dz, b: head, accumulate: false, precision }.run_on(isa);
            Matmul { c: dhead, a: dz.t(), b: h, accumulate: true, precision }.run_on(isa);
        }
    }
}

impl LogSoftmaxRow<'_> {
    /// Runs the op on a given tier.
    pub fn run_on(self, isa: Isa) {
        isa.run(self);
    }
}

/// Sets `z` to the logits of a chunk.
fn project(isa: Isa, z: &mut [f32], h: &[f32], head: &[f32], dims: Dims, precision: Precision) {
    let Dims { hidden, vocab, .. } = dims;
    let (a, b) = (Mat::new(h, h.len() / hidden, hidden), Mat::new(head, vocab, hidden).t());
    Matmul { c: z, a, b, accumulate: false, precision }.run_on(isa);
}

/// How the rows of a chunk are computed.
#[derive(Clone, Copy)]
struct Rows {
    /// Asks for the gradient, times this.
    scale: Option<f32>,
    logits: Logits,
    vocab: usize,
}

/// Computes the losses of a chunk from its products `z`. Sets `z` to the logits, or to the gradient of the products when there
/// is a `scale`.
fn rows(isa: Isa, losses: &mut [f32], z: &mut [f32], targets: &[u32], settings: Rows) {
    let Rows { scale, logits, vocab } = settings;
    let rows = block_rows(vocab);
    let blocks =
        losses.par_chunks_mut(rows).zip(z.par_chunks_mut(rows * vocab)).zip(targets.par_chunks(rows));
    each(blocks, |((losses, z), targets)| {
        for ((loss, z), &target) in losses.iter_mut().zip(z.chunks_exact_mut(vocab)).zip(targets) {
            let target = (target != IGNORE).then_some(target as usize);
            *loss = match scale {
                Some(scale) if logits != Logits::default() => with_spare(vocab, |capped| {
                    isa.run(kernel::TransformedRow { z, target, scale, logits, capped })
                }),
                _ => {
                    if logits != Logits::default() {
                        isa.run(kernel::Transform { z, logits });
                    }
                    isa.run(kernel::Row { z, target, scale })
                }
            };
        }
    });
}

/// Work space and precision of training. The space grows on demand and is kept.
#[derive(Debug, Default)]
pub struct Scratch {
    precision: Precision,
    logits: Buf,
}

impl Scratch {
    /// Returns an empty scratch; products round their operands to `precision`.
    pub fn new(precision: Precision) -> Scratch {
        Scratch { precision, logits: Buf::default() }
    }

    /// Makes room for `dims`, so that the op allocates nothing.
    pub fn reserve(&mut self, dims: Dims) {
        self.logits.resize(dims.chunk().min(dims.tokens) * dims.vocab);
    }
}
