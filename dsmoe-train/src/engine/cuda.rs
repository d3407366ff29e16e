//! Optimiser steps on a GPU.

use std::borrow::Cow;

use dsmoe_core::Model;
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_core::model::{Batch, StepArgs};
use dsmoe_router::{LogitCounts, RoutingStats};

use super::{Engine, EngineOptions, StepResult};
use crate::error::Result;
use crate::optim::{AdamW, GradNorms, Update};

/// The memory of training on a GPU.
#[derive(Debug)]
pub(super) struct CudaEngine {
    optimizer: AdamW,
    stats: Option<RoutingStats>,
    trainer: Box<CudaTrainer>,
    /// The router logits of the last micro-batch, where they are counted.
    logits: Option<LogitCounts>,
    predicted: usize,
}

impl CudaEngine {
    pub(super) fn new(
        model: &Model,
        optimizer: AdamW,
        options: EngineOptions,
        ordinal: usize,
    ) -> Result<CudaEngine> {
        let (m, v) = (&optimizer.m, &optimizer.v);
        let trainer = Box::new(CudaTrainer::new(ordinal, model, m, v, options.tokens, options.seq)?);
        Ok(CudaEngine { optimizer, stats: model.new_stats(), trainer, logits: None, predicted: 0 })
    }
}

impl Engine for CudaEngine {
    fn begin(&mut self, _step: u64, _micro_batches: u64) -> Result<()> {
        if let Some(stats) = &mut self.stats {
            stats.clear();
        }
        self.predicted = 0;
        Ok(self.trainer.begin()?)
    }

    fn micro_batch(&mut self, _model: &Model, batch: Batch<'_>, args: &StepArgs) -> Result<bool> {
        self.trainer.micro_batch(batch.inputs, batch.targets, batch.seq, args)?;
        self.predicted += batch.targets.len();
        if let Some(counts) = &mut self.logits {
            self.trainer.logits(counts)?;
        }
        Ok(true)
    }

    fn end(&mut self, model: &Model, _step: u64, stop: bool) -> Result<StepResult> {
        let sums = self.trainer.finish(self.stats.as_mut())?;
        let tokens = self.predicted * model.config().num_layers;
        Ok(StepResult {
            lm_loss: sums.loss / self.predicted as f64,
            divergence: 0.0,
            sparsity_loss: sums.active_gates / tokens as f64,
            mean_gate: sums.all_gates / tokens as f64,
            share_loss: 0.0,
            balance_loss: sums.balance_loss,
            separability: 0.0,
            gate_entropy: 0.0,
            budget: 0.0,
            stop,
            norms: GradNorms { all: sums.squares.sqrt(), router: sums.router_squares.sqrt() },
            non_finite: if sums.loss.is_finite() { None } else { Some(self.trainer.first_non_finite()?) },
        })
    }

    fn update(&mut self, _model: &mut Model, update: &Update<'_>) -> Result<()> {
        Ok(self.trainer.update(update.scale, |decay, router| update.hyper(decay, router))?)
    }

    fn fetch(&mut self, model: &mut Model) -> Result<()> {
        self.trainer.download(model)?;
        Ok(self.trainer.download_moments(&mut self.optimizer.m, &mut self.optimizer.v)?)
    }

    fn grads(&self) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Owned(self.trainer.download_grads()?))
    }

    fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    fn stats(&self) -> Option<&RoutingStats> {
        self.stats.as_ref()
    }

    fn count_logits(&mut self) -> Result<()> {
        self.logits = self.stats.as_ref().map(|stats| LogitCounts::new(stats.num_layers()));
        Ok(self.trainer.count_logits()?)
    }

    fn logits(&self) -> Option<&LogitCounts> {
        self.logits.as_ref()
    }

    fn set_thresholds(&mut self, model: &mut Model, logits: &[f32]) -> Result<()> {
        model.set_thresholds(logits)?;
        Ok(self.trainer.set_thresholds(logits)?)
    }

    fn set_threshold(&mut self, model: &mut Model, threshold: f32) -> Result<()> {
        model.set_threshold(threshold)?;
        Ok(self.trainer.set_threshold(threshold)?)
    }
}
