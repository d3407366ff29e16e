//! The training engine: computes optimiser steps on one device.
//!
//! ```text
//! begin                     gradients and sums are zero
//! micro_batch (repeated)    forward and backward, added to the gradients of the lane
//! end_lane                  they are a leaf of the tree of lanes; for the next lane gradients are zero again
//! finish                    gradients and losses of all processes, gradient norms, the first non-finite place
//! update                    AdamW, scaled by the clipping factor
//! fetch                     parameters and moments reach the host
//! ```

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod memory;
mod parts;
mod report;

use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_core::model::{Batch, StepArgs, Weights};
use dsmoe_core::{Device, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::comm::{Communicator, neighbours};
use dsmoe_router::{LogitCounts, Pull, RoutingStats};

use self::cpu::CpuEngine;
#[cfg(feature = "cuda")]
use self::cuda::CudaEngine;
pub use self::memory::Share;
use crate::error::{Error, Result};
use crate::optim::{AdamW, GradNorms, Update, last_non_finite};
use crate::ranks::Zero;
pub use crate::teacher::Lessons;

/// The shape of the micro-batches of an engine, and where and how it computes.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::{Device, Model};
/// use dsmoe_kernels::{Precision, comm::alone};
/// use dsmoe_train::Zero;
/// use dsmoe_train::engine::{EngineOptions, new};
/// use dsmoe_train::optim::AdamW;
///
/// // Two lanes of four micro-batches, each of one sequence of 8 tokens.
/// let options = EngineOptions {
///     tokens: 8,
///     seq: 8,
///     lanes: 2,
///     accumulate: 4,
///     zero: Zero::Moments,
///     precision: Precision::F32,
///     device: Device::Cpu,
///     recompute: true, // less memory, more time
/// };
/// let model = Model::new(preset("tiny")?);
/// let engine = new(&model, AdamW::new(model.layout()), options, alone().clone())?;
/// assert_eq!(engine.optimizer().m.len(), model.layout().len());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Tokens in a micro-batch.
    pub tokens: usize,
    /// Tokens in a sequence.
    pub seq: usize,
    /// Lanes of a step that this process computes.
    pub lanes: usize,
    /// Micro-batches of a lane.
    pub accumulate: usize,
    /// The state that is divided among processes.
    pub zero: Zero,
    /// The precision to which operands of matrix products are rounded.
    pub precision: Precision,
    /// The device that computes.
    pub device: Device,
    /// Keep the inputs of layers alone, and run their forward pass again in the backward pass.
    pub recompute: bool,
}

/// The losses and gradient norms of a step.
///
/// ```
/// use dsmoe_train::engine::StepResult;
/// use dsmoe_train::optim::clip_scale;
///
/// // The factor of the gradients in the update, or what has to stop the run.
/// fn scale(step: &StepResult) -> Result<f32, String> {
///     match &step.non_finite {
///         Some(place) => Err(format!("{place} is not finite")),
///         None => Ok(clip_scale(step.norms.all, 1.0)),
///     }
/// }
/// assert_eq!(scale(&StepResult::default()), Ok(1.0));
/// let broken = StepResult { non_finite: Some("layer 3".to_owned()), ..StepResult::default() };
/// assert_eq!(scale(&broken).unwrap_err(), "layer 3 is not finite");
/// ```
#[derive(Clone, Debug, Default)]
pub struct StepResult {
    /// Mean negative log-likelihood of the step's tokens, nats.
    pub lm_loss: f64,
    /// Mean divergence of the step's tokens from the teacher, nats; 0 without a teacher.
    pub divergence: f64,
    /// Mean gate of active experts over layers, tokens and experts (eqs. 17-19).
    pub sparsity_loss: f64,
    /// Mean of all gates over layers, tokens and experts.
    pub mean_gate: f64,
    /// The squared distance of the mean gate of a micro-batch from the share, mean over micro-batches; 0 unless there is a loss on it.
    pub share_loss: f64,
    /// The balance losses of all layers, summed; mean over micro-batches.
    pub balance_loss: f64,
    /// Mean of the separability loss over layers, tokens and gates; 0 unless it has a weight.
    pub separability: f64,
    /// Mean of the entropy of gates over layers, tokens and, of sigmoids, gates; 0 unless it has a weight.
    pub gate_entropy: f64,
    /// Mean of the budgets of the micro-batches, where thresholds hold them.
    pub budget: f64,
    /// Norms of the gradient.
    pub norms: GradNorms,
    /// True if a process asks to stop after this step.
    pub stop: bool,
    /// The first place with a NaN or infinity. Such a step must not be applied.
    pub non_finite: Option<String>,
}

