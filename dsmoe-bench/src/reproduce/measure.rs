//! Measurements of a model: perplexity by source and window, active experts by layer, thresholds, tokens and tasks.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_datasets::Tokenizer;
use dsmoe_datasets::tasks::{Loaded, Profile as TaskProfile, Request};
use dsmoe_train::eval::{Agreement, EvalOptions, agreement, evaluate_detailed};
use dsmoe_train::tasks::Responder;
use serde::{Deserialize, Serialize};

use super::cache::Interrupted;
use super::text::{HeldOut, task_bos};
use crate::interrupts::STOP;

/// Approximate number of tokens in a forward pass.
const BATCH_TOKENS: usize = 2048;
/// Groups of tokens by difficulty.
const BINS: usize = 10;
/// Bisections of a threshold.
const BISECTIONS: usize = 24;

/// Perplexity on held-out text, and the share of experts that were active for it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Means {
    pub(crate) nll: f64,
    pub(crate) ppl: f64,
    /// Share of active experts; absent without routers.
    pub(crate) active_ratio: Option<f64>,
    pub(crate) params_total: u64,
    pub(crate) params_activated: f64,
}

/// The means over all held-out text, and those of its sources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TextResult {
    #[serde(flatten)]
    pub(crate) means: Means,
    pub(crate) flops_per_token: f64,
    /// The threshold that was found after training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) threshold: Option<f32>,
    pub(crate) domains: Vec<DomainResult>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DomainResult {
    pub(crate) name: String,
    pub(crate) share: f64,
    pub(crate) nll: f64,
    pub(crate) ppl: f64,
    pub(crate) active_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) active_ratio_per_layer: Option<Vec<f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) zero_active_share: Option<f64>,
    /// Entropies of the loads of the layers' experts, nats; absent without routers, and not stored.
    #[serde(skip)]
    pub(crate) load_entropies: Option<Vec<f64>>,
    /// Sum of negative log-likelihoods, and predicted tokens, of every window.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(crate) windows: Vec<(f64, u64)>,
    /// The document that each window begins in, where that is known.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(crate) documents: Vec<u32>,
    /// The distance from the dense model, if it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agreement: Option<Agreement>,
}

/// Measurements of single tokens, in the order of the held-out text.
#[derive(Debug, Default)]
pub(crate) struct PerToken {
    pub(crate) losses: Vec<f32>,
    /// Active experts, mean over layers; empty without routers.
    pub(crate) active: Vec<f64>,
}

