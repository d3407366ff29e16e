//! Expert pruning after SEER-MoE (Muzio et al., arXiv 2404.05089): experts that few tokens run are dropped with their gates. How the
//! paper counts was read in the reports of others; the criteria of later work are settings beside it.
//!
//! ```text
//! hard       tokens that run e                    soft       sum of the softmax over all gates
//! ean        sum over dimensions of sqrt(sum of squared outputs), tokens that run e
//! reap       mean over tokens that run e of c |o| mean-norm  mean over them of |o|
//! ```
//! Scores are shares of a layer's sum, so that layers compare. Of DSMoE, hard counts open gates and soft sums sigmoids; a core and
//! residual experts have no score and stay. Where a DSMoE model stores budgets, the calibration text says which share of the
//! experts that are left each of them opens.

use dsmoe_core::Config;
use dsmoe_core::calibrate::{ExpertStats, ExpertSums};
use dsmoe_core::surgery::{LayerSurgery, Surgery};
use dsmoe_kernels::rng::Rng;
use serde::{Deserialize, Serialize};

use super::budget::Held;
use super::{Allocation, Shape, Survey, entropy, made, plan, shape, shares, survey, write};
use crate::error::Result;
use crate::method::{Budget, Configured, Counts, Job, Made, Plan, Progress, Source};
use crate::settings::{Entry, SettingValues, Settings as _, settings};

/// The method `seer-moe`.
pub(crate) static SEER_MOE: Entry<Settings> = Entry {
    name: "seer-moe",
    summary: "experts that few tokens run dropped with their gates, of mixtures, DSMoE and top-k models; held parameters",
    source: Source::Experts,
    counts: Counts::Held,
    ..Entry::new(configure)
};

settings! {
    /// Settings of expert pruning.
    pub(crate) struct Settings {
        /// Importance of an expert: hard (tokens that run it), soft (its gate's probability), ean, reap or mean-norm (of its outputs), or random (a control).
        pub score: Score = Score::Hard,
        /// Experts of layers: layer (the same number) or global (those of the largest scores of all).
        pub allocation: Allocation = Allocation::Layer,
        /// When scores are taken: once, or again after one expert of each layer was dropped (each).
        pub rounds: Rounds = Rounds::Once,
    }
}

/// The importance of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Score {
    /// Tokens that run it.
    Hard,
    /// The sum of its gate's probability.
    Soft,
    /// The norms of its outputs by dimension.
    Ean,
    /// The mean of its outputs' norms times their coefficients.
    Reap,
    /// The mean of its outputs' norms.
    MeanNorm,
    /// A random number.
    Random,
}

/// When scores are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rounds {
    /// Once.
    Once,
    /// After each expert of a layer that was dropped.
    Each,
}

fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    Ok(Box::new(Seer(settings)))
}

/// Expert pruning with its settings.
struct Seer(Settings);

impl Configured for Seer {
    fn needs_calibration(&self) -> bool {
        true
    }

    fn continues(&self) -> bool {
        true
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        let even: Vec<Vec<f64>> = shape(config)?.experts.iter().map(|&n| vec![1.0; n]).collect();
        self.planned(config, &self.kept(config, budget, &even)?)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        self.plan(&config, job.budget)?;
        let all: Vec<Vec<usize>> = shape(&config)?.experts.iter().map(|&n| (0..n).collect()).collect();
        let (mut kept, mut entropies, mut above) = (all.clone(), Vec::new(), Vec::new());
        for before in 0.. {
            let mut scores = Vec::new();
            let left = Survey { kept: Some(&kept), with_outputs: self.needs_outputs(), before };
            survey(job, left, progress, &mut |seen| {
                if kept == all {
                    entropies.push(entropy(&seen.stats.usage()));
                    above.push(above_budgets(seen.stats));
                }
                scores.push(normalised(&scores_of(self.0.score, seen.stats, [job.seed, seen.layer as u64])));
                Ok(())
            })?;
            let next = self.next(&config, job.budget, &kept, &scores)?;
            let is_last = next == kept || self.0.rounds == Rounds::Once;
            kept = next;
            if is_last {
                break;
            }
        }
        let plan = self.planned(&config, &kept)?;
        let Shape { always, top_k, .. } = shape(&config)?;
        let shares = shares_of_budgets(&above, &kept, &always);
        let layers: Vec<LayerSurgery> = kept.into_iter().map(LayerSurgery::keep).collect();
        write(job, Surgery { layers: &layers, top_k, shares: Some(&shares) }, progress)?;
        Ok(made(plan, &entropies, Vec::new()))
    }
}

impl Seer {
    fn needs_outputs(&self) -> bool {
        matches!(self.0.score, Score::Ean | Score::Reap | Score::MeanNorm)
    }

