//! Methods that change which experts a trained model holds: they merge experts that are alike, or drop those that few tokens
//! run. They see the model layer by layer on calibration text and leave the writing to [`dsmoe_core::surgery`].
//!
//! Experts of DSMoE and of top-k models are parts of one FFN: a token needs their sum, and a mean of two is neither of them. They
//! are dropped, and merged by [`uncurl`] alone, which asks nothing of their outputs.

mod align;
mod budget;
mod hc_smoe;
mod linkage;
mod parts;
mod seer;
mod spectral;
#[cfg(test)]
mod tests;
mod uncurl;

use std::path::Path;

use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::{ExpertStats, LayerExperts, LayerStream, check_text};
use dsmoe_core::config::{CONFIG_FILE, Config, MixtureSpec};
use dsmoe_core::surgery::{self, LayerSurgery, RouterRule, Surgery};
use dsmoe_router::expert_map::ExpertMap;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::method::{Job, Made, Plan, Progress};
use crate::states::States;
use crate::topk;
use hc_smoe::Alignment;
pub(crate) use hc_smoe::HC_SMOE;
use parts::Parts;
pub(crate) use seer::SEER_MOE;
pub(crate) use uncurl::UNCURL;

/// How a budget is divided among layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Allocation {
    /// The same number of experts in every layer.
    Layer,
    /// The most used experts of the whole model stay, so a layer keeps as many as it has among them.
    Global,
}

/// The gates that a merged expert gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Gates {
    /// All gates stay, and those of a group run one expert.
    Map,
    /// A group has the mean of its gates.
    Mean,
}

impl Gates {
    fn rule(self) -> RouterRule {
        match self {
            Gates::Map => RouterRule::Map,
            Gates::Mean => RouterRule::Mean,
        }
    }
}

/// The models that all methods take.
const HELP: &str =
    "use Mixtral, Qwen-MoE or OLMoE, or a mixture that was made of a dense model by sparse upcycling";

/// Returns the experts of a mixture, whose gates can share them.
fn mixture(config: &Config) -> Result<&MixtureSpec> {
    match config.mixture() {
        Some(spec) => Ok(spec),
        None => {
            shape(config)?;
            let problem = "its experts are parts of one FFN and no variants of each other";
            Err(Error::model(problem, HELP))
        }
    }
}

/// The experts of a model that have gates, and what its tokens run besides.
struct Shape {
    /// Experts of layers.
    experts: Vec<usize>,
    /// The gates of each expert, layer by layer.
    gates: Vec<Vec<usize>>,
    /// Experts of layers that all tokens run: a core, or residual ones.
    always: Vec<usize>,
    /// Neurons of an expert of each layer.
    widths: Vec<usize>,
    /// Parameters of an expert of each layer.
    sizes: Vec<usize>,
    /// Parameters of a gate.
    gate: usize,
    /// Gates that a token opens, where their number is fixed.
    top_k: Option<usize>,
}

