//! The start from a dense model and calibration text with all that may stand beside experts, layer by layer: every layer
//! is fitted on the inputs that the layers before it give as they will run.
//!
//! ```text
//! first:      the experts of each layer that run, and its core, by what they cost alone    see `costs`
//! per layer:  states += attention(states)
//!             core     = the neurons that give most, and those of the first position's massive values
//!             experts  = similar neurons of the rest (balanced k-means of the rows of gate_proj)
//!             router   = ridge regression of what each expert gives on the input        see `router`
//!             bars     = quantiles of its logits on text that it was not fitted to       see `router`
//!             down     = least squares of the FFN's output on the neurons left           see `down`
//!             states  += sparse FFN(states)
//! ```
//! The first position of a sequence, and tokens with massive values like it, are left out of all fits: they would own every
//! sum (see `sinks`).

mod costs;
mod down;
mod experts;
mod layer;
mod plan;
mod router;
mod settings;
mod sinks;
mod write;

use std::path::Path;
use std::sync::Arc;

pub use plan::Start;
pub use settings::{BUDGETS, RIDGE_TOKENS, RouterTarget, StartSettings, Widths, default_width};

use self::layer::Layer;
use self::plan::Plan;
use super::{ConvertProgress, ConvertReport};
use crate::calibrate::{LayerStream, check_router_text};
use crate::config::{Budget, CONFIG_FILE, Config, MoeConfig, MoeParts, PartitionKind};
use crate::error::{Error, Result};
use crate::masks::{MASKS_FILE, Masks};
use crate::partition::check_divisible;
use dsmoe_kernels::comm::{Communicator, alone};
use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive};

/// Results of a start.
///
/// ```no_run
/// use dsmoe_core::convert::start::{RouterTarget, Start, StartSettings, Started, Widths, start};
/// use dsmoe_router::{GateValue, RouterConfig};
///
/// fn fit(dense: &std::path::Path, out: &std::path::Path, sequences: Vec<Vec<u32>>) -> dsmoe_core::Result<()> {
///     let settings =
///         StartSettings { widths: Widths::Kl, target: RouterTarget::Square, ..StartSettings::default() };
///     let router = RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(16) };
///     let options = Start { sequences, active: 0.5, router, settings, seed: 0, force: false };
///     let Started { active, errors, .. } = start(dense, out, &options, &mut |_| {})?;
///     println!("{active} of the experts run; errors by layer: {errors:?}");
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Started {
    /// The written model.
    pub report: ConvertReport,
    /// Squared error of each layer's output over its squared size, on sequences that were not fitted to, if there are any.
    pub errors: Vec<f64>,
    /// The share of experts that ran on the same sequences.
    pub active: f64,
    /// The share of each layer's experts that is to run.
    pub shares: Vec<f64>,
    /// Numbers of experts of each layer and what they cost the model's output alone, where that was measured.
    pub costs: Vec<Vec<(usize, f64)>>,
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
    start_on(alone(), model, out, options, progress)
}

/// Does as [`start`] on the processes of `comm`, which divide the text. All get the result of a single process, and the first
/// one writes it.
///
/// # Errors
/// Those of [`start`]; an error of another process.
pub fn start_on(
    comm: &Arc<dyn Communicator>,
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
    let mut plan = Plan::of(options, config.num_layers)?;
    let mut costs = Vec::new();
    if options.settings.widths == Widths::Kl && config.num_layers > 1 && options.active < 1.0 {
        costs = costs::of_layers(comm, model, options, &plan, progress)?;
        plan.allot(&costs, &options.settings);
        set_cores(&mut planned, &plan);
    }
    let mut sequences = options.sequences.clone();
    plan.copy_held(&mut sequences);
    let mut stream = LayerStream::open_on(comm, model, &sequences)?;
    let precision = stream.checkpoint().precision();
    stream = stream.in_precision(precision);
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
        writer.layer(&stream, &weights, &layer)?;
        let measured = layer.advance(&mut stream, &weights, &plan)?;
        errors.push(measured.error);
        active += measured.active / config.num_layers as f64;
    }
    if let Some(moe) = &mut planned.moe {
        let budgets = plan.budgets.iter().zip(thresholds);
        moe.parts.budgets = budgets.map(|(&active, thresholds)| Budget { active, thresholds }).collect();
    }
    let report = writer.finish(model, &stream, &planned)?;
    Ok(Started { report, errors, active, shares: plan.shares().collect(), costs })
}

fn set_cores(planned: &mut Config, plan: &Plan) {
    if let Some(moe) = &mut planned.moe {
        moe.parts.core.clone_from(&plan.cores);
    }
}

/// Returns the configuration that a start makes of the dense `config`, without the thresholds of its budgets. No text is
/// needed; text moves parts of the cores from layer to layer, and their sum stays.
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
    let plan = Plan::of(options, config.num_layers)?;
    let settings = &options.settings;
    let mut planned = config.clone();
    planned.moe = Some(MoeConfig {
        partition: PartitionKind::Permuted,
        router_bias: true,
        active_target: Some(options.active),
        untrained: settings.least_squares.is_none(),
        parts: MoeParts { core: plan.cores, ..MoeParts::default() },
        ..MoeConfig::new(options.router.clone())
    });
    let has_intercept = settings.intercept && settings.least_squares.is_some();
    planned.architecture.output_bias |= has_intercept && !config.architecture.mlp_bias;
    Ok(planned)
}
