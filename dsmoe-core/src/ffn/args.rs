//! Arguments and results of the passes of an FFN.

use std::any::Any;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::expert_ffn;
use dsmoe_router::{Fade, Pull, Routed, Routing, RoutingStats, SparsityGrad};
use ndarray::Array2;

use crate::kept::KeptScratch;

/// The memory an FFN works in. One serves all layers; no value in it but `pull` outlives a call.
///
/// [`Ffn`](crate::ffn::Ffn) has an example.
#[derive(Debug, Default)]
pub struct FfnScratch {
    /// Memory of the expert kernels.
    pub experts: expert_ffn::Scratch,
    /// Router logits and their like, `[tokens, experts]`.
    pub logits: Buf,
    /// Values between the two products of a router of low rank, `[tokens, rank]`.
    pub low: Buf,
    /// Gradient of `low`.
    pub dlow: Buf,
    /// Gradient by the coefficient of every pair, `[tokens, experts]`.
    pub dcoefficients: Buf,
    /// Gradient of the router logits, `[tokens, experts]`.
    pub dlogits: Buf,
    /// Output of an expert that every token runs beside the routed ones, `[tokens, hidden]`.
    pub shared: Buf,
    /// Routing of an inference pass.
    pub routed: Routed,
    /// To which a backward over gates with thresholds adds, in units of the weight that a layer where all experts have gates gets.
    pub pull: Pull,
    /// Memory of layers with thresholds of inputs.
    pub kept: KeptScratch,
}

/// Statistics to which the routing of one layer is added.
///
/// [`Decision`] has an example.
#[derive(Debug)]
pub struct Record<'a> {
    /// The model's statistics.
    pub stats: &'a mut RoutingStats,
    /// The layer within them.
    pub layer: usize,
}

/// The decisions of a layer's gates for a batch of tokens.
///
/// ```
/// use dsmoe_core::Model;
/// use dsmoe_core::convert::{UpcycleOptions, upcycle};
/// use dsmoe_core::ffn::{Decision, Record};
/// use dsmoe_router::RoutingStats;
/// # let work = tempfile::tempdir()?;
/// # let (dense, mixture) = (work.path().join("dense"), work.path().join("mixture"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
/// # let family = "mixtral".to_owned();
/// # let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 0, force: false };
/// # upcycle(&dense, &mixture, &options, &mut |_| {})?;
///
/// let mut model = Model::load(&mixture)?;
/// let x = vec![0.5; 3 * model.config().hidden];
/// let (ffn, params) = model.ffn_mut(0);
/// let Decision { routing, .. } = ffn.decide(params, &x).unwrap();
/// let mut stats = RoutingStats::new(1, 4);
/// let Record { stats, layer } = Record { stats: &mut stats, layer: 0 };
/// stats.add(layer, &routing);
/// assert_eq!(stats.summary().active_experts, 2.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Decision {
    /// `[tokens, experts]`: the logits of the gates.
    pub logits: Array2<f32>,
    /// `[tokens, experts]`: their softmax over all experts, or their sigmoids, by the family of gates.
    pub soft: Array2<f64>,
    /// The experts that run, with their coefficients.
    pub routing: Routing,
}

/// Losses that a training forward reports beside its output.
///
/// [`Ffn`](crate::ffn::Ffn) has an example.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FfnReport {
    /// Mean over tokens and experts of the gates of active experts (eq. 17-19 for one layer); 0 without a router.
    pub sparsity_loss: f64,
    /// Mean over tokens and experts of all gates; 0 without a router.
    pub mean_gate: f64,
    /// The loss term of this layer that balances the use of experts, multiplied by its weight and by
    /// [`GateTraining::balance_scale`]; 0 without such a loss.
    pub balance_loss: f64,
    /// Mean over tokens and gates of the separability loss; 0 unless it has a weight.
    pub separability: f64,
    /// Mean over tokens of the entropy of the gates, of sigmoid gates over gates too ([`dsmoe_router::confidence`]); 0 unless it
    /// has a weight.
    pub gate_entropy: f64,
}

/// Settings of one layer's gate in one micro-batch of training; the same in the forward and the backward.
///
/// [`Ffn`](crate::ffn::Ffn) has an example.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateTraining {
    /// Seed of the gate's noise.
    pub seed: u64,
    /// Factor of the balance loss and its gradient: one over the micro-batches of the optimiser step.
    pub balance_scale: f32,
    /// Weight of this layer's separability loss.
    pub separability: f32,
    /// Weight of the entropy of this layer's gates.
    pub entropy: f32,
    /// Experts of a token that fade out, where tokens run a fixed number.
    pub fade: Fade,
}

impl Default for GateTraining {
    /// Uses seed 0, a single micro-batch, no loss of separability or entropy, and all experts.
    fn default() -> GateTraining {
        GateTraining { seed: 0, balance_scale: 1.0, separability: 0.0, entropy: 0.0, fade: Fade::NONE }
    }
}

/// Arguments of [`Ffn::forward_train`](super::Ffn::forward_train).
///
/// [`Ffn`](crate::ffn::Ffn) has an example.
#[derive(Debug)]
pub struct FfnForward<'a> {
    /// Output `[tokens, hidden]`; set.
    pub y: &'a mut [f32],
    /// Values kept for the backward, made by [`Ffn::new_saved`](super::Ffn::new_saved); set.
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

/// Arguments of [`Ffn::backward`](super::Ffn::backward).
///
/// [`Ffn`](crate::ffn::Ffn) has an example.
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

/// Arguments of [`PackedFfn::forward`](super::PackedFfn::forward).
///
/// [`Ffn`](crate::ffn::Ffn) has an example.
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
