//! One optimiser step: micro-batches forward and backward, clipping, AdamW.

use std::sync::atomic::{AtomicBool, Ordering};

use dsmoe_core::Model;
use dsmoe_core::model::{StepArgs, TrainWorkspace};
use dsmoe_core::params::Layout;
use dsmoe_datasets::{Batches, Split};
use dsmoe_kernels::buf::Buf;
use dsmoe_router::{RoutingSummary, SparsityOver};

use crate::config::TrainConfig;
use crate::error::Result;
use crate::optim::{AdamW, GradNorms, clip_scale, grad_norms, last_non_finite};

/// The memory of training, and what moves with it.
#[derive(Debug)]
pub(crate) struct Stepper {
    pub(crate) optimizer: AdamW,
    layout: Layout,
    grads: Buf,
    workspace: TrainWorkspace,
    inputs: Vec<u32>,
    targets: Vec<u32>,
}

/// What a step showed.
#[derive(Debug)]
pub(crate) struct StepResult {
    pub(crate) lm_loss: f64,
    /// Of active gates (eqs. 17-19).
    pub(crate) sparsity_loss: f64,
    pub(crate) mean_gate: f64,
    pub(crate) norms: GradNorms,
    pub(crate) routing: Option<RoutingSummary>,
    /// Where a NaN or infinity showed first; the parameters were then left alone.
    pub(crate) non_finite: Option<String>,
}

impl Stepper {
    pub(crate) fn new(model: &Model, optimizer: AdamW) -> Stepper {
        Stepper {
            optimizer,
            layout: model.layout().clone(),
            grads: Buf::zeros(model.layout().len()),
            workspace: TrainWorkspace::default(),
            inputs: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Takes step `step`, counted from 0. `None` when `stop` was raised meanwhile: nothing has changed then.
    #[expect(clippy::too_many_arguments, reason = "the trainer's parts, borrowed one by one")]
    pub(crate) fn take(
        &mut self,
        model: &mut Model,
        split: &Split,
        batches: &mut Batches,
        config: &TrainConfig,
        step: u64,
        sparsity: (f32, SparsityOver),
        stop: &AtomicBool,
    ) -> Result<Option<StepResult>> {
        self.grads.clear();
        let micro_batches = config.accumulate as u64;
        let args = StepArgs {
            loss_scale: (1.0 / config.tokens_per_step() as f64) as f32,
            sparsity_weight: sparsity.0 / micro_batches as f32,
            sparsity_over: sparsity.1,
            precision: config.dtype,
        };
        let mut stats = model.new_stats();
        let (mut loss_sum, mut predicted, mut sparsity_loss, mut mean_gate) = (0.0, 0, 0.0, 0.0);
        let mut non_finite = None;
        for micro in 0..micro_batches {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            self.inputs.clear();
            self.targets.clear();
            for index in batches.batch_at(step * micro_batches + micro) {
                let window = split.window(index);
                self.inputs.extend_from_slice(&window[..config.seq]);
                self.targets.extend_from_slice(&window[1..]);
            }
            let output = model.train_step(
                &mut self.grads,
                &self.inputs,
                &self.targets,
                config.seq,
                &args,
                &mut self.workspace,
            )?;
            loss_sum += output.loss_sum;
            predicted += output.predicted;
            sparsity_loss += output.sparsity_loss / micro_batches as f64;
            mean_gate += output.mean_gate / micro_batches as f64;
            if let (Some(sum), Some(part)) = (&mut stats, &output.stats) {
                sum.merge(part);
            }
            non_finite = output.non_finite;
            if non_finite.is_some() {
                break;
            }
        }

        let norms = grad_norms(&self.layout, &self.grads);
        let lm_loss = loss_sum / predicted as f64;
        if non_finite.is_none() && !lm_loss.is_finite() {
            non_finite = Some("loss".to_owned());
        }
        if non_finite.is_none() && !norms.all.is_finite() {
            let name =
                last_non_finite(&self.layout, &self.grads).map_or("a tensor", |entry| &entry.spec.name);
            non_finite = Some(format!("gradient of {name}"));
        }
        if non_finite.is_none() {
            let lr = config.schedule().lr_at(step);
            let scale = clip_scale(norms.all, config.clip);
            self.optimizer.step(model.params_mut(), &self.grads, &self.layout, config, lr, scale, step + 1);
        }
        Ok(Some(StepResult {
            lm_loss,
            sparsity_loss,
            mean_gate,
            norms,
            routing: stats.map(|stats| stats.summary()),
            non_finite,
        }))
    }
}
