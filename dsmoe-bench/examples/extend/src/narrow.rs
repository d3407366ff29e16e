//! A method: every FFN keeps its first neurons, as many as the budget pays for, and its output gets a learned factor.

use std::sync::Arc;

use dsmoe_baselines::{
    Budget, Configured, Entry, Error, Job, Made, Plan, Progress, Result, SettingValues, Settings as _,
};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Dtype, OutputDir, copy_companions};
use dsmoe_core::config::LayerShape;
use dsmoe_core::{Config, Model};

use crate::scaled::{SCALE, ScaledSpec};

dsmoe_baselines::settings! {
    /// Settings of the method.
    pub struct Settings {
        /// First value of the learned factors, a number above 0.
        pub scale: f64 = 1.0,
    }
}

/// The method `narrow`.
pub static NARROW: Entry<Settings> = Entry {
    name: "narrow",
    summary: "the first neurons of every FFN, with a learned factor of its output; one neuron per layer is a step",
    ..Entry::new(|settings| match settings.scale.is_finite() && settings.scale > 0.0 {
        true => Ok(Box::new(Narrow(settings))),
        false => Err(Error::Setting {
            name: "scale".to_owned(),
            problem: format!("cannot be {}", settings.scale),
            help: "a number above 0".to_owned(),
        }),
    })
};

struct Narrow(Settings);

/// Returns the configuration of `dense` with so many neurons in every FFN.
fn with_neurons(dense: &Config, neurons: usize) -> Config {
    let mut config = dense.clone();
    config.set_layers(vec![LayerShape { intermediate: neurons, ..dense.layer(0) }; dense.num_layers]);
    config.ffn = Some(Arc::new(ScaledSpec));
    config
}

/// Returns the configuration whose parameters are nearest to the budget.
fn nearest(dense: &Config, budget: Budget) -> Result<Config> {
    if !dense.is_dense() || !dense.is_even() || dense.architecture.mlp_bias || dense.architecture.output_bias
    {
        let problem = format!("is {} or has FFNs with biases", dense.model_type());
        let help = "use a dense model whose layers are alike and whose FFNs have no biases".to_owned();
        return Err(Error::Model { problem, help });
    }
    let params = |neurons: usize| Accounting::of(&with_neurons(dense, neurons)).total as f64;
    let dense_total = Accounting::of(dense).total;
    let step = params(2) - params(1);
    let neurons = ((budget.params(dense_total) - params(1)) / step).round() + 1.0;
    if !(1.0..=dense.intermediate as f64).contains(&neurons) {
        let [least, most] = [1, dense.intermediate].map(params);
        return Err(Error::Budget {
            asked: budget.to_string(),
            problem: "is out of reach".to_owned(),
            help: format!("use {least} to {most} parameters"),
        });
    }
    Ok(with_neurons(dense, neurons as usize))
}

impl Configured for Narrow {
    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        let narrow = nearest(config, budget)?;
        let total = Accounting::of(&narrow).total as f64;
        let reached_by = format!("{} of {} neurons", narrow.intermediate, config.intermediate);
        Ok(Plan { total, activated: total, reached_by, ..Plan::default() })
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let source = Model::load(job.model)?;
        let plan = self.plan(source.config(), job.budget)?;
        let output = OutputDir::create_on(job.comm, job.model, job.out, job.force)?;
        let mut model = Model::new(nearest(source.config(), job.budget)?);
        let entries = model.layout().entries().to_vec();
        let total = entries.len() as u64;
        for (done, entry) in (0..).zip(&entries) {
            progress(Progress { stage: "cutting", done, total });
            let values = &mut model.params_mut()[entry.range.clone()];
            match source.layout().get(&entry.spec.name) {
                // Projections lie neuron by neuron, so that the first ones are the start of each.
                Some(old) => values.copy_from_slice(&source.params()[old.range.start..][..values.len()]),
                None if entry.spec.name.ends_with(SCALE) => values.fill(self.0.scale as f32),
                None => unreachable!("{} is a tensor of the dense model", entry.spec.name),
            }
        }
        output.commit_with(|dir| {
            model.save(dir, Dtype::F32)?;
            copy_companions(job.model, dir)
        })?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