/// The memory of training on one device, with the optimiser's state. Steps allocate next to nothing, except to read and write
/// a teacher's cache. What takes part in sums over processes is called by all of them.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{Batch, StepArgs};
/// use dsmoe_core::{Device, Model};
/// use dsmoe_kernels::Precision;
/// use dsmoe_kernels::comm::alone;
/// use dsmoe_train::engine::{Engine, EngineOptions, StepResult, new};
/// use dsmoe_train::optim::{AdamW, Update};
/// use dsmoe_train::{TrainConfig, Zero};
///
/// let mut model = Model::new(preset("tiny")?);
/// let (zero, precision, device) = (Zero::Moments, Precision::F32, Device::Cpu);
/// let options = EngineOptions {
///     tokens: 4,
///     seq: 4,
///     lanes: 1,
///     accumulate: 1,
///     zero,
///     precision,
///     device,
///     recompute: false,
/// };
/// let mut engine: Box<dyn Engine> = new(&model, AdamW::new(model.layout()), options, alone().clone())?;
/// engine.begin(1, 1)?;
/// let batch = Batch { inputs: &[1, 5, 9, 2], targets: &[5, 9, 2, 7], seq: 4 };
/// engine.micro_batch(&model, batch, &StepArgs { loss_scale: 0.25, ..StepArgs::default() })?;
/// let StepResult { lm_loss, non_finite, .. } = engine.end(&model, 1, false)?;
/// assert!(lm_loss > 0.0 && non_finite.is_none());
/// let config = TrainConfig::default();
/// engine.update(&mut model, &Update { config: &config, lr: 1e-3, scale: 1.0, step: 1 })?;
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
pub trait Engine: Debug + Send {
    /// Starts step `step` of so many micro-batches, those of other processes included: sets gradients and sums to zero.
    ///
    /// # Errors
    /// The device fails.
    fn begin(&mut self, step: u64, micro_batches: u64) -> Result<()>;

