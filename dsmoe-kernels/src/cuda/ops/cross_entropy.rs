//! Softmax cross-entropy over rows of logits; see [`crate::ops::cross_entropy`].

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};

static SOURCE: Source = Source { name: "cross_entropy", text: include_str!("cross_entropy.cu") };

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &["chunk", "forward", "likelihoods"],
    defines: &[&[]],
    max_registers: 64,
}];

fn start(gpu: &Gpu, entry: &'static str, rows: usize, vocab: usize, args: &[Arg]) -> Result<()> {
    let kernel = gpu.kernel(&SOURCE, entry, &[])?;
    let block = vocab.next_multiple_of(32).clamp(32, 1024) as u32;
    // SAFETY: a block per row; the callers checked the lengths, and that targets are logits is their callers' promise.
    unsafe { kernel.launch([int("cross_entropy", rows)? as u32, 1, 1], block, 0, args) }
}

/// Sets `losses[r]` to the negative log-likelihood of `targets[r]` under the logits of row r, and `dlogits` to its
/// gradient times `scale`; both 0 for a target of [`IGNORE`](crate::cross_entropy::IGNORE).
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn chunk(
    gpu: &Gpu,
    losses: ViewMut<'_, f32>,
    dlogits: ViewMut<'_, bf16>,
    logits: View<'_, f32>,
    targets: View<'_, u32>,
    scale: f32,
    vocab: usize,
) -> Result<()> {
    let rows = targets.len();
    assert!(
        losses.len() == rows && logits.len() == rows * vocab && dlogits.len() == logits.len(),
        "cuda cross_entropy::chunk: {} logits for {rows} targets",
        logits.len()
    );
    let args = [
        Arg::from(&losses),
        Arg::from(&dlogits),
        logits.into(),
        targets.into(),
        scale.into(),
        int("cross_entropy", vocab)?.into(),
    ];
    start(gpu, "chunk", rows, vocab, &args)
}

/// Sets the losses alone.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn forward(
    gpu: &Gpu,
    losses: ViewMut<'_, f32>,
    logits: View<'_, f32>,
    targets: View<'_, u32>,
    vocab: usize,
) -> Result<()> {
    let rows = targets.len();
    assert!(
        losses.len() == rows && logits.len() == rows * vocab,
        "cuda cross_entropy::forward: {} logits for {rows} targets",
        logits.len()
    );
    let args = [Arg::from(&losses), logits.into(), targets.into(), int("cross_entropy", vocab)?.into()];
    start(gpu, "forward", rows, vocab, &args)
}

/// Sets `found[i]` to the log-probability of `targets[i]` in row `rows[i]` of the logits, and `greedy[i]` to 1 where no
/// token is likelier and none before it as likely, else to 0.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn likelihoods(
    gpu: &Gpu,
    found: ViewMut<'_, f32>,
    greedy: ViewMut<'_, u32>,
    logits: View<'_, f32>,
    rows: View<'_, u32>,
    targets: View<'_, u32>,
    vocab: usize,
) -> Result<()> {
    let count = targets.len();
    assert!(
        found.len() == count
            && greedy.len() == count
            && rows.len() == count
            && logits.len().is_multiple_of(vocab),
        "cuda cross_entropy::likelihoods: {} logits for {count} targets",
        logits.len()
    );
    let args = [
        Arg::from(&found),
        Arg::from(&greedy),
        logits.into(),
        rows.into(),
        targets.into(),
        int("cross_entropy", vocab)?.into(),
    ];
    start(gpu, "likelihoods", count, vocab, &args)
}
