//! One training step: its arguments and its results, on any device.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod workspace;

use dsmoe_kernels::rng::Rng;
use dsmoe_router::SparsityOver;
pub use workspace::TrainWorkspace;

use crate::ffn::GateTraining;

/// Weights of the losses of one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepArgs {
    /// Factor of each token's loss: one over the predicted tokens of the whole optimiser step.
    pub loss_scale: f32,
    /// Weight of the sparsity loss (a mean over layers, tokens and experts) in this micro-batch: the weight of the
    /// optimiser step divided by its micro-batches.
    pub sparsity_weight: f32,
    /// Gates that the sparsity loss acts on.
    pub sparsity_over: SparsityOver,
    /// Factor of balance losses: one over the micro-batches of the optimiser step.
    pub balance_scale: f32,
    /// Seed of the noise of this micro-batch.
    pub seed: u64,
}

/// One use of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// The use.
    pub what: &'static str,
    /// Its size.
    pub bytes: usize,
}

/// Losses and checks of a micro-batch.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// Sum of the token losses, nats.
    pub loss_sum: f64,
    /// Tokens predicted.
    pub predicted: usize,
    /// Mean of active gates over layers, tokens and experts (eq. 17-19).
    pub sparsity_loss: f64,
    /// Mean of all gates over layers, tokens and experts.
    pub mean_gate: f64,
    /// Sum over layers of the balance losses, scaled and weighted.
    pub balance_loss: f64,
    /// The first place with a NaN or infinity in the forward pass, e.g. `layer 3 ffn`, when the loss has one.
    pub non_finite: Option<String>,
}

/// The sum of the tokens' losses, without a sparsity loss.
impl Default for StepArgs {
    fn default() -> StepArgs {
        StepArgs {
            loss_scale: 1.0,
            sparsity_weight: 0.0,
            sparsity_over: SparsityOver::Active,
            balance_scale: 1.0,
            seed: 0,
        }
    }
}

impl StepArgs {
    /// Settings of the gate of layer `i`, which has a seed of its own.
    pub(crate) fn gate_training(&self, i: usize) -> GateTraining {
        GateTraining { seed: Rng::new(self.seed, i as u64).next_u64(), balance_scale: self.balance_scale }
    }
}
