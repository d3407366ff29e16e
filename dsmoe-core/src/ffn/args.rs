//! Arguments and results of the passes of an FFN.

use std::any::Any;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::expert_ffn;
use dsmoe_router::{Fade, InactivePairs, InactiveSample, Pull, Routed, Routing, RoutingStats, SparsityGrad};
use ndarray::Array2;

use crate::kept::KeptScratch;

/// The memory an FFN works in. One serves all layers; no value in it but `pull` outlives a call.
///
/// ```
/// use dsmoe_core::ffn::{DenseFfn, DsmoeFfn, Ffn, FfnInference, FfnScratch, block_len};
/// use dsmoe_kernels::Precision;
/// use dsmoe_router::RouterConfig;
///
/// // One memory for layers of different forms, one after the other.
/// let mut scratch = FfnScratch::default();
/// let moe = DsmoeFfn::new(16, 32, RouterConfig::new(4), false);
/// for ffn in [&DenseFfn::new(16, 32) as &dyn Ffn, &moe] {
///     let packed = ffn.pack(&vec![0.1; block_len(&ffn.tensors())], Precision::F32);
///     let (mut y, x) = ([0.0; 16], [1.0; 16]);
///     packed.forward(FfnInference { y: &mut y, x: &x, record: None, scratch: &mut scratch });
///     assert!(y.iter().all(|&y| y > 0.0));
/// }
/// ```
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
    /// The inactive pairs that an estimator of the router's gradient draws.
    pub sample: InactiveSample,
    /// To which a backward over gates with thresholds adds, in units of the weight that a layer where all experts have gates gets.
    pub pull: Pull,
    /// Memory of layers with thresholds of inputs.
    pub kept: KeptScratch,
}

/// Statistics to which the routing of one layer is added.
///
/// ```
/// use dsmoe_core::ffn::{DsmoeFfn, Ffn, FfnInference, FfnScratch, Record, block_len};
/// use dsmoe_kernels::Precision;
/// use dsmoe_router::{RouterConfig, RoutingStats};
///
/// let router = RouterConfig { threshold: 0.0, ..RouterConfig::new(4) }; // all gates are open
/// let ffn = DsmoeFfn::new(16, 32, router, false);
/// let packed = ffn.pack(&vec![0.1; block_len(&ffn.tensors())], Precision::F32);
/// let (mut y, x, scratch) = ([0.0; 16], [1.0; 16], &mut FfnScratch::default());
/// let mut stats = RoutingStats::new(1, 4);
/// let record = Some(Record { stats: &mut stats, layer: 0 });
/// packed.forward(FfnInference { y: &mut y, x: &x, record, scratch });
/// assert_eq!(stats.active_ratio(), 1.0);
/// ```
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
    /// `[tokens, experts]`: the logits of the gates. The logit of an expert with several gates is the one whose exponential is the
    /// sum of theirs.
    pub logits: Array2<f32>,
    /// `[tokens, experts]`: their softmax over all experts, or their sigmoids, by the family of gates; that of an expert with
    /// several gates is the sum.
    pub soft: Array2<f64>,
    /// The experts that run, with their coefficients.
    pub routing: Routing,
}

/// Losses that a training forward reports beside its output.
///
/// ```
/// use dsmoe_core::ffn::{DsmoeFfn, Ffn, FfnForward, FfnReport, FfnScratch, GateTraining, block_len};
/// use dsmoe_router::RouterConfig;
///
/// // A router of weight 0: all gates are a half, and none is above the threshold of a half.
/// let ffn = DsmoeFfn::new(16, 32, RouterConfig::new(4), false);
/// let params = vec![0.0; block_len(&ffn.tensors())];
/// let (mut y, x, mut saved) = ([0.0; 16], [1.0; 16], ffn.new_saved(1));
/// let FfnReport { sparsity_loss, mean_gate, .. } = ffn.forward_train(FfnForward {
///     y: &mut y,
///     saved: &mut *saved,
///     x: &x,
///     params: &params,
///     training: GateTraining::default(),
///     record: None,
///     scratch: &mut FfnScratch::default(),
/// });
/// assert_eq!((sparsity_loss, mean_gate), (0.0, 0.5));
/// ```
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
/// ```
/// use dsmoe_core::ffn::{DsmoeFfn, Ffn, FfnForward, FfnScratch, GateTraining, block_len};
/// use dsmoe_router::RouterConfig;
///
/// let ffn = DsmoeFfn::new(16, 32, RouterConfig::new(4), false);
/// let params = vec![0.0; block_len(&ffn.tensors())];
/// let (mut y, x, mut saved) = ([0.0; 16], [1.0; 16], ffn.new_saved(1));
/// let mut separability = |training: GateTraining| {
///     let (y, saved, scratch) = (&mut y, &mut *saved, &mut FfnScratch::default());
///     let (x, params, record) = (&x, &params, None);
///     ffn.forward_train(FfnForward { y, saved, x, params, training, record, scratch }).separability
/// };
/// // The loss is computed where it has a weight.
/// assert_eq!(separability(GateTraining::default()), 0.0);
/// assert!(separability(GateTraining { separability: 0.1, ..GateTraining::default() }) > 0.0);
/// ```
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
    /// The inactive pairs whose part of the router's gradient is computed, where gates have the straight-through rule.
    pub inactive: InactivePairs,
    /// The number that divides the router's logits, where the FFN has one
    /// ([`FfnSpec::router_temperature`](super::FfnSpec::router_temperature)); none for the FFN's own.
    pub temperature: Option<f32>,
}