/// Measures a model on the first `windows` windows of every source.
pub(crate) fn text(
    model: &Inference,
    held_out: &[HeldOut],
    seq: usize,
    windows: usize,
) -> Result<(TextResult, PerToken)> {
    let accounting = model.accounting();
    let layers = model.config().num_layers as f64;
    let options = EvalOptions { seq: seq + 1, stride: seq + 1, batch_tokens: BATCH_TOKENS };
    let mut tokens = PerToken::default();
    let mut domains = Vec::new();
    let (mut nll, mut ratio) = (0.0, Some(0.0));
    for part in held_out {
        let ids = &part.ids[..part.ids.len().min(windows * (seq + 1))];
        let (report, detail) = evaluate_detailed(model, ids, options, &mut |_, _| {})?;
        let windows: Vec<(f64, u64)> =
            detail.windows.iter().map(|window| (window.nll_sum, window.predicted as u64)).collect();
        let (sum, count) = windows.iter().fold((0.0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
        let mean = sum / count as f64;
        if !mean.is_finite() {
            bail!("the likelihood of {} is not finite: the model overflows", part.name);
        }
        nll += part.share * mean;
        ratio = ratio.zip(report.active_ratio).map(|(all, active)| all + part.share * active);
        tokens.losses.extend(detail.losses);
        tokens.active.extend(detail.active.iter().map(|&sum| f64::from(sum) / layers));
        domains.push(DomainResult {
            name: part.name.clone(),
            share: part.share,
            nll: mean,
            ppl: mean.exp(),
            active_ratio: report.active_ratio,
            active_ratio_per_layer: report.active_ratio_per_layer,
            zero_active_share: report.zero_active_share,
            load_entropies: detail.load_entropies,
            documents: part.documents[..windows.len().min(part.documents.len())].to_vec(),
            windows,
            agreement: None,
        });
    }
    let active = ratio.unwrap_or(0.0) * accounting.num_experts;
    let (params_total, params_activated) = (accounting.total, accounting.activated(active));
    let means = Means { nll, ppl: nll.exp(), active_ratio: ratio, params_total, params_activated };
    let flops_per_token = accounting.mean_flops_per_token(active, seq);
    Ok((TextResult { means, flops_per_token, threshold: None, domains }, tokens))
}

/// Compares the distributions of a model with those of the dense one on the first `windows` windows of every source.
pub(crate) fn agreements(
    model: &Inference,
    dense: &Inference,
    held_out: &[HeldOut],
    seq: usize,
    windows: usize,
) -> Result<Vec<Agreement>> {
    let of = |part: &HeldOut| {
        let ids = &part.ids[..part.ids.len().min(windows * (seq + 1))];
        Ok(agreement(model, dense, ids, seq + 1, &mut |_, _| {})?)
    };
    held_out.iter().map(of).collect()
}

/// One threshold of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SweepPoint {
    pub(crate) threshold: f64,
    pub(crate) nll: f64,
    pub(crate) ppl: f64,
    pub(crate) active_ratio: f64,
    pub(crate) params_activated: f64,
}

/// Measures a gated model at other thresholds. The model keeps the last.
pub(crate) fn sweep(
    model: &mut Inference,
    held_out: &[HeldOut],
    seq: usize,
    windows: usize,
    thresholds: &[f64],
) -> Result<Vec<SweepPoint>> {
    let point = |&threshold: &f64| {
        model.set_threshold(threshold as f32)?;
        let (found, _) = text(model, held_out, seq, windows)?;
        let Means { nll, ppl, active_ratio, params_activated, .. } = found.means;
        let active_ratio = active_ratio.unwrap_or(1.0);
        Ok(SweepPoint { threshold, nll, ppl, active_ratio, params_activated })
    };
    thresholds.iter().map(point).collect()
}

/// Finds the threshold at which a gated model has that share of experts active. The model keeps it.
pub(crate) fn find_threshold(
    model: &mut Inference,
    held_out: &[HeldOut],
    seq: usize,
    windows: usize,
    active: f64,
) -> Result<f32> {
    let (mut low, mut high) = (0.0f32, 1.0f32);
    for _ in 0..BISECTIONS {
        let middle = (low + high) / 2.0;
        model.set_threshold(middle)?;
        let (found, _) = text(model, held_out, seq, windows)?;
        if found.means.active_ratio.unwrap_or(1.0) > active { low = middle } else { high = middle }
    }
    model.set_threshold(high)?;
    Ok(high)
}

/// Tokens of similar difficulty.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bin {
    pub(crate) tokens: usize,
    /// Mean loss of the dense model, the measure of difficulty.
    pub(crate) dense_nll: f64,
    /// Mean loss of this model.
    pub(crate) nll: f64,
    /// Active experts of a token, mean over layers.
    pub(crate) active: f64,
}

/// Active experts against the difficulty of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Difficulty {
    /// From the easiest tokens to the hardest.
    pub(crate) bins: Vec<Bin>,
    /// Pearson's correlation of active experts with the dense model's loss, over tokens.
    pub(crate) correlation: Option<f64>,
    /// Tokens by their active experts, mean over layers, rounded.
    pub(crate) histogram: Vec<u64>,
}

