//! The router of a top-k FFN: gate network, noise, selection and balance loss, forward and backward. It always runs
//! on the CPU, also if the experts run on a GPU.

use std::any::Any;
use std::sync::Arc;

use dsmoe_core::ffn::{
    Decision, GateBackward, GateTraining, HostGate, HostRouted, block_len, split, split_mut,
};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::expert_map::ExpertMap;
use dsmoe_router::topk::{self, Noise, TopKRouted};
use dsmoe_router::{Fade, Routing, confidence};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use super::gate::{Gate, GateActs, GateGrads, GateWeights, NetworkBackward};
use super::spec::TopkSpec;

/// Routes inputs of width `hidden`.
#[derive(Clone, Debug)]
pub(super) struct TopkRouter {
    pub(super) hidden: usize,
    /// The settings, with the number of gates.
    pub(super) spec: TopkSpec,
    /// The expert of every gate, residual ones left out; none where each expert has a gate of its own.
    pub(super) map: Option<Arc<ExpertMap>>,
}

/// Values that the backward pass needs.
#[derive(Debug, Default)]
pub(super) struct RouterSaved {
    acts: GateActs,
    /// The softmax over all experts, where its entropy has a weight.
    soft: Option<Array2<f64>>,
    pub(super) routed: Option<TopKRouted>,
    /// The routing of the experts, where gates share them.
    mapped: Option<Routing>,
}

impl RouterSaved {
    /// The routing of the experts, after a forward pass.
    pub(super) fn routing(&self) -> Option<&Routing> {
        self.mapped.as_ref().or(self.routed.as_ref().map(|routed| &routed.routing))
    }
}

impl TopkRouter {
    pub(super) fn gate(&self) -> Gate {
        self.spec.gate(self.hidden)
    }

    /// The number of values that inference reads, from the start of the parameters.
    pub(super) fn inference_len(&self) -> usize {
        let mut tensors = self.gate().tensors();
        tensors.retain(|tensor| !tensor.training_only);
        block_len(&tensors)
    }

    /// Returns what the gates decide for `x`, without noise.
    pub(super) fn decide(&self, x: &[f32], params: &[f32]) -> Decision {
        let (mut logits, mut acts) = (Buf::default(), GateActs::default());
        self.gate().forward(&mut logits, &mut acts, x, self.weights(params, false), false);
        let logits = matrix(&logits, x.len() / self.hidden, self.spec.router.num_experts).to_owned();
        let TopKRouted { routing, .. } = topk::route(&self.spec.router, logits.view(), None, Fade::NONE);
        let soft = confidence::softmax(logits.view());
        let Some(map) = &self.map else { return Decision { soft, logits, routing } };
        let mut experts = Routing::default();
        map.before(self.spec.router.num_residual).route(&routing, &mut experts);
        Decision { soft: map.sums(soft.view()), logits: map.log_sums(logits.view()), routing: experts }
    }

    fn weights<'a>(&self, params: &'a [f32], noisy: bool) -> GateWeights<'a> {
        let [a, b, bias, noise] = self.gate().lens();
        let [a, b, bias, noise] = split(params, [a, b, bias, if noisy { noise } else { 0 }]);
        GateWeights { a, b, bias, noise }
    }

    fn balance_weight(&self, training: GateTraining) -> f64 {
        f64::from(training.balance_scale) * self.spec.balance_weight
    }

    /// Routes noisy logits; `raw` is the output of the noise network.
    fn route_noisy(
        &self,
        logits: ArrayView2<'_, f32>,
        raw: ArrayView2<'_, f32>,
        training: GateTraining,
    ) -> TopKRouted {
        let std = topk::noise_std(raw);
        let mut draws = vec![0.0; raw.len()];
        Rng::new(training.seed, u64::from_be_bytes(*b"gatenois")).fill_normal(&mut draws, 1.0);
        let noise = Noise { std: std.view(), draws: matrix(&draws, raw.nrows(), raw.ncols()) };
        topk::route(&self.spec.router, logits, Some(noise), training.fade)
    }
}

