//! The FFN of a decoder layer, in any form.
//!
//! [`Ffn`] is the one abstraction other crates implement: a dense FFN, DSMoE's gated experts, and any method that
//! DSMoE is compared with; [`PackedFfn`] is its form for inference. The model, the trainer and the checkpoints know
//! nothing else of an FFN.

mod args;
mod blocks;
mod bound;
mod build;
mod dense;
mod device;
mod dsmoe;
mod form;
mod gated;
mod gating;
pub(crate) mod kept;
mod mixture;
mod parts;
mod registry;
mod route;

use std::any::Any;
use std::sync::Arc;

use dsmoe_kernels::{Precision, expert_ffn};
use dsmoe_router::Routing;
use dsmoe_router::expert_map::ExpertMap;
use serde_json::{Map, Value};

pub use args::{
    Decision, FfnBackward, FfnForward, FfnInference, FfnReport, FfnScratch, GateTraining, Record,
};
pub(crate) use blocks::{DOWN_BIAS, OUTPUT_BIAS};
pub use blocks::{block_len, projections, split, split_mut};
pub use bound::RouterBound;
pub(crate) use build::of_layer;
pub use dense::DenseFfn;
pub use device::{DeviceFfn, GateBackward, HostGate, HostRouted};
pub use dsmoe::DsmoeFfn;
pub use form::DsmoeForm;
pub use gated::{Gated, add_output_bias};
#[cfg(feature = "cuda")]
pub(crate) use gating::Gating;
pub use mixture::MixtureFfn;
pub(crate) use mixture::SHARED_EXPERT;
pub use parts::ExpertParts;
pub(crate) use registry::read_spec;
pub use registry::{FfnReader, ReadSpec, register};
pub use route::Route;

use crate::config::{Config, MixtureSpec};
use crate::params::TensorSpec;

