//! The start from a dense model and calibration text with all that may stand beside experts, layer by layer: every layer
//! is fitted on the inputs that the layers before it give as they will run.
//!
//! ```text
//! per layer:  states += attention(states)
//!             core     = the neurons that give most, and those of the first position's massive values
//!             experts  = similar neurons of the rest (balanced k-means of the rows of gate_proj)
//!             router   = ridge regression of what each expert gives on the input        see `router`
//!             bars     = quantiles of its logits on text that it was not fitted to       see `router`
//!             down     = least squares of the FFN's output on the neurons left           see `down`
//!             states  += sparse FFN(states)
//! ```
//! The first position of a sequence is left out of all fits: its states are of another size than all others, and they
//! would own every sum.

mod down;
mod experts;
mod router;
mod settings;
mod write;

use std::path::Path;

pub use settings::{BUDGETS, RIDGE_TOKENS, RouterTarget, StartSettings, default_width};

use self::down::Fitted;
use self::experts::Experts;
use self::router::Router;
use super::{ConvertProgress, ConvertReport};
use crate::calibrate::{LayerStream, LayerWeights, check_router_text};
use crate::config::{Budget, CONFIG_FILE, Config, MoeConfig, MoeParts, PartitionKind};
use crate::error::{Error, Result};
use crate::masks::{MASKS_FILE, Masks};
use crate::partition::check_divisible;
use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive};

/// A start from calibration text.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// Token ids of sequences of one length.
    pub sequences: Vec<Vec<u32>>,
    /// The share of experts that run, the core included.
    pub active: f64,
    /// The settings of the gates, with the number of experts.
    pub router: RouterConfig,
    /// What is fitted, and how.
    pub settings: StartSettings,
    /// Seed of the experts' clusters.
    pub seed: u64,
    /// Replace an output directory that is not empty.
    pub force: bool,
}

/// Results of a start.
#[derive(Clone, Debug, PartialEq)]
pub struct Started {
    /// The written model.
    pub report: ConvertReport,
    /// Squared error of each layer's output over its squared size, on the text that it was fitted to.
    pub errors: Vec<f64>,
    /// The share of experts that ran on the calibration text.
    pub active: f64,
}

/// Sizes and shares that are the same for all layers.
#[derive(Clone, Debug)]
struct Plan {
    num_experts: usize,
    /// Experts of the core.
    core: usize,
    /// The shares that thresholds are stored for, ascending, that of the start among them.
    budgets: Vec<f64>,
    /// The place of the start's share in `budgets`.
    chosen: usize,
    /// Sequences that routers and projections are fitted to; the others place the thresholds.
    fitted: usize,
    sequences: usize,
}

impl Plan {
    fn of(start: &Start) -> Result<Plan> {
        let (num_experts, active) = (start.router.num_experts, start.active);
        if !(active > 0.0 && active <= 1.0) {
            return Err(Error::argument(
                format!("an active share of {active}"),
                "use a share above 0 and up to 1",
            ));
        }
        let core = (start.settings.core * active * num_experts as f64 + 1e-9) as usize;
        let core = core.min(num_experts - 1);
        let of_core = core as f64 / num_experts as f64;
        let above_core = || BUDGETS.into_iter().filter(|&budget| budget > of_core).collect();
        let mut budgets: Vec<f64> = start.settings.budgets.clone().unwrap_or_else(above_core);
        budgets.push(active);
        if let Some(wrong) = budgets.iter().find(|&&budget| !(budget > of_core && budget <= 1.0)) {
            let problem =
                format!("a budget of {wrong} is not above the share of the core, {of_core:.4}, and up to 1");
            return Err(Error::argument(problem, "leave it out, or make the core smaller"));
        }
        budgets.sort_by(f64::total_cmp);
        budgets.dedup();
        let chosen = budgets.iter().position(|&budget| budget == active).unwrap_or(0);
        let sequences = start.sequences.len();
        let fitted = if sequences > 1 { sequences - sequences.div_ceil(8) } else { sequences };
        Ok(Plan { num_experts, core, budgets, chosen, fitted, sequences })
    }

