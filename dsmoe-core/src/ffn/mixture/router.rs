//! The router of a mixture: one matrix, the rule of [`dsmoe_router::mixture`], and the balance loss. It runs on the host, also
//! where the experts run on a GPU.

use std::any::Any;
use std::sync::Arc;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::matmul::{Mat, Packed};
use dsmoe_kernels::{Precision, linear};
use dsmoe_router::confidence;
use dsmoe_router::expert_map::ExpertMap;
use dsmoe_router::mixture::{self, MixtureConfig, MixtureRouted};
use dsmoe_router::{Fade, Routing};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use crate::ffn::{Decision, GateBackward, GateTraining, HostGate, HostRouted};

/// Routes inputs of width `hidden`; its parameters are the matrix `[n, hidden]`.
#[derive(Clone, Debug)]
pub(super) struct MixtureRouter {
    pub(super) hidden: usize,
    /// The rule by which it chooses among its gates.
    pub(super) config: MixtureConfig,
    /// The expert of every gate; none where each expert has a gate of its own.
    pub(super) map: Option<Arc<ExpertMap>>,
    /// Weight of the balance loss of this layer.
    pub(super) balance_weight: f64,
}

/// The routing that the backward pass needs.
#[derive(Debug, Default)]
pub(super) struct RouterSaved {
    gates: Option<MixtureRouted>,
    /// The routing of the experts, where gates share them.
    mapped: Option<Routing>,
}

impl RouterSaved {
    /// Returns what the experts run, after a forward pass.
    pub(super) fn routing(&self) -> Option<&Routing> {
        self.mapped.as_ref().or(self.gates.as_ref().map(|gates| &gates.routing))
    }
}

impl MixtureRouter {
    /// Returns the number of parameters.
    pub(super) fn len(&self) -> usize {
        self.config.num_experts * self.hidden
    }

    fn dims(&self, rows: usize) -> linear::Dims {
        let outputs = self.config.num_experts;
        linear::Dims { rows, inputs: self.hidden, outputs, precision: Precision::F32 }
    }

    /// Returns what the gates decide for `x`.
    pub(super) fn decide(&self, x: &[f32], params: &[f32]) -> Decision {
        let logits = self.logits(x, params);
        let MixtureRouted { probabilities, routing, .. } =
            mixture::route(&self.config, logits.view(), Fade::NONE);
        let Some(map) = &self.map else { return Decision { logits, soft: probabilities, routing } };
        let mut experts = Routing::default();
        map.route(&routing, &mut experts);
        Decision {
            soft: map.sums(probabilities.view()),
            logits: map.log_sums(logits.view()),
            routing: experts,
        }
    }

    fn logits(&self, x: &[f32], params: &[f32]) -> Array2<f32> {
        let w = &params[..self.len()];
        self.logits_by(x, |y, rows| linear::Forward { y, x, w, bias: None, dims: self.dims(rows) }.run())
    }

    /// Returns the logits that `product` sets for the rows of `x`.
    fn logits_by(&self, x: &[f32], product: impl FnOnce(&mut [f32], usize)) -> Array2<f32> {
        let rows = x.len() / self.hidden;
        let mut logits = Array2::zeros((rows, self.config.num_experts));
        product(logits.as_slice_mut().expect("a new array is contiguous"), rows);
        logits
    }

    /// Returns the matrix in the order in which products read it.
    pub(super) fn pack(&self, params: &[f32]) -> Packed {
        let w = Mat::new(&params[..self.len()], self.config.num_experts, self.hidden);
        Packed::new(Precision::F32, w)
    }

    /// Routes `x` by a packed matrix.
    pub(super) fn forward_packed<'a>(
        &self,
        saved: &'a mut RouterSaved,
        x: &[f32],
        w: &Packed,
    ) -> HostRouted<'a> {
        let logits = self.logits_by(x, |y, rows| linear::ForwardPacked { y, x, w, bias: None, rows }.run());
        self.route(saved, &logits, None)
    }

    /// Routes tokens by their logits; without `training` there are no losses, and no expert fades out.
    fn route<'a>(
        &self,
        saved: &'a mut RouterSaved,
        logits: &Array2<f32>,
        training: Option<GateTraining>,
    ) -> HostRouted<'a> {
        let fade = training.map_or(Fade::NONE, |training| training.fade);
        let routed = saved.gates.insert(mixture::route(&self.config, logits.view(), fade));
        let weight = training.map_or(0.0, |training| self.weight(training));
        let balance_loss = if weight == 0.0 { 0.0 } else { weight * mixture::balance_loss(routed) };
        let has_entropy = training.is_some_and(|training| training.entropy != 0.0);
        let gate_entropy =
            if has_entropy { confidence::of_softmax(routed.probabilities.view()) } else { 0.0 };
        let routing = match &self.map {
            None => &routed.routing,
            Some(map) => {
                let mapped = saved.mapped.get_or_insert_default();
                map.route(&routed.routing, mapped);
                mapped
            }
        };
        HostRouted { routing, balance_loss, gate_entropy }
    }

    fn weight(&self, training: GateTraining) -> f64 {
        f64::from(training.balance_scale) * self.balance_weight
    }
}

impl HostGate for MixtureRouter {
    fn new_saved(&self) -> Box<dyn Any + Send> {
        Box::new(RouterSaved::default())
    }

    fn forward<'a>(
        &self,
        saved: &'a mut (dyn Any + Send),
        x: &[f32],
        params: &[f32],
        training: Option<GateTraining>,
    ) -> HostRouted<'a> {
        let saved: &mut RouterSaved = saved.downcast_mut().expect("saved by the router of a mixture");
        self.route(saved, &self.logits(x, params), training)
    }

    fn backward(&self, args: GateBackward<'_>) {
        let GateBackward { dx, grads, dcoefficients, saved, x, params, training } = args;
        let saved: &RouterSaved = saved.downcast_ref().expect("saved by the router of a mixture");
        let routed = saved.gates.as_ref().expect("a forward before the backward");
        let (tokens, n) = (x.len() / self.hidden, self.config.num_experts);
        let mut dlogits = Buf::zeros(tokens * n);
        let experts = self.map.as_ref().map_or(n, |map| map.num_experts());
        let by_expert =
            ArrayView2::from_shape((tokens, experts), dcoefficients).expect("tokens * experts values");
        let by_gate = self.map.as_ref().map(|map| map.backward(by_expert));
        mixture::backward(
            &self.config,
            routed,
            by_gate.as_ref().map_or(by_expert, |by_gate| by_gate.view()),
            self.weight(training),
            ArrayViewMut2::from_shape((tokens, n), &mut dlogits[..]).expect("tokens * experts values"),
        );
        confidence::add_of_softmax(
            routed.probabilities.view(),
            f64::from(training.entropy),
            ArrayViewMut2::from_shape((tokens, n), &mut dlogits[..]).expect("tokens * experts values"),
        );
        let (dims, w, dw) = (self.dims(tokens), &params[..self.len()], &mut grads[..self.len()]);
        linear::BackwardWeight { dw, dy: &dlogits, x, dims }.run();
        linear::BackwardInput { dx, dy: &dlogits, w, dims, add: true }.run();
    }
}
