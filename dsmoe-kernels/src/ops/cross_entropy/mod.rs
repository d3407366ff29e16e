//! Cross-entropy of the next token, fused with the output head.
//!
//! ```text
//! logits  z = h W^T                            h [T, hidden], W [vocab, hidden]
//! forward   losses[t] = logsumexp(z[t]) - z[t, targets[t]]            nats; 0 where the target is IGNORE
//! backward  dz[t] = scale (softmax(z[t]) - onehot(targets[t]))        0 where the target is IGNORE
//!           dh = dz W                          set
//!           dW += dz^T h                       added to
//! ```
//! Works on a few rows of logits at a time, never on more than [`CHUNK_BYTES`] of them (but at least one row), so
//! that `[T, vocab]` is never stored.

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{block_rows, each};
use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::{Mat, Packed, Precision, matmul_on, matmul_packed};

/// A target that is not scored.
pub const IGNORE: u32 = u32::MAX;

/// Largest size of the logits kept at a time.
pub const CHUNK_BYTES: usize = 64 << 20;

/// Rows after which a larger product gains nothing.
const MAX_ROWS: usize = 512;

/// Sizes of the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// T.
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
            "{op}: losses {losses}, hidden states {hidden_states}, head {head}, targets {} for {self:?}",
            targets.len()
        );
        for (t, &target) in targets.iter().enumerate() {
            assert!(
                target == IGNORE || (target as usize) < vocab,
                "{op}: target {target} of token {t} in a vocabulary of {vocab}"
            );
        }
    }

    /// Rows of logits at a time.
    pub fn chunk(self) -> usize {
        (CHUNK_BYTES / size_of::<f32>() / self.vocab).clamp(1, MAX_ROWS)
    }
}

/// Sets `losses` `[T]` from `hidden_states` `[T, hidden]`, `head` `[vocab, hidden]` and `targets` `[T]`.
///
/// # Panics
/// Lengths do not fit `dims`, or a target is neither [`IGNORE`] nor below `vocab`.
pub fn forward(losses: &mut [f32], hidden_states: &[f32], head: &[f32], targets: &[u32], dims: Dims) {
    forward_on(Isa::current(), losses, hidden_states, head, targets, dims);
}

/// [`forward`] on a given tier.
pub fn forward_on(
    isa: Isa,
    losses: &mut [f32],
    hidden_states: &[f32],
    head: &[f32],
    targets: &[u32],
    dims: Dims,
) {
    dims.check("cross_entropy::forward", losses.len(), hidden_states.len(), head.len(), targets);
    let chunk = dims.chunk();
    let mut logits = vec![0.0; chunk.min(dims.tokens) * dims.vocab];
    let inputs = hidden_states.chunks(chunk * dims.hidden).zip(targets.chunks(chunk));
    for (losses, (h, targets)) in losses.chunks_mut(chunk).zip(inputs) {
        let z = &mut logits[..targets.len() * dims.vocab];
        project(isa, z, h, head, dims, Precision::F32);
        rows(isa, losses, z, targets, None, dims);
    }
}

/// [`forward`] with a packed head, to whose precision the hidden states are rounded; `logits` is work space.
///
/// # Panics
/// As [`forward`].
pub fn forward_packed(
    losses: &mut [f32],
    hidden_states: &[f32],
    head: &Packed,
    targets: &[u32],
    logits: &mut Buf,
) {
    let dims = Dims { tokens: losses.len(), hidden: head.inputs(), vocab: head.outputs() };
    let weights = head.outputs() * head.inputs();
    dims.check("cross_entropy::forward_packed", losses.len(), hidden_states.len(), weights, targets);
    let isa = Isa::current();
    let chunk = dims.chunk();
    logits.resize(chunk.min(dims.tokens) * dims.vocab);
    let inputs = hidden_states.chunks(chunk * dims.hidden).zip(targets.chunks(chunk));
    for (losses, (h, targets)) in losses.chunks_mut(chunk).zip(inputs) {
        let z = &mut logits[..targets.len() * dims.vocab];
        matmul_packed(isa, z, Mat::new(h, targets.len(), dims.hidden), head);
        rows(isa, losses, z, targets, None, dims);
    }
}