    /// Returns the place of the budget at which the projections are fitted to a sequence.
    fn budget_of(&self, sequence: usize, elastic: bool) -> usize {
        let others = self.budgets.len() - 1;
        if !elastic || others == 0 || sequence.is_multiple_of(2) {
            return self.chosen;
        }
        let other = sequence / 2 % others;
        if other < self.chosen { other } else { other + 1 }
    }

    /// Returns whether a sequence is fitted to.
    fn is_fitted(&self, sequence: usize) -> bool {
        sequence < self.fitted
    }

    /// Returns whether a sequence places thresholds.
    fn is_held(&self, sequence: usize) -> bool {
        sequence >= self.fitted || self.fitted == self.sequences
    }

    /// Returns a ridge that is `share` of the diagonal at [`RIDGE_TOKENS`] tokens, for the fitted sequences of `seq` tokens.
    fn ridge(&self, share: f64, seq: usize) -> f64 {
        share * RIDGE_TOKENS as f64 / (self.fitted * (seq - 1)).max(1) as f64
    }

    fn routed(&self) -> usize {
        self.num_experts - self.core
    }

    /// Returns the share of routed experts that a budget leaves to run.
    fn routed_share(&self, budget: f64) -> f64 {
        let open = budget * self.num_experts as f64 - self.core as f64;
        (open / self.routed() as f64).clamp(0.0, 1.0)
    }
}

/// A layer of the start.
struct Layer {
    experts: Experts,
    router: Router,
    fitted: Fitted,
}

