//! A smaller dense model with random weights.

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{CONFIG_FILE, LayerShape};
use dsmoe_core::init::{InitOptions, init_beside};

use super::{NoSettings, check_dense, dense_config, writing};
use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::Entry;

/// The method `small-dense`: a dense model as large as the budget, to be trained from scratch. Depth, residual width
/// and head width are the source's; key-value groups and neurons are scaled by one factor, then neurons fill the
/// budget.
pub(crate) static SMALL_DENSE: Entry<NoSettings> = Entry {
    name: "small-dense",
    summary: "control: a smaller dense model with random weights, for training from scratch; one neuron per layer is a step",
    ..Entry::new(|_| Ok(Box::new(SmallDense)))
};

struct SmallDense;

impl SmallDense {
    /// The sizes of every layer at that many parameters.
    fn shape(config: &Config, budget: Budget) -> Result<LayerShape> {
        let counts = Accounting::of(config);
        let (layers, hidden) = (counts.num_layers as f64, config.hidden as f64);
        let (rest, wanted) = ((counts.non_ffn - counts.attention) as f64, budget.params(counts.total));
        let group = config.num_heads / config.num_kv_heads;
        let attention = counts.attention as f64 / config.num_kv_heads as f64;
        let neuron = 3.0 * hidden * layers;
        let least = rest + attention + neuron;
        if !(least..=counts.total as f64).contains(&wanted) {
            let problem = "is no size between one head group with one neuron and the dense model";
            return Err(Error::out_of_reach(budget, problem, [least, counts.total as f64], counts.total));
        }
        let factor = (wanted - rest) / (counts.attention + counts.ffn) as f64;
        // A narrow FFN may leave no room for the groups of the common factor.
        let most_groups = ((wanted - rest - neuron) / attention).floor().max(1.0);
        let groups = (factor * config.num_kv_heads as f64).round().clamp(1.0, most_groups);
        let neurons = ((wanted - rest - groups * attention) / neuron).round().max(1.0);
        let num_kv_heads = groups as usize;
        Ok(LayerShape { num_heads: num_kv_heads * group, num_kv_heads, intermediate: neurons as usize })
    }

    fn small(config: &Config, budget: Budget) -> Result<Config> {
        let mut small = config.clone();
        small.set_layers(vec![SmallDense::shape(config, budget)?; config.num_layers]);
        Ok(small)
    }
}

impl Configured for SmallDense {
    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        check_dense(config, Path::new(CONFIG_FILE))?;
        let small = SmallDense::small(config, budget)?;
        let total = Accounting::of(&small).total as f64;
        let LayerShape { num_heads, num_kv_heads, intermediate } = small.layer(0);
        let heads = format!("{num_heads} heads, {num_kv_heads} of keys and values");
        let reached_by =
            format!("{heads}, and {intermediate} neurons in each of {} layers", small.num_layers);
        Ok(Plan::dense(total, reached_by))
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = dense_config(job.model)?;
        let plan = self.plan(&config, job.budget)?;
        let small = SmallDense::small(&config, job.budget)?;
        let options = InitOptions { seed: job.seed, force: job.force, ..InitOptions::default() };
        init_beside(job.model, &small, job.out, &options, &mut writing(progress))?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
