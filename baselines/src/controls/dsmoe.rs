//! DSMoE's conversion, whole and without one of its parts.

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{CONFIG_FILE, MoeConfig, PartitionKind};
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::partition::check_divisible;
use dsmoe_router::{RouterConfig, RouterInit};

use super::{check_dense, dense_config, writing};
use crate::error::{Error, Result};
use crate::method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress};

const EXPERTS: Knob =
    Knob { name: "experts", default: "8", help: "experts per layer; use a number that divides the FFN" };
const THRESHOLD: Knob =
    Knob { name: "threshold", default: "0.5", help: "what a gate must exceed; use a number from 0 to 1" };

/// A conversion to experts in contiguous blocks with random routers (eqs. 6-11). It has all experts; training is what
/// brings it to the budget.
#[derive(Clone, Copy, Debug)]
pub struct Dsmoe {
    name: &'static str,
    summary: &'static str,
    knobs: &'static [Knob],
    ste: bool,
    /// Whether training has a threshold.
    threshold: bool,
}

/// The paper's method.
pub const PAPER: Dsmoe = Dsmoe {
    name: "dsmoe",
    summary: "the paper's conversion, random routers; the controller of the training reaches any budget",
    knobs: &[EXPERTS, THRESHOLD],
    ste: true,
    threshold: true,
};

/// Without the straight-through estimator: a gate that is shut has no gradient (table 3).
pub const NO_STE: Dsmoe = Dsmoe {
    name: "dsmoe-no-ste",
    summary: "ablation: DSMoE without the straight-through estimator; the controller reaches any budget",
    ste: false,
    ..PAPER
};

/// Without a threshold in training, every expert weighted by its gate; there is one at inference (eq. 20).
pub const NO_THRESHOLD: Dsmoe = Dsmoe {
    name: "dsmoe-no-threshold",
    summary: "ablation: DSMoE trained without a threshold; the threshold at inference reaches any budget",
    knobs: &[EXPERTS],
    threshold: false,
    ..PAPER
};

impl Dsmoe {
    fn router(&self, knobs: &Knobs) -> Result<RouterConfig> {
        let threshold = if self.threshold { knobs.need("threshold")? } else { 0.0 };
        let router = RouterConfig { threshold, ste: self.ste, ..RouterConfig::new(knobs.need("experts")?) };
        router.validate()?;
        Ok(router)
    }
}

impl Method for Dsmoe {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn knobs(&self) -> &'static [Knob] {
        self.knobs
    }

    fn needs_calibration(&self, _knobs: &Knobs) -> bool {
        false
    }

    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan> {
        check_dense(config, Path::new(CONFIG_FILE))?;
        let router = self.router(knobs)?;
        check_divisible(config.intermediate, router.num_experts, None)?;
        let dense = Accounting::of(config).total;
        let num_experts = router.num_experts;
        let mut converted = config.clone();
        converted.moe = Some(MoeConfig { router, partition: PartitionKind::Contiguous, router_bias: false });
        let counts = Accounting::of(&converted);
        let wanted = budget.params(dense);
        let experts =
            (wanted - (counts.non_ffn + counts.router) as f64) / counts.ffn as f64 * num_experts as f64;
        let of_one = counts.ffn as f64 / num_experts as f64;
        if experts <= 0.0 || experts > num_experts as f64 {
            return Err(Error::Budget {
                asked: budget.to_string(),
                problem: format!("is {experts:.2} of {num_experts} experts"),
                mend: format!(
                    "give {:.0} (one expert in ten tokens) to {} parameters",
                    counts.activated(0.0) + of_one / 10.0,
                    counts.total
                ),
            });
        }
        let share = experts / num_experts as f64;
        let reached_by = match self.threshold {
            true => {
                format!("training with --active-target {share:.4} ({experts:.2} of {num_experts} experts)")
            }
            false => format!(
                "training without a target, then the --threshold that leaves {experts:.2} of {num_experts} experts"
            ),
        };
        let settings = vec![("active_share".to_owned(), share.to_string())];
        Ok(Plan { total: counts.total as f64, activated: counts.activated(experts), reached_by, settings })
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let plan = self.plan(&dense_config(job.model)?, job.budget, job.knobs)?;
        let router = self.router(job.knobs)?;
        let options = ConvertOptions {
            router_init: RouterInit::Random,
            seed: job.seed,
            force: job.force,
            ..ConvertOptions::new(router.num_experts)
        };
        let options = ConvertOptions { router, ..options };
        convert(job.model, job.out, &options, &mut writing(progress))?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
