//! DSMoE: the tuned conversion, the paper's, and the paper's without one of its parts.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{CONFIG_FILE, MoeConfig, PartitionKind};
use dsmoe_core::convert::{Calibration, ConvertOptions, PartitionSpec, RouterStart, convert};
use dsmoe_core::partition::check_divisible;
use dsmoe_router::{GateValue, Rescale, RouterConfig, RouterInit, ZeroActive};
use serde::{Deserialize, Serialize};

use crate::controls::{check_dense, dense_config};
use crate::error::{Error, Result};
use crate::experts::importance::neurons_by_importance;
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings, stored_as_text};

/// The method `dsmoe`: experts of similar neurons, routers fitted to calibration text, gates of 1.
pub(crate) const TUNED: Entry<Settings> = Entry {
    name: "dsmoe",
    summary: "DSMoE: experts of similar neurons, routers fitted to calibration text; training reaches any budget",
    defaults: || Settings {
        order: Order::Clustering,
        routers: Routers::Calibrated,
        gate_value: GateValue::Binary,
        ..Settings::default()
    },
    ..Entry::new(|settings| Dsmoe { settings, ste: true, trains_threshold: true }.checked())
};

/// The method `dsmoe-paper`: experts in contiguous blocks, random routers and sigmoid gates (eqs. 6-11).
pub(crate) const PAPER: Entry<Settings> = Entry {
    name: "dsmoe-paper",
    summary: "DSMoE as in the paper: contiguous experts, random routers, sigmoid gates; training reaches any budget",
    defaults: Settings::default,
    ..TUNED
};

/// The method `dsmoe-no-ste`: without the straight-through estimator, so that a closed gate has no gradient (table 3).
pub(crate) const NO_STE: Entry<Settings> = Entry {
    name: "dsmoe-no-ste",
    summary: "ablation: the paper's DSMoE without the straight-through estimator; training reaches any budget",
    configure: |settings| Dsmoe { settings, ste: false, trains_threshold: true }.checked(),
    ..PAPER
};

/// The method `dsmoe-no-threshold`: training has no threshold and every expert is weighted by its gate; inference has
/// one (eq. 20).
pub(crate) const NO_THRESHOLD: Entry<Settings> = Entry {
    name: "dsmoe-no-threshold",
    summary: "ablation: the paper's DSMoE trained without a threshold; the threshold at inference reaches any budget",
    defaults: || Settings { threshold: 0.0, ..Settings::default() },
    fixed: &["threshold"],
    configure: |settings| Dsmoe { settings, ste: true, trains_threshold: false }.checked(),
};

settings! {
    /// Settings of DSMoE.
    pub struct Settings {
        /// Experts per layer, a divisor of intermediate_size.
        pub experts: usize = 8,
        /// An expert is active if its gate exceeds this number from 0 to 1.
        pub threshold: f64 = 0.5,
        /// Neurons of an expert: contiguous, random, taylor (sorted by importance) or clustering (similar neurons).
        pub order: Order = Order::Contiguous,
        /// Start of the routers: random, open, centroid, warm(K) or calibrated (open the budget's share on the text).
        pub routers: Routers = Routers::Untrained(RouterInit::Random),
        /// Factor of an active expert: sigmoid (its gate) or binary (1).
        pub gate_value: GateValue = GateValue::Sigmoid,
        /// Scale of the sum of experts: eq8 (experts over active ones) or none.
        pub rescale: Rescale = Rescale::None,
        /// Tokens without an active expert: skip (the FFN adds nothing) or force_argmax (the largest gate opens).
        pub zero_active: ZeroActive = ZeroActive::Skip,
    }
}

/// The choice of the neurons of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Contiguous blocks (eq. 6).
    Contiguous,
    /// A random partition.
    Random,
    /// Blocks of neurons sorted by Taylor importance.
    Taylor,
    /// Balanced k-means of the rows of `gate_proj`.
    Clustering,
}

/// The start of the routers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routers {
    /// A start that reads no text.
    Untrained(RouterInit),
    /// Fitted to calibration text.
    Calibrated,
}

stored_as_text!(Routers);

impl FromStr for Routers {
    type Err = dsmoe_router::Error;

    fn from_str(name: &str) -> std::result::Result<Routers, dsmoe_router::Error> {
        match name {
            "calibrated" => Ok(Routers::Calibrated),
            name => name.parse().map(Routers::Untrained),
        }
    }
}

impl fmt::Display for Routers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Routers::Untrained(init) => init.fmt(f),
            Routers::Calibrated => f.write_str("calibrated"),
        }
    }
}

