//! The router of a mixture: one matrix, the rule of [`dsmoe_router::mixture`], and the balance loss. It runs on the host, also
//! where the experts run on a GPU.

use std::any::Any;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, linear};
use dsmoe_router::mixture::{self, MixtureConfig, MixtureRouted};
use ndarray::{ArrayView2, ArrayViewMut2};

use crate::ffn::{GateBackward, GateTraining, HostGate, HostRouted};

/// Routes inputs of width `hidden`; its parameters are the matrix `[n, hidden]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct MixtureRouter {
    pub(super) hidden: usize,
    pub(super) config: MixtureConfig,
    /// Weight of the balance loss of this layer.
    pub(super) balance_weight: f64,
}

/// The routing that the backward pass needs.
#[derive(Debug, Default)]
pub(super) struct RouterSaved(pub(super) Option<MixtureRouted>);

impl MixtureRouter {
    /// Returns the number of parameters.
    pub(super) fn len(&self) -> usize {
        self.config.num_experts * self.hidden
    }

    fn dims(&self, rows: usize) -> linear::Dims {
        let outputs = self.config.num_experts;
        linear::Dims { rows, inputs: self.hidden, outputs, precision: Precision::F32 }
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
        let RouterSaved(routed) = saved.downcast_mut().expect("saved by the router of a mixture");
        let (tokens, n) = (x.len() / self.hidden, self.config.num_experts);
        let mut logits = Buf::zeros(tokens * n);
        let w = &params[..self.len()];
        linear::Forward { y: &mut logits, x, w, bias: None, dims: self.dims(tokens) }.run();
        let logits = ArrayView2::from_shape((tokens, n), &logits[..]).expect("tokens * experts values");
        let routed = routed.insert(mixture::route(&self.config, logits));
        let weight = training.map_or(0.0, |training| self.weight(training));
        let balance_loss = if weight == 0.0 { 0.0 } else { weight * mixture::balance_loss(routed) };
        HostRouted { routing: &routed.routing, balance_loss }
    }

    fn backward(&self, args: GateBackward<'_>) {
        let GateBackward { dx, grads, dcoefficients, saved, x, params, training } = args;
        let RouterSaved(routed) = saved.downcast_ref().expect("saved by the router of a mixture");
        let routed = routed.as_ref().expect("a forward before the backward");
        let (tokens, n) = (x.len() / self.hidden, self.config.num_experts);
        let mut dlogits = Buf::zeros(tokens * n);
        mixture::backward(
            &self.config,
            routed,
            ArrayView2::from_shape((tokens, n), dcoefficients).expect("tokens * experts values"),
            self.weight(training),
            ArrayViewMut2::from_shape((tokens, n), &mut dlogits[..]).expect("tokens * experts values"),
        );
        let (dims, w, dw) = (self.dims(tokens), &params[..self.len()], &mut grads[..self.len()]);
        linear::BackwardWeight { dw, dy: &dlogits, x, dims }.run();
        linear::BackwardInput { dx, dy: &dlogits, w, dims, add: true }.run();
    }
}