impl HostGate for TopkRouter {
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
        let RouterSaved { acts, soft, routed, mapped } =
            saved.downcast_mut().expect("saved by a top-k router");
        let (tokens, n) = (x.len() / self.hidden, self.spec.router.num_experts);
        let noisy = training.filter(|_| self.spec.gate.noise);
        let mut logits = Buf::default();
        self.gate().forward(&mut logits, acts, x, self.weights(params, noisy.is_some()), noisy.is_some());
        let logits = matrix(&logits, tokens, n);
        let routed = routed.insert(match noisy {
            None => {
                let fade = training.map_or(Fade::NONE, |training| training.fade);
                topk::route(&self.spec.router, logits, None, fade)
            }
            Some(training) => self.route_noisy(logits, matrix(&acts.raw, tokens, n), training),
        });
        let has_entropy = training.is_some_and(|training| training.entropy != 0.0);
        *soft = has_entropy.then(|| confidence::softmax(logits));
        let gate_entropy = soft.as_ref().map_or(0.0, |soft| confidence::of_softmax(soft.view()));
        let weight = training.map_or(0.0, |training| self.balance_weight(training));
        let balance_loss = weight * topk::balance_loss(routed);
        let routing = match &self.map {
            None => &routed.routing,
            Some(map) => {
                let mapped = mapped.get_or_insert_default();
                map.before(self.spec.router.num_residual).route(&routed.routing, mapped);
                mapped
            }
        };
        HostRouted { routing, balance_loss, gate_entropy }
    }

    fn backward(&self, args: GateBackward<'_>) {
        let GateBackward { dx, grads, dcoefficients, saved, x, params, training } = args;
        let RouterSaved { acts, soft, routed, .. } = saved.downcast_ref().expect("saved by a top-k router");
        let routed = routed.as_ref().expect("a forward before the backward");
        let (tokens, n, noisy) = (x.len() / self.hidden, self.spec.router.num_experts, self.spec.gate.noise);
        let mut dlogits = vec![0.0; tokens * n];
        let mut dstd = noisy.then(|| Array2::zeros((tokens, n)));
        let map = self.map.as_ref().map(|map| map.before(self.spec.router.num_residual));
        let experts = map.as_ref().map_or(self.spec.all_experts(), ExpertMap::num_experts);
        let by_expert = matrix(dcoefficients, tokens, experts);
        let by_gate = map.as_ref().map(|map| map.backward(by_expert));
        topk::backward(
            &self.spec.router,
            routed,
            by_gate.as_ref().map_or(by_expert, |by_gate| by_gate.view()),
            self.balance_weight(training),
            ArrayViewMut2::from_shape((tokens, n), &mut dlogits).expect("tokens * experts values"),
            dstd.as_mut().map(|dstd| dstd.view_mut()),
        );
        if let Some(soft) = soft {
            let dlogits =
                ArrayViewMut2::from_shape((tokens, n), &mut dlogits).expect("tokens * experts values");
            confidence::add_of_softmax(soft.view(), f64::from(training.entropy), dlogits);
        }
        // s = softplus(raw) + 0.01, so ds/draw = sigmoid(raw).
        let draw = dstd.map(|dstd| {
            let (values, _) = dstd.into_raw_vec_and_offset();
            let pairs = values.iter().zip(acts.raw.iter());
            pairs.map(|(ds, raw)| ds / (1.0 + (-raw).exp())).collect::<Vec<f32>>()
        });
        let [a, b, bias, noise] = split_mut(grads, self.gate().lens());
        let grads = GateGrads { a, b, bias, noise };
        let weights = self.weights(params, noisy);
        let draw = draw.as_deref();
        self.gate().backward(NetworkBackward { dx, grads, dz: &dlogits, draw, acts, x, weights });
    }
}

fn matrix(values: &[f32], rows: usize, cols: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((rows, cols), values).expect("rows * cols values")
}
