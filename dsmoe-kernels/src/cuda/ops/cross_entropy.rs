//! Softmax cross-entropy over rows of logits; see [`crate::ops::cross_entropy`].

use half::bf16;

use super::{Arg, Define, Gpu, Grid, Matrix, Result, Source};
use crate::cross_entropy::Logits;

pub(super) static SOURCE: Source = Source { name: "cross_entropy", text: include_str!("cross_entropy.cu") };

pub(super) fn defines(capped: bool) -> [Define; 1] {
    [("CAPPED", i64::from(capped))]
}

fn start(gpu: &Gpu, entry: &'static str, rows: usize, vocab: usize, args: &[Arg]) -> Result<()> {
    start_capped(gpu, entry, [rows, vocab], args, None)
}

/// Queues a kernel that takes the cap of logits at its end, where there is one.
fn start_capped(
    gpu: &Gpu,
    entry: &'static str,
    [rows, vocab]: [usize; 2],
    args: &[Arg],
    cap: Option<f32>,
) -> Result<()> {
    let threads = vocab.next_multiple_of(32).clamp(32, 1024) as u32;
    let (defines, args) = (defines(cap.is_some()), with_cap(args, cap));
    // SAFETY: a block per row; the callers checked the sizes, and their callers promise that targets are logits.
    unsafe { SOURCE.launch(gpu, entry, &defines, Grid::row(rows, threads), &args) }
}

fn with_cap(args: &[Arg], cap: Option<f32>) -> Vec<Arg> {
    args.iter().copied().chain(cap.map(Arg::F32)).collect()
}

/// Turns products of hidden states and head into logits, in place. It queues nothing where they are logits already.
#[derive(Debug)]
pub struct Finish<'a> {
    /// `[T, vocab]`
    pub logits: &'a mut Matrix<f32>,
    /// The settings.
    pub settings: Logits,
}

impl Finish<'_> {
    /// Queues the op, or returns the device's error.
    pub fn run(self) -> Result<()> {
        let Finish { logits, settings } = self;
        let Logits { scale, cap } = settings;
        if settings == Logits::default() {
            return Ok(());
        }
        let len = logits.len();
        let args = with_cap(&[logits.arg(), Arg::I64(len as i64), Arg::F32(scale)], cap);
        let grid = Grid::row(len.div_ceil(256), 256);
        // SAFETY: a thread per value.
        unsafe { SOURCE.launch(logits.gpu(), "logits", &defines(cap.is_some()), grid, &args) }
    }
}

/// Sets the losses as [`Forward`] does, and `dproducts` to their gradient with respect to the products that [`Finish`] made
/// logits of, times `scale`; it is 0 for an ignored target.
#[derive(Debug)]
pub struct Chunk<'a> {
    /// `[T]`
    pub losses: &'a mut Matrix<f32>,
    /// `[T, vocab]`
    pub dproducts: &'a mut Matrix<bf16>,
    /// `[T, vocab]`
    pub logits: &'a Matrix<f32>,
    /// `[T]`
    pub targets: &'a Matrix<u32>,
    /// The factor of the gradient.
    pub scale: f32,
    /// The settings of the logits.
    pub settings: Logits,
}

impl Chunk<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Chunk { losses, dproducts, logits, targets, scale, settings } = self;
        let (rows, vocab) = (targets.len(), logits.cols());
        let lens = [losses.len(), logits.rows(), dproducts.len()];
        assert_eq!(lens, [rows, rows, logits.len()], "cuda cross_entropy::chunk: losses, logits, dproducts");
        let scale = Arg::F32(scale * settings.scale);
        let args = [losses.arg(), dproducts.arg(), logits.arg(), targets.arg(), scale, vocab.into()];
        start_capped(logits.gpu(), "chunk", [rows, vocab], &args, settings.cap)
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
