//! The decoder over any [`Ffn`](crate::ffn::Ffn): [`Model`], an arena of f32 parameters, to train, load and save;
//! [`Inference`], packed weights in a precision, to score and to decode.
//!
//! ```text
//! x = embed(ids)
//! per layer:  x += attention(rms_norm(x)) W_o^T;   x += ffn(rms_norm(x))
//! logits = rms_norm(x) W_head^T
//! ```
//! This is LLaMA; [`Architecture`](crate::config::Architecture) states in which switches other families differ.

pub(crate) mod arena;
pub(crate) mod block;
#[cfg(feature = "cuda")]
pub(crate) mod gpu;
pub(crate) mod inference;
pub(crate) mod memory;
pub(crate) mod ropes;
pub(crate) mod tensors;
pub(crate) mod train;
pub(crate) mod weights;

/// Models on a GPU. [`CudaTrainer`](cuda::CudaTrainer) trains; [`Inference`] chooses its device.
#[cfg(feature = "cuda")]
pub mod cuda {
    pub use super::train::cuda::{CudaStep, CudaTrainer};
}

pub use arena::Model;
pub use inference::{After, Cache, Inference, Likelihood, Observe, Observed, Segment, Workspace};
pub use memory::MemoryUse;
pub use tensors::Batch;
pub use train::{Grads, StepArgs, StepOutput, Teacher, Teaching, TopRows, TrainWorkspace, Units, Whole};
pub use weights::{Params, Weights};
