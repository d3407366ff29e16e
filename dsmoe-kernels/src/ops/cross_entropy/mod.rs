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
//! with a teacher of logits u[t] and a weight w of 0 to 1, p = softmax(u), q = softmax(z):
//! forward   divergences[t] = sum_k p_k (ln p_k - ln q_k)     nats; 0 where the target is IGNORE
//!           the loss of a token is (1 - w) losses[t] + w divergences[t]
//! backward  dz[t] = scale (q - (1 - w) onehot(targets[t]) - w p)
//! of a teacher's most likely tokens K alone, with r for all others as one outcome, p_r = 1 - sum of p_k, q_r likewise:
//! forward   divergences[t] = sum over K of p_k (ln p_k - ln q_k) + p_r (ln p_r - ln q_r)     at most that of all tokens
//! backward  dz[t]_k = scale (q_k - (1 - w) onehot_k - w p_k) in K, scale (q_j - (1 - w) onehot_j - w p_r q_j / q_r) else
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

/// Distributions of the next token that are to be learned.
#[derive(Debug)]
pub struct Teacher<'a> {
    /// `[T]`, set.
    pub divergences: &'a mut [f32],
    /// The distributions.
    pub distributions: Distributions<'a>,
    /// The weight w of the divergences, 0 to 1; the losses have 1 - w.
    pub weight: f32,
}

/// The distributions of a teacher.
#[derive(Clone, Copy, Debug)]
pub enum Distributions<'a> {
    /// Those of a model. Its logits exist a chunk at a time.
    Model {
        /// `[T, teacher's hidden]`
        hidden_states: &'a [f32],
        /// `[vocab, teacher's hidden]`; the hidden states are rounded to its precision.
        head: &'a Packed,
        /// The settings of the teacher's logits.
        logits: Logits,
    },
    /// The most likely tokens of each row; the others are one outcome.
    Top {
        /// `[T, K]`, different tokens in each row.
        ids: &'a [u32],
        /// `[T, K + 1]`: a logarithm of a probability for each token and for all others together. A row is normed by the op.
        log_p: &'a [f32],
    },
}

/// Sets the most likely tokens of a model's distributions, in the form of [`Distributions::Top`]: the most likely first, of
/// equals the one with the lower id.
#[derive(Debug)]
pub struct MostLikely<'a> {
    /// `[T, K]`, set.
    pub ids: &'a mut [u32],
    /// `[T, K + 1]`, set.
    pub log_p: &'a mut [f32],
    /// K, 1 to the vocabulary's size.
    pub top: usize,
    /// `[T, hidden]`; rounded to the precision of `head`.
    pub hidden_states: &'a [f32],
    /// `[vocab, hidden]`
    pub head: &'a Packed,
    /// The settings of the logits.
    pub logits: Logits,
    /// Work space.
    pub space: &'a mut Buf,
}

/// Sets `losses` and `dhidden` and adds to `dhead` the gradients of `scale * sum of losses`; with a teacher, of
/// `scale * sum of (1 - w) losses + w divergences`.
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
    /// Gives a second target, where there is one.
    pub teacher: Option<Teacher<'a>>,
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

run_on_current_tier!(Forward, ForwardPacked, ForwardBackward, LogSoftmaxRow, MostLikely);

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

impl Teacher<'_> {
    fn check(&self, dims: Dims) {
        let Teacher { divergences, distributions, weight } = self;
        let Dims { tokens, vocab, .. } = dims;
        let fits = match *distributions {
            Distributions::Model { hidden_states, head, .. } => {
                head.outputs() == vocab && hidden_states.len() == tokens * head.inputs()
            }
            Distributions::Top { ids, log_p } => {
                let top = ids.len() / tokens.max(1);
                ids.len() == tokens * top
                    && log_p.len() == ids.len() + tokens
                    && (top > 0 || tokens == 0)
                    && ids.iter().all(|&id| (id as usize) < vocab)
            }
        };
        assert!(
            fits && divergences.len() == tokens && (0.0..=1.0).contains(weight),
            "cross_entropy::Teacher: divergences {}, {}, weight {weight} for {dims:?}",
            divergences.len(),
            distributions.shapes()
        );
    }
}

