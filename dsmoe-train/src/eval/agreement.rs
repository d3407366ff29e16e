//! The distance of a model from another one, by their distributions of the next token.

use dsmoe_core::Inference;
use dsmoe_core::model::{Cache, Workspace};
use dsmoe_datasets::eval_windows;
use dsmoe_kernels::comm::{self, Alone, Communicator};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::EVALUATION;
use crate::error::{Error, Result};
use crate::ranks::agree;

/// The distance of a model's distributions of the next token from those of a reference on the same text.
///
/// ```
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
/// use dsmoe_train::eval::{Agreement, agreement};
/// # let mut weights = Model::new(dsmoe_core::init::preset("tiny")?);
/// # dsmoe_kernels::rng::Rng::new(3, 0).fill_normal(weights.params_mut(), 0.3);
///
/// // The cost of bf16 on a text.
/// let (full, half) = (Inference::new(&weights, Precision::F32), Inference::new(&weights, Precision::Bf16));
/// let Agreement { tokens, kl, .. } = agreement(&half, &full, &[1, 5, 9, 2], 4, &mut |_, _| {})?;
/// assert_eq!(tokens, 3);
/// assert!(kl > 0.0 && kl < 0.1, "{kl}");
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Tokens compared.
    pub tokens: usize,
    /// Mean Kullback-Leibler divergence of the reference's distribution from the model's, nats.
    pub kl: f64,
    /// Share of tokens for which both find the same token likeliest.
    pub top1: f64,
    /// Mean negative log-likelihoods of the text's next token by the model and by the reference, nats. Results of earlier
    /// versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nll: Option<[f64; 2]>,
}

/// Logits of a forward pass of [`agreement`] at the most.
const MAX_LOGITS: usize = 1 << 24;

/// Compares the distributions of `model` with those of `reference` after every token of `ids`, in windows of `seq` tokens
/// as in [`evaluate`](super::evaluate). `progress` receives the number of windows done and of all.
///
/// # Errors
/// Those of [`evaluate`](super::evaluate); models of different vocabularies.
pub fn agreement(
    model: &Inference,
    reference: &Inference,
    ids: &[u32],
    seq: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Agreement> {
    agreement_on(&Alone, [model, reference], ids, seq, progress)
}

/// Does as [`agreement`] for a model and its reference on the processes of `comm`, which divide the windows. All get the
/// result of a single process.
///
/// # Errors
/// Those of [`agreement`]; an error of another process.
pub fn agreement_on(
    comm: &dyn Communicator,
    [model, reference]: [&Inference; 2],
    ids: &[u32],
    seq: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Agreement> {
    let [vocab, other] = [model, reference].map(|model| model.config().vocab_size);
    if vocab != other {
        let found = format!("of vocab_size {other}");
        let allowed = format!("a model with the vocabulary of the one to measure, vocab_size {vocab}");
        return Err(Error::field("the model to compare with", found, allowed));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::field(
            "the text",
            format!("with token {id}"),
            format!("ids below vocab_size {vocab}"),
        ));
    }
    let windows = eval_windows(ids.len(), seq, seq)?;
    let mut pair = Pair { models: [model, reference], workspaces: Default::default() };
    let mut compare = || -> Result<Vec<Compared>> {
        let own = windows.iter().enumerate().skip(comm.rank()).step_by(comm.size());
        own.map(|(at, window)| {
            let compared = pair.compare(&ids[window.start..window.end])?;
            progress((at + comm.size()).min(windows.len()), windows.len());
            Ok(compared)
        })
        .collect()
    };
    let own = agree(comm, EVALUATION, compare())?;
    let message = serde_json::to_vec(&own).expect("numbers are JSON");
    let all: Vec<Vec<Compared>> = comm::gather(comm, EVALUATION, &message)?
        .iter()
        .map(|message| serde_json::from_slice(message).expect("the numbers of a process"))
        .collect();
    // In the order of windows.
    let of_window = |at: usize| &all[at % comm.size()][at / comm.size()];
    let found: Vec<&Compared> = (0..windows.len()).map(of_window).collect();
    let tokens = windows.iter().map(|window| window.end - window.start - 1).sum::<usize>();
    let [kl, ours, theirs] = [0, 1, 2].map(|which| {
        let pieces = found.iter().flat_map(|of| &of.sums).map(|sums| f64::from_bits(sums[which]));
        pieces.fold(0.0, |sum, piece| sum + piece) / tokens as f64
    });
    let same = found.iter().map(|of| of.same).sum::<usize>();
    Ok(Agreement { tokens, kl, top1: same as f64 / tokens as f64, nll: Some([ours, theirs]) })
}

/// Two models that are compared on one window after the other.
struct Pair<'a> {
    models: [&'a Inference; 2],
    workspaces: [Workspace; 2],
}

/// The comparison on one window.
#[derive(Serialize, Deserialize)]
struct Compared {
    /// The bits of sums over one piece after the other: of divergences, and of the losses by the model and by the reference.
    sums: Vec<[u64; 3]>,
    /// Tokens for which both find the same token likeliest.
    same: usize,
}

impl Pair<'_> {
    /// Compares the models after every token of `window` but the last.
    fn compare(&mut self, window: &[u32]) -> Result<Compared> {
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        let Pair { models: [model, reference], workspaces: [ours, theirs] } = self;
        let vocab = model.config().vocab_size;
        let piece = (MAX_LOGITS / vocab).max(1);
        let mut compared = Compared { sums: Vec::new(), same: 0 };
        let [mut our_cache, mut their_cache] = [*model, *reference].map(|of| Cache::new(of, inputs.len()));
        for (part, targets) in inputs.chunks(piece).zip(targets.chunks(piece)) {
            let ours = model.logits(part, part.len(), &mut our_cache, None, ours)?;
            let theirs = reference.logits(part, part.len(), &mut their_cache, None, theirs)?;
            let pairs = ours.par_chunks_exact(vocab).zip(theirs.par_chunks_exact(vocab));
            let all =
                pairs.zip(targets).map(|((ours, theirs), &next)| divergence(theirs, ours, next as usize));
            let found: Vec<([f64; 3], bool)> = all.collect();
            let sum = |which: usize| found.iter().map(|(values, _)| values[which]).sum::<f64>().to_bits();
            compared.sums.push([sum(0), sum(2), sum(1)]);
            compared.same += found.iter().filter(|(_, same)| *same).count();
        }
        Ok(compared)
    }
}