/// Returns the experts of a mixture, of a DSMoE model, or of a model with FFNs of type top-k.
fn shape(config: &Config) -> Result<Shape> {
    if let Some(spec) = config.mixture() {
        let layers = config.num_layers;
        let maps = (0..layers).map(|layer| spec.map(layer).cloned());
        return Ok(Shape {
            experts: spec.experts.clone(),
            gates: maps.zip(&spec.experts).map(|(map, &experts)| gates_of(map.as_deref(), experts)).collect(),
            always: vec![0; layers],
            widths: vec![spec.width; layers],
            sizes: vec![3 * config.hidden * spec.width; layers],
            gate: config.hidden,
            top_k: Some(spec.top_k),
        });
    }
    let layers = || 0..config.num_layers;
    let (always, gate, top_k): (Vec<usize>, _, _) = match (&config.moe, config.ffn.as_deref()) {
        (Some(moe), _) => {
            let gate = moe.parts.router_rank.unwrap_or(config.hidden) + usize::from(moe.router_bias);
            (layers().map(|layer| moe.core(layer)).collect(), gate, None)
        }
        (None, Some(spec)) => {
            let Some(spec) = topk::spec_of(spec) else {
                return Err(Error::model("its experts cannot be changed one by one", HELP));
            };
            let always = vec![spec.router.num_residual; config.num_layers];
            (always, spec.gate(config.hidden).params_of_expert(), Some(spec.router.top_k))
        }
        (None, None) => return Err(Error::model("it is dense, and this method changes experts", HELP)),
    };
    // A neuron has a row in each projection, and a bias in two of them.
    let neuron = 3 * config.hidden + if config.architecture.mlp_bias { 2 } else { 0 };
    let blocks: Vec<usize> = layers().map(|layer| config.layer_experts(layer).unwrap_or(1)).collect();
    let widths: Vec<usize> = config.layers().zip(&blocks).map(|(layer, n)| layer.intermediate / n).collect();
    let experts: Vec<usize> = blocks.iter().zip(&always).map(|(blocks, always)| blocks - always).collect();
    let map = |layer: usize| match (&config.moe, &config.ffn) {
        (Some(moe), _) => moe.map(layer).cloned(),
        (None, Some(spec)) => spec.build(config, layer).expert_parts().and_then(|parts| parts.map),
        (None, None) => None,
    };
    Ok(Shape {
        gates: layers().zip(&experts).map(|(i, &experts)| gates_of(map(i).as_deref(), experts)).collect(),
        experts,
        always,
        sizes: widths.iter().map(|width| neuron * width).collect(),
        widths,
        gate,
        top_k,
    })
}

/// Returns the number of gates of each of so many experts of a layer.
fn gates_of(map: Option<&ExpertMap>, experts: usize) -> Vec<usize> {
    match map {
        Some(map) => (0..experts).map(|expert| map.gates_of(expert).count()).collect(),
        None => vec![1; experts],
    }
}

/// The weights and statistics of one layer, which a method decides by.
struct Seen<'a> {
    layer: usize,
    experts: &'a LayerExperts,
    stats: &'a ExpertStats,
}

/// A look at the experts of a model.
#[derive(Clone, Copy)]
struct Survey<'a> {
    /// The experts of every layer that are seen; all of them where there is no choice.
    kept: Option<&'a [Vec<usize>]>,
    /// True if the outputs of experts are needed.
    with_outputs: bool,
    /// The surveys of the job before this one.
    before: usize,
}

