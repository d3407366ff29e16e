//! One optimiser step: micro-batches forward and backward, clipping, AdamW.

use std::sync::Arc;

use dsmoe_core::model::{Batch, StepArgs};
use dsmoe_core::{Device, Model};
use dsmoe_datasets::{Interleaving, Mixture};
use dsmoe_kernels::comm::Communicator;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::{RouterGradientAt, ShareLoss, SparsityOver, ThresholdController};

use crate::budgets;
use crate::config::{Budget, TrainConfig};
use crate::engine::{self, Engine, EngineOptions, StepResult};
use crate::error::Result;
use crate::optim::{AdamW, Update, clip_scale};
use crate::ranks::{Zero, own_lanes};
use crate::step_gates::{Shape, StepGates};
use crate::teacher::Lessons;

/// Takes optimiser steps on the text of a run.
#[derive(Debug)]
pub(crate) struct Stepper {
    pub(crate) engine: Box<dyn Engine>,
    /// The lanes of this process.
    lanes: Vec<u64>,
    comm: Arc<dyn Communicator>,
    zero: Zero,
    /// The controller that moves the thresholds of gates after a step of several lanes.
    gates: StepGates,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    window: Vec<u32>,
}

/// The gates' part in a step.
pub(crate) struct Gates<'a> {
    /// Weight of the sparsity loss.
    pub(crate) sparsity: f32,
    /// The gates that it acts on.
    pub(crate) over: SparsityOver,
    /// Moves with every micro-batch, where thresholds hold the share.
    pub(crate) thresholds: Option<&'a mut ThresholdController>,
}

/// The text of a step and the settings it is trained with.
pub(crate) struct StepText<'a> {
    pub(crate) mixture: &'a Mixture,
    /// The order of the windows.
    pub(crate) order: &'a mut Interleaving,
    /// The run's settings, resolved.
    pub(crate) config: &'a TrainConfig,
    /// The step, counted from 0.
    pub(crate) step: u64,
}

/// The memory of a run and the processes that share its steps.
pub(crate) struct Setup {
    /// The moments of the parameters that this process owns.
    pub(crate) optimizer: AdamW,
    pub(crate) device: Device,
    pub(crate) recompute: bool,
    pub(crate) zero: Zero,
    pub(crate) lessons: Option<Lessons>,
    pub(crate) comm: Arc<dyn Communicator>,
}

/// Returns the settings of the engine of a process that computes so many lanes under a resolved `config`.
pub(crate) fn engine_options(
    config: &TrainConfig,
    lanes: usize,
    (device, recompute, zero): (Device, bool, Zero),
) -> EngineOptions {
    let &TrainConfig { batch, seq, accumulate, dtype: precision, .. } = config;
    EngineOptions { tokens: batch * seq, seq, lanes, accumulate, zero, precision, device, recompute }
}

impl Stepper {
    /// Allocates the memory to train `model` under a resolved `config`.
    pub(crate) fn new(model: &Model, config: &TrainConfig, setup: Setup) -> Result<Stepper> {
        let Setup { optimizer, device, recompute, zero, lessons, comm } = setup;
        let lanes = own_lanes(config.lanes(), &*comm, zero)?;
        let options = engine_options(config, lanes.len(), (device, recompute, zero));
        let tokens = options.tokens;
        let mut engine = engine::new(model, optimizer, options, comm.clone())?;
        if let Some(lessons) = lessons {
            engine.set_teacher(lessons)?;
        }
        Ok(Stepper {
            engine,
            lanes,
            comm,
            zero,
            gates: StepGates::default(),
            inputs: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            window: Vec::with_capacity(options.seq + 1),
        })
    }

