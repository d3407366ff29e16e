//! Controls: the dense model itself, and a smaller dense model of random weights.

mod small_dense;
#[cfg(test)]
mod tests;

use std::path::Path;

use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::CONFIG_FILE;
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::{Config, checkpoint};

pub(crate) use small_dense::SMALL_DENSE;

use crate::error::Result;
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, settings};

settings! {
    /// The settings of a method that has none.
    pub(crate) struct NoSettings {}
}

/// Reads the configuration of the dense model in `dir`.
pub(crate) fn dense_config(dir: &Path) -> Result<Config> {
    let config = Config::load(dir)?;
    check_dense(&config, &dir.join(CONFIG_FILE))?;
    Ok(config)
}

/// Checks that `config` is dense, with layers of one shape.
pub(crate) fn check_dense(config: &Config, path: &Path) -> Result<()> {
    if config.is_dense() && config.is_even() {
        return Ok(());
    }
    let problem = format!("is {}, not a plain llama", config.model_type());
    let help = "use a dense model whose layers are alike";
    Err(dsmoe_core::Error::field(path, "model_type", problem, help).into())
}

/// Reports a streamed writer's progress as a method's.
fn writing(progress: &mut dyn FnMut(Progress)) -> impl FnMut(checkpoint::Progress) + '_ {
    |at| progress(Progress { stage: "writing", done: at.done_bytes, total: at.total_bytes })
}

/// The method `dense`: a copy of the dense model, to measure what more training on the same text does.
pub(crate) static DENSE: Entry<NoSettings> = Entry {
    name: "dense",
    summary: "control: the dense model itself, a copy; its size is its own, whatever the budget",
    ..Entry::new(|_| Ok(Box::new(Dense)))
};

struct Dense;

impl Configured for Dense {
    fn plan(&self, config: &Config, _budget: Budget) -> Result<Plan> {
        check_dense(config, Path::new(CONFIG_FILE))?;
        let reached_by = "full size, whatever the budget".to_owned();
        Ok(Plan { unchanged: true, ..Plan::dense(Accounting::of(config).total as f64, reached_by) })
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let plan = self.plan(&dense_config(job.model)?, job.budget)?;
        let options = ExportOptions { force: job.force, ..ExportOptions::new(ExportAs::Native) };
        export(job.model, job.out, &options, &mut writing(progress))?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
