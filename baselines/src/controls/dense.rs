//! The dense model as it is.

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::CONFIG_FILE;
use dsmoe_core::export::{ExportAs, export};

use super::{NoSettings, check_dense, dense_config, writing};
use crate::error::Result;
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::Entry;

/// The method `dense`: a copy of the dense model, to measure what more training on the same text does.
pub(crate) static DENSE: Entry<NoSettings> = Entry {
    name: "dense",
    summary: "control: the dense model itself, a copy; its size is its own, whatever the budget",
    defaults: NoSettings::default,
    fixed: &[],
    configure: |_| Ok(Box::new(Dense)),
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
        export(job.model, job.out, ExportAs::Native, None, job.force, &mut writing(progress))?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