    /// Runs a micro-batch forward and backward and adds its gradients and losses to those of the step. A GPU only
    /// queues the work. Returns false when the loss is not finite, here or in a process that goes on together with this one, so
    /// that further micro-batches are of no use.
    ///
    /// # Errors
    /// A token id outside the vocabulary, sequences longer than the model has positions, or a device that fails.
    ///
    /// # Panics
    /// The batch has not [`EngineOptions::tokens`] tokens, or these are no multiple of its `seq`.
    fn micro_batch(&mut self, model: &Model, batch: Batch<'_>, args: &StepArgs) -> Result<bool>;

    /// Ends a lane of the step, whose micro-batches are done.
    ///
    /// # Errors
    /// The device fails.
    fn end_lane(&mut self) -> Result<()> {
        Ok(())
    }

    /// Ends the backward passes of step `step` and returns its losses and norms as the device has them. `stop` asks all
    /// processes to stop after it.
    ///
    /// # Errors
    /// The device or the communication fails.
    fn end(&mut self, model: &Model, step: u64, stop: bool) -> Result<StepResult>;

    /// Does as [`Engine::end`], and names the first place that is not finite.
    ///
    /// # Errors
    /// The device or the communication fails.
    fn finish(&mut self, model: &Model, step: u64, stop: bool) -> Result<StepResult> {
        let mut result = self.end(model, step, stop)?;
        if result.non_finite.is_none() && !result.lm_loss.is_finite() {
            result.non_finite = Some("loss".to_owned());
        }
        if result.non_finite.is_none() && !result.norms.all.is_finite() {
            result.non_finite = Some(format!("gradient of {}", self.gradient_not_finite(model, step)?));
        }
        Ok(result)
    }

    /// Returns the name of the tensor nearest to the loss whose gradient is not finite.
    ///
    /// # Errors
    /// The device or the communication fails.
    fn gradient_not_finite(&mut self, model: &Model, _step: u64) -> Result<String> {
        let grads = self.grads()?;
        let entry = last_non_finite(model.layout(), &grads);
        Ok(entry.map_or("a tensor", |entry| &entry.spec.name).to_owned())
    }

    /// Updates the parameters from the gradients. On a GPU `model` changes with [`Engine::fetch`] only.
    ///
    /// # Errors
    /// The device or the communication fails.
    fn update(&mut self, model: &mut Model, update: &Update<'_>) -> Result<()>;

    /// Copies parameters and moments from the device to `model` and to [`Engine::optimizer`], where the host has not
    /// got them.
    ///
    /// # Errors
    /// The device fails.
    fn fetch(&mut self, _model: &mut Model) -> Result<()> {
        Ok(())
    }

    /// Returns the gradients, laid out as the parameters; those of other owners are unspecified.
    ///
    /// # Errors
    /// The device fails.
    fn grads(&self) -> Result<Cow<'_, [f32]>>;

    /// Returns the optimiser's state; on a GPU that of the last [`Engine::fetch`].
    fn optimizer(&self) -> &AdamW;

    /// Returns the routing of the last step's tokens; none without routers.
    fn stats(&self) -> Option<&RoutingStats>;

    /// Sets the gates' threshold of every layer, in `model` and on the device.
    ///
    /// # Errors
    /// The threshold is outside 0..=1, or the model has no gates.
    fn set_threshold(&mut self, model: &mut Model, threshold: f32) -> Result<()> {
        Ok(model.set_threshold(threshold)?)
    }

    /// Sets what the logits of each layer's gates have to exceed, one threshold per layer, for the next micro-batches.
    ///
    /// # Errors
    /// The model has no gates, or the device fails.
    fn set_thresholds(&mut self, model: &mut Model, logits: &[f32]) -> Result<()> {
        Ok(model.set_thresholds(logits)?)
    }

    /// Counts the router logits of all further micro-batches, for [`Engine::logits`].
    ///
    /// # Errors
    /// The device's memory does not suffice.
    fn count_logits(&mut self) -> Result<()>;

    /// Returns the router logits of the last micro-batch; none unless they are counted.
    fn logits(&self) -> Option<&LogitCounts>;

    /// Returns what the last micro-batch did to the gates as a whole; 0 where the device does not tell.
    fn pull(&self) -> Pull {
        Pull::default()
    }

    /// Makes all further steps learn from a teacher too. [`Lessons`] has an example.
    ///
    /// # Errors
    /// The device runs no teacher.
    fn set_teacher(&mut self, _lessons: Lessons) -> Result<()> {
        Err(Error::field("teacher", "set for a GPU", "a teacher with {device} cpu only"))
    }

    /// Returns what the teacher's cache has to say to the user since the last call.
    fn notes(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Lends the parameters for an evaluation, where every process holds its part of them alone.
    fn lend(&self) -> Option<Box<dyn Weights>> {
        None
    }

    /// Frees the host memory of the gradients until the next step, for what measures the model meanwhile.
    fn release(&mut self) {}
}

/// Allocates the memory to train `model` from the given state of the optimiser, of the parameters that this process owns.
///
/// # Errors
/// The device is not there, its memory does not suffice, or it does not support the model's FFNs, the precision, or several
/// lanes or processes.
pub fn new(
    model: &Model,
    optimizer: AdamW,
    options: EngineOptions,
    comm: Arc<dyn Communicator>,
) -> Result<Box<dyn Engine>> {
    #[cfg(feature = "cuda")]
    check_gpu(model, &options, comm.size(), optimizer.freezes().then_some("train_layers or train_parts"))?;
    Ok(match options.device {
        Device::Cpu => {
            let neighbours = neighbours(&*comm)?;
            Box::new(CpuEngine::new(model, optimizer, options, (comm, neighbours)))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => Box::new(CudaEngine::new(model, optimizer, options, ordinal)?),
    })
}

/// Refuses what a GPU does not train, if the device is one, without opening it. `frozen` is the setting that leaves parameters as
/// they are.
#[cfg(feature = "cuda")]
pub(crate) fn check_gpu(
    model: &Model,
    options: &EngineOptions,
    processes: usize,
    frozen: Option<&'static str>,
) -> Result<()> {
    let &EngineOptions { tokens, lanes, precision, device, recompute, .. } = options;
    if !device.is_gpu() {
        return Ok(());
    }
    if processes > 1 {
        let found = format!("a GPU with {processes} processes");
        return Err(Error::field("device", found, "cpu, or one process"));
    }
    if let Some(field) = frozen {
        return Err(Error::field(field, "set for a GPU", "it with {device} cpu only"));
    }
    if lanes > 1 {
        return Err(Error::field("lanes", lanes, "1 on a GPU, and a larger {accumulate}"));
    }
    if recompute {
        return Err(Error::field("recompute", "set for a GPU", "it with {device} cpu only"));
    }
    if precision != Precision::Bf16 {
        return Err(Error::field("dtype", precision, "bf16 on a GPU"));
    }
    // It names an FFN that a GPU does not run.
    CudaTrainer::memory(model.config(), tokens)?;
    Ok(())
}