/// Converts the dense model in `model` to a DSMoE model in the new directory `out` that is fitted to calibration text.
/// Weights keep their types; the directory appears when it is complete.
///
/// # Errors
/// `model` cannot be read, is not dense, has masks or cannot be cut into that many experts; the text is too short; a
/// setting is out of range; a fit has no finite solution; `out` is not empty; the file system refuses.
pub fn start(
    model: &Path,
    out: &Path,
    options: &Start,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<Started> {
    let config = Config::load(model)?;
    if let Err(Error::Indivisible { intermediate, num_experts, divisors, .. }) = planned(&config, options) {
        let path = Some(model.join(CONFIG_FILE));
        return Err(Error::Indivisible { path, intermediate, num_experts, divisors });
    }
    let mut planned = planned(&config, options)?;
    if Masks::read(model, &config)?.is_some() {
        let problem = "masks weights of a model that is to be changed".to_owned();
        return Err(Error::path(&model.join(MASKS_FILE), problem, "use the dense model it was made from"));
    }
    check_router_text(&options.sequences)?;
    let plan = Plan::of(options)?;
    let mut stream = LayerStream::open(model, &options.sequences)?;
    let mut writer = write::Writing::begin(model, out, options.force, &planned, &stream)?;
    let (mut thresholds, mut errors) = (vec![Vec::new(); plan.budgets.len()], Vec::new());
    let mut active = 0.0;
    for i in 0..config.num_layers {
        progress(ConvertProgress { stage: "layers", done: i as u64, total: config.num_layers as u64 });
        let weights = stream.layer(i)?;
        let layer = Layer::fit(&mut stream, &weights, &plan, options)?;
        for (of_budget, &threshold) in thresholds.iter_mut().zip(&layer.router.thresholds) {
            of_budget.push(threshold);
        }
        errors.push(layer.fitted.error);
        active += layer.fitted.active / config.num_layers as f64;
        writer.layer(&stream, &weights, &layer)?;
        if i + 1 < config.num_layers {
            layer.advance(&mut stream, &weights);
        }
    }
    if let Some(moe) = &mut planned.moe {
        let budgets = plan.budgets.iter().zip(thresholds);
        moe.parts.budgets = budgets.map(|(&active, thresholds)| Budget { active, thresholds }).collect();
    }
    let report = writer.finish(model, &stream, &planned)?;
    Ok(Started { report, errors, active })
}

/// Returns the configuration that a start makes of the dense `config`, without the thresholds of its budgets. No text is
/// needed.
///
/// # Errors
/// The FFNs cannot be cut into that many experts; a setting is out of range.
pub fn planned(config: &Config, options: &Start) -> Result<Config> {
    options.router.validate()?;
    options.settings.validate()?;
    let RouterConfig { gate_value, rescale, zero_active, .. } = options.router;
    let (wanted, found) =
        ((GateValue::Binary, Rescale::None, ZeroActive::Skip), (gate_value, rescale, zero_active));
    if found != wanted {
        let problem = format!(
            "gates are {gate_value}, with rescale {rescale} and {zero_active} at zero active: the start fits experts that run as they are"
        );
        return Err(Error::argument(problem, "use binary gates, rescale none and skip"));
    }
    for shape in config.layers() {
        check_divisible(shape.intermediate, options.router.num_experts, None)?;
    }
    let plan = Plan::of(options)?;
    let settings = &options.settings;
    let mut planned = config.clone();
    planned.moe = Some(MoeConfig {
        partition: PartitionKind::Permuted,
        router_bias: true,
        active_target: Some(options.active),
        untrained: settings.least_squares.is_none(),
        parts: MoeParts { core: vec![plan.core; config.num_layers], ..MoeParts::default() },
        ..MoeConfig::new(options.router.clone())
    });
    let has_intercept = settings.intercept && settings.least_squares.is_some();
    planned.architecture.output_bias |= has_intercept && !config.architecture.mlp_bias;
    Ok(planned)
}

impl Layer {
    /// Fits a layer whose attention the states hold.
    fn fit(stream: &mut LayerStream, weights: &LayerWeights, plan: &Plan, options: &Start) -> Result<Layer> {
        stream.attend(weights);
        let experts = Experts::choose(stream, weights, plan, options)?;
        let router = Router::fit(stream, weights, (plan, &experts), options)?;
        let fitted = Fitted::fit(stream, weights, (plan, &experts, &router), options)?;
        Ok(Layer { experts, router, fitted })
    }

    /// Completes the layer in the states.
    fn advance(&self, stream: &mut LayerStream, weights: &LayerWeights) {
        stream.join_ffn(weights, &mut |y, tap| {
            let (open, _) = self.router.open(&self.experts, (tap.x, tap.neurons), self.router.bar);
            self.fitted.forward(y, &open);
        });
    }
}

/// Makes the error for a fit without a finite solution.
fn not_finite(layer: usize) -> Error {
    Error::Calibration {
        problem: format!("layer {layer} cannot be fitted: the FFN's values are not finite"),
        help: "use an undamaged model".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_take_turns_over_the_budgets() {
        let router = RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(8) };
        let settings =
            StartSettings { core: 0.25, budgets: Some(vec![0.25, 0.5, 1.0]), ..StartSettings::default() };
        let sequences = vec![vec![0; 4]; 16];
        let start = Start { sequences, active: 0.5, router, settings, seed: 0, force: false };
        let plan = Plan::of(&start).unwrap();
        assert_eq!((plan.core, plan.chosen, plan.budgets.clone()), (1, 1, vec![0.25, 0.5, 1.0]));
        assert_eq!((plan.fitted, plan.is_held(13), plan.is_held(14)), (14, false, true));
        let turns = |elastic| (0..8).map(|sequence| plan.budget_of(sequence, elastic)).collect::<Vec<_>>();
        assert_eq!(turns(true), [1, 0, 1, 2, 1, 0, 1, 2]);
        assert_eq!(turns(false), [1; 8]);
        assert_eq!([0.125, 0.25, 1.0].map(|budget| plan.routed_share(budget)), [0.0, 1.0 / 7.0, 1.0]);
        // By default there are no budgets that the core alone exceeds.
        let settings = StartSettings { core: 0.5, budgets: None, ..StartSettings::default() };
        let plan = Plan::of(&Start { settings, ..start }).unwrap();
        assert_eq!(plan.budgets, [0.375, 0.5, 0.75, 1.0]);
    }
}
