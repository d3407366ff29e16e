//! LLM-Pruner (Ma, Fang, Wang 2023, arXiv 2305.11627) removes whole neurons, heads or channels, the least important
//! first, and leaves a smaller dense model.
//!
//! Memory: parameters and one set of gradients in f32 whatever the importance (`taylor-second` sums per sequence,
//! `taylor-mix` runs the text once per 34 million weights scored), and the activations of one sequence. For
//! LLaMA-3.2-1B that is 9.9 GB and 2 MB per token of a sequence (1,024 tokens: 11.9 GB), and with `taylor-mix` 0.3 GB
//! more.

mod groups;
mod importance;
mod rewrite;
mod solve;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use dsmoe_core::calibrate::check_text;
use dsmoe_core::checkpoint::{OutputDir, check_llama_tensors, open_model};
use dsmoe_core::masks::{MASKS_FILE, Masks};
use dsmoe_core::{Config, Model};

pub use importance::{Importance, Reduce};

use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings, stored_as_text, wrong};
use groups::{Cuts, Groups};
use importance::{Scoring, group_scores, largest, random_scores};

/// Weights that `taylor-mix` sums gradients of at a time: 0.3 GB.
const MIX_WINDOW: usize = 32 << 20;

/// The method `llm-pruner-block`.
pub(crate) static BLOCK: Entry<BlockSettings> = Entry {
    name: "llm-pruner-block",
    summary: "removes FFN neurons and attention heads of a range of layers by gradient; any budget to a neuron per layer",
    ..Entry::new(|settings| Ok(Box::new(Pruner::Block(settings))))
};

/// The method `llm-pruner-channel`.
pub(crate) static CHANNEL: Entry<ChannelSettings> = Entry {
    name: "llm-pruner-channel",
    summary: "removes channels of the residual stream through the whole network by gradient; any budget to a channel",
    ..Entry::new(|settings| match settings.multiple {
        0 => Err(wrong::<ChannelSettings>("multiple", 0)),
        _ => Ok(Box::new(Pruner::Channel(settings))),
    })
};

settings! {
    /// Settings of block-wise LLM-Pruner: FFN neurons, and key/value heads with their query heads, in a range of
    /// layers.
    pub struct BlockSettings {
        /// Importance of a weight: taylor-first, taylor-second, taylor-mix, vector, magnitude-l1, magnitude-l2 or
        /// random.
        pub importance: Importance = Importance::TaylorFirst,
        /// Reduction of the importances of coupled tensors to one: sum, max, mean, prod or last.
        pub reduce: Reduce = Reduce::Sum,
        /// Layers to prune, FIRST..LAST, both included and counted from 0; by default the paper's 4..29 of 32, scaled.
        pub layers: Option<Layers> = None,
        /// True removes attention heads as well as neurons.
        pub heads: bool = true,
    }
}

settings! {
    /// Settings of channel-wise LLM-Pruner: channels of the residual stream, through the whole network.
    pub struct ChannelSettings {
        /// Importance of a weight: taylor-first, taylor-second, taylor-mix, vector, magnitude-l1, magnitude-l2 or
        /// random.
        pub importance: Importance = Importance::TaylorFirst,
        /// Reduction of the importances of coupled tensors to one: sum, max, mean, prod or last.
        pub reduce: Reduce = Reduce::Sum,
        /// Divisor of the new width, 1 to hidden_size; transformers needs the number of heads.
        pub multiple: usize = 1,
    }
}

/// A range of layers, `FIRST..LAST`, both included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layers(pub RangeInclusive<usize>);

stored_as_text!(Layers);

impl FromStr for Layers {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Layers, ()> {
        let (first, last) = text.split_once("..").ok_or(())?;
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| ());
        Ok(Layers(number(first)?..=number(last)?))
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.0.start(), self.0.end())
    }
}

/// LLM-Pruner with its settings.
enum Pruner {
    Block(BlockSettings),
    Channel(ChannelSettings),
}

/// The model to make, and the sets of groups that compete for a number of places.
struct Resolved {
    plan: Plan,
    pruned: Config,
    sets: Vec<(Groups, usize)>,
}

impl BlockSettings {
    /// Returns the layers to prune of a model of `config`.
    fn layers(&self, config: &Config) -> Result<RangeInclusive<usize>> {
        let Some(Layers(layers)) = self.layers.clone() else {
            return Ok(solve::default_layers(config.num_layers));
        };
        if layers.is_empty() || *layers.end() >= config.num_layers {
            let problem = format!("{} of {} layers", Layers(layers), config.num_layers);
            let help = format!("use FIRST..LAST within 0..{}, both included", config.num_layers - 1);
            return Err(Error::setting("layers", problem, help));
        }
        Ok(layers)
    }

