//! The gates of a run: their settings, the share that controllers hold, and the fading number of experts of a token.

use dsmoe_core::{Device, Model};
use dsmoe_router::{BudgetController, Fade, ThresholdController};

use crate::budgets;
use crate::checkpoint::State;
use crate::config::{Budget, Hold, TrainConfig};
use crate::error::{Error, Result};

/// The share of active experts approaches its target over one part in so many of the run.
const RAMP_SHARE: u64 = 3;

/// The controllers that hold the share of active experts.
pub(crate) struct Held {
    pub(crate) controller: Option<BudgetController>,
    pub(super) thresholds: Option<ThresholdController>,
    /// Weight of the sparsity loss in the first step.
    pub(crate) weight: f32,
}

/// Returns the model with as many experts of a token as the run has after the steps done.
pub(super) fn with_top_k(mut model: Model, state: &State) -> Result<Model> {
    lower_top_k(&mut model, &state.config, state.step)?;
    Ok(model)
}

/// Lowers the number of experts of a token once those that go have faded out.
pub(super) fn lower_top_k(model: &mut Model, config: &TrainConfig, step: u64) -> Result<()> {
    let Fade { kept, factor } = config.fade_at(step);
    let runs = model.config().ffn.as_ref().and_then(|spec| spec.top_k());
    if factor == 0.0 && runs != Some(kept) {
        model.lower_top_k(kept)?;
    }
    Ok(())
}

/// Refuses settings of gates that the model does not have, or that a device does not train with.
fn check_gates(model: &Model, config: &TrainConfig, device: Device) -> Result<()> {
    if config.gate_entropy > 0.0 && (device != Device::Cpu || model.num_experts().is_none()) {
        let allowed = "0 on a GPU and for a model without gates";
        return Err(Error::field("gate_entropy", config.gate_entropy, allowed));
    }
    if !config.router_gradient.is_full() && device != Device::Cpu {
        let allowed = "full on a GPU: the processor alone estimates the gradient";
        return Err(Error::field("router_gradient", config.router_gradient, allowed));
    }
    if config.hold == Some(Hold::Squared) && device != Device::Cpu {
        return Err(Error::field("hold", Hold::Squared, "loss on a GPU"));
    }
    if let Some([first, last]) = config.router_temperature
        && device != Device::Cpu
    {
        let allowed = "none on a GPU: train on the processor";
        return Err(Error::field("router_temperature", format!("{first} to {last}"), allowed));
    }
    let Some(top_k) = config.top_k else { return Ok(()) };
    let wrong = |allowed: String| Err(Error::field("top_k", top_k, allowed));
    match model.config().ffn.as_ref().and_then(|spec| spec.top_k()) {
        _ if device != Device::Cpu => wrong("no number on a GPU: train on the processor".to_owned()),
        None => wrong("no number for a model whose tokens run no fixed number of experts".to_owned()),
        Some(before) if !(1..=before).contains(&top_k) => {
            wrong(format!("1 to the number of experts that tokens of this model run, {before}"))
        }
        Some(_) => Ok(()),
    }
}

/// Returns what holds the share that `config` wants, and sets the default way in `config`.
pub(crate) fn held(model: &Model, config: &mut TrainConfig, device: Device) -> Result<Held> {
    let none = Held { controller: None, thresholds: None, weight: 0.0 };
    check_gates(model, config, device)?;
    if config.separability > 0.0 && (device != Device::Cpu || model.config().moe.is_none()) {
        let allowed = "0 on a GPU and for a model without gates";
        return Err(Error::field("separability", config.separability, allowed));
    }
    let (field, shown) = match config.budget() {
        Budget::Weight(weight) => return Ok(Held { weight: weight as f32, ..none }),
        Budget::Target(target) => ("active_target", target.to_string()),
        Budget::Range(low, high) => ("active_range", format!("{low} to {high}")),
    };
    let wrong = |allowed: &'static str| Err(Error::field(field, &shown, allowed));
    if model.num_experts().is_none() {
        return wrong("a model with experts (dsmoe convert), or no target for a dense model");
    }
    if model.config().fixed_active().is_some() {
        return wrong("no target for a model whose tokens all run the same number of experts");
    }
    let ramp = (config.steps.unwrap_or(1) / RAMP_SHARE).max(1);
    let by_default = match config.budget() {
        Budget::Range(..) => Hold::Threshold,
        _ => Hold::Loss,
    };
    match *config.hold.get_or_insert(by_default) {
        Hold::Threshold => {
            let thresholds = budgets::controller(model, config, ramp * config.micro_batches())?;
            Ok(Held { thresholds: Some(thresholds), ..none })
        }
        Hold::Loss => {
            let controller = BudgetController::new(config.active_target.unwrap_or(1.0) as f32, ramp)?;
            let weight = controller.weight();
            Ok(Held { controller: Some(controller), weight, ..none })
        }
        // The steps have the loss on the share, without a controller.
        Hold::Squared => Ok(none),
    }
}