/// Sets `z` to the logits of a chunk.
fn project(isa: Isa, z: &mut [f32], h: &[f32], head: &[f32], dims: Dims, precision: Precision) {
    let Dims { hidden, vocab, .. } = dims;
    let h = Mat::new(h, h.len() / hidden, hidden);
    matmul_on(isa, z, h, Mat::new(head, vocab, hidden).t(), false, precision);
}

/// Work space and precision of training. The space grows on demand and is kept.
#[derive(Debug)]
pub struct Scratch {
    isa: Isa,
    precision: Precision,
    logits: Buf,
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch::with(Isa::current(), Precision::F32)
    }
}

impl Scratch {
    /// An empty scratch: the ops it is given to run on `isa` and round the operands of their products to
    /// `precision`.
    pub fn with(isa: Isa, precision: Precision) -> Scratch {
        Scratch { isa, precision, logits: Buf::default() }
    }

    /// Makes room for `dims`, so that the op allocates nothing.
    pub fn reserve(&mut self, dims: Dims) {
        self.logits.resize(dims.chunk().min(dims.tokens) * dims.vocab);
    }
}

/// Sets `losses` `[T]` and `dhidden` `[T, hidden]` and adds to `dhead` `[vocab, hidden]` the gradients of
/// `scale * sum of losses`.
///
/// # Panics
/// As [`forward`].
#[expect(clippy::too_many_arguments, reason = "the op's operands, in the order of its formula")]
pub fn forward_backward(
    losses: &mut [f32],
    dhidden: &mut [f32],
    dhead: &mut [f32],
    hidden_states: &[f32],
    head: &[f32],
    targets: &[u32],
    scale: f32,
    dims: Dims,
    scratch: &mut Scratch,
) {
    let op = "cross_entropy::forward_backward";
    dims.check(op, losses.len(), hidden_states.len(), head.len(), targets);
    dims.check(op, losses.len(), dhidden.len(), dhead.len(), targets);
    let Dims { hidden, vocab, .. } = dims;
    scratch.reserve(dims);
    let (isa, precision) = (scratch.isa, scratch.precision);
    let chunk = dims.chunk();
    let inputs = hidden_states.chunks(chunk * hidden).zip(targets.chunks(chunk));
    let outputs = losses.chunks_mut(chunk).zip(dhidden.chunks_mut(chunk * hidden));
    for ((losses, dh), (h, targets)) in outputs.zip(inputs) {
        let n = targets.len();
        let dz = &mut scratch.logits[..n * vocab];
        project(isa, dz, h, head, dims, precision);
        rows(isa, losses, dz, targets, Some(scale), dims);
        matmul_on(isa, dh, Mat::new(dz, n, vocab), Mat::new(head, vocab, hidden), false, precision);
        matmul_on(isa, dhead, Mat::new(dz, n, vocab).t(), Mat::new(h, n, hidden), true, precision);
    }
}

/// Losses of a chunk from its logits `z`. Leaves `z`, or sets it to its gradient when there is a `scale`.
fn rows(isa: Isa, losses: &mut [f32], z: &mut [f32], targets: &[u32], scale: Option<f32>, dims: Dims) {
    let vocab = dims.vocab;
    let rows = block_rows(vocab);
    let blocks =
        losses.par_chunks_mut(rows).zip(z.par_chunks_mut(rows * vocab)).zip(targets.par_chunks(rows));
    each(blocks, |((losses, z), targets)| {
        for ((loss, z), &target) in losses.iter_mut().zip(z.chunks_exact_mut(vocab)).zip(targets) {
            let target = (target != IGNORE).then_some(target as usize);
            *loss = isa.run(kernel::Row { z, target, scale });
        }
    });
}

/// Turns one row of logits into log-probabilities, in place.
pub fn log_softmax_row(logits: &mut [f32]) {
    log_softmax_row_on(Isa::current(), logits);
}

/// [`log_softmax_row`] on a given tier.
pub fn log_softmax_row_on(isa: Isa, logits: &mut [f32]) {
    isa.run(kernel::LogSoftmax { z: logits });
}