/// One layer's FFN. It holds settings, not weights: `params` is this FFN's part of the arena, laid out as
/// [`Ffn::tensors`] says, each tensor padded to whole cache lines (see [`split`]).
///
/// ```
/// use dsmoe_core::ffn::{DenseFfn, Ffn, FfnBackward, FfnForward, FfnInference, FfnReport, FfnScratch};
/// use dsmoe_core::ffn::{GateTraining, PackedFfn, block_len};
/// use dsmoe_kernels::Precision;
/// use dsmoe_router::{SparsityGrad, SparsityOver};
///
/// let ffn: Box<dyn Ffn> = Box::new(DenseFfn::new(16, 32));
/// let params: Vec<f32> = (0..block_len(&ffn.tensors())).map(|i| (i as f32).sin() / 4.0).collect();
/// let x: Vec<f32> = (0..3 * 16).map(|i| (i as f32).cos()).collect();
/// let (mut y, mut saved, mut scratch) = (vec![0.0; x.len()], ffn.new_saved(3), FfnScratch::default());
/// let training = GateTraining::default();
/// let report: FfnReport = ffn.forward_train(FfnForward {
///     y: &mut y,
///     saved: &mut *saved,
///     x: &x,
///     params: &params,
///     training,
///     record: None,
///     scratch: &mut scratch,
/// });
/// assert_eq!(report.sparsity_loss, 0.0);
///
/// let (mut dx, mut grads) = (vec![0.0; x.len()], vec![0.0; params.len()]);
/// ffn.backward(FfnBackward {
///     dx: &mut dx,
///     grads: &mut grads,
///     dy: &y,
///     saved: &mut *saved,
///     x: &x,
///     params: &params,
///     sparsity: SparsityGrad { weight: 0.0, over: SparsityOver::Active },
///     training,
///     scratch: &mut scratch,
/// });
/// assert!(dx.iter().any(|&d| d != 0.0));
///
/// let packed: Box<dyn PackedFfn> = ffn.pack(&params, Precision::F32);
/// let mut again = vec![0.0; x.len()];
/// packed.forward(FfnInference { y: &mut again, x: &x, record: None, scratch: &mut scratch });
/// assert!(y.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-4));
/// ```
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

    /// Returns the neurons of every expert where experts are not of one width, by which shares count them.
    fn expert_sizes(&self) -> Option<Vec<u64>> {
        None
    }

    /// Sets the gates' threshold, where there is one; returns whether there is.
    fn set_threshold(&mut self, _threshold: f32) -> bool {
        false
    }

    /// Sets what the logit of a gate has to exceed, where there are gates; returns whether there are.
    fn set_threshold_logit(&mut self, _logit: f32) -> bool {
        false
    }

    /// Returns the form that other devices run, with parameters laid out by [`Ffn::tensors`]; none for a form
    /// that only the host runs.
    fn on_device(&self) -> Option<DeviceFfn> {
        None
    }

    /// Returns which of its blocks of neurons are experts with gates, and where the gates are; none without experts that gates
    /// open one by one.
    fn expert_parts(&self) -> Option<ExpertParts> {
        None
    }

    /// Returns the form with some of the experts that have a gate, 1 or more, in that order, with their gates, and the same beside
    /// them; some where [`Ffn::expert_parts`] are.
    fn keep_experts(&self, _kept: &[usize]) -> Option<Box<dyn Ffn>> {
        None
    }

    /// Returns what its gates decide for `x` `[tokens, hidden]`; some where [`Ffn::expert_parts`] are.
    fn decide(&self, _params: &[f32], _x: &[f32]) -> Option<Decision> {
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
///
/// ```
/// use dsmoe_core::ffn::{FfnInference, FfnScratch, PackedFfn};
///
/// /// Multiplies its input.
/// #[derive(Debug)]
/// struct Scale(f32);
///
/// impl PackedFfn for Scale {
///     fn forward(&self, args: FfnInference<'_>) {
///         args.y.iter_mut().zip(args.x).for_each(|(y, x)| *y = self.0 * x);
///     }
///
///     fn bytes(&self) -> usize {
///         size_of::<f32>()
///     }
/// }
///
/// let (mut y, scratch) = ([0.0; 2], &mut FfnScratch::default());
/// Scale(3.0).forward(FfnInference { y: &mut y, x: &[1.0, 2.0], record: None, scratch });
/// assert_eq!(y, [3.0, 6.0]);
/// // It has no router, and so no threshold.
/// assert!(!Scale(3.0).set_threshold(0.5));
/// ```
pub trait PackedFfn: std::fmt::Debug + Send + Sync {
    /// Lets `bound` choose experts in place of the router, where there are gates; returns whether there are.
    fn set_router_bound(&mut self, _bound: RouterBound) -> bool {
        false
    }

    /// Returns the number of choices that can be made for all tokens in place of its own: of experts, the k of the largest
    /// logits for k from 1.
    fn choices(&self) -> usize {
        0
    }

    /// Makes it take that one of its [`choices`](PackedFfn::choices), counted from 1, for all tokens; none leaves the choice to
    /// it. Returns whether there is such a choice.
    fn set_choice(&mut self, choice: Option<usize>) -> bool {
        choice.is_none()
    }

    /// Sets `y = ffn(x)`.
    fn forward(&self, args: FfnInference<'_>);

    /// Returns the size of the weights in bytes.
    fn bytes(&self) -> usize;

    /// Returns the number of experts; none without a router.
    fn num_experts(&self) -> Option<usize> {
        None
    }

    /// Returns the neurons of every expert where experts are not of one width ([`Ffn::expert_sizes`]).
    fn expert_sizes(&self) -> Option<Vec<u64>> {
        None
    }

    /// Sets the gates' threshold, where there is one; returns whether there is.
    fn set_threshold(&mut self, _threshold: f32) -> bool {
        false
    }

    /// Sets what the logit of a gate has to exceed, where there are gates; returns whether there are.
    fn set_threshold_logit(&mut self, _logit: f32) -> bool {
        false
    }
}

/// Beginning of the names of the projections of a second FFN: of a layer of one expert, tokens run it that do not run the
/// expert; of a layer of two, it is the second expert.
pub const SMALL_FFN: &str = "small.";

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

/// Configuration of the FFNs of a model: the `ffn` object of config.json.
///
/// ```no_run
/// use std::path::Path;
/// use std::sync::Arc;
///
/// use dsmoe_core::ffn::{DenseFfn, Ffn, FfnReader, FfnSpec, ReadSpec, register};
/// use dsmoe_core::{Config, Result};
/// use serde_json::{Map, Value};
///
/// /// FFNs that are dense, under another name.
/// #[derive(Debug)]
/// struct Plain;
///
/// impl FfnSpec for Plain {
///     fn kind(&self) -> &'static str {
///         "plain"
///     }
///
///     fn settings(&self) -> Map<String, Value> {
///         Map::new()
///     }
///
///     fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
///         Box::new(DenseFfn::new(config.hidden, config.layer(layer).intermediate))
///     }
///
///     fn num_experts(&self, _layer: usize) -> usize {
///         1
///     }
///
///     fn active_experts(&self) -> Option<f64> {
///         Some(1.0)
///     }
/// }
///
/// fn read(_: &Path, _: &Config, _: &Map<String, Value>) -> Result<Arc<dyn FfnSpec>> {
///     Ok(Arc::new(Plain))
/// }
///
/// static READER: FfnReader = FfnReader { kind: "plain", read: read as ReadSpec };
/// register(&READER)?; // models with `"ffn": {"type": "plain"}` load from now on
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
pub trait FfnSpec: std::fmt::Debug + Send + Sync {
    /// Returns the object's key `type`.
    fn kind(&self) -> &'static str;

    /// Returns the object's other keys.
    fn settings(&self) -> Map<String, Value>;

    /// Makes the FFN of a layer, whose sizes are [`Config::layer`]'s. Tensors that only training reads are
    /// [`crate::params::TensorSpec::training_only`].
    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn>;

    /// Returns the share of active experts that training has to hold, where there is one.
    fn active_target(&self) -> Option<f64> {
        None
    }

    /// Returns the number that divides the logits of its routers in training, where these are softmaxes over what a token may run and
    /// the mean gate of training is the share that is expected to run. FFNs that return one use [`GateTraining::temperature`] in
    /// place of it where that is set.
    fn router_temperature(&self) -> Option<f64> {
        None
    }

    /// Returns the number of experts of a layer.
    fn num_experts(&self, layer: usize) -> usize;

    /// Returns the experts of a mixture; none for another kind.
    fn as_mixture(&self) -> Option<&MixtureSpec> {
        None
    }

    /// Returns the number of experts that every token runs, mean over layers, where it is fixed.
    fn active_experts(&self) -> Option<f64>;

    /// Returns the number of experts that are chosen for a token, where it is fixed and can be lowered ([`FfnSpec::with_top_k`]).
    fn top_k(&self) -> Option<usize> {
        None
    }

    /// Returns the settings with `top_k` chosen experts, 1 or more and no more than there are, and the same tensors; none where no
    /// number is fixed.
    fn with_top_k(&self, _top_k: usize) -> Option<Arc<dyn FfnSpec>> {
        None
    }

    /// Returns the settings with so many experts of every layer that have gates, 1 or more, and the same beside them, whose FFNs
    /// are those of [`Ffn::keep_experts`]; none for mixtures, which [`Config::set_mixture`] changes, and where the number is fixed.
    /// `maps` have the expert of every gate, layer by layer, where gates share experts.
    fn with_experts(
        &self,
        _counts: &[usize],
        _maps: Option<Vec<Arc<ExpertMap>>>,
    ) -> Option<Arc<dyn FfnSpec>> {
        None
    }

    /// Returns the number of equal blocks of neurons of a layer, in the order of the rows, that are the experts of an FFN whose
    /// output is the sum of theirs, each times its coefficient; none for another FFN.
    fn blocks(&self, _layer: usize) -> Option<usize> {
        None
    }
}

/// The entry of config.json that describes an FFN.
///
/// ```
/// use dsmoe_core::ffn::{DsmoeFfn, Ffn, FfnKind};
/// use dsmoe_router::RouterConfig;
///
/// let ffn = DsmoeFfn::new(16, 32, RouterConfig::new(4), false);
/// assert!(matches!(ffn.kind(), Some(FfnKind::Dsmoe(form)) if form.routed() == 4));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum FfnKind {
    /// No entry: the FFN of a plain LLaMA.
    Dense,
    /// The `dsmoe` object that describes this form.
    Dsmoe(DsmoeForm),
    /// The `ffn` object of this spec.
    Spec(Arc<dyn FfnSpec>),
}

impl PartialEq for dyn FfnSpec {
    fn eq(&self, other: &dyn FfnSpec) -> bool {
        self.kind() == other.kind() && self.settings() == other.settings()
    }
}
