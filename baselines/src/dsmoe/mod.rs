//! DSMoE: the tuned conversion, the paper's, and the paper's without one of its parts.

mod settings;

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{CONFIG_FILE, MoeConfig, PartitionKind};
use dsmoe_core::convert::start::{Start, default_width, planned, start_on};
use dsmoe_core::convert::{Calibration, ConvertOptions, PartitionSpec, RouterStart, convert_on};
use dsmoe_core::partition::check_divisible;
use dsmoe_router::{GateValue, RouterConfig, RouterInit};

use crate::controls::{check_dense, dense_config};
use crate::error::{Error, Result};
use crate::experts::importance::neurons_by_importance;
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _};

pub use self::settings::{Experts, LayerWidths, Order, Routers, Settings, Shares, Target};

/// Experts per layer of a start that does not choose their width.
const EXPERTS: usize = 8;
/// Rounds in which the share of experts and the size of the routers are made to fit.
const MOST_ROUNDS: usize = 8;

/// The method `dsmoe`: a core, fine experts of similar neurons, and routers and projections fitted to calibration text.
pub(crate) const TUNED: Entry<Settings> = Entry {
    name: "dsmoe",
    summary: "DSMoE: a core and fine experts, fitted to calibration text layer by layer; training reaches any budget",
    defaults: || Settings {
        experts: Experts::Auto,
        order: Order::Clustering,
        routers: Routers::Fitted,
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

/// The method `lte`: Learn-To-be-Efficient (Zheng et al., NeurIPS 2024, arXiv 2402.06126) in DSMoE's form: experts of 32
/// neurons with similar rows of `gate_proj` behind sigmoid routers with a fixed threshold.
///
/// LTE trains in two stages: soft gates with all experts active, then hard gates with frozen routers. This method has one
/// stage, in which gates are hard and the straight-through estimator trains the routers. LTE's efficiency loss is the mean
/// square of the gates at a fixed weight. Here a controller holds the share of active experts. LTE's separability loss is an
/// option of training.
pub(crate) const LTE: Entry<Settings> = Entry {
    name: "lte",
    summary: "LTE in one stage: experts of 32 similar neurons, random routers, hard gates; training reaches any budget",
    defaults: || Settings {
        experts: Experts::Width(32),
        order: Order::Clustering,
        gate_value: GateValue::Binary,
        ..Settings::default()
    },
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
    ..PAPER
};

/// A DSMoE method with its settings. The model has all experts; training brings it to the budget.
struct Dsmoe {
    settings: Settings,
    ste: bool,
    trains_threshold: bool,
}

impl Dsmoe {
    fn checked(self) -> Result<Box<dyn Configured>> {
        let router = self.router(match self.settings.experts {
            Experts::Count(experts) => experts,
            Experts::Width(_) | Experts::Auto => EXPERTS,
        });
        router.validate()?;
        self.check_start()?;
        if let Routers::Untrained(RouterInit::Warm(open)) = self.settings.routers
            && !(1..=router.num_experts).contains(&open)
        {
            let n = router.num_experts;
            let problem = format!("is warm({open}) of {n} experts");
            return Err(Error::setting("routers", problem, format!("use warm(1) to warm({n})")));
        }
        Ok(Box::new(self))
    }

    /// Checks that settings of the fitted start come with it, and that it has those that it needs.
    fn check_start(&self) -> Result<()> {
        let settings = &self.settings;
        let fitted = settings.routers == Routers::Fitted;
        let wrong = |name: &'static str, problem: &'static str, help: &'static str| {
            Err(Error::setting(name, problem, help))
        };
        if !fitted && settings.start() != Settings::default().start() {
            let problem = "is calibrated or untrained, and core, core_first, widths, massive, target, ridge, intercept, \
                           relative, elastic and budgets are of a fitted start";
            return wrong("routers", problem, "leave them out, or set it to fitted");
        }
        if fitted && settings.order != Order::Clustering {
            return wrong("order", "is not clustering, and routers is fitted", "use clustering");
        }
        if fitted && !self.trains_threshold {
            return wrong("routers", "is fitted, which places thresholds by budget", "use another start");
        }
        if fitted {
            settings.start().validate()?;
        }
        Ok(())
    }

    fn router(&self, num_experts: usize) -> RouterConfig {
        let Settings { threshold, gate_value, rescale, zero_active, .. } = self.settings;
        let (threshold, ste) = (threshold as f32, self.ste);
        RouterConfig { num_experts, threshold, gate_value, rescale, zero_active, ste }
    }

    /// Returns the number of experts of a model of `config`.
    fn num_experts(&self, config: &Config) -> usize {
        match self.settings.experts {
            Experts::Count(experts) => experts,
            Experts::Width(width) => (config.intermediate / width).max(1),
            Experts::Auto if self.settings.routers == Routers::Fitted => {
                config.intermediate / default_width(config.layers().map(|shape| shape.intermediate))
            }
            Experts::Auto => EXPERTS,
        }
    }

    /// Returns a fitted start without its text.
    fn start(&self, config: &Config, active: f64) -> Start {
        let (router, settings) = (self.router(self.num_experts(config)), self.settings.start());
        Start { sequences: Vec::new(), active, router, settings, seed: 0, force: false }
    }

    /// Returns the configuration of the model that has that share of experts active.
    fn converted(&self, config: &Config, active: f64) -> Result<Config> {
        let partition = match self.settings.order {
            Order::Contiguous => PartitionKind::Contiguous,
            _ => PartitionKind::Permuted,
        };
        let router_bias = match self.settings.routers {
            Routers::Untrained(init) => init.has_bias(),
            Routers::Calibrated => true,
            Routers::Fitted => return Ok(planned(config, &self.start(config, active))?),
        };
        let mut converted = config.clone();
        let router = self.router(self.num_experts(config));
        converted.moe = Some(MoeConfig { partition, router_bias, ..MoeConfig::new(router) });
        Ok(converted)
    }

    /// Counts the parameters of the model, and the experts that the budget is worth.
    fn experts(&self, config: &Config, budget: Budget) -> Result<(Accounting, f64)> {
        check_dense(config, Path::new(CONFIG_FILE))?;
        let num_experts = self.num_experts(config);
        if let Experts::Width(width) = self.settings.experts
            && !config.intermediate.is_multiple_of(width)
        {
            let problem = format!("is width({width}), which does not divide {} neurons", config.intermediate);
            return Err(Error::setting("experts", problem, "give a width that does, or a number of experts"));
        }
        check_divisible(config.intermediate, num_experts, None)?;
        let wanted = budget.params(Accounting::of(config).total);
        // The core grows with the share and takes gates from the router: a few rounds settle both.
        let mut share = 1.0;
        for _ in 0..MOST_ROUNDS {
            let counts = Accounting::of(&self.converted(config, share)?);
            let for_ffn = wanted - (counts.non_ffn + counts.router) as f64;
            let experts = for_ffn / counts.ffn as f64 * num_experts as f64;
            if experts <= 0.0 || experts > num_experts as f64 {
                let of_one = counts.ffn as f64 / num_experts as f64;
                let least = counts.activated(0.0) + of_one / 10.0;
                let problem = format!(
                    "is {experts:.2} of {num_experts} experts; one expert in ten tokens is the least"
                );
                let (ends, dense) = ([least, counts.total as f64], Accounting::of(config).total);
                return Err(Error::out_of_reach(budget, problem, ends, dense));
            }
            let before = std::mem::replace(&mut share, experts / num_experts as f64);
            if self.settings.routers != Routers::Fitted || (before - share).abs() < 1e-9 {
                return Ok((counts, experts));
            }
        }
        let counts = Accounting::of(&self.converted(config, share)?);
        Ok((counts, share * num_experts as f64))
    }
}

impl Dsmoe {
    fn run_start(
        &self,
        job: &Job<'_>,
        config: &Config,
        plan: Plan,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Made> {
        let (counts, experts) = self.experts(config, job.budget)?;
        let options = Start {
            sequences: job.calibration.to_vec(),
            seed: job.seed,
            force: job.force,
            ..self.start(config, experts / counts.num_experts)
        };
        let done = start_on(job.comm, job.model, job.out, &options, &mut |at| {
            progress(Progress { stage: at.stage, done: at.done, total: at.total });
        })?;
        let errors = done.errors.iter().enumerate();
        let mut measured: Vec<(String, f64)> =
            errors.map(|(layer, &error)| (format!("layer {layer} error"), error)).collect();
        for (layer, costs) in done.costs.iter().enumerate() {
            let named = |(n, cost): &(usize, f64)| {
                (format!("layer {layer}: divergence with {n} experts alone"), *cost)
            };
            measured.extend(costs.iter().map(named));
        }
        let shares = done.shares.iter().enumerate();
        measured.extend(shares.map(|(layer, &share)| (format!("layer {layer} share"), share)));
        measured.push(("active".to_owned(), done.active));
        Ok(Made { plan, measured })
    }
}

impl Configured for Dsmoe {
    fn needs_calibration(&self) -> bool {
        self.settings.order == Order::Taylor
            || matches!(self.settings.routers, Routers::Calibrated | Routers::Fitted)
    }

    fn resolved(&self) -> SettingValues {
        self.settings.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        let (counts, experts) = self.experts(config, budget)?;
        let num_experts = counts.num_experts;
        let share = experts / num_experts;
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
        if self.settings.routers == Routers::Fitted {
            return self.run_start(job, &config, plan, progress);
        }
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
            Routers::Calibrated | Routers::Fitted => {
                let (counts, experts) = self.experts(&config, job.budget)?;
                let active = experts / counts.num_experts;
                RouterStart::Calibrated(Calibration { sequences: job.calibration.to_vec(), active })
            }
        };
        let (router, active_target) = (self.router(self.num_experts(&config)), plan.active_target);
        let &Job { seed, force, .. } = job;
        let options = ConvertOptions { router, partition, routers, active_target, seed, force };
        convert_on(job.comm, job.model, job.out, &options, &mut |at| {
            progress(Progress { stage: at.stage, done: at.done, total: at.total });
        })?;
        Ok(Made { plan, measured: Vec::new() })
    }
}
