//! The FFN of a decoder layer, in any form.
//!
//! [`Ffn`] is the one abstraction other crates implement: a dense FFN, DSMoE's gated experts, and any method that
//! DSMoE is compared with; [`PackedFfn`] is its form for inference. The model, the trainer and the checkpoints know
//! nothing else of an FFN.

mod dense;
mod dsmoe;
mod spec;

use std::any::Any;
use std::sync::Arc;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, expert_ffn};
use dsmoe_router::{Routed, RouterConfig, Routing, RoutingStats, SparsityGrad};

pub use dense::DenseFfn;
pub use dsmoe::DsmoeFfn;
pub use spec::{FfnKind, FfnSpec, ReadSpec, register};
pub(crate) use spec::{of_layer, read_spec};

use crate::params::{TensorSpec, padded};

/// The memory an FFN works in. One serves all layers; no value in it outlives a call.
#[derive(Debug, Default)]
pub struct FfnScratch {
    /// Memory of the expert kernels.
    pub experts: expert_ffn::Scratch,
    /// Router logits and their like, `[tokens, experts]`.
    pub logits: Buf,
    /// Gradient by the coefficient of every pair, `[tokens, experts]`.
    pub dcoefficients: Buf,
    /// Gradient of the router logits, `[tokens, experts]`.
    pub dlogits: Buf,
    /// Routing of an inference pass.
    pub routed: Routed,
}

/// Statistics to which the routing of one layer is added.
#[derive(Debug)]
pub struct Record<'a> {
    /// The model's statistics.
    pub stats: &'a mut RoutingStats,
    /// The layer within them.
    pub layer: usize,
}

/// Losses that a training forward reports beside its output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FfnReport {
    /// Mean over tokens and experts of the gates of active experts (eq. 17-19 for one layer); 0 without a router.
    pub sparsity_loss: f64,
    /// Mean over tokens and experts of all gates; 0 without a router.
    pub mean_gate: f64,
    /// The loss term of this layer that balances the use of experts, multiplied by its weight and by
    /// [`GateTraining::balance_scale`]; 0 without such a loss.
    pub balance_loss: f64,
}

/// Settings of one layer's gate in one micro-batch of training; the same in the forward and the backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateTraining {
    /// Seed of the gate's noise.
    pub seed: u64,
    /// Factor of the balance loss and its gradient: one over the micro-batches of the optimiser step.
    pub balance_scale: f32,
}

impl Default for GateTraining {
    /// Uses seed 0 and a single micro-batch.
    fn default() -> GateTraining {
        GateTraining { seed: 0, balance_scale: 1.0 }
    }
}

/// Arguments of [`Ffn::forward_train`].
#[derive(Debug)]
pub struct FfnForward<'a> {
    /// Output `[tokens, hidden]`; set.
    pub y: &'a mut [f32],
    /// Values kept for the backward, made by [`Ffn::new_saved`]; set.
    pub saved: &'a mut (dyn Any + Send),
    /// Input `[tokens, hidden]`.
    pub x: &'a [f32],
    /// The FFN's part of the arena.
    pub params: &'a [f32],
    /// Settings of this micro-batch.
    pub training: GateTraining,
    /// Statistics that the routing of these tokens is added to.
    pub record: Option<Record<'a>>,
    /// Memory to work in.
    pub scratch: &'a mut FfnScratch,
}

/// Arguments of [`Ffn::backward`].
#[derive(Debug)]
pub struct FfnBackward<'a> {
    /// Gradient of the input `[tokens, hidden]`; set.
    pub dx: &'a mut [f32],
    /// Gradient of the parameters, laid out as `params`; added to.
    pub grads: &'a mut [f32],
    /// Gradient of the output `[tokens, hidden]`.
    pub dy: &'a [f32],
    /// Values of the forward over the same `x`.
    pub saved: &'a mut (dyn Any + Send),
    /// Input `[tokens, hidden]`.
    pub x: &'a [f32],
    /// The FFN's part of the arena.
    pub params: &'a [f32],
    /// Share of the sparsity loss in the gradient.
    pub sparsity: SparsityGrad,
    /// Settings of this micro-batch, those of the forward.
    pub training: GateTraining,
    /// Memory to work in.
    pub scratch: &'a mut FfnScratch,
}

/// Arguments of [`PackedFfn::forward`].
#[derive(Debug)]
pub struct FfnInference<'a> {
    /// Output `[tokens, hidden]`; set.
    pub y: &'a mut [f32],
    /// Input `[tokens, hidden]`.
    pub x: &'a [f32],
    /// Statistics that the routing of these tokens is added to.
    pub record: Option<Record<'a>>,
    /// Memory to work in.
    pub scratch: &'a mut FfnScratch,
}

