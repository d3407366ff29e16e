//! Optimiser steps on a GPU.

use std::borrow::Cow;

use dsmoe_core::Model;
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_core::model::{Batch, StepArgs};
use dsmoe_kernels::Precision;
use dsmoe_router::{LogitCounts, RoutingStats};

use super::{Engine, EngineOptions, StepResult};
use crate::error::{Error, Result};
use crate::optim::{AdamW, GradNorms, Update};

/// The memory of training on a GPU.
#[derive(Debug)]
pub(super) struct CudaEngine {
    optimizer: AdamW,
    stats: Option<RoutingStats>,
    trainer: Box<CudaTrainer>,
    predicted: usize,
}

impl CudaEngine {
    pub(super) fn new(
        model: &Model,
        optimizer: AdamW,
        options: EngineOptions,
        ordinal: usize,
    ) -> Result<CudaEngine> {
        if options.precision != Precision::Bf16 {
            return Err(Error::field("dtype", options.precision, "bf16 on a GPU"));
        }
        let (m, v) = (&optimizer.m, &optimizer.v);
        let trainer = Box::new(CudaTrainer::new(ordinal, model, m, v, options.tokens, options.seq)?);
        Ok(CudaEngine { optimizer, stats: model.new_stats(), trainer, predicted: 0 })
    }
}

impl Engine for CudaEngine {
    fn begin(&mut self, _micro_batches: u64) -> Result<()> {
        if let Some(stats) = &mut self.stats {
            stats.clear();
        }
        self.predicted = 0;
        Ok(self.trainer.begin()?)
    }

    fn micro_batch(&mut self, _model: &Model, batch: Batch<'_>, args: &StepArgs) -> Result<bool> {
        self.trainer.micro_batch(batch.inputs, batch.targets, batch.seq, args)?;
        self.predicted += batch.targets.len();
        Ok(true)
    }

    fn end(&mut self, model: &Model) -> Result<StepResult> {
        let sums = self.trainer.finish(self.stats.as_mut())?;
        let gates = self.predicted * model.config().num_layers * model.num_experts().unwrap_or(1);
        Ok(StepResult {
            lm_loss: sums.loss / self.predicted as f64,
            divergence: 0.0,
            sparsity_loss: sums.active_gates / gates as f64,
            mean_gate: sums.all_gates / gates as f64,
            balance_loss: sums.balance_loss,
            separability: 0.0,
            budget: 0.0,
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
        Err(Error::field("hold", "threshold on a GPU", "loss"))
    }

    fn logits(&self) -> Option<&LogitCounts> {
        None
    }

    fn set_thresholds(&mut self, _model: &mut Model, _logits: &[f32]) -> Result<()> {
        Err(Error::field("hold", "threshold on a GPU", "loss"))
    }

    fn set_threshold(&mut self, model: &mut Model, threshold: f32) -> Result<()> {
        model.set_threshold(threshold)?;
        Ok(self.trainer.set_threshold(threshold)?)
    }
}
