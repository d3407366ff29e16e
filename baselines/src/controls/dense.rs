//! The dense model as it is.

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::CONFIG_FILE;
use dsmoe_core::export::{ExportAs, export};

use super::{check_dense, dense_config, writing};
use crate::error::Result;
use crate::method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress};

/// A copy of the dense model: what more training on the same text does without any method.
#[derive(Clone, Copy, Debug)]
pub struct Dense;

impl Method for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn summary(&self) -> &'static str {
        "control: the dense model itself, a copy; its size is its own, whatever the budget"
    }

    fn knobs(&self) -> &'static [Knob] {
        &[]
    }

    fn needs_calibration(&self, _knobs: &Knobs) -> bool {
        false
    }

    fn plan(&self, config: &Config, _budget: Budget, _knobs: &Knobs) -> Result<Plan> {
        check_dense(config, Path::new(CONFIG_FILE))?;
        let total = Accounting::of(config).total as f64;
        let reached_by = "full size, the budget is not asked".to_owned();
        Ok(Plan { total, activated: total, reached_by, settings: Vec::new() })
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let plan = self.plan(&dense_config(job.model)?, job.budget, job.knobs)?;
        export(job.model, job.out, ExportAs::Native, None, job.force, &mut writing(progress))?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