impl Distributions<'_> {
    /// Names the shapes.
    fn shapes(&self) -> String {
        match self {
            Distributions::Model { hidden_states, head, .. } => {
                format!("hidden states {}, head {} x {}", hidden_states.len(), head.outputs(), head.inputs())
            }
            Distributions::Top { ids, log_p } => {
                let largest = ids.iter().max().copied().unwrap_or(0);
                format!("{} ids of up to {largest}, {} probabilities", ids.len(), log_p.len())
            }
        }
    }
}

/// Sets `u` to logits of the tokens from `first` on.
fn project_packed(isa: Isa, u: &mut [f32], (h, first): (&[f32], usize), head: &Packed, logits: Logits) {
    let (rows, width) = (u.len() / head.outputs(), head.inputs());
    let h = &h[first * width..][..rows * width];
    MatmulPacked { c: u, a: Mat::new(h, rows, width), w: head }.run_on(isa);
    logits.apply_on(isa, u);
}

impl MostLikely<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit, or `top` is 0 or larger than the vocabulary.
    pub fn run_on(self, isa: Isa) {
        let MostLikely { ids, log_p, top, hidden_states, head, logits, space } = self;
        let (hidden, vocab) = (head.inputs(), head.outputs());
        let dims = Dims { tokens: hidden_states.len() / hidden.max(1), hidden, vocab };
        assert!(
            (1..=vocab).contains(&top)
                && hidden_states.len() == dims.tokens * hidden
                && ids.len() == dims.tokens * top
                && log_p.len() == dims.tokens * (top + 1),
            "cross_entropy::MostLikely: {} ids, {} probabilities, top {top} for {dims:?}",
            ids.len(),
            log_p.len()
        );
        let chunk = dims.chunk();
        space.resize(chunk.min(dims.tokens) * vocab);
        let outputs = ids.chunks_mut(chunk * top).zip(log_p.chunks_mut(chunk * (top + 1)));
        for (i, (ids, log_p)) in outputs.enumerate() {
            let u = &mut space[..ids.len() / top * vocab];
            project_packed(isa, u, (hidden_states, i * chunk), head, logits);
            let outputs = ids.par_chunks_mut(top).zip(log_p.par_chunks_mut(top + 1));
            each(outputs.zip(u.par_chunks_mut(vocab)), |((ids, log_p), u)| {
                isa.run(kernel::MostLikelyRow { ids, log_p, u });
            });
        }
    }
}