/// Arguments of [`HostGate::backward`].
#[derive(Debug)]
pub struct GateBackward<'a> {
    /// Gradient of the input `[tokens, hidden]`; added to.
    pub dx: &'a mut [f32],
    /// Gradient of the gate's parameters; added to.
    pub grads: &'a mut [f32],
    /// Gradient of the coefficients `[tokens, experts]`; entries for experts that did not run are unspecified.
    pub dcoefficients: &'a [f32],
    /// Values of the training forward over the same `x`.
    pub saved: &'a (dyn Any + Send),
    /// Input `[tokens, hidden]`.
    pub x: &'a [f32],
    /// The gate's parameters.
    pub params: &'a [f32],
    /// Settings of this micro-batch, those of the forward.
    pub training: GateTraining,
}

/// Decision of a [`HostGate`] for a batch of tokens.
#[derive(Clone, Copy, Debug)]
pub struct HostRouted<'a> {
    /// The experts that each token runs, and their coefficients.
    pub routing: &'a Routing,
    /// The loss of [`FfnReport::balance_loss`]; 0 in inference.
    pub balance_loss: f64,
}

/// A gate that the host computes wherever the experts run. Its data is small, `[tokens, experts]`, and its forms are
/// many. Its parameters follow the [`projections`] in an FFN's part of the arena, each tensor padded as in [`split`];
/// its gradients are laid out alike.
pub trait HostGate: std::fmt::Debug + Send + Sync {
    /// Makes room for the values that [`HostGate::backward`] needs; reused every step.
    fn new_saved(&self) -> Box<dyn Any + Send>;

    /// Routes the FFN's input `x` `[tokens, hidden]`; sets `saved`, which must come from this gate's
    /// [`HostGate::new_saved`]. Inference is without `training`: nothing is drawn.
    fn forward<'a>(
        &self,
        saved: &'a mut (dyn Any + Send),
        x: &[f32],
        params: &[f32],
        training: Option<GateTraining>,
    ) -> HostRouted<'a>;

    /// Adds the gradients of the input and of the gate's parameters.
    fn backward(&self, args: GateBackward<'_>);
}

/// The forms of FFN that devices other than the host run.
#[derive(Clone, Debug)]
pub enum DeviceFfn {
    /// SwiGLU.
    Dense {
        /// Width of its input.
        hidden: usize,
        /// Neurons.
        intermediate: usize,
    },
    /// SwiGLU cut into experts behind sigmoid gates; parameters are [`projections`], the router, and its bias.
    Gated {
        /// Width of its input.
        hidden: usize,
        /// Neurons of all experts together.
        intermediate: usize,
        /// Its gates.
        router: RouterConfig,
        /// Whether the router has a bias.
        router_bias: bool,
    },
    /// SwiGLU cut into experts behind a gate that the host computes; parameters are [`projections`] and the
    /// gate's. Only experts that ran take part in the gradient.
    Hosted {
        /// Width of its input.
        hidden: usize,
        /// Neurons of all experts together.
        intermediate: usize,
        /// Experts, those that every token has included.
        num_experts: usize,
        /// The gate.
        gate: Arc<dyn HostGate>,
    },
}

impl DeviceFfn {
    /// Returns the width of its input.
    pub fn hidden(&self) -> usize {
        match *self {
            DeviceFfn::Dense { hidden, .. }
            | DeviceFfn::Gated { hidden, .. }
            | DeviceFfn::Hosted { hidden, .. } => hidden,
        }
    }

    /// Returns the number of neurons.
    pub fn intermediate(&self) -> usize {
        match *self {
            DeviceFfn::Dense { intermediate, .. }
            | DeviceFfn::Gated { intermediate, .. }
            | DeviceFfn::Hosted { intermediate, .. } => intermediate,
        }
    }

    /// Sets the gates' threshold, where there is one; returns whether there is.
    pub fn set_threshold(&mut self, threshold: f32) -> bool {
        match self {
            DeviceFfn::Dense { .. } | DeviceFfn::Hosted { .. } => false,
            DeviceFfn::Gated { router, .. } => {
                router.threshold = threshold;
                true
            }
        }
    }

    /// Returns the number of experts; none without a router.
    pub fn num_experts(&self) -> Option<usize> {
        match self {
            DeviceFfn::Dense { .. } => None,
            DeviceFfn::Gated { router, .. } => Some(router.num_experts),
            DeviceFfn::Hosted { num_experts, .. } => Some(*num_experts),
        }
    }

