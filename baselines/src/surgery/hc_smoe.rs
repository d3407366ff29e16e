//! HC-SMoE (Chen et al., arXiv 2410.08589): experts whose mean outputs are near are merged, by hierarchical clustering and without
//! training. All gates stay, so that a token's coefficients are those of the source.
//!
//! ```text
//! vector     v_e = mean over all tokens of the output of expert e, whether the token runs it or not
//! clusters   agglomerative, average linkage of |v_a - v_b|, until r are left
//! merge      sum over members of f_e / (sum of f) W_e, f the share of slots that run e; equal weights where nothing does
//! ```

use dsmoe_core::Config;
use dsmoe_core::calibrate::{ExpertStats, ExpertSums};
use dsmoe_core::surgery::{LayerSurgery, NewExpert, Part, RouterRule, Surgery};
use dsmoe_kernels::rng::Rng;
use serde::{Deserialize, Serialize};

use super::budget::Held;
use super::linkage::{Linkage, agglomerate};
use super::{
    Allocation, Seen, Survey, align, aligned, entropy, groups_of, made, mixture, plan, survey, write,
};
use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Counts, Job, Made, Plan, Progress, Source};
use crate::settings::{Entry, SettingValues, Settings as _, settings};

/// The method `hc-smoe`.
pub(crate) static HC_SMOE: Entry<Settings> = Entry {
    name: "hc-smoe",
    summary: "experts of a mixture merged by clusters of their mean outputs, all gates kept; held parameters",
    source: Source::Experts,
    counts: Counts::Held,
    ..Entry::new(configure)
};

settings! {
    /// Settings of HC-SMoE.
    pub(crate) struct Settings {
        /// Vector that stands for an expert: outputs (its mean output over all tokens), routed-outputs (over the tokens that run it), weights, router-logits, or random (a control).
        pub vectors: Vectors = Vectors::Outputs,
        /// Distance of two descriptions: euclidean or cosine.
        pub distance: Distance = Distance::Euclidean,
        /// Distance of two clusters: average, single, complete or ward.
        pub linkage: Linkage = Linkage::Average,
        /// Expert that replaces a cluster: frequency (the mean weighted by use), average (the plain mean), or dominant (the member nearest to the mean).
        pub merge: Merge = Merge::Frequency,
        /// Order of neurons before a merge: none (as they are) or weights (most like those of the most used member).
        pub alignment: Alignment = Alignment::None,
        /// Experts of layers: layer (the same number) or global (those of the most used of all).
        pub allocation: Allocation = Allocation::Layer,
    }
}

/// The description of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Vectors {
    /// Its mean output over all tokens.
    Outputs,
    /// Its mean output over the tokens that run it.
    RoutedOutputs,
    /// Its three matrices.
    Weights,
    /// The logits of its gate, token by token.
    RouterLogits,
    /// Random numbers.
    Random,
}

/// The distance of two vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Distance {
    /// The norm of their difference.
    Euclidean,
    /// 1 minus their cosine.
    Cosine,
}

/// The expert that replaces a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Merge {
    /// The mean of its members, weighted by use.
    Frequency,
    /// The mean of its members.
    Average,
    /// The member nearest to the mean of the descriptions.
    Dominant,
}

/// The order of neurons of members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Alignment {
    /// The order of every member stays.
    None,
    /// The order that matches the weights of the most used member best.
    Weights,
}

fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    if settings.linkage == Linkage::Ward && settings.distance == Distance::Cosine {
        return Err(Error::setting(
            "linkage",
            "cannot be ward with cosine distances",
            "set distance to euclidean",
        ));
    }
    Ok(Box::new(HcSmoe(settings)))
}

/// HC-SMoE with its settings.
struct HcSmoe(Settings);

/// Values of random vectors.
const RANDOM: usize = 16;

/// A layer with what is needed to merge its experts.
struct Layer {
    usage: Vec<f64>,
    /// `[n, n]`: distances of experts.
    distances: Vec<f64>,
}

impl Configured for HcSmoe {
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
        let experts = &mixture(config)?.experts;
        let held = Held::of(config, true)?;
        let counts = match self.0.allocation {
            Allocation::Layer => held.per_layer(budget, 1)?,
            Allocation::Global => {
                let even = experts.iter().map(|&held| vec![1.0; held]).collect::<Vec<_>>();
                held.of_all(budget, &even, 1)?
            }
        };
        let layers: Vec<LayerSurgery> =
            experts.iter().zip(&counts).map(|(&n, &r)| first_clusters(n, r)).collect();
        self.planned(config, &layers)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        self.plan(&config, job.budget)?;
        let held = Held::of(&config, true)?;
        let mut layers = Vec::new();
        let all = Survey { kept: None, with_outputs: self.needs_outputs(), before: 0 };
        survey(job, all, progress, &mut |seen| {
            let distances = self.distances(&seen, job.seed);
            layers.push(Layer { usage: seen.stats.usage(), distances });
            Ok(())
        })?;
        let counts = match self.0.allocation {
            Allocation::Layer => held.per_layer(job.budget, 1)?,
            Allocation::Global => {
                let usage: Vec<Vec<f64>> = layers.iter().map(|layer| layer.usage.clone()).collect();
                held.of_all(job.budget, &usage, 1)?
            }
        };
        let mut surgeries: Vec<LayerSurgery> =
            layers.iter().zip(&counts).map(|(layer, &r)| self.surgery(layer, r)).collect();
        if self.0.alignment == Alignment::Weights {
            align::align(job.model, &mut surgeries, progress)?;
        }
        let plan = self.planned(&config, &surgeries)?;
        let top_k = self.top_k(&config, &surgeries)?;
        write(job, Surgery { top_k, ..Surgery::of(&surgeries) }, progress)?;
        let entropies: Vec<f64> = layers.iter().map(|layer| entropy(&layer.usage)).collect();
        Ok(made(plan, &entropies, Vec::new()))
    }
}

