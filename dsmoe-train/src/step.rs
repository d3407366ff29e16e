//! One optimiser step: micro-batches forward and backward, clipping, AdamW.

use std::sync::atomic::{AtomicBool, Ordering};

use dsmoe_core::Model;
use dsmoe_core::model::{StepArgs, TrainWorkspace};
use dsmoe_core::params::Layout;
use dsmoe_datasets::{Interleaving, Mixture};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::{RoutingStats, SparsityOver};

use crate::config::TrainConfig;
use crate::error::Result;
use crate::optim::{AdamW, GradNorms, clip_scale, grad_norms, last_non_finite};

/// The memory of training, sized for a configuration; steps allocate nothing.
#[derive(Debug)]
pub struct Stepper {
    /// The moments.
    pub optimizer: AdamW,
    layout: Layout,
    grads: Buf,
    workspace: TrainWorkspace,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    window: Vec<u32>,
    /// Routing of the last step.
    stats: Option<RoutingStats>,
}

/// What a step showed.
#[derive(Debug)]
pub struct StepResult {
    /// Mean negative log-likelihood of the step's tokens, nats.
    pub lm_loss: f64,
    /// Mean gate of active experts over layers, tokens and experts (eqs. 17-19).
    pub sparsity_loss: f64,
    /// The same of all gates.
    pub mean_gate: f64,
    /// What the layers add to the loss so that experts are used evenly, summed over layers, mean over micro-batches.
    pub balance_loss: f64,
    /// Norms of the gradient.
    pub norms: GradNorms,
    /// Where a NaN or infinity showed first; the parameters were then left alone.
    pub non_finite: Option<String>,
}

impl Stepper {
    /// For `model` under a resolved `config`.
    pub fn new(model: &Model, optimizer: AdamW, config: &TrainConfig) -> Stepper {
        let tokens = config.batch * config.seq;
        Stepper {
            optimizer,
            layout: model.layout().clone(),
            grads: Buf::zeros(model.layout().len()),
            workspace: TrainWorkspace::new(model, tokens, config.dtype),
            inputs: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            window: Vec::with_capacity(config.seq + 1),
            stats: model.new_stats(),
        }
    }

    /// Takes step `step`, counted from 0, with this weight of the sparsity loss. `None` when `stop` was raised
    /// meanwhile: nothing has changed then.
    ///
    /// # Errors
    /// A token id outside the vocabulary, sequences longer than the model has positions, or text that cannot be read.
    #[expect(clippy::too_many_arguments, reason = "the trainer's parts, borrowed one by one")]
    pub fn take(
        &mut self,
        model: &mut Model,
        mixture: &Mixture,
        order: &mut Interleaving,
        config: &TrainConfig,
        step: u64,
        sparsity: (f32, SparsityOver),
        stop: &AtomicBool,
    ) -> Result<Option<StepResult>> {
        self.grads.clear();
        let micro_batches = config.accumulate as u64;
        let mut args = StepArgs {
            loss_scale: (1.0 / config.tokens_per_step() as f64) as f32,
            sparsity_weight: sparsity.0 / micro_batches as f32,
            sparsity_over: sparsity.1,
            balance_scale: 1.0 / micro_batches as f32,
            seed: 0,
        };
        if let Some(stats) = &mut self.stats {
            stats.clear();
        }
        let (mut loss_sum, mut predicted) = (0.0, 0);
        let (mut sparsity_loss, mut mean_gate, mut balance_loss) = (0.0, 0.0, 0.0);
        let mut non_finite = None;
        for micro in 0..micro_batches {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            self.inputs.clear();
            self.targets.clear();
            for sample in order.batch_at(step * micro_batches + micro) {
                self.window.clear();
                mixture.window(sample, &mut self.window)?;
                self.inputs.extend_from_slice(&self.window[..config.seq]);
                self.targets.extend_from_slice(&self.window[1..]);
            }
            // A function of the run's seed and of where it stands, so that a resumed run draws the same noise.
            args.seed = Rng::new(config.seed, step * micro_batches + micro).next_u64();
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
            balance_loss += output.balance_loss;
            if let (Some(sum), Some(part)) = (&mut self.stats, self.workspace.stats()) {
                sum.merge(part);
            }
            non_finite = output.non_finite;
            if non_finite.is_some() {
                break;
            }
        }

        if let Some(masks) = model.masks() {
            masks.apply(&mut self.grads, &self.layout);
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
            model.apply_masks();
        }
        Ok(Some(StepResult { lm_loss, sparsity_loss, mean_gate, balance_loss, norms, non_finite }))
    }

    /// The routing of the last step's tokens; none without routers.
    pub fn stats(&self) -> Option<&RoutingStats> {
        self.stats.as_ref()
    }
}
