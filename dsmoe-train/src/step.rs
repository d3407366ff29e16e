//! One optimiser step: micro-batches forward and backward, clipping, AdamW.

use std::sync::atomic::{AtomicBool, Ordering};

use dsmoe_core::model::{Batch, StepArgs, Teacher};
use dsmoe_core::{Device, Model};
use dsmoe_datasets::{Interleaving, Mixture};
use dsmoe_kernels::rng::Rng;
use dsmoe_router::SparsityOver;

use crate::config::TrainConfig;
use crate::engine::{self, Engine, EngineOptions, StepResult};
use crate::error::Result;
use crate::optim::{AdamW, Update, clip_scale};

/// Takes optimiser steps on the text of a run.
#[derive(Debug)]
pub(crate) struct Stepper {
    pub(crate) engine: Box<dyn Engine>,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    window: Vec<u32>,
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

impl Stepper {
    /// Allocates the memory to train `model` under a resolved `config` on `device`.
    pub(crate) fn new(
        model: &Model,
        optimizer: AdamW,
        config: &TrainConfig,
        device: Device,
        teacher: Option<Teacher>,
    ) -> Result<Stepper> {
        let (seq, precision) = (config.seq, config.dtype);
        let tokens = config.batch * seq;
        let mut engine = engine::new(model, optimizer, EngineOptions { tokens, seq, precision, device })?;
        if let Some(teacher) = teacher {
            engine.set_teacher(teacher)?;
        }
        Ok(Stepper {
            engine,
            inputs: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            window: Vec::with_capacity(seq + 1),
        })
    }

    /// Takes a step with this weight of the sparsity loss. Returns `None`, with nothing changed, when `stop` was raised
    /// meanwhile. A step with a NaN or infinity leaves the parameters alone.
    pub(crate) fn take(
        &mut self,
        model: &mut Model,
        mut of: StepText<'_>,
        sparsity: (f32, SparsityOver),
        stop: &AtomicBool,
    ) -> Result<Option<StepResult>> {
        let (config, step) = (of.config, of.step);
        let micro_batches = config.accumulate as u64;
        self.engine.begin(micro_batches)?;
        for micro in 0..micro_batches {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let args = StepArgs {
                loss_scale: (1.0 / config.tokens_per_step() as f64) as f32,
                sparsity_weight: sparsity.0 / micro_batches as f32,
                sparsity_over: sparsity.1,
                balance_scale: 1.0 / micro_batches as f32,
                // Depends on the seed and the position only, so that a resumed run draws the same noise.
                seed: Rng::new(config.seed, step * micro_batches + micro).next_u64(),
            };
            self.gather(&mut of, micro)?;
            let batch = Batch { inputs: &self.inputs, targets: &self.targets, seq: config.seq };
            if !self.engine.micro_batch(model, batch, &args)? {
                break;
            }
        }
        let result = self.engine.finish(model)?;
        if result.non_finite.is_none() {
            let scale = clip_scale(result.norms.all, config.clip);
            let lr = config.schedule().lr_at(step);
            self.engine.update(model, &Update { config, lr, scale, step: step + 1 })?;
        }
        Ok(Some(result))
    }

    /// Reads the tokens of micro-batch `micro` of the step.
    fn gather(&mut self, of: &mut StepText<'_>, micro: u64) -> Result<()> {
        self.inputs.clear();
        self.targets.clear();
        for sample in of.order.batch_at(of.step * of.config.accumulate as u64 + micro) {
            self.window.clear();
            of.mixture.window(sample, &mut self.window)?;
            self.inputs.extend_from_slice(&self.window[..of.config.seq]);
            self.targets.extend_from_slice(&self.window[1..]);
        }
        Ok(())
    }
}
