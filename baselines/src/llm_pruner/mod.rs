//! LLM-Pruner (Ma, Fang, Wang 2023, arXiv 2305.11627): whole neurons, heads or channels go, the least important first,
//! and a smaller dense model stays.
//!
//! Memory: parameters and one set of gradients in f32 whatever the importance (`taylor-second` sums per sequence,
//! `taylor-mix` runs the text once per 34 million weights scored), and the activations of one sequence. For LLaMA-3.2-1B
//! that is 9.9 GB and 2 MB per token of a sequence (1,024 tokens: 11.9 GB), and with `taylor-mix` 0.3 GB more.

mod gradients;
mod groups;
mod importance;
mod rewrite;
mod solve;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use dsmoe_core::checkpoint::{Checkpoint, OutputDir, check_llama_tensors};
use dsmoe_core::masks::{MASKS_FILE, Masks};
use dsmoe_core::{Config, Model};

use crate::error::{Error, Result};
use crate::method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress};
use gradients::check_calibration;
use groups::{Cuts, Groups};
use importance::{Importance, Reduce, Scoring, group_scores, largest, random_scores};

/// Weights that `taylor-mix` sums gradients of at a time: 0.3 GB.
const MIX_WINDOW: usize = 32 << 20;

const IMPORTANCE: Knob = Knob {
    name: "importance",
    default: "taylor-first",
    help: "use taylor-first, taylor-second, taylor-mix, vector, magnitude-l1, magnitude-l2 or random",
};
const REDUCE: Knob = Knob {
    name: "reduce",
    default: "sum",
    help: "how the importances of coupled tensors become one: use sum, max, mean, prod or last",
};
const LAYERS: Knob = Knob {
    name: "layers",
    default: "",
    help: "layers to prune, use FIRST..LAST, both included and counted from 0 [the paper's 4..29 of 32, scaled]",
};
const HEADS: Knob =
    Knob { name: "heads", default: "yes", help: "whether attention heads go as well: use yes or no" };

const MULTIPLE: Knob = Knob {
    name: "multiple",
    default: "1",
    help: "what the new width is a multiple of (transformers wants the number of heads): use 1 to hidden_size",
};

/// Block-wise: FFN neurons, and key/value heads with their query heads, in a range of layers.
#[derive(Clone, Copy, Debug)]
pub struct LlmPrunerBlock;

/// Channel-wise: channels of the residual stream, through the whole network.
#[derive(Clone, Copy, Debug)]
pub struct LlmPrunerChannel;

/// `FIRST..LAST`, both included.
struct Layers(RangeInclusive<usize>);

impl FromStr for Layers {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Layers, ()> {
        let (first, last) = text.split_once("..").ok_or(())?;
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| ());
        Ok(Layers(number(first)?..=number(last)?))
    }
}

/// `yes` or `no`.
struct Switch(bool);

impl FromStr for Switch {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Switch, ()> {
        match text {
            "yes" => Ok(Switch(true)),
            "no" => Ok(Switch(false)),
            _ => Err(()),
        }
    }
}

/// What a plan decides: the model to make, and which groups compete for how many places.
struct Resolved {
    plan: Plan,
    pruned: Config,
    sets: Vec<(Groups, usize)>,
}

/// Layers to prune of a model of `config`.
fn layers(config: &Config, knobs: &Knobs) -> Result<RangeInclusive<usize>> {
    let Some(Layers(layers)) = knobs.get("layers")? else {
        return Ok(solve::default_layers(config.num_layers));
    };
    if layers.is_empty() || *layers.end() >= config.num_layers {
        return Err(Error::Knob {
            name: "layers".to_owned(),
            problem: format!("{}..{} of {} layers", layers.start(), layers.end(), config.num_layers),
            mend: format!("use FIRST..LAST within 0..{}, both included", config.num_layers - 1),
        });
    }
    Ok(layers)
}

fn check_dense(config: &Config) -> Result<()> {
    if !config.is_dense() {
        return Err(Error::Knob {
            name: "model".to_owned(),
            problem: "has experts".to_owned(),
            mend: "name a dense LLaMA, or export this model with --as dense first".to_owned(),
        });
    }
    Ok(())
}

fn settings(knobs: &Knobs, resolved: &[(&str, &dyn fmt::Display)]) -> Vec<(String, String)> {
    let mut settings: Vec<(String, String)> =
        knobs.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    for (name, value) in resolved {
        settings.retain(|(known, _)| known != name);
        settings.push(((*name).to_owned(), value.to_string()));
    }
    settings
}

fn resolve_block(config: &Config, budget: Budget, knobs: &Knobs) -> Result<Resolved> {
    check_dense(config)?;
    knobs.need::<Importance>("importance")?;
    knobs.need::<Reduce>("reduce")?;
    let Switch(heads) = knobs.need("heads")?;
    let layers = layers(config, knobs)?;
    let sizes = solve::block(config, budget, &layers, heads)?;
    let sets = layers.clone().flat_map(|i| {
        let shape = sizes.shapes[i];
        [(Groups::heads(config, i), shape.num_kv_heads), (Groups::neurons(config, i), shape.intermediate)]
    });
    let sets = sets.filter(|(groups, kept)| *kept < groups.count).collect();
    let range = format!("{}..{}", layers.start(), layers.end());
    let width =
        sizes.shapes.iter().map(|shape| shape.intermediate).sum::<usize>() as f64 / sizes.shapes.len() as f64;
    let ratio = match !heads || sizes.ratios.heads == sizes.ratios.neurons {
        true => sizes.ratios.neurons.to_string(),
        false => format!("{} (heads {})", sizes.ratios.neurons, sizes.ratios.heads),
    };
    let last = sizes.shapes[*layers.end()];
    let resolved: [(&str, &dyn fmt::Display); 6] = [
        ("layers", &range),
        ("ratio", &ratio),
        ("num_attention_heads", &last.num_heads),
        ("num_key_value_heads", &last.num_kv_heads),
        ("intermediate_size", &last.intermediate),
        ("mean intermediate_size", &width),
    ];
    let plan = Plan {
        total: sizes.total,
        activated: sizes.total,
        reached_by: format!("ratio {ratio} of layers {range}"),
        settings: settings(knobs, &resolved),
    };
    let mut pruned = config.clone();
    pruned.set_layers(sizes.shapes);
    Ok(Resolved { plan, pruned, sets })
}

