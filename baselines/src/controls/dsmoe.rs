//! DSMoE's conversion, whole and without one of its parts.

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{CONFIG_FILE, MoeConfig, PartitionKind};
use dsmoe_core::convert::{ConvertOptions, PartitionSpec, convert};
use dsmoe_core::partition::check_divisible;
use dsmoe_router::{RouterConfig, RouterInit};

use super::start::{calibrated_routers, neurons_by_cluster};
use super::{check_dense, dense_config, writing};
use crate::error::{Error, Result};
use crate::llama_moe::{neurons_by_importance, random};
use crate::method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress};

const EXPERTS: Knob =
    Knob { name: "experts", default: "8", help: "experts per layer; use a number that divides the FFN" };
const THRESHOLD: Knob =
    Knob { name: "threshold", default: "0.5", help: "what a gate must exceed; use a number from 0 to 1" };
const ORDER: Knob = Knob {
    name: "order",
    default: "contiguous",
    help: "which neurons form an expert: use contiguous, random, taylor (sorted by importance) or clustering",
};
const ROUTERS: Knob = Knob {
    name: "routers",
    default: "random",
    help: "how routers start: use random, open, centroid, warm(K) or calibrated (open the budget's share by text)",
};
const GATE_VALUE: Knob = Knob {
    name: "gate_value",
    default: "sigmoid",
    help: "what an open gate multiplies by: use sigmoid (the gate) or binary (1)",
};
const RESCALE: Knob =
    Knob { name: "rescale", default: "none", help: "use eq8 to scale by experts over open ones, or none" };
const ZERO_ACTIVE: Knob = Knob {
    name: "zero_active",
    default: "skip",
    help: "tokens without an open gate: use skip or force_argmax (their largest gate opens)",
};

/// A conversion to experts with routers, by default in contiguous blocks with random ones (eqs. 6-11). It has all experts;
/// training is what brings it to the budget.
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
    knobs: &[EXPERTS, THRESHOLD, ORDER, ROUTERS, GATE_VALUE, RESCALE, ZERO_ACTIVE],
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
    knobs: &[EXPERTS, ORDER, ROUTERS, GATE_VALUE, RESCALE, ZERO_ACTIVE],
    threshold: false,
    ..PAPER
};

/// Which neurons form an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Contiguous,
    Random,
    Taylor,
    Clustering,
}

impl std::str::FromStr for Order {
    type Err = ();

    fn from_str(name: &str) -> std::result::Result<Order, ()> {
        match name {
            "contiguous" => Ok(Order::Contiguous),
            "random" => Ok(Order::Random),
            "taylor" => Ok(Order::Taylor),
            "clustering" => Ok(Order::Clustering),
            _ => Err(()),
        }
    }
}

/// How routers start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Routers {
    Untrained(RouterInit),
    Calibrated,
}

impl std::str::FromStr for Routers {
    type Err = dsmoe_router::Error;

    fn from_str(name: &str) -> std::result::Result<Routers, dsmoe_router::Error> {
        match name {
            "calibrated" => Ok(Routers::Calibrated),
            name => name.parse().map(Routers::Untrained),
        }
    }
}

impl Routers {
    fn have_bias(self) -> bool {
        match self {
            Routers::Untrained(init) => init.has_bias(),
            Routers::Calibrated => true,
        }
    }
}

impl Dsmoe {
    fn router(&self, knobs: &Knobs) -> Result<RouterConfig> {
        let router = RouterConfig {
            threshold: if self.threshold { knobs.need(THRESHOLD.name)? } else { 0.0 },
            ste: self.ste,
            gate_value: knobs.need(GATE_VALUE.name)?,
            rescale: knobs.need(RESCALE.name)?,
            zero_active: knobs.need(ZERO_ACTIVE.name)?,
            ..RouterConfig::new(knobs.need(EXPERTS.name)?)
        };
        router.validate()?;
        if let Routers::Untrained(RouterInit::Warm(open)) = knobs.need(ROUTERS.name)?
            && !(1..=router.num_experts).contains(&open)
        {
            return Err(Error::Knob {
                name: ROUTERS.name.to_owned(),
                problem: format!("is warm({open}) of {} experts", router.num_experts),
                mend: ROUTERS.help.to_owned(),
            });
        }
        Ok(router)
    }

    /// What the model counts to, and how many experts the budget is.
    fn experts(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<(Accounting, f64)> {
        check_dense(config, Path::new(CONFIG_FILE))?;
        let router = self.router(knobs)?;
        check_divisible(config.intermediate, router.num_experts, None)?;
        let order: Order = knobs.need(ORDER.name)?;
        let routers: Routers = knobs.need(ROUTERS.name)?;
        let dense = Accounting::of(config).total;
        let num_experts = router.num_experts;
        let mut converted = config.clone();
        converted.moe = Some(MoeConfig {
            router,
            partition: match order {
                Order::Contiguous => PartitionKind::Contiguous,
                _ => PartitionKind::Permuted,
            },
            router_bias: routers.have_bias(),
            active_target: None,
        });
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
        Ok((counts, experts))
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

    fn needs_calibration(&self, knobs: &Knobs) -> bool {
        matches!(knobs.get(ORDER.name), Ok(Some(Order::Taylor)))
            || matches!(knobs.get(ROUTERS.name), Ok(Some(Routers::Calibrated)))
    }

    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan> {
        let (counts, experts) = self.experts(config, budget, knobs)?;
        let num_experts = counts.num_experts;
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
        let config = dense_config(job.model)?;
        let plan = self.plan(&config, job.budget, job.knobs)?;
        let router = self.router(job.knobs)?;
        let num_experts = router.num_experts;
        let orders = match job.knobs.need(ORDER.name)? {
            Order::Contiguous => None,
            Order::Random => Some(
                (0..config.num_layers)
                    .map(|layer| random(config.intermediate, num_experts, job.seed, layer))
                    .collect::<Result<Vec<_>>>()?,
            ),
            Order::Taylor => Some(neurons_by_importance(job.model, job.calibration, progress)?),
            Order::Clustering => Some(neurons_by_cluster(job.model, num_experts, job.seed, progress)?),
        };
        let (router_init, routers) = match job.knobs.need(ROUTERS.name)? {
            Routers::Untrained(init) => (init, None),
            Routers::Calibrated => {
                let share = self.experts(&config, job.budget, job.knobs)?.1 / num_experts as f64;
                let (model, text) = (job.model, job.calibration);
                let routers =
                    calibrated_routers(model, orders.as_deref(), num_experts, share, text, progress)?;
                (RouterInit::Random, Some(routers))
            }
        };
        let partition = orders.map_or(PartitionSpec::Contiguous, PartitionSpec::Orders);
        let options =
            ConvertOptions { router, partition, router_init, routers, seed: job.seed, force: job.force };
        convert(job.model, job.out, &options, &mut writing(progress))?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
