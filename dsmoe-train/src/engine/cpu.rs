//! Optimiser steps on the processor.

use std::borrow::Cow;

use dsmoe_core::Model;
use dsmoe_core::model::{Batch, StepArgs, TrainWorkspace};
use dsmoe_core::params::Layout;
use dsmoe_kernels::buf::Buf;
use dsmoe_router::{LogitCounts, RoutingStats};

use super::{Engine, EngineOptions, StepResult};
use crate::error::Result;
use crate::optim::{AdamW, Update, grad_norms};
use crate::teacher::{Lessons, LessonsOf, learn};

/// The memory of training on the processor.
#[derive(Debug)]
pub(super) struct CpuEngine {
    optimizer: AdamW,
    stats: Option<RoutingStats>,
    layout: Layout,
    grads: Buf,
    workspace: Box<TrainWorkspace>,
    lessons: Option<Box<Lessons>>,
    /// The losses of the step so far.
    result: StepResult,
    micro_batches: u64,
    predicted: usize,
}

impl CpuEngine {
    pub(super) fn new(model: &Model, optimizer: AdamW, options: EngineOptions) -> CpuEngine {
        CpuEngine {
            optimizer,
            stats: model.new_stats(),
            layout: model.layout().clone(),
            grads: Buf::zeros(model.layout().len()),
            workspace: Box::new(TrainWorkspace::new(model, options.tokens, options.precision)),
            lessons: None,
            result: StepResult::default(),
            micro_batches: 1,
            predicted: 0,
        }
    }
}

impl Engine for CpuEngine {
    fn begin(&mut self, micro_batches: u64) -> Result<()> {
        self.grads.resize(self.layout.len());
        self.grads.clear();
        if let Some(stats) = &mut self.stats {
            stats.clear();
        }
        self.result = StepResult::default();
        (self.micro_batches, self.predicted) = (micro_batches, 0);
        Ok(())
    }

    fn micro_batch(&mut self, model: &Model, batch: Batch<'_>, args: &StepArgs) -> Result<bool> {
        let (grads, workspace) = (&mut self.grads, &mut self.workspace);
        let output = match self.lessons.as_deref_mut() {
            None => model.train_step(grads, batch, args, workspace)?,
            Some(Lessons { teacher, of: LessonsOf::All }) => {
                model.distill_step(grads, batch, args, teacher, workspace)?
            }
            Some(Lessons { teacher, of: LessonsOf::Top { top, cache, rows } }) => {
                learn(teacher, cache.as_deref_mut(), (batch.inputs, batch.seq), *top, rows)?;
                model.distill_step_from(grads, batch, args, (rows, teacher.weight()), workspace)?
            }
        };
        self.predicted += batch.targets.len();
        let (result, parts) = (&mut self.result, self.micro_batches as f64);
        result.lm_loss += output.loss_sum;
        result.divergence += output.divergence_sum;
        result.sparsity_loss += output.sparsity_loss / parts;
        result.mean_gate += output.mean_gate / parts;
        result.balance_loss += output.balance_loss;
        result.separability += output.separability / parts;
        result.non_finite = output.non_finite;
        if let (Some(sum), Some(part)) = (&mut self.stats, self.workspace.stats()) {
            sum.merge(part);
        }
        Ok(self.result.non_finite.is_none())
    }

    fn end(&mut self, model: &Model) -> Result<StepResult> {
        if let Some(masks) = model.masks() {
            masks.apply(&mut self.grads, &self.layout);
        }
        let mut result = self.result.clone();
        result.norms = grad_norms(&self.layout, &self.grads);
        result.lm_loss /= self.predicted as f64;
        result.divergence /= self.predicted as f64;
        Ok(result)
    }

    fn update(&mut self, model: &mut Model, update: &Update<'_>) -> Result<()> {
        self.optimizer.step(model.params_mut(), &self.grads, &self.layout, update);
        model.apply_masks();
        Ok(())
    }

    fn grads(&self) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(&self.grads))
    }

    fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    fn stats(&self) -> Option<&RoutingStats> {
        self.stats.as_ref()
    }

    fn count_logits(&mut self) -> Result<()> {
        self.workspace.count_logits();
        Ok(())
    }

    fn logits(&self) -> Option<&LogitCounts> {
        self.workspace.stats().and_then(RoutingStats::logits)
    }

    fn set_teacher(&mut self, lessons: Lessons) -> Result<()> {
        self.lessons = Some(Box::new(lessons));
        Ok(())
    }

    fn notes(&mut self) -> Vec<String> {
        self.lessons.as_mut().map_or_else(Vec::new, |lessons| lessons.notes())
    }

    fn release(&mut self) {
        self.grads = Buf::zeros(0);
    }
}
