//! One optimiser step: micro-batches forward and backward, clipping, AdamW.

use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(feature = "cuda")]
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_core::model::{StepArgs, TrainWorkspace};
use dsmoe_core::params::Layout;
use dsmoe_core::{Device, Model};
use dsmoe_datasets::{Interleaving, Mixture};
#[cfg(feature = "cuda")]
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::{RoutingStats, SparsityOver};

use crate::config::TrainConfig;
#[cfg(feature = "cuda")]
use crate::error::Error;
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::optim::hyper;
use crate::optim::{AdamW, GradNorms, clip_scale, grad_norms, last_non_finite};

/// The memory of training, sized for a configuration; steps allocate nothing.
#[derive(Debug)]
pub struct Stepper {
    /// The moments; where a GPU trains, as of the last [`Stepper::fetch`].
    pub optimizer: AdamW,
    layout: Layout,
    engine: Engine,
    text: Text,
    /// Routing of the last step.
    stats: Option<RoutingStats>,
}

/// Who computes.
#[derive(Debug)]
enum Engine {
    Cpu {
        grads: Buf,
        workspace: Box<TrainWorkspace>,
    },
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaTrainer>),
}

/// Where the text of a step comes from, and how it is trained on.
pub struct StepText<'a> {
    /// The text.
    pub mixture: &'a Mixture,
    /// Its order.
    pub order: &'a mut Interleaving,
    /// The run's settings, resolved.
    pub config: &'a TrainConfig,
    /// The step, counted from 0.
    pub step: u64,
}

/// The tokens of a micro-batch.
#[derive(Debug)]
struct Text {
    inputs: Vec<u32>,
    targets: Vec<u32>,
    window: Vec<u32>,
}

impl Text {
    /// Takes the tokens of micro-batch `micro` of the step.
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

/// What a step showed.
#[derive(Debug, Default)]
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
    /// For `model` under a resolved `config`, on `device`.
    ///
    /// # Errors
    /// The device is not there, its memory does not suffice, or it does not know the model's FFNs or the precision.
    pub fn new(model: &Model, optimizer: AdamW, config: &TrainConfig, device: Device) -> Result<Stepper> {
        let tokens = config.batch * config.seq;
        let engine = match device {
            Device::Cpu => Engine::Cpu {
                grads: Buf::zeros(model.layout().len()),
                workspace: Box::new(TrainWorkspace::new(model, tokens, config.dtype)),
            },
            #[cfg(feature = "cuda")]
            Device::Cuda(_) if config.dtype != Precision::Bf16 => {
                let allowed = "bf16 on a GPU".to_owned();
                return Err(Error::Field { field: "dtype", found: config.dtype.to_string(), allowed });
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                let (m, v) = (&optimizer.m, &optimizer.v);
                Engine::Cuda(Box::new(CudaTrainer::new(ordinal, model, m, v, tokens, config.seq)?))
            }
        };
        Ok(Stepper {
            optimizer,
            layout: model.layout().clone(),
            engine,
            text: Text {
                inputs: Vec::with_capacity(tokens),
                targets: Vec::with_capacity(tokens),
                window: Vec::with_capacity(config.seq + 1),
            },
            stats: model.new_stats(),
        })
    }

    /// Gives back the memory of the gradients until the next step. What measures the model meanwhile takes about as much.
    pub fn release(&mut self) {
        match &mut self.engine {
            Engine::Cpu { grads, .. } => *grads = Buf::zeros(0),
            #[cfg(feature = "cuda")]
            Engine::Cuda(_) => {}
        }
    }