    /// Takes a step. Returns `None`, with nothing changed but the gates' thresholds in `model`, when `stop` says so meanwhile in
    /// a single process; several processes finish the step, and the result tells all of them. A step with a NaN or infinity
    /// leaves the parameters alone.
    pub(crate) fn take(
        &mut self,
        model: &mut Model,
        mut of: StepText<'_>,
        gates: Gates<'_>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<StepResult>> {
        let (config, step) = (of.config, of.step);
        let mut held = gates.thresholds.as_deref().cloned();
        let mut budgets = 0.0;
        let micro_batches = config.micro_batches();
        let accumulate = config.accumulate as u64;
        let together = config.lanes() > 1;
        self.gates.begin();
        self.engine.begin(step + 1, micro_batches)?;
        'lanes: for lane in self.lanes.clone() {
            for micro in lane * accumulate..(lane + 1) * accumulate {
                if self.comm.size() == 1 && stop() {
                    return Ok(None);
                }
                let index = step * micro_batches + micro;
                let mut args = step_args(config, &gates, index);
                let active = match &held {
                    None => Vec::new(),
                    Some(held) => {
                        let active = budgets_at(config, model.config().num_layers, index);
                        self.engine.set_thresholds(model, &held.bars(&active))?;
                        active
                    }
                };
                let mean = budgets::mean(&active);
                if let Some(multiplier) = held.as_ref().and_then(|held| held.multiplier(mean)) {
                    args.sparsity_weight += multiplier as f32;
                    args.sparsity_over = SparsityOver::All;
                }
                self.gather(&mut of, micro)?;
                let batch = Batch { inputs: &self.inputs, targets: &self.targets, seq: config.seq };
                if !self.engine.micro_batch(model, batch, &args)? {
                    self.engine.end_lane()?;
                    break 'lanes;
                }
                if let (Some(held), Some(counts)) = (&mut held, self.engine.logits()) {
                    budgets += mean / micro_batches as f64;
                    if together {
                        self.gates.add(held, mean, (counts, self.engine.pull()));
                    } else {
                        held.update(mean, counts);
                        held.pulled(mean, self.engine.pull());
                    }
                }
            }
            self.engine.end_lane()?;
        }
        let mut result = self.engine.finish(model, step + 1, stop())?;
        if result.non_finite.is_none() {
            let scale = clip_scale(result.norms.all, config.clip);
            let lr = config.schedule().lr_at(step);
            self.engine.update(model, &Update { config, lr, scale, step: step + 1 })?;
        }
        if let Some(held) = held.as_mut().filter(|_| together && result.non_finite.is_none()) {
            let layers = model.config().num_layers;
            let of_micro = |micro| budgets::mean(&budgets_at(config, layers, step * micro_batches + micro));
            let all: Vec<f64> = (0..micro_batches).map(of_micro).collect();
            budgets = budgets::mean(&all);
            let shape = Shape { lanes: config.lanes(), accumulate: config.accumulate, zero: self.zero };
            self.gates.finish(held, &all, shape, (&*self.comm, step + 1))?;
        }
        if let (Some(to), Some(from)) = (gates.thresholds, held) {
            *to = from;
        }
        result.budget = budgets;
        Ok(Some(result))
    }

    /// Reads the tokens of micro-batch `micro` of the step.
    fn gather(&mut self, of: &mut StepText<'_>, micro: u64) -> Result<()> {
        self.inputs.clear();
        self.targets.clear();
        for sample in of.order.batch_at(of.step * of.config.micro_batches() + micro) {
            self.window.clear();
            of.mixture.window(sample, &mut self.window)?;
            self.inputs.extend_from_slice(&self.window[..of.config.seq]);
            self.targets.extend_from_slice(&self.window[1..]);
        }
        Ok(())
    }
}

/// Returns the weights of the losses in micro-batch `index` of the run. They depend on the number of micro-batches of a step,
/// not on where these are computed.
pub(crate) fn step_args(config: &TrainConfig, gates: &Gates<'_>, index: u64) -> StepArgs {
    let (micro_batches, step) = (config.micro_batches() as f32, index / config.micro_batches());
    StepArgs {
        loss_scale: (1.0 / config.tokens_per_step() as f64) as f32,
        sparsity_weight: gates.sparsity / micro_batches,
        sparsity_over: gates.over,
        share: config
            .share_loss()
            .map(|share| ShareLoss { weight: share.weight / config.micro_batches() as f64, ..share }),
        separability_weight: config.separability as f32 / micro_batches,
        entropy_weight: config.gate_entropy as f32 / micro_batches,
        fade: config.fade_at(step),
        temperature: config.temperature_at(step).map(|temperature| temperature as f32),
        router_gradient: RouterGradientAt { rule: config.router_gradient, seed: config.seed, index },
        balance_scale: if config.balances() { 1.0 / micro_batches } else { 0.0 },
        // Depends on the seed and the position only, so that a resumed run draws the same noise.
        seed: Rng::new(config.seed, index).next_u64(),
    }
}

/// Returns the budgets of the layers in micro-batch `index` of the run, where thresholds hold them.
fn budgets_at(config: &TrainConfig, layers: usize, index: u64) -> Vec<f64> {
    match config.budget() {
        Budget::Range(low, high) => budgets::draw([low, high], layers, config.seed, index),
        Budget::Target(share) => vec![share; layers],
        Budget::Weight(_) => Vec::new(),
    }
}