impl ForwardBackward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Panics under the conditions of [`Forward::run_on`], and if the teacher's lengths do not fit or its weight is
    /// outside 0 to 1.
    pub fn run_on(self, isa: Isa) {
        let ForwardBackward { losses, dhidden, dhead, hidden_states, head, targets, mut teacher, .. } = self;
        let (scratch, scale, logits, dims) = (self.scratch, self.scale, self.logits, self.dims);
        dims.check("ForwardBackward", losses.len(), hidden_states.len(), head.len(), targets);
        dims.check("ForwardBackward", losses.len(), dhidden.len(), dhead.len(), targets);
        let Dims { hidden, vocab, .. } = dims;
        scratch.reserve(dims);
        if let Some(teacher) = &teacher {
            teacher.check(dims);
            if matches!(teacher.distributions, Distributions::Model { .. }) {
                scratch.reserve_teacher(dims);
            }
        }
        let precision = scratch.precision;
        let chunk = dims.chunk();
        let inputs = hidden_states.chunks(chunk * hidden).zip(targets.chunks(chunk));
        let outputs = losses.chunks_mut(chunk).zip(dhidden.chunks_mut(chunk * hidden));
        for (i, ((losses, dh), (h, targets))) in outputs.zip(inputs).enumerate() {
            let n = targets.len();
            let dz = &mut scratch.logits[..n * vocab];
            project(isa, dz, h, head, dims, precision);
            match &mut teacher {
                None => rows(isa, losses, dz, targets, Rows { scale: Some(scale), logits, vocab }),
                Some(teacher) => {
                    let first = i * chunk;
                    let (weight, divergences) = (teacher.weight, &mut teacher.divergences[first..][..n]);
                    let settings = Distilled { scale, weight, logits, vocab };
                    let outputs = [losses, divergences];
                    match teacher.distributions {
                        Distributions::Model { hidden_states, head, logits } => {
                            let u = &mut scratch.teacher[..n * vocab];
                            project_packed(isa, u, (hidden_states, first), head, logits);
                            distilled_rows(isa, outputs, [dz, u], targets, settings);
                        }
                        Distributions::Top { ids, log_p } => {
                            let top = ids.len() / dims.tokens;
                            let (ids, log_p) = (
                                &ids[first * top..][..n * top],
                                &log_p[first * (top + 1)..][..n * (top + 1)],
                            );
                            top_rows(isa, outputs, (dz, ids, log_p), targets, settings);
                        }
                    }
                }
            }
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

/// How the rows of a chunk are computed with a teacher.
#[derive(Clone, Copy)]
struct Distilled {
    scale: f32,
    weight: f32,
    logits: Logits,
    vocab: usize,
}

/// Computes the losses and divergences of a chunk from its products `z` and the teacher's logits `u`. Sets `z` to the
/// gradient of the products; `u` is used up.
fn distilled_rows(
    isa: Isa,
    [losses, divergences]: [&mut [f32]; 2],
    [z, u]: [&mut [f32]; 2],
    targets: &[u32],
    settings: Distilled,
) {
    let Distilled { scale, weight, vocab, .. } = settings;
    let rows = block_rows(vocab);
    let outputs = losses.par_chunks_mut(rows).zip(divergences.par_chunks_mut(rows));
    let inputs = z.par_chunks_mut(rows * vocab).zip(u.par_chunks_mut(rows * vocab));
    let blocks = outputs.zip(inputs).zip(targets.par_chunks(rows));
    each(blocks, |(((losses, divergences), (z, u)), targets)| {
        let inputs = z.chunks_exact_mut(vocab).zip(u.chunks_exact_mut(vocab)).zip(targets);
        for ((loss, divergence), ((z, u), &target)) in losses.iter_mut().zip(divergences).zip(inputs) {
            let target = (target != IGNORE).then_some(target as usize);
            let row = settings
                .with_logits(isa, z, |z| isa.run(kernel::DistilledRow { z, u, target, scale, weight }));
            [*loss, *divergence] = row;
        }
    });
}

impl Distilled {
    /// Turns a row of products `z` into logits for `row`, and the gradient that it leaves there into that of the products.
    fn with_logits(self, isa: Isa, z: &mut [f32], row: impl FnOnce(&mut [f32]) -> [f32; 2]) -> [f32; 2] {
        let Distilled { logits, vocab, .. } = self;
        if logits == Logits::default() {
            return row(z);
        }
        with_spare(vocab, |capped| {
            isa.run(kernel::Transform { z, logits });
            capped.copy_from_slice(z);
            let values = row(z);
            isa.run(kernel::TransformBackward { dz: z, capped, logits });
            values
        })
    }
}

/// Computes the losses and divergences of a chunk from its products `z` and the teacher's most likely tokens. Sets `z` to
/// the gradient of the products.
fn top_rows(
    isa: Isa,
    [losses, divergences]: [&mut [f32]; 2],
    (z, ids, log_p): (&mut [f32], &[u32], &[f32]),
    targets: &[u32],
    settings: Distilled,
) {
    let Distilled { scale, weight, vocab, .. } = settings;
    let top = ids.len() / targets.len();
    let outputs = losses.par_iter_mut().zip(divergences).zip(z.par_chunks_mut(vocab));
    let inputs = ids.par_chunks(top).zip(log_p.par_chunks(top + 1)).zip(targets);
    each(outputs.zip(inputs), |(((loss, divergence), z), ((ids, log_p), &target))| {
        let target = (target != IGNORE).then_some(target as usize);
        let row = settings.with_logits(isa, z, |z| {
            with_spare(top, |near| isa.run(kernel::TopRow { z, near, ids, log_p, target, scale, weight }))
        });
        [*loss, *divergence] = row;
    });
}

/// Work space and precision of training. The space grows on demand and is kept.
#[derive(Debug, Default)]
pub struct Scratch {
    precision: Precision,
    logits: Buf,
    /// The teacher's logits.
    teacher: Buf,
}

impl Scratch {
    /// Returns an empty scratch; products round their operands to `precision`.
    pub fn new(precision: Precision) -> Scratch {
        Scratch { precision, ..Scratch::default() }
    }

    /// Makes room for `dims`, so that the op allocates nothing.
    pub fn reserve(&mut self, dims: Dims) {
        self.logits.resize(dims.chunk().min(dims.tokens) * dims.vocab);
    }

    /// Makes room for a teacher of `dims`.
    pub fn reserve_teacher(&mut self, dims: Dims) {
        self.teacher.resize(dims.chunk().min(dims.tokens) * dims.vocab);
    }
}