    fn resolve(&self, config: &Config, budget: Budget) -> Result<Resolved> {
        check_dense(config)?;
        let (layers, heads) = (self.layers(config)?, self.heads);
        let sizes = solve::block(config, budget, &layers, heads)?;
        let sets = layers.clone().flat_map(|i| {
            let shape = sizes.shapes[i];
            [(Groups::heads(config, i), shape.num_kv_heads), (Groups::neurons(config, i), shape.intermediate)]
        });
        let sets = sets.filter(|(groups, kept)| *kept < groups.count).collect();
        let range = Layers(layers.clone());
        let width = sizes.shapes.iter().map(|shape| shape.intermediate).sum::<usize>() as f64
            / sizes.shapes.len() as f64;
        let ratio = match !heads || sizes.ratios.heads == sizes.ratios.neurons {
            true => sizes.ratios.neurons.to_string(),
            false => format!("{} (heads {})", sizes.ratios.neurons, sizes.ratios.heads),
        };
        let last = sizes.shapes[*layers.end()];
        let settings: [(&str, &dyn fmt::Display); 6] = [
            ("layers", &range),
            ("ratio", &ratio),
            ("num_attention_heads", &last.num_heads),
            ("num_key_value_heads", &last.num_kv_heads),
            ("intermediate_size", &last.intermediate),
            ("mean intermediate_size", &width),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_string())).to_vec();
        let reached_by = format!("ratio {ratio} of layers {range}");
        let plan = Plan { settings, ..Plan::dense(sizes.total, reached_by) };
        let mut pruned = config.clone();
        pruned.set_layers(sizes.shapes);
        Ok(Resolved { plan, pruned, sets })
    }
}

impl ChannelSettings {
    fn resolve(&self, config: &Config, budget: Budget) -> Result<Resolved> {
        check_dense(config)?;
        check_channels(config)?;
        if self.multiple > config.hidden {
            let help = format!("use 1 to {}", config.hidden);
            return Err(Error::setting("multiple", format!("is {}", self.multiple), help));
        }
        let sizes = solve::channel(config, budget, self.multiple)?;
        let reached_by = format!("{} of {} channels", sizes.hidden, config.hidden);
        let settings = [("ratio", sizes.ratio.to_string()), ("hidden_size", sizes.hidden.to_string())];
        let settings = settings.map(|(name, value)| (name.to_owned(), value)).to_vec();
        let plan = Plan { settings, ..Plan::dense(sizes.total, reached_by) };
        let mut pruned = config.clone();
        pruned.set_hidden(sizes.hidden);
        let sets = [(Groups::channels(config), sizes.hidden)].into_iter();
        Ok(Resolved { plan, pruned, sets: sets.filter(|(groups, kept)| *kept < groups.count).collect() })
    }
}

fn check_dense(config: &Config) -> Result<()> {
    let help = "use a dense model, such as the one that this was made from";
    if config.is_dense() { Ok(()) } else { Err(Error::model("has experts or thresholds", help)) }
}

/// Checks that the residual stream of a model can be narrowed: nothing in its family is a function of the width.
fn check_channels(config: &Config) -> Result<()> {
    let family = config.family().model_type;
    let problem = if config.architecture.scales_by_width(config.hidden) {
        format!("is of type {family}, whose embedding is multiplied by the root of hidden_size")
    } else {
        return Ok(());
    };
    Err(Error::model(problem, "use llm-pruner-block"))
}

impl Pruner {
    fn resolve(&self, config: &Config, budget: Budget) -> Result<Resolved> {
        match self {
            Pruner::Block(settings) => settings.resolve(config, budget),
            Pruner::Channel(settings) => settings.resolve(config, budget),
        }
    }

    fn scoring(&self) -> Scoring {
        let (importance, reduce) = match *self {
            Pruner::Block(BlockSettings { importance, reduce, .. }) => (importance, reduce),
            Pruner::Channel(ChannelSettings { importance, reduce, .. }) => (importance, reduce),
        };
        Scoring { importance, reduce, window: MIX_WINDOW }
    }
}

impl Configured for Pruner {
    fn needs_calibration(&self) -> bool {
        self.scoring().importance.needs_gradients()
    }

    fn resolved(&self) -> SettingValues {
        match self {
            Pruner::Block(settings) => settings.values(),
            Pruner::Channel(settings) => settings.values(),
        }
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        Ok(self.resolve(config, budget)?.plan)
    }

    /// Scores the groups of all sets and writes the model without the least important.
    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let Resolved { plan, pruned, sets } = self.resolve(&config, job.budget)?;
        let scoring = self.scoring();
        if self.needs_calibration() {
            check_text(job.calibration, 1, "gradients")?;
        }
        if Masks::load(job.model)?.is_some() {
            let help = "use the dense model it was made from";
            return Err(Error::model(format!("has {MASKS_FILE}"), help));
        }
        let checkpoint = open_model(job.model, &config)?;
        let names = check_llama_tensors(&config, &checkpoint)?;
        let output = OutputDir::create_on(job.comm, job.model, job.out, job.force)?;

        let (groups, places): (Vec<Groups>, Vec<usize>) = sets.into_iter().unzip();
        let mut measured = Vec::new();
        let scores = match scoring.importance {
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
        let source = rewrite::Source { dir: job.model, checkpoint: &checkpoint, names: &names };
        rewrite::rewrite(&source, &pruned, &cuts, output, &mut report)?;
        Ok(Made { plan, measured })
    }
}