/// A surgery of as many clusters of any members, whose sizes are those of every such surgery.
pub(super) fn first_clusters(experts: usize, clusters: usize) -> LayerSurgery {
    let labels: Vec<usize> = (0..experts).map(|e| e.min(clusters - 1)).collect();
    let experts = groups_of(&labels, |_| 1.0).into_iter().map(NewExpert::merged).collect();
    LayerSurgery { experts, router: RouterRule::Map }
}

impl HcSmoe {
    fn needs_outputs(&self) -> bool {
        matches!(self.0.vectors, Vectors::Outputs | Vectors::RoutedOutputs)
    }

    /// Returns the experts that a token runs: not more than a layer holds.
    fn top_k(&self, config: &Config, layers: &[LayerSurgery]) -> Result<Option<usize>> {
        let most = layers.iter().map(|layer| layer.experts.len()).max().unwrap_or(1);
        Ok(Some(mixture(config)?.top_k.min(most)))
    }

    fn planned(&self, config: &Config, layers: &[LayerSurgery]) -> Result<Plan> {
        let (held, all) = (layers.iter().map(|layer| layer.experts.len()), &mixture(config)?.experts);
        let reached_by = format!("{} of {} experts", held.sum::<usize>(), all.iter().sum::<usize>());
        let plan = plan(config, layers, self.top_k(config, layers)?, reached_by)?;
        aligned(plan, config, layers, self.0.alignment)
    }

    /// Returns the distances of the experts of a layer.
    fn distances(&self, seen: &Seen<'_>, seed: u64) -> Vec<f64> {
        let n = seen.stats.experts.len();
        let products = match self.0.vectors {
            Vectors::RouterLogits => seen.stats.gram.clone(),
            Vectors::Outputs => {
                products(&means(seen.stats, |sums| (&sums.outputs, seen.stats.tokens as f64)))
            }
            Vectors::RoutedOutputs => products(&means(seen.stats, |sums| (&sums.routed_outputs, sums.hard))),
            Vectors::Weights => {
                let flat = |e| seen.experts.rows(e).concat().into_iter().map(f64::from).collect();
                products(&(0..n).map(flat).collect::<Vec<_>>())
            }
            Vectors::Random => {
                let mut rng = Rng::new(seed, seen.layer as u64);
                let mut vector = || (0..RANDOM).map(|_| f64::from(rng.normal())).collect();
                products(&(0..n).map(|_| vector()).collect::<Vec<_>>())
            }
        };
        (0..n * n)
            .map(|i| {
                let (a, b) = (i / n, i % n);
                let [aa, bb, ab] = [products[a * (n + 1)], products[b * (n + 1)], products[i]];
                match self.0.distance {
                    _ if a == b => 0.0,
                    Distance::Euclidean => (aa + bb - 2.0 * ab).max(0.0).sqrt(),
                    Distance::Cosine if aa > 0.0 && bb > 0.0 => 1.0 - ab / (aa * bb).sqrt(),
                    Distance::Cosine => 1.0,
                }
            })
            .collect()
    }

    fn surgery(&self, layer: &Layer, clusters: usize) -> LayerSurgery {
        let (labels, _) = agglomerate(&layer.distances, self.0.linkage, clusters);
        let groups = match self.0.merge {
            Merge::Frequency => groups_of(&labels, |e| layer.usage[e]),
            Merge::Average => groups_of(&labels, |_| 1.0),
            Merge::Dominant => groups_of(&labels, |_| 1.0)
                .into_iter()
                .map(|group| dominant(&group, &layer.distances))
                .collect(),
        };
        let experts = groups.into_iter().map(|group| most_used_first(group, &layer.usage)).collect();
        LayerSurgery { experts, router: RouterRule::Map }
    }
}

/// Makes an expert of a group, the most used member first.
pub(super) fn most_used_first(mut group: Vec<(usize, f64)>, usage: &[f64]) -> NewExpert {
    group.sort_by(|(a, _), (b, _)| usage[*b].total_cmp(&usage[*a]).then(a.cmp(b)));
    let part = |(old, weight)| Part { old, weight, neurons: None };
    NewExpert { parts: group.into_iter().map(part).collect() }
}

/// Gives all weight to the member whose description is nearest to the mean: that of the least sum of squared distances.
fn dominant(group: &[(usize, f64)], distances: &[f64]) -> Vec<(usize, f64)> {
    let n = distances.len().isqrt();
    let spread = |a: usize| group.iter().map(|&(b, _)| distances[a * n + b].powi(2)).sum::<f64>();
    let nearest =
        group.iter().map(|&(e, _)| e).min_by(|&a, &b| spread(a).total_cmp(&spread(b)).then(a.cmp(&b)));
    group.iter().map(|&(e, _)| (e, f64::from(u8::from(Some(e) == nearest)))).collect()
}

/// Returns means of outputs; 0 where there is no token.
fn means<'a>(stats: &'a ExpertStats, of: impl Fn(&'a ExpertSums) -> (&'a Vec<f64>, f64)) -> Vec<Vec<f64>> {
    let mean = |sums| {
        let (values, tokens) = of(sums);
        values.iter().map(|sum| if tokens > 0.0 { sum / tokens } else { 0.0 }).collect()
    };
    stats.experts.iter().map(mean).collect()
}

/// Returns the products of all pairs of vectors.
fn products(vectors: &[Vec<f64>]) -> Vec<f64> {
    let pairs = vectors.iter().flat_map(|a| vectors.iter().map(move |b| (a, b)));
    pairs.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect()
}