/// Returns the divergence of the distribution of logits `p` from that of `q` with the losses of token `next` by both, and
/// whether both have one maximum.
fn divergence(p: &[f32], q: &[f32], next: usize) -> ([f64; 3], bool) {
    let normal = |logits: &[f32]| {
        let (mut at, mut most) = (0, f32::NEG_INFINITY);
        for (i, &logit) in logits.iter().enumerate() {
            if logit > most {
                (at, most) = (i, logit);
            }
        }
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
        (at, f64::from(most) + sum.ln())
    };
    let ((p_at, p_norm), (q_at, q_norm)) = (normal(p), normal(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let log_p = f64::from(p) - p_norm;
        log_p.exp() * (log_p - (f64::from(q) - q_norm))
    });
    let losses = [p_norm - f64::from(p[next]), q_norm - f64::from(q[next])];
    ([terms.sum(), losses[0], losses[1]], p_at == q_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4): the divergence is ln 2 / 2 - ln 2 / 4.
    #[test]
    fn a_divergence_by_hand() {
        let of = |values: [f32; 3]| values.map(|value| value.ln() + 3.0);
        let ([kl, by_p, by_q], same) = divergence(&of([0.5, 0.25, 0.25]), &of([0.25, 0.5, 0.25]), 1);
        assert!((kl - 2f64.ln() / 4.0).abs() < 1e-6 && !same, "{kl}");
        assert!((by_p - 4f64.ln()).abs() < 1e-6 && (by_q - 2f64.ln()).abs() < 1e-6, "{by_p} {by_q}");
        let ([kl, ..], same) = divergence(&of([0.5, 0.25, 0.25]), &[1.0 + 2f32.ln(), 1.0, 1.0], 0);
        assert!(kl.abs() < 1e-6 && same, "{kl}");
    }
}