impl Default for GateTraining {
    /// Uses seed 0, a single micro-batch, no loss of separability or entropy, all experts, all inactive pairs, and the router's own
    /// temperature.
    fn default() -> GateTraining {
        GateTraining {
            seed: 0,
            balance_scale: 1.0,
            separability: 0.0,
            entropy: 0.0,
            fade: Fade::NONE,
            inactive: InactivePairs::ALL,
            temperature: None,
        }
    }
}

/// Arguments of [`Ffn::forward_train`](super::Ffn::forward_train).
///
/// ```
/// use dsmoe_core::ffn::{DenseFfn, Ffn, FfnForward, FfnScratch, GateTraining, block_len};
/// # let ffn = DenseFfn::new(16, 32);
/// # let params: Vec<f32> = (0..block_len(&ffn.tensors())).map(|i| (i as f32).sin() / 4.0).collect();
/// # let x: Vec<f32> = (0..3 * 16).map(|i| (i as f32).cos()).collect();
///
/// let (mut y, mut saved) = (vec![0.0; x.len()], ffn.new_saved(3));
/// ffn.forward_train(FfnForward {
///     y: &mut y,
///     saved: &mut *saved, // for the backward
///     x: &x,
///     params: &params,
///     training: GateTraining::default(),
///     record: None,
///     scratch: &mut FfnScratch::default(),
/// });
/// assert!(y.iter().all(|y| y.is_finite() && *y != 0.0));
/// ```
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
/// ```
/// use dsmoe_core::ffn::{DenseFfn, Ffn, FfnBackward, GateTraining, block_len};
/// use dsmoe_router::{SparsityGrad, SparsityOver};
/// # use dsmoe_core::ffn::{FfnForward, FfnScratch};
/// # let ffn = DenseFfn::new(16, 32);
/// # let params: Vec<f32> = (0..block_len(&ffn.tensors())).map(|i| (i as f32).sin() / 4.0).collect();
/// # let x: Vec<f32> = (0..3 * 16).map(|i| (i as f32).cos()).collect();
/// # let (mut y, mut saved, mut scratch) = (vec![0.0; x.len()], ffn.new_saved(3), FfnScratch::default());
/// # let training = GateTraining::default();
/// # ffn.forward_train(FfnForward {
/// #     y: &mut y,
/// #     saved: &mut *saved,
/// #     x: &x,
/// #     params: &params,
/// #     training,
/// #     record: None,
/// #     scratch: &mut scratch,
/// # });
///
/// let (mut dx, mut grads) = (vec![9.0; x.len()], vec![1.0; params.len()]);
/// ffn.backward(FfnBackward {
///     dx: &mut dx,
///     grads: &mut grads,
///     dy: &vec![0.0; x.len()],
///     saved: &mut *saved,
///     x: &x,
///     params: &params,
///     sparsity: SparsityGrad { weight: 0.0, over: SparsityOver::Active },
///     training,
///     scratch: &mut scratch,
/// });
/// // A gradient of 0: `dx` is set to it, and it is added to `grads`.
/// assert!(dx.iter().all(|&dx| dx == 0.0) && grads.iter().all(|&grad| grad == 1.0));
/// ```
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
/// ```
/// use dsmoe_core::ffn::{DenseFfn, Ffn, FfnInference, FfnScratch, block_len};
/// use dsmoe_kernels::Precision;
/// # let ffn = DenseFfn::new(16, 32);
/// # let params: Vec<f32> = (0..block_len(&ffn.tensors())).map(|i| (i as f32).sin() / 4.0).collect();
/// # let x: Vec<f32> = (0..3 * 16).map(|i| (i as f32).cos()).collect();
///
/// let packed = ffn.pack(&params, Precision::Bf16);
/// let (mut y, mut scratch) = (vec![0.0; x.len()], FfnScratch::default());
/// packed.forward(FfnInference { y: &mut y, x: &x, record: None, scratch: &mut scratch });
/// assert!(y.iter().all(|y| y.is_finite() && *y != 0.0));
/// ```
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
