//! The conversion of a dense model directory to one with FFNs of type `topk`: the number of active experts nearest to a
//! budget, and the directory, streamed.

use std::path::Path;
use std::sync::Arc;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, Dtype, TensorInfo, check_llama_tensors, open_model};
use dsmoe_core::config::CONFIG_FILE;
use dsmoe_core::ffn::FfnSpec;
use dsmoe_core::files::write_synced;
use dsmoe_core::masks::Masks;
use dsmoe_core::params::TensorSpec;
use dsmoe_core::partition::Partition;
use serde_json::json;

use super::spec::TopkSpec;
use crate::error::{Error, Result};
use crate::method::{Budget, Job, Plan, Progress};
use crate::rewrite::{Additions, rewrite};
use crate::settings::shown;

/// The neurons of all experts, in the form that `dsmoe convert --partition` reads.
pub const EXPERTS_FILE: &str = "experts.json";

/// Opens the dense model in `dir`: its configuration and its files.
///
/// # Errors
/// They cannot be read, or the model is not dense or has masked weights.
pub(crate) fn open_dense(dir: &Path) -> Result<(Config, Checkpoint)> {
    let config = Config::load(dir)?;
    let wrong = |field: &str, problem: &str| {
        Error::Core(dsmoe_core::Error::field(&dir.join(CONFIG_FILE), field, problem, "use a dense model"))
    };
    if !config.is_dense() {
        return Err(wrong("model_type", "says that the model has experts or thresholds already"));
    }
    let checkpoint = open_model(dir, &config)?;
    check_llama_tensors(&config, &checkpoint)?;
    if Masks::load(dir)?.is_some() {
        return Err(wrong("the model", "has pruned weights, whose masks would not fit the experts"));
    }
    Ok((config, checkpoint))
}

/// Checks that `num_experts` divide the neurons of every layer.
///
/// # Errors
/// They do not; the message lists numbers that do.
pub(crate) fn check_experts(config: &Config, num_experts: usize) -> Result<()> {
    for shape in config.layers() {
        Partition::contiguous(shape.intermediate, num_experts)?;
    }
    Ok(())
}

/// Chooses the spec whose number of activated parameters is nearest to `budget`, the smaller number among equals, and
/// plans the model that it makes of the dense `config`. `specs` ascends in active experts.
///
/// # Errors
/// The budget is more than half a step outside what they reach.
///
/// # Panics
/// There are no `specs`.
pub(crate) fn nearest(
    config: &Config,
    budget: Budget,
    specs: impl Iterator<Item = TopkSpec>,
) -> Result<(TopkSpec, Plan)> {
    let counted: Vec<(TopkSpec, Accounting)> =
        specs.map(|spec| (spec, Accounting::of(&with_spec(config, spec)))).collect();
    let activated = |i: usize| counted[i].1.activated(0.0);
    let asked = budget.params(Accounting::of(config).total);
    let off = |i: usize| (activated(i) - asked).abs();
    let last = counted.len() - 1;
    let best = (0..=last).min_by(|&a, &b| off(a).total_cmp(&off(b))).expect("a spec");
    let step = counted[best].1.ffn as f64 / counted[best].1.num_experts;
    let (spec, counts) = &counted[best];
    if off(best) > 0.5 * step {
        let side = if asked < activated(best) { "below" } else { "above" };
        let experts = format!("{} of {} experts", spec.active_experts(), spec.all_experts());
        let problem = format!("is {side} {experts}, which activate {}", Budget::Params(activated(best)));
        let problem = format!("{problem}; use another number of experts, or a budget within reach");
        let ends = [0, last].map(activated);
        return Err(Error::out_of_reach(budget, problem, ends, Accounting::of(config).total));
    }
    let settings = spec.settings().into_iter().map(|(key, value)| (key, shown(&value)));
    let settings = settings.chain([("step".to_owned(), Budget::Params(step).to_string())]).collect();
    let plan = Plan {
        total: counts.total as f64,
        activated: activated(best),
        reached_by: match spec.router.num_residual {
            0 => format!("{} of {} experts", spec.active_experts(), spec.all_experts()),
            r => format!("{} of {} experts, {r} of them always", spec.active_experts(), spec.all_experts()),
        },
        settings,
        ..Plan::default()
    };
    Ok((*spec, plan))
}

fn with_spec(config: &Config, spec: TopkSpec) -> Config {
    let mut config = config.clone();
    config.ffn = Some(Arc::new(spec));
    config
}

/// The experts and the gate of a layer.
pub(crate) struct LayerExperts {
    /// The original neuron of each row, experts one after the other.
    pub(crate) order: Vec<u32>,
    /// The gate's tensors, in the order of [`super::gate::Gate::tensors`].
    pub(crate) gate: Vec<Vec<f32>>,
}

/// Writes the dense model of `job` with FFNs of `spec`. Weights keep their types; gates are f32.
///
/// # Errors
/// The output directory is not empty; the file system refuses.
pub(crate) fn write(
    job: &Job<'_>,
    config: &Config,
    checkpoint: &Checkpoint,
    spec: TopkSpec,
    layers: &[LayerExperts],
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let config = with_spec(config, spec);
    let gate = spec.gate(config.hidden).tensors();
    let name = |layer: usize, name: &str| format!("model.layers.{layer}.mlp.{name}");
    let gates = (0..layers.len()).flat_map(|layer| gate.iter().map(move |tensor| (layer, tensor)));
    let gates = gates.map(|(layer, TensorSpec { name: tensor, shape, .. })| TensorInfo {
        name: name(layer, tensor),
        dtype: Dtype::F32,
        shape: shape.clone(),
    });
    let experts = |LayerExperts { order, .. }: &LayerExperts| -> Vec<Vec<u32>> {
        order.chunks_exact(order.len() / spec.all_experts()).map(<[u32]>::to_vec).collect()
    };
    let experts = json!({"layers": layers.iter().map(experts).collect::<Vec<_>>()});
    let additions = Additions {
        infos: gates.collect(),
        values: &|at, _| Ok(layers[at / gate.len()].gate[at % gate.len()].clone()),
        order: &|layer| layers.get(layer).map(|layer| &layer.order[..]),
        files: &|dir| {
            let path = dir.join(EXPERTS_FILE);
            write_synced(&path, format!("{experts}\n").as_bytes()).map_err(dsmoe_core::Error::io(&path))
        },
    };
    rewrite(job, &config, checkpoint, &additions, progress)
}