/// Groups tokens by the losses of the dense model and counts the active experts of each group.
pub(crate) fn difficulty(dense: &[f32], tokens: &PerToken, experts: usize) -> Difficulty {
    let mut order: Vec<usize> = (0..dense.len()).collect();
    order.sort_by(|&a, &b| dense[a].total_cmp(&dense[b]).then(a.cmp(&b)));
    let bins = (0..BINS).map(|bin| {
        let group = &order[bin * order.len() / BINS..(bin + 1) * order.len() / BINS];
        let mean = |value: &dyn Fn(usize) -> f64| {
            group.iter().map(|&at| value(at)).sum::<f64>() / group.len().max(1) as f64
        };
        Bin {
            tokens: group.len(),
            dense_nll: mean(&|at| f64::from(dense[at])),
            nll: mean(&|at| f64::from(tokens.losses[at])),
            active: mean(&|at| tokens.active[at]),
        }
    });
    let mut histogram = vec![0; experts + 1];
    for active in &tokens.active {
        histogram[(active.round() as usize).min(experts)] += 1;
    }
    let dense: Vec<f64> = dense.iter().map(|&loss| f64::from(loss)).collect();
    let correlation = super::statistics::correlation(&dense, &tokens.active);
    Difficulty { bins: bins.collect(), correlation, histogram }
}

/// The score of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TaskScore {
    pub(crate) task: String,
    /// Metric and filter of lm-evaluation-harness.
    pub(crate) metric: String,
    pub(crate) shots: usize,
    pub(crate) items: usize,
    pub(crate) value: f64,
    pub(crate) stderr: Option<f64>,
    /// `1` for every right item and `0` for every wrong one.
    pub(crate) right: String,
    /// Mean negative log-likelihood of the right answers, nats by item, where they are scored by likelihood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gold_nll: Option<f64>,
    /// Share of active experts; absent without routers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) active_ratio: Option<f64>,
}

/// Scores a model on all tasks.
pub(crate) fn tasks(
    model: &Inference,
    tokenizer: &Tokenizer,
    tasks: &[Loaded],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<TaskScore>> {
    let mut scores = Vec::new();
    for (at, loaded) in tasks.iter().enumerate() {
        progress(at, tasks.len());
        let documents: Vec<&[Request]> = loaded.documents().iter().map(|d| &d.requests[..]).collect();
        let responder = Responder::new(model, tokenizer, task_bos(), TaskProfile::default()).stop_at(&STOP);
        let Some(answers) = responder.answer(&documents, None, &mut |_, _| {})? else {
            return Err(Interrupted.into());
        };
        let scored = loaded.score(&answers.documents);
        let main = scored.scores.iter().find(|score| ["acc", "exact_match"].contains(&score.metric));
        let Some(main) = main else {
            bail!("task {}: no item could be scored", loaded.name());
        };
        let rows = loaded.sample_rows(&scored).filter(|row| row["filter"] == main.filter);
        let by_item: BTreeMap<u64, bool> = rows
            .map(|row| (row["doc_id"].as_u64().unwrap_or(0), row[main.metric].as_f64().unwrap_or(0.0) > 0.5))
            .collect();
        scores.push(TaskScore {
            task: loaded.task().name.to_owned(),
            metric: format!("{},{}", main.metric, main.filter),
            shots: loaded.shots(),
            items: by_item.len(),
            value: main.value,
            stderr: main.stderr,
            gold_nll: loaded.gold_nll(&scored),
            active_ratio: answers.ran.routing.as_ref().map(|routing| routing.summary().active_ratio),
            right: by_item.values().map(|&right| if right { '1' } else { '0' }).collect(),
        });
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_grouped_by_difficulty() {
        let dense: Vec<f32> = (0..100).rev().map(|i| i as f32).collect();
        let tokens = PerToken {
            losses: dense.clone(),
            active: (0..100).rev().map(|i| if i < 50 { 1.0 } else { 3.0 }).collect(),
        };
        let found = difficulty(&dense, &tokens, 4);
        assert_eq!(found.bins.len(), 10);
        assert_eq!((found.bins[0].tokens, found.bins[0].dense_nll, found.bins[0].active), (10, 4.5, 1.0));
        assert_eq!((found.bins[9].dense_nll, found.bins[9].active), (94.5, 3.0));
        assert_eq!(found.histogram, [0, 50, 0, 50, 0]);
        assert!(found.correlation.unwrap() > 0.8);
    }
}