/// A DSMoE method with its settings. The model has all experts; training brings it to the budget.
struct Dsmoe {
    settings: Settings,
    ste: bool,
    trains_threshold: bool,
}

impl Dsmoe {
    fn checked(self) -> Result<Box<dyn Configured>> {
        let router = self.router();
        router.validate()?;
        if let Routers::Untrained(RouterInit::Warm(open)) = self.settings.routers
            && !(1..=router.num_experts).contains(&open)
        {
            let n = router.num_experts;
            let problem = format!("is warm({open}) of {n} experts");
            return Err(Error::setting("routers", problem, format!("use warm(1) to warm({n})")));
        }
        Ok(Box::new(self))
    }

    fn router(&self) -> RouterConfig {
        let Settings { experts, threshold, gate_value, rescale, zero_active, .. } = self.settings;
        let (num_experts, threshold, ste) = (experts, threshold as f32, self.ste);
        RouterConfig { num_experts, threshold, gate_value, rescale, zero_active, ste }
    }

    /// Counts the parameters of the model, and the experts that the budget is worth.
    fn experts(&self, config: &Config, budget: Budget) -> Result<(Accounting, f64)> {
        check_dense(config, Path::new(CONFIG_FILE))?;
        let num_experts = self.settings.experts;
        check_divisible(config.intermediate, num_experts, None)?;
        let dense = Accounting::of(config).total;
        let mut converted = config.clone();
        let partition = match self.settings.order {
            Order::Contiguous => PartitionKind::Contiguous,
            _ => PartitionKind::Permuted,
        };
        let router_bias = match self.settings.routers {
            Routers::Untrained(init) => init.has_bias(),
            Routers::Calibrated => true,
        };
        converted.moe = Some(MoeConfig { partition, router_bias, ..MoeConfig::new(self.router()) });
        let counts = Accounting::of(&converted);
        let for_ffn = budget.params(dense) - (counts.non_ffn + counts.router) as f64;
        let experts = for_ffn / counts.ffn as f64 * num_experts as f64;
        let of_one = counts.ffn as f64 / num_experts as f64;
        if experts <= 0.0 || experts > num_experts as f64 {
            let least = counts.activated(0.0) + of_one / 10.0;
            let help = format!("give {least:.0} (one expert in ten tokens) to {} parameters", counts.total);
            return Err(Error::budget(budget, format!("is {experts:.2} of {num_experts} experts"), help));
        }
        Ok((counts, experts))
    }
}

impl Configured for Dsmoe {
    fn needs_calibration(&self) -> bool {
        self.settings.order == Order::Taylor || self.settings.routers == Routers::Calibrated
    }

    fn resolved(&self) -> SettingValues {
        self.settings.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        let (counts, experts) = self.experts(config, budget)?;
        let num_experts = counts.num_experts;
        let share = experts / num_experts as f64;
        let of = format!("{experts:.2} of {num_experts}");
        let reached_by = match self.trains_threshold {
            true => format!("training to an active share of {share:.4} ({of} experts)"),
            false => format!("training without a target, then the threshold that leaves {of} experts"),
        };
        let (total, activated) = (counts.total as f64, counts.activated(experts));
        let active_target = Some(share).filter(|_| self.trains_threshold);
        Ok(Plan { total, activated, reached_by, active_target, ..Plan::default() })
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = dense_config(job.model)?;
        let plan = self.plan(&config, job.budget)?;
        let partition = match self.settings.order {
            Order::Contiguous => PartitionSpec::Contiguous,
            Order::Random => PartitionSpec::Random,
            Order::Clustering => PartitionSpec::Clusters,
            Order::Taylor => {
                PartitionSpec::Orders(neurons_by_importance(job.model, job.calibration, progress)?)
            }
        };
        let routers = match self.settings.routers {
            Routers::Untrained(init) => RouterStart::Init(init),
            Routers::Calibrated => {
                let (counts, experts) = self.experts(&config, job.budget)?;
                let active = experts / counts.num_experts as f64;
                RouterStart::Calibrated(Calibration { sequences: job.calibration.to_vec(), active })
            }
        };
        let (router, active_target) = (self.router(), plan.active_target);
        let &Job { seed, force, .. } = job;
        let options = ConvertOptions { router, partition, routers, active_target, seed, force };
        convert(job.model, job.out, &options, &mut |at| {
            progress(Progress { stage: at.stage, done: at.done, total: at.total });
        })?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