    fn planned(&self, config: &Config, kept: &[Vec<usize>]) -> Result<Plan> {
        let Shape { experts, top_k, .. } = shape(config)?;
        let layers: Vec<LayerSurgery> =
            kept.iter().map(|kept| LayerSurgery::keep(kept.iter().copied())).collect();
        let (held, all) = (kept.iter().map(Vec::len).sum::<usize>(), experts.iter().sum::<usize>());
        plan(config, &layers, top_k, format!("{held} of {all} experts"))
    }

    /// Chooses the experts that the budget has room for, by their scores.
    fn kept(&self, config: &Config, budget: Budget, scores: &[Vec<f64>]) -> Result<Vec<Vec<usize>>> {
        let (held, fewest) = (Held::of(config, false)?, shape(config)?.top_k.unwrap_or(1));
        let counts = match self.0.allocation {
            Allocation::Layer => held.per_layer(budget, fewest)?,
            Allocation::Global => held.of_all(budget, scores, fewest)?,
        };
        Ok(scores.iter().zip(counts).map(|(scores, count)| largest(scores, count)).collect())
    }

    /// Chooses among the experts that are left: all that the budget has room for, or all but one of each layer.
    fn next(
        &self,
        config: &Config,
        budget: Budget,
        kept: &[Vec<usize>],
        scores: &[Vec<f64>],
    ) -> Result<Vec<Vec<usize>>> {
        let target = self.kept(config, budget, scores)?;
        let chosen = match self.0.rounds {
            Rounds::Once => target,
            Rounds::Each => {
                let (target, now) = (total(&target), total(kept));
                let after = target.max(now.saturating_sub(kept.len()));
                let fewest = shape(config)?.top_k.unwrap_or(1);
                let counts = match self.0.allocation {
                    Allocation::Global => shares(scores, after.min(now), fewest),
                    Allocation::Layer => {
                        let wanted = self.kept(config, budget, scores)?;
                        let one_less = |(kept, wanted): (&Vec<usize>, &Vec<usize>)| {
                            wanted.len().max(kept.len().saturating_sub(1)).min(kept.len())
                        };
                        kept.iter().zip(&wanted).map(one_less).collect()
                    }
                };
                scores.iter().zip(counts).map(|(scores, count)| largest(scores, count)).collect()
            }
        };
        let names = |(kept, chosen): (&Vec<usize>, &Vec<usize>)| chosen.iter().map(|&i| kept[i]).collect();
        Ok(kept.iter().zip(&chosen).map(names).collect())
    }
}

/// Returns the share of tokens whose logit is above the threshold of each budget, expert by expert.
fn above_budgets(stats: &ExpertStats) -> Vec<Vec<f64>> {
    let tokens = stats.tokens.max(1) as f64;
    stats.experts.iter().map(|sums| sums.above.iter().map(|above| above / tokens).collect()).collect()
}

/// Returns the share of the experts of a model that each budget leaves active, of which those that are `kept` and those that all
/// tokens run are left, from the shares of tokens `above` its thresholds, by layer and expert.
pub(super) fn shares_of_budgets(above: &[Vec<Vec<f64>>], kept: &[Vec<usize>], always: &[usize]) -> Vec<f64> {
    let budgets = above.first().and_then(|layer| layer.first()).map_or(0, Vec::len);
    let experts = (total(kept) + always.iter().sum::<usize>()) as f64;
    let active = |budget: usize| {
        let layers = above.iter().zip(kept).zip(always);
        let open = layers.map(|((above, kept), &always)| {
            always as f64 + kept.iter().map(|&expert| above[expert][budget]).sum::<f64>()
        });
        open.sum::<f64>() / experts
    };
    (0..budgets).map(active).collect()
}

fn total(kept: &[Vec<usize>]) -> usize {
    kept.iter().map(Vec::len).sum()
}

/// Returns the places of the largest scores, ascending; the lower place wins among equals.
pub(super) fn largest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Returns the scores of a layer's experts.
pub(super) fn scores_of(score: Score, stats: &ExpertStats, [seed, stream]: [u64; 2]) -> Vec<f64> {
    let mean = |sum: f64, sums: &ExpertSums| if sums.hard > 0.0 { sum / sums.hard } else { 0.0 };
    let mut rng = Rng::new(seed, stream);
    let of = |sums: &ExpertSums| match score {
        Score::Hard => sums.hard,
        Score::Soft => sums.soft,
        Score::Ean => sums.squares.iter().map(|square| square.sqrt()).sum(),
        Score::Reap => mean(sums.weighted_norms, sums),
        Score::MeanNorm => mean(sums.norms, sums),
        Score::Random => f64::from(rng.uniform()),
    };
    stats.experts.iter().map(of).collect()
}

fn normalised(scores: &[f64]) -> Vec<f64> {
    let all: f64 = scores.iter().sum();
    scores.iter().map(|score| if all > 0.0 { score / all } else { 0.0 }).collect()
}