    /// Returns whether a pass waits for the host; it cannot be captured as a CUDA graph then.
    pub fn is_hosted(&self) -> bool {
        matches!(self, DeviceFfn::Hosted { .. })
    }

    /// Returns the range of the gate's parameters in the `len` parameters of the FFN.
    pub fn gate_params(&self, len: usize) -> std::ops::Range<usize> {
        3 * padded(self.hidden() * self.intermediate())..len
    }
}

/// One layer's FFN. It holds settings, not weights: `params` is this FFN's part of the arena, laid out as
/// [`Ffn::tensors`] says, each tensor padded to whole cache lines (see [`split`]).
pub trait Ffn: std::fmt::Debug + Send + Sync {
    /// Returns its tensors, named relative to `model.layers.{i}.mlp.`.
    fn tensors(&self) -> Vec<TensorSpec>;

    /// Returns the entry of config.json that builds this FFN again; none where there is no such entry, and then a model
    /// with this FFN is saved only if its configuration names a spec itself.
    fn kind(&self) -> Option<FfnKind> {
        None
    }

    /// Returns the number of experts; none without a router.
    fn num_experts(&self) -> Option<usize> {
        None
    }

    /// Sets the gates' threshold, where there is one; returns whether there is.
    fn set_threshold(&mut self, _threshold: f32) -> bool {
        false
    }

    /// Returns the form that other devices run, with parameters laid out by [`Ffn::tensors`]; none for a form
    /// that only the host runs.
    fn on_device(&self) -> Option<DeviceFfn> {
        None
    }

    /// Packs this FFN for inference: its projections in `precision`, its router in f32.
    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn>;

    /// Makes room for the values that [`Ffn::backward`] needs of `tokens` tokens; reused every step.
    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send>;

    /// Makes room in `scratch` for training on `tokens` tokens, where the FFN uses it.
    fn reserve(&self, _scratch: &mut FfnScratch, _tokens: usize) {}

    /// Sets `y = ffn(x)` and `saved`.
    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport;

    /// Sets `dx` and adds to `grads`.
    fn backward(&self, args: FfnBackward<'_>);
}

/// One layer's FFN for inference, with its weights; made by [`Ffn::pack`].
pub trait PackedFfn: std::fmt::Debug + Send + Sync {
    /// Sets `y = ffn(x)`.
    fn forward(&self, args: FfnInference<'_>);

    /// Returns the size of the weights in bytes.
    fn bytes(&self) -> usize;

    /// Returns the number of experts; none without a router.
    fn num_experts(&self) -> Option<usize> {
        None
    }

    /// Sets the gates' threshold, where there is one; returns whether there is.
    fn set_threshold(&mut self, _threshold: f32) -> bool {
        false
    }
}

/// Returns the length of `tensors` in the arena.
pub fn block_len(tensors: &[TensorSpec]) -> usize {
    tensors.iter().map(|t| padded(t.numel())).sum()
}

/// Returns the views of tensors with `lens` values in an FFN's part of an arena.
///
/// # Panics
/// The block is shorter than the tensors.
pub fn split<const N: usize>(mut block: &[f32], lens: [usize; N]) -> [&[f32]; N] {
    lens.map(|len| {
        let (tensor, rest) = block.split_at(padded(len));
        block = rest;
        &tensor[..len]
    })
}

/// Does as [`split`] for gradients.
///
/// # Panics
/// Those of [`split`].
pub fn split_mut<const N: usize>(block: &mut [f32], lens: [usize; N]) -> [&mut [f32]; N] {
    let mut rest = block;
    lens.map(|len| {
        let (tensor, tail) = std::mem::take(&mut rest).split_at_mut(padded(len));
        rest = tail;
        &mut tensor[..len]
    })
}

/// Returns the three projections every FFN here has, `[intermediate, hidden]` each, the down projection transposed.
pub fn projections(hidden: usize, intermediate: usize) -> Vec<TensorSpec> {
    vec![
        TensorSpec::matrix("gate_proj.weight", intermediate, hidden),
        TensorSpec::matrix("up_proj.weight", intermediate, hidden),
        TensorSpec::matrix("down_proj.weight", intermediate, hidden).transposed(),
    ]
}

/// Converts a routing for the expert kernels.
pub fn routes(routing: &Routing) -> expert_ffn::Routes<'_> {
    expert_ffn::Routes {
        offsets: &routing.offsets,
        tokens: &routing.tokens,
        coefficients: &routing.coefficients,
        token_offsets: &routing.token_offsets,
        slots: &routing.slots,
    }
}