fn resolve_channel(config: &Config, budget: Budget, knobs: &Knobs) -> Result<Resolved> {
    check_dense(config)?;
    knobs.need::<Importance>("importance")?;
    knobs.need::<Reduce>("reduce")?;
    let multiple: usize = knobs.need("multiple")?;
    if !(1..=config.hidden).contains(&multiple) {
        return Err(Error::Knob {
            name: "multiple".to_owned(),
            problem: format!("is {multiple}"),
            mend: format!("use 1 to {}", config.hidden),
        });
    }
    let sizes = solve::channel(config, budget, multiple)?;
    let plan = Plan {
        total: sizes.total,
        activated: sizes.total,
        reached_by: format!("{} of {} channels", sizes.hidden, config.hidden),
        settings: settings(knobs, &[("ratio", &sizes.ratio), ("hidden_size", &sizes.hidden)]),
    };
    let mut pruned = config.clone();
    pruned.set_hidden(sizes.hidden);
    let sets = [(Groups::channels(config), sizes.hidden)].into_iter();
    Ok(Resolved { plan, pruned, sets: sets.filter(|(groups, kept)| *kept < groups.count).collect() })
}

fn needs_gradients(knobs: &Knobs) -> bool {
    knobs.need::<Importance>("importance").is_ok_and(Importance::needs_gradients)
}

/// Scores the groups of all sets and writes the model without the least important.
fn prune(job: &Job<'_>, resolve: Resolve, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
    let config = Config::load(job.model)?;
    let Resolved { plan, pruned, sets } = resolve(&config, job.budget, job.knobs)?;
    let (importance, reduce) = (job.knobs.need("importance")?, job.knobs.need("reduce")?);
    let scoring = Scoring { importance, reduce, window: MIX_WINDOW };
    if needs_gradients(job.knobs) {
        check_calibration(job.calibration)?;
    }
    if Masks::load(job.model)?.is_some() {
        return Err(Error::Knob {
            name: "model".to_owned(),
            problem: format!("has {MASKS_FILE}"),
            mend: "name the dense model it was made from".to_owned(),
        });
    }
    let checkpoint = Checkpoint::open(job.model)?;
    let names = check_llama_tensors(&config, &checkpoint)?;
    let output = OutputDir::create_from(job.model, job.out, job.force)?;

    let (groups, places): (Vec<Groups>, Vec<usize>) = sets.into_iter().unzip();
    let mut measured = Vec::new();
    let scores = match importance {
        Importance::Random => random_scores(&groups, job.seed),
        _ => {
            let model = Model::load(job.model)?;
            let mut report = |done, total| progress(Progress { stage: "gradients", done, total });
            let (scores, loss) = group_scores(&model, &groups, scoring, job.calibration, &mut report)?;
            measured.extend(loss.map(|loss| ("calibration loss (nats)".to_owned(), loss)));
            scores
        }
    };
    let mut cuts = Cuts::default();
    for ((groups, places), scores) in groups.iter().zip(places).zip(&scores) {
        cuts.keep(groups, &largest(scores, places));
    }
    let mut report = |done, total| progress(Progress { stage: "tensors", done, total });
    rewrite::rewrite(job.model, &checkpoint, &names, &pruned, &cuts, output, &mut report)?;
    Ok(Made { plan, measured })
}

type Resolve = fn(&Config, Budget, &Knobs) -> Result<Resolved>;

impl Method for LlmPrunerBlock {
    fn name(&self) -> &'static str {
        "llm-pruner-block"
    }

    fn summary(&self) -> &'static str {
        "removes FFN neurons and attention heads of a range of layers by gradient; any budget to a neuron per layer"
    }

    fn knobs(&self) -> &'static [Knob] {
        &[IMPORTANCE, REDUCE, LAYERS, HEADS]
    }

    fn needs_calibration(&self, knobs: &Knobs) -> bool {
        needs_gradients(knobs)
    }

    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan> {
        Ok(resolve_block(config, budget, knobs)?.plan)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        prune(job, resolve_block, progress)
    }
}

impl Method for LlmPrunerChannel {
    fn name(&self) -> &'static str {
        "llm-pruner-channel"
    }

    fn summary(&self) -> &'static str {
        "removes channels of the residual stream through the whole network by gradient; any budget to a channel"
    }

    fn knobs(&self) -> &'static [Knob] {
        &[IMPORTANCE, REDUCE, MULTIPLE]
    }

    fn needs_calibration(&self, knobs: &Knobs) -> bool {
        needs_gradients(knobs)
    }

    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan> {
        Ok(resolve_channel(config, budget, knobs)?.plan)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        prune(job, resolve_channel, progress)
    }
}
