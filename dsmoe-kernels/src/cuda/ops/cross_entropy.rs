//! Softmax cross-entropy over rows of logits; see [`crate::ops::cross_entropy`].

use half::bf16;

use super::{Arg, Gpu, Grid, Matrix, Result, Source};

pub(super) static SOURCE: Source = Source { name: "cross_entropy", text: include_str!("cross_entropy.cu") };

fn start(gpu: &Gpu, entry: &'static str, rows: usize, vocab: usize, args: &[Arg]) -> Result<()> {
    let threads = vocab.next_multiple_of(32).clamp(32, 1024) as u32;
    // SAFETY: a block per row; the callers checked the sizes, and their callers promise that targets are logits.
    unsafe { SOURCE.launch(gpu, entry, &[], Grid::row(rows, threads), args) }
}

/// Sets the losses as [`Forward`] does, and `dlogits` to their gradient times `scale`, which is 0 for an ignored target.
#[derive(Debug)]
pub struct Chunk<'a> {
    /// `[T]`
    pub losses: &'a mut Matrix<f32>,
    /// `[T, vocab]`
    pub dlogits: &'a mut Matrix<bf16>,
    /// `[T, vocab]`
    pub logits: &'a Matrix<f32>,
    /// `[T]`
    pub targets: &'a Matrix<u32>,
    /// The factor of the gradient.
    pub scale: f32,
}

impl Chunk<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Chunk { losses, dlogits, logits, targets, scale } = self;
        let (rows, vocab) = (targets.len(), logits.cols());
        let lens = [losses.len(), logits.rows(), dlogits.len()];
        assert_eq!(lens, [rows, rows, logits.len()], "cuda cross_entropy::chunk: losses, logits, dlogits");
        let args = [losses.arg(), dlogits.arg(), logits.arg(), targets.arg(), Arg::F32(scale), vocab.into()];
        start(logits.gpu(), "chunk", rows, vocab, &args)
    }
}

/// Sets `losses[r]` to the negative log-likelihood of `targets[r]` under the logits of row r, or to 0 for a target of
/// [`IGNORE`](crate::cross_entropy::IGNORE).
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[T]`
    pub losses: &'a mut Matrix<f32>,
    /// `[T, vocab]`
    pub logits: &'a Matrix<f32>,
    /// `[T]`
    pub targets: &'a Matrix<u32>,
}

impl Forward<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Forward { losses, logits, targets } = self;
        let (rows, vocab) = (targets.len(), logits.cols());
        assert_eq!([losses.len(), logits.rows()], [rows; 2], "cuda cross_entropy::forward: losses, logits");
        let args = [losses.arg(), logits.arg(), targets.arg(), vocab.into()];
        start(logits.gpu(), "forward", rows, vocab, &args)
    }
}

/// Sets `found[i]` to the log-probability of `targets[i]` in row `rows[i]` of the logits. Sets `greedy[i]` to 1 where no token
/// is likelier and no earlier one as likely, else to 0.
#[derive(Debug)]
pub struct Likelihoods<'a> {
    /// `[targets]`
    pub found: &'a mut Matrix<f32>,
    /// `[targets]`
    pub greedy: &'a mut Matrix<u32>,
    /// `[T, vocab]`
    pub logits: &'a Matrix<f32>,
    /// `[targets]`; the caller promises that these rows exist.
    pub rows: &'a Matrix<u32>,
    /// `[targets]`
    pub targets: &'a Matrix<u32>,
}

impl Likelihoods<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Likelihoods { found, greedy, logits, rows, targets } = self;
        let (count, vocab) = (targets.len(), logits.cols());
        let lens = [found.len(), greedy.len(), rows.len()];
        assert_eq!(lens, [count; 3], "cuda cross_entropy::likelihoods: found, greedy, rows");
        let args = [found.arg(), greedy.arg(), logits.arg(), rows.arg(), targets.arg(), vocab.into()];
        start(logits.gpu(), "likelihoods", count, vocab, &args)
    }
}
