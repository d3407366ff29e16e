//! Task-specific merging after UNCURL (Sarkar et al., arXiv 2409.01483): experts whose gates agree on the text of a task become one.
//! The paper's body was not available; the constants and the choice of gates are ours.
//!
//! ```text
//! affinity   S_ab = max(0, correlation over tokens of the logits of gates a and b)
//! groups     spectral clustering of S into r
//! neurons    of a member in the order that is most like the most used member's
//! merge      mean of the members by the tokens that run them; equal weights where nothing does
//! ```
//! The experts of DSMoE and of top-k models are parts of one FFN, of which a token needs the sum. A group of them that becomes its mean
//! gives less than it did where it has one gate. Where its gates share it, a token that opens several of them gets the mean as many
//! times, which is the sum if their values are equal. [`dsmoe_core::surgery`] says what the mean of gates is.

use dsmoe_core::Config;
use dsmoe_core::calibrate::ExpertStats;
use dsmoe_core::surgery::{LayerSurgery, Surgery};
use serde::{Deserialize, Serialize};

use super::budget::Held;
use super::hc_smoe::{Alignment, first_clusters, most_used_first};
use super::{Gates, Survey, align, aligned, entropy, groups_of, made, plan, shape, spectral, survey, write};
use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Counts, Job, Made, Plan, Progress, Source};
use crate::settings::{Entry, SettingValues, Settings as _, settings};

/// The method `uncurl`.
pub(crate) static UNCURL: Entry<Settings> = Entry {
    name: "uncurl",
    summary: "experts merged by spectral clusters of their gates on a task's text, of mixtures, DSMoE and top-k models; held parameters",
    source: Source::Experts,
    counts: Counts::Held,
    ..Entry::new(configure)
};

settings! {
    /// Settings of UNCURL.
    pub(crate) struct Settings {
        /// Similarity of two experts: correlation or cosine of their gates' logits, or coactivation (the tokens that run both).
        pub affinity: Affinity = Affinity::Correlation,
        /// Order of neurons before a merge: weights (most like those of the most used member) or none (as they are).
        pub alignment: Alignment = Alignment::Weights,
        /// Gates of merged experts: map (all stay, and those of a group run one expert) or mean (one of each group).
        pub router: Gates = Gates::Map,
    }
}

/// The similarity of two experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Affinity {
    /// The correlation of their gates' logits over tokens.
    Correlation,
    /// Their cosine.
    Cosine,
    /// Tokens that run both over the root of the product of those that run each.
    Coactivation,
}

fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    Ok(Box::new(Uncurl(settings)))
}

/// UNCURL with its settings.
struct Uncurl(Settings);

impl Configured for Uncurl {
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
        let counts = self.held(config)?.per_layer(budget, 1)?;
        let rule = self.0.router.rule();
        let layer = |(&n, &r): (&usize, &usize)| LayerSurgery { router: rule, ..first_clusters(n, r) };
        let layers: Vec<LayerSurgery> = shape(config)?.experts.iter().zip(&counts).map(layer).collect();
        self.planned(config, &layers)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let plan = self.plan(&config, job.budget)?;
        let counts = self.held(&config)?.per_layer(job.budget, 1)?;
        let (mut layers, mut entropies) = (Vec::new(), Vec::new());
        survey(job, Survey { kept: None, with_outputs: false, before: 0 }, progress, &mut |seen| {
            let affinity = affinities(self.0.affinity, seen.stats);
            let seed = job.seed.wrapping_add(seen.layer as u64);
            let labels = spectral::cluster(&affinity, counts[seen.layer], seed);
            let usage = seen.stats.usage();
            let groups = groups_of(&labels, |e| usage[e]).into_iter();
            let experts = groups.map(|group| most_used_first(group, &usage)).collect();
            entropies.push(entropy(&usage));
            layers.push(LayerSurgery { experts, router: self.0.router.rule() });
            Ok(())
        })?;
        let mut moved = 0;
        if self.0.alignment == Alignment::Weights {
            moved = align::align(job.model, &mut layers, progress)?;
        }
        let top_k = self.top_k(&config, &layers)?;
        write(job, Surgery { top_k, ..Surgery::of(&layers) }, progress)?;
        Ok(made(plan, &entropies, vec![("experts whose neurons moved".to_owned(), moved as f64)]))
    }
}

impl Uncurl {
    fn held(&self, config: &Config) -> Result<Held> {
        let keeps_gates = self.0.router == Gates::Map;
        if !keeps_gates && shape(config)?.gates.iter().flatten().any(|&gates| gates > 1) {
            let problem = "cannot be mean for gates that share experts already";
            return Err(Error::setting("router", problem, "set it to map"));
        }
        Held::of(config, keeps_gates)
    }

    fn top_k(&self, config: &Config, layers: &[LayerSurgery]) -> Result<Option<usize>> {
        let fewest = layers.iter().map(|layer| layer.experts.len()).min().unwrap_or(1);
        Ok(shape(config)?.top_k.map(|top_k| top_k.min(fewest)))
    }

    fn planned(&self, config: &Config, layers: &[LayerSurgery]) -> Result<Plan> {
        let (held, all) = (layers.iter().map(|layer| layer.experts.len()), shape(config)?.experts);
        let reached_by = format!("{} of {} experts", held.sum::<usize>(), all.iter().sum::<usize>());
        let plan = plan(config, layers, self.top_k(config, layers)?, reached_by)?;
        aligned(plan, config, layers, self.0.alignment)
    }
}

/// Returns S `[n, n]`, with ones on the diagonal.
pub(super) fn affinities(affinity: Affinity, stats: &ExpertStats) -> Vec<f64> {
    let n = stats.experts.len();
    let ratio = |values: &[f64], a: usize, b: usize| {
        let squared = values[a * (n + 1)] * values[b * (n + 1)];
        if squared > 0.0 { values[a * n + b] / squared.sqrt() } else { 0.0 }
    };
    let alike = |a: usize, b: usize| match affinity {
        _ if a == b => 1.0,
        Affinity::Correlation => stats.correlation(a, b),
        Affinity::Cosine => ratio(&stats.gram, a, b),
        Affinity::Coactivation => ratio(&stats.both, a, b),
    };
    (0..n * n).map(|i| alike(i / n, i % n).max(0.0)).collect()
}
