//! Forms of an FFN on other devices than the host.

use std::any::Any;
use std::sync::Arc;

use dsmoe_router::Routing;

use super::args::{GateTraining, Record};
use super::{DsmoeForm, Gated};

/// Arguments of [`HostGate::backward`].
///
/// ```
/// use dsmoe_core::ffn::{GateBackward, GateTraining};
///
/// /// The backward of a gate whose coefficients all are one learnt value.
/// fn backward(args: GateBackward<'_>) {
///     let GateBackward { grads, dcoefficients, .. } = args;
///     grads[0] += dcoefficients.iter().sum::<f32>();
/// }
///
/// let (mut dx, mut grads) = ([0.0; 4], [0.5]);
/// backward(GateBackward {
///     dx: &mut dx, // the value does not depend on the input
///     grads: &mut grads,
///     dcoefficients: &[0.25, 0.25],
///     saved: &(),
///     x: &[1.0; 4],
///     params: &[1.0],
///     training: GateTraining::default(),
/// });
/// assert_eq!(grads, [1.0]);
/// ```
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
///
/// ```
/// use dsmoe_core::ffn::{HostRouted, Record};
/// use dsmoe_router::{Routing, RoutingStats};
/// use ndarray::array;
///
/// let routing = Routing::from_mask(array![[true, false], [true, true]].view(), |_, _| 1.0);
/// let routed = HostRouted { routing: &routing, balance_loss: 0.0, gate_entropy: 0.0 };
/// let mut stats = RoutingStats::new(1, 2);
/// routed.count(Some(Record { stats: &mut stats, layer: 0 }));
/// assert_eq!(stats.active_ratio(), 0.75);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct HostRouted<'a> {
    /// The experts that each token runs, and their coefficients.
    pub routing: &'a Routing,
    /// The loss of [`FfnReport::balance_loss`](super::FfnReport::balance_loss); 0 in inference.
    pub balance_loss: f64,
    /// The entropy of [`FfnReport::gate_entropy`](super::FfnReport::gate_entropy); 0 in inference.
    pub gate_entropy: f64,
}

impl HostRouted<'_> {
    /// Adds the routing to `record`, if there is one.
    pub fn count(&self, record: Option<Record<'_>>) {
        if let Some(Record { stats, layer }) = record {
            stats.add(layer, self.routing);
        }
    }
}

/// A gate that the host computes wherever the experts run. Its data is small, `[tokens, experts]`, and its forms are
/// many. Its parameters follow [`Gated::tensors`] in an FFN's part of the arena, each tensor padded as in
/// [`split`](super::split); its gradients are laid out alike.
///
/// ```
/// use std::any::Any;
///
/// use dsmoe_core::ffn::{GateBackward, GateTraining, HostGate, HostRouted};
/// use dsmoe_router::Routing;
/// use ndarray::Array2;
///
/// /// Opens the experts in turn, token by token.
/// #[derive(Debug)]
/// struct InTurn {
///     experts: usize,
///     hidden: usize,
/// }
///
/// impl HostGate for InTurn {
///     fn new_saved(&self) -> Box<dyn Any + Send> {
///         Box::new(Routing::default())
///     }
///
///     fn forward<'a>(
///         &self,
///         saved: &'a mut (dyn Any + Send),
///         x: &[f32],
///         _params: &[f32],
///         _training: Option<GateTraining>,
///     ) -> HostRouted<'a> {
///         let routing = saved.downcast_mut::<Routing>().expect("of this gate");
///         let tokens = x.len() / self.hidden;
///         let mask = Array2::from_shape_fn((tokens, self.experts), |(t, i)| t % self.experts == i);
///         routing.rebuild(mask.view(), |_, _| 1.0);
///         HostRouted { routing, balance_loss: 0.0, gate_entropy: 0.0 }
///     }
///
///     fn backward(&self, _: GateBackward<'_>) {
///         // No parameters, and no gradient by the input.
///     }
/// }
///
/// let gate = InTurn { experts: 2, hidden: 4 };
/// let mut saved = gate.new_saved();
/// let routed = gate.forward(&mut *saved, &[0.0; 12], &[], None);
/// assert_eq!(routed.routing.offsets, [0, 2, 3]);
/// ```
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
///
/// ```
/// use dsmoe_core::ffn::{DeviceFfn, DsmoeFfn, Ffn};
/// use dsmoe_router::RouterConfig;
///
/// let ffn = DsmoeFfn::new(16, 32, RouterConfig::new(4), false);
/// let form: DeviceFfn = ffn.on_device().unwrap();
/// assert_eq!((form.num_experts(), form.is_hosted()), (Some(4), false));
/// ```
#[derive(Clone, Debug)]
pub enum DeviceFfn {
    /// The gated FFN as it is.
    Dense(Gated),
    /// Cut into experts, those behind the core with sigmoid gates; parameters are [`Gated::tensors`] and the router's.
    Routed {
        /// All experts together.
        gated: Gated,
        /// Its gates, the core, and the form of the router.
        form: DsmoeForm,
        /// The threshold that a logit has to exceed; none where every gate is open.
        bar: Option<f32>,
        /// The logit at which a gate that switches its expert is a half in the straight-through rule.
        centre: f32,
    },
    /// Cut into experts behind a gate that the host computes; parameters are [`Gated::tensors`] and the gate's. Only experts
    /// that ran take part in the gradient.
    Hosted {
        /// All experts together.
        gated: Gated,
        /// Experts, those that every token has included.
        num_experts: usize,
        /// The gate.
        gate: Arc<dyn HostGate>,
    },
}