    /// Takes a step with this weight of the sparsity loss. `None` when `stop` was raised meanwhile: nothing has changed
    /// then. Where a GPU trains, `model` changes with [`Stepper::fetch`] only.
    ///
    /// # Errors
    /// A token id outside the vocabulary, sequences longer than the model has positions, text that cannot be read, or a
    /// GPU that fails.
    pub fn take(
        &mut self,
        model: &mut Model,
        mut of: StepText<'_>,
        sparsity: (f32, SparsityOver),
        stop: &AtomicBool,
    ) -> Result<Option<StepResult>> {
        let Stepper { optimizer, layout, engine, text, stats } = self;
        if let Some(stats) = stats {
            stats.clear();
        }
        let (config, step) = (of.config, of.step);
        let micro_batches = config.accumulate as u64;
        let mut args = StepArgs {
            loss_scale: (1.0 / config.tokens_per_step() as f64) as f32,
            sparsity_weight: sparsity.0 / micro_batches as f32,
            sparsity_over: sparsity.1,
            balance_scale: 1.0 / micro_batches as f32,
            seed: 0,
        };
        let mut shown = StepResult::default();
        match engine {
            Engine::Cpu { grads, .. } => {
                grads.resize(layout.len());
                grads.clear();
            }
            #[cfg(feature = "cuda")]
            Engine::Cuda(trainer) => trainer.begin()?,
        }
        let mut predicted = 0;
        for micro in 0..micro_batches {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            text.gather(&mut of, micro)?;
            // A function of the run's seed and of where it stands, so that a resumed run draws the same noise.
            args.seed = Rng::new(config.seed, step * micro_batches + micro).next_u64();
            predicted += text.targets.len();
            match engine {
                Engine::Cpu { grads, workspace } => {
                    let output =
                        model.train_step(grads, &text.inputs, &text.targets, config.seq, &args, workspace)?;
                    shown.lm_loss += output.loss_sum;
                    shown.sparsity_loss += output.sparsity_loss / micro_batches as f64;
                    shown.mean_gate += output.mean_gate / micro_batches as f64;
                    shown.balance_loss += output.balance_loss;
                    if let (Some(sum), Some(part)) = (&mut *stats, workspace.stats()) {
                        sum.merge(part);
                    }
                    shown.non_finite = output.non_finite;
                    if shown.non_finite.is_some() {
                        break;
                    }
                }
                #[cfg(feature = "cuda")]
                Engine::Cuda(trainer) => {
                    trainer.micro_batch(&text.inputs, &text.targets, config.seq, &args)?
                }
            }
        }
        match engine {
            Engine::Cpu { grads, .. } => {
                if let Some(masks) = model.masks() {
                    masks.apply(grads, layout);
                }
                shown.norms = grad_norms(layout, grads);
            }
            #[cfg(feature = "cuda")]
            Engine::Cuda(trainer) => {
                let sums = trainer.finish(stats.as_mut())?;
                let gates = predicted * model.config().num_layers * model.num_experts().unwrap_or(1);
                shown.lm_loss = sums.loss;
                shown.sparsity_loss = sums.active_gates / gates as f64;
                shown.mean_gate = sums.all_gates / gates as f64;
                shown.balance_loss = sums.balance_loss;
                shown.norms = GradNorms { all: sums.squares.sqrt(), router: sums.router_squares.sqrt() };
                if !sums.loss.is_finite() {
                    shown.non_finite = Some(trainer.first_non_finite()?);
                }
            }
        }
        shown.lm_loss /= predicted as f64;
        if shown.non_finite.is_none() && !shown.lm_loss.is_finite() {
            shown.non_finite = Some("loss".to_owned());
        }
        if shown.non_finite.is_none() && !shown.norms.all.is_finite() {
            let of_gradient = |grads: &[f32]| {
                let name = last_non_finite(layout, grads).map_or("a tensor", |entry| &entry.spec.name);
                Some(format!("gradient of {name}"))
            };
            shown.non_finite = match engine {
                Engine::Cpu { grads, .. } => of_gradient(grads),
                #[cfg(feature = "cuda")]
                Engine::Cuda(trainer) => of_gradient(&trainer.download_grads()?),
            };
        }
        if shown.non_finite.is_none() {
            let lr = config.schedule().lr_at(step);
            let scale = clip_scale(shown.norms.all, config.clip);
            match engine {
                Engine::Cpu { grads, .. } => {
                    optimizer.step(model.params_mut(), grads, layout, config, lr, scale, step + 1);
                    model.apply_masks();
                }
                #[cfg(feature = "cuda")]
                Engine::Cuda(trainer) => {
                    trainer.update(scale, |decay, router| hyper(config, lr, step + 1, decay, router))?;
                }
            }
        }
        Ok(Some(shown))
    }

    /// Brings parameters and moments here, where a GPU has them.
    ///
    /// # Errors
    /// The GPU fails.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "they are here"))]
    pub fn fetch(&mut self, model: &mut Model) -> Result<()> {
        match &self.engine {
            Engine::Cpu { .. } => {}
            #[cfg(feature = "cuda")]
            Engine::Cuda(trainer) => {
                trainer.download(model)?;
                trainer.download_moments(&mut self.optimizer.m, &mut self.optimizer.v)?;
            }
        }
        Ok(())
    }

    /// The routing of the last step's tokens; none without routers.
    pub fn stats(&self) -> Option<&RoutingStats> {
        self.stats.as_ref()
    }
}