/// Shows every layer of a job's model to `see`, on the states of calibration text that its layers before it give. The statistics of
/// layers that an interrupted job has finished are not made again.
fn survey(
    job: &Job<'_>,
    Survey { kept, with_outputs, before }: Survey<'_>,
    progress: &mut dyn FnMut(Progress),
    see: &mut dyn FnMut(Seen<'_>) -> Result<()>,
) -> Result<()> {
    check_text(job.calibration, 1, "the statistics of experts")?;
    let mut stream = LayerStream::open_experts_on(job.comm, job.model, job.calibration)?;
    let layers = stream.config().num_layers;
    let (parts, mut states) = (Parts::of(job.partial, before), States::of(job.partial, before));
    let mut finished = parts.finished(layers)?.into_iter();
    let passed = states.restore(&mut stream, finished.len())?;
    for layer in 0..layers {
        progress(Progress { stage: "experts", done: layer as u64, total: layers as u64 });
        let mut experts = stream.experts(layer)?;
        if let Some(kept) = kept.map(|kept| &kept[layer]).filter(|kept| kept.len() < experts.num_experts()) {
            experts = experts.keep(kept);
        }
        let known = finished.next();
        if let (true, Some(stats)) = (layer < passed, &known) {
            see(Seen { layer, experts: &experts, stats })?;
            continue;
        }
        let weights = stream.layer(layer)?;
        stream.attend(&weights)?;
        let stats = match known {
            Some(stats) => stats,
            None => {
                let stats = stream.expert_stats(&weights, &experts, with_outputs);
                parts.keep(layer, &stats)?;
                stats
            }
        };
        see(Seen { layer, experts: &experts, stats: &stats })?;
        stream.join_experts(&weights, &experts);
        states.keep(layer, &stream)?;
    }
    progress(Progress { stage: "experts", done: layers as u64, total: layers as u64 });
    Ok(())
}

/// Counts what the model that `config` becomes holds and activates.
fn plan(config: &Config, layers: &[LayerSurgery], top_k: Option<usize>, reached_by: String) -> Result<Plan> {
    let after = surgery::plan(Path::new(CONFIG_FILE), config, layers, top_k)?;
    let counts = Accounting::of(&after);
    let mut settings = Vec::new();
    if let (Some(top_k), Some(before)) = (top_k, shape(config)?.top_k)
        && top_k < before
    {
        settings.push(("experts of a token".to_owned(), format!("{top_k}, {before} before")));
    }
    let held: Vec<usize> = layers.iter().map(|layer| layer.experts.len()).collect();
    if held.iter().any(|&experts| experts != held[0]) {
        settings.push(("experts of layers".to_owned(), format!("{held:?}")));
    }
    Ok(Plan {
        total: counts.total as f64,
        activated: counts.activated(counts.num_experts),
        reached_by,
        settings,
        ..Plan::default()
    })
}

/// Returns the plan with what is to be said about the order of neurons, if that of merged experts is looked for.
fn aligned(plan: Plan, config: &Config, layers: &[LayerSurgery], alignment: Alignment) -> Result<Plan> {
    let notice = match alignment {
        Alignment::Weights => align::notice(&shape(config)?.widths, layers),
        Alignment::None => None,
    };
    Ok(Plan { notices: notice.into_iter().collect(), ..plan })
}

/// Writes the model of a job.
fn write(job: &Job<'_>, surgery: Surgery<'_>, progress: &mut dyn FnMut(Progress)) -> Result<()> {
    surgery::operate_on(job.comm, [job.model, job.out], surgery, job.force, &mut |at| {
        progress(Progress { stage: "writing", done: at.done_bytes, total: at.total_bytes });
    })?;
    Ok(())
}

/// Returns the model that a job made, with the loads of the source's experts.
fn made(plan: Plan, entropies: &[f64], mut measured: Vec<(String, f64)>) -> Made {
    let least = entropies.iter().copied().fold(1.0, f64::min);
    measured.push(("least load entropy of a layer before".to_owned(), least));
    Made { plan, measured }
}

/// Returns the entropy of the use of a layer's experts over that of an even use.
fn entropy(usage: &[f64]) -> f64 {
    if usage.len() < 2 {
        return 1.0;
    }
    let sum: f64 = usage.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
    sum / (usage.len() as f64).ln()
}

/// Divides `total` experts among layers: `fewest` of each, or all that it has, and otherwise those of the largest values of all
/// layers. Among equals the earlier layer and the lower expert win.
fn shares(values: &[Vec<f64>], total: usize, fewest: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = values.iter().map(|values| values.len().min(fewest)).collect();
    let mut others = Vec::new();
    for (layer, values) in values.iter().enumerate() {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
        others.extend(order[counts[layer]..].iter().map(|&expert| (values[expert], layer, expert)));
    }
    others.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let left = total.saturating_sub(counts.iter().sum());
    others.iter().take(left).for_each(|&(_, layer, _)| counts[layer] += 1);
    counts
}

/// A layer of experts in groups, to be merged with these weights; group i has the members of all gates that are i.
fn groups_of(labels: &[usize], weight: impl Fn(usize) -> f64) -> Vec<Vec<(usize, f64)>> {
    let count = labels.iter().max().map_or(0, |most| most + 1);
    let group = |group: usize| {
        let members: Vec<usize> = (0..labels.len()).filter(|&e| labels[e] == group).collect();
        let all: f64 = members.iter().map(|&e| weight(e)).sum();
        let share = |e: usize| if all > 0.0 { weight(e) / all } else { 1.0 / members.len() as f64 };
        normalised(members.iter().map(|&e| (e, share(e))).collect())
    };
    (0..count).map(group).collect()
}

/// Makes weights add up to 1 as nearly as f64 can.
fn normalised(mut parts: Vec<(usize, f64)>) -> Vec<(usize, f64)> {
    let all: f64 = parts.iter().map(|(_, weight)| weight).sum();
    parts.iter_mut().for_each(|(_, weight)| *weight /= all);
    parts
}