impl DeviceFfn {
    /// Returns its projections.
    pub fn gated(&self) -> &Gated {
        match self {
            DeviceFfn::Dense(gated) | DeviceFfn::Routed { gated, .. } | DeviceFfn::Hosted { gated, .. } => {
                gated
            }
        }
    }

    /// Sets the gates' threshold, where there is one; returns whether there is.
    pub fn set_threshold(&mut self, threshold: f32) -> bool {
        match self {
            DeviceFfn::Dense(_) | DeviceFfn::Hosted { .. } => false,
            DeviceFfn::Routed { form, bar, centre, .. } => {
                form.router.threshold = threshold;
                (*bar, *centre) = (form.router.bar(), 0.0);
                true
            }
        }
    }

    /// Sets what the logit of a gate has to exceed, where there are gates; returns whether there are.
    pub fn set_threshold_logit(&mut self, logit: f32) -> bool {
        match self {
            DeviceFfn::Dense(_) | DeviceFfn::Hosted { .. } => false,
            DeviceFfn::Routed { bar, centre, .. } => {
                (*bar, *centre) = (Some(logit), logit);
                true
            }
        }
    }

    /// Returns the number of experts, the core included; none without a router.
    pub fn num_experts(&self) -> Option<usize> {
        match self {
            DeviceFfn::Dense(_) => None,
            DeviceFfn::Routed { form, .. } => Some(form.router.num_experts),
            DeviceFfn::Hosted { num_experts, .. } => Some(*num_experts),
        }
    }

    /// Returns the number of experts that a router chooses among; none without a router.
    pub fn routed(&self) -> Option<usize> {
        self.num_experts().map(|n| n - self.core())
    }

    /// Returns the number of leading experts that every token runs and that no router knows.
    pub fn core(&self) -> usize {
        match self {
            DeviceFfn::Dense(_) | DeviceFfn::Hosted { .. } => 0,
            DeviceFfn::Routed { form, .. } => form.core,
        }
    }

    /// Returns the numbers of neurons of the core, which come first, and of the others.
    pub fn cut(&self) -> [usize; 2] {
        let width = self.gated().intermediate;
        let core = self.num_experts().map_or(0, |n| width / n * self.core());
        [core, width - core]
    }

    /// Returns whether a pass waits for the host; it cannot be captured as a CUDA graph then.
    pub fn is_hosted(&self) -> bool {
        matches!(self, DeviceFfn::Hosted { .. })
    }

    /// Returns the range of the gate's parameters in the `len` parameters of the FFN.
    pub fn gate_params(&self, len: usize) -> std::ops::Range<usize> {
        self.gated().len()..len
    }
}
