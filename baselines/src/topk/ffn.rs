//! The FFN of LLaMA-MoE and MoEfication: experts cut from the dense FFN, a gate that gives every token exactly k. Where gates share
//! experts, a token opens k gates, and an expert runs once with the sum of their coefficients.

use std::any::Any;
use std::sync::Arc;

use dsmoe_core::ffn::{
    Decision, DeviceFfn, ExpertParts, Ffn, FfnBackward, FfnForward, FfnInference, FfnKind, FfnReport,
    FfnScratch, GateBackward, Gated, HostGate, PackedFfn, add_output_bias, routes,
};
use dsmoe_core::params::TensorSpec;
use dsmoe_kernels::Precision;
use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Pairs, Saved};
use dsmoe_router::expert_map::ExpertMap;

use super::layers::TopkLayers;
use super::router::{RouterSaved, TopkRouter};
use super::spec::TopkSpec;

/// `y = sum over the k selected experts of score_scale p_i o_i + sum over residual experts of o_i`; see
/// [`dsmoe_router::topk`]. Expert i is the i-th block of neurons, the residual ones come last.
#[derive(Clone, Debug)]
pub struct TopkMoeFfn {
    gated: Gated,
    /// The settings, with the number of gates.
    spec: TopkSpec,
    /// The expert of every gate, residual ones left out; none where each expert has a gate of its own.
    map: Option<Arc<ExpertMap>>,
    /// The settings of the model, where its layers differ or gates share experts.
    layers: Option<Arc<TopkLayers>>,
}

/// Values that the backward pass needs.
#[derive(Debug)]
struct TopkSaved {
    experts: Saved,
    router: RouterSaved,
}

impl TopkMoeFfn {
    /// Creates LLaMA's FFN for inputs of width `hidden` and `intermediate` neurons.
    ///
    /// # Panics
    /// The experts do not divide `intermediate`.
    pub fn new(hidden: usize, intermediate: usize, spec: TopkSpec) -> TopkMoeFfn {
        TopkMoeFfn::of(Gated::silu(hidden, intermediate), spec)
    }

    /// Creates the FFN of any family.
    ///
    /// # Panics
    /// Those of [`TopkMoeFfn::new`].
    pub fn of(gated: Gated, spec: TopkSpec) -> TopkMoeFfn {
        TopkMoeFfn::with_map(gated, spec, None)
    }

    /// Creates the FFN of a layer of a model whose layers differ or whose gates share experts.
    ///
    /// # Panics
    /// Those of [`TopkMoeFfn::new`]; there is no such layer.
    pub(super) fn of_layers(gated: Gated, layers: Arc<TopkLayers>, layer: usize) -> TopkMoeFfn {
        let ffn = TopkMoeFfn::with_map(gated, layers.layer(layer), layers.map(layer).cloned());
        TopkMoeFfn { layers: Some(layers), ..ffn }
    }

    fn with_map(gated: Gated, spec: TopkSpec, map: Option<Arc<ExpertMap>>) -> TopkMoeFfn {
        let ffn = TopkMoeFfn { gated, spec, map, layers: None };
        let (intermediate, num_experts) = (gated.intermediate, ffn.experts());
        let even = num_experts > 0 && intermediate.is_multiple_of(num_experts);
        assert!(even, "top-k ffn: {intermediate} neurons in {num_experts} experts");
        ffn
    }

    /// The number of experts, residual ones included.
    fn experts(&self) -> usize {
        self.routed() + self.spec.router.num_residual
    }

    /// The number of experts to choose from.
    fn routed(&self) -> usize {
        self.map.as_ref().map_or(self.spec.router.num_experts, |map| map.num_experts())
    }

    fn router(&self) -> TopkRouter {
        TopkRouter { hidden: self.gated.hidden, spec: self.spec, map: self.map.clone() }
    }

    /// The index of the router's first parameter.
    fn router_start(&self) -> usize {
        self.gated.len()
    }

    /// Only selected experts take part in the gradient (LLaMA-MoE has no straight-through rule).
    fn dims(&self, tokens: usize) -> Dims {
        let num_experts = self.experts();
        Dims { num_experts, all_pairs: false, ..self.gated.dims(tokens) }
    }
}

/// A top-k FFN for inference; the gate stays f32.
#[derive(Debug)]
struct PackedTopk {
    ffn: TopkMoeFfn,
    weights: PackedWeights,
    router: Vec<f32>,
    /// The bias of the output; empty where there is none.
    output_bias: Vec<f32>,
    /// The number of experts that the gate chooses, in place of the spec's.
    top_k: Option<usize>,
}

impl PackedFfn for PackedTopk {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, record, scratch } = args;
        let mut saved = RouterSaved::default();
        let mut router = self.ffn.router();
        router.spec.router.top_k = self.top_k.unwrap_or(router.spec.router.top_k);
        let routed = router.forward(&mut saved, x, &self.router, None);
        routed.count(record);
        let (dims, routes) = (self.ffn.dims(x.len() / self.ffn.gated.hidden), routes(routed.routing));
        let (pairs, weights, scratch) = (Pairs::Routed(&routes), &self.weights, &mut scratch.experts);
        expert_ffn::ForwardPacked { y, x, weights, pairs, dims, scratch }.run();
        add_output_bias(y, &self.output_bias);
    }

    fn bytes(&self) -> usize {
        self.weights.bytes() + 4 * (self.router.len() + self.output_bias.len())
    }

    fn num_experts(&self) -> Option<usize> {
        self.ffn.num_experts()
    }

    fn choices(&self) -> usize {
        self.ffn.spec.router.num_experts
    }

    fn set_choice(&mut self, choice: Option<usize>) -> bool {
        self.top_k = choice.filter(|k| (1..=self.choices()).contains(k));
        self.top_k == choice
    }
}

impl Ffn for TopkMoeFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = self.gated.tensors();
        tensors.extend(self.router().gate().tensors());
        tensors
    }

    fn num_experts(&self) -> Option<usize> {
        Some(self.experts())
    }

    fn kind(&self) -> Option<FfnKind> {
        Some(FfnKind::Spec(match &self.layers {
            Some(layers) => Arc::<TopkLayers>::clone(layers),
            None => Arc::new(self.spec),
        }))
    }

    fn on_device(&self) -> Option<DeviceFfn> {
        let (num_experts, gate) = (self.experts(), Arc::new(self.router()));
        Some(DeviceFfn::Hosted { gated: self.gated, num_experts, gate })
    }

    fn expert_parts(&self) -> Option<ExpertParts> {
        let (gated, blocks, map) = (self.gated, self.experts(), self.map.clone());
        let (routed, gates) = (0..self.routed(), self.router().gate().rows_of_experts());
        Some(ExpertParts { gated, blocks, routed, map, gates })
    }

    fn keep_experts(&self, kept: &[usize]) -> Option<Box<dyn Ffn>> {
        let width = self.gated.intermediate / self.experts();
        let (gates, map) = match &self.map {
            None => (kept.len(), None),
            Some(map) => {
                let (gates, map) = map.keep(kept);
                (gates.len(), Some(Arc::new(map)))
            }
        };
        let intermediate = (kept.len() + self.spec.router.num_residual) * width;
        let gated = Gated { intermediate, ..self.gated };
        Some(Box::new(TopkMoeFfn::with_map(gated, self.spec.with_experts(gates), map)))
    }

    fn decide(&self, params: &[f32], x: &[f32]) -> Option<Decision> {
        Some(self.router().decide(x, &params[self.router_start()..]))
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        Box::new(PackedTopk {
            ffn: self.clone(),
            weights: PackedWeights::new(precision, &self.gated.weights(params), self.dims(0)),
            router: params[self.router_start()..][..self.router().inference_len()].to_vec(),
            output_bias: self.gated.output_bias(params).to_vec(),
            top_k: None,
        })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        let experts = Saved::with_room(self.dims(tokens));
        Box::new(TopkSaved { experts, router: RouterSaved::default() })
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        scratch.experts.reserve(self.dims(tokens));
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, training, record, scratch } = args;
        let saved = saved.downcast_mut::<TopkSaved>().expect("saved by a top-k FFN");
        let of_router = &params[self.router_start()..];
        let routed = self.router().forward(&mut saved.router, x, of_router, Some(training));
        routed.count(record);
        let (balance_loss, gate_entropy) = (routed.balance_loss, routed.gate_entropy);
        let (weights, routes) = (&self.gated.weights(params), routes(routed.routing));
        let (pairs, dims) = (Pairs::Routed(&routes), self.dims(x.len() / self.gated.hidden));
        let (saved, scratch) = (&mut saved.experts, &mut scratch.experts);
        expert_ffn::ForwardTrain { y, saved, x, weights, pairs, dims, scratch }.run();
        add_output_bias(y, self.gated.output_bias(params));
        FfnReport { balance_loss, gate_entropy, ..FfnReport::default() }
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dx, grads, dy, saved, x, params, training, scratch, .. } = args;
        let saved = saved.downcast_mut::<TopkSaved>().expect("saved by a top-k FFN");
        let TopkSaved { experts: saved, router } = saved;
        let routing = router.routing().expect("a forward before the backward");
        self.gated.add_output_bias_grad(grads, dy);
        let (weights, params) = params.split_at(self.router_start());
        let (grads, drouter) = grads.split_at_mut(self.router_start());
        let (weights, grads) = (&self.gated.weights(weights), self.gated.grads(grads));
        let dims = self.dims(x.len() / self.gated.hidden);
        let FfnScratch { experts: scratch, dcoefficients: by_pair, .. } = scratch;
        by_pair.resize(dims.tokens * dims.num_experts);
        let (dcoefficients, routes) = (Some(&mut by_pair[..]), routes(routing));
        let pairs = Pairs::Routed(&routes);
        expert_ffn::Backward { dx, dcoefficients, grads, dy, saved, x, weights, pairs, dims, scratch }.run();
        let (grads, dcoefficients, saved) = (drouter, &by_pair[..], router);
        self.router().backward(GateBackward { dx, grads, dcoefficients, saved, x, params, training });
    }
}

/// Runs an FFN for inference.
#[cfg(test)]
pub(crate) fn infer(packed: &dyn PackedFfn, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    packed.forward(FfnInference { y: &mut y, x, record: None, scratch: &mut FfnScratch::default() });
    y
}

#[cfg(test)]
mod tests {
    use dsmoe_core::ffn::{DenseFfn, GateTraining, block_len, split_mut};
    use dsmoe_kernels::buf::Buf;
    use dsmoe_kernels::testing::{assert_close, f64s, normals};
    use dsmoe_router::topk::{Scores, TopKConfig};
    use dsmoe_router::{Fade, SparsityGrad, SparsityOver};

    use super::super::spec::{GateNetwork, GateSpec};
    use super::*;

    const HIDDEN: usize = 12;
    const WIDTH: usize = 20;
    const EXPERTS: usize = 5;
    const TOKENS: usize = 6;

    fn params(ffn: &TopkMoeFfn, seed: u64) -> Buf {
        let mut params = Buf::zeros(block_len(&ffn.tensors()));
        let values = normals(params.len(), seed);
        params.iter_mut().zip(values).for_each(|(p, v)| *p = 0.3 * v);
        params
    }

    fn spec(router: TopKConfig, network: GateNetwork) -> TopkSpec {
        let gate = GateSpec { network, normalize: false, noise: false, bias: false, hidden: None };
        TopkSpec { router, gate, balance_weight: 0.0 }
    }

    /// The first matrix of the gate.
    fn gate_network<'a>(ffn: &TopkMoeFfn, params: &'a mut [f32]) -> &'a mut [f32] {
        let [gate, ..] = split_mut(&mut params[ffn.router_start()..], ffn.router().gate().lens());
        gate
    }

    fn packed(ffn: &TopkMoeFfn, params: &[f32], x: &[f32]) -> Vec<f32> {
        infer(&*ffn.pack(params, Precision::F32), x)
    }

    /// The forward pass of training: the output, the losses of gates and the saved values.
    fn train(
        ffn: &TopkMoeFfn,
        x: &[f32],
        params: &[f32],
        training: GateTraining,
    ) -> (Vec<f32>, f64, Box<dyn Any + Send>) {
        let (mut y, mut saved) = (vec![0.0; x.len()], ffn.new_saved(TOKENS));
        let scratch = &mut FfnScratch::default();
        let args = FfnForward { y: &mut y, saved: &mut *saved, x, params, training, record: None, scratch };
        let report = ffn.forward_train(args);
        (y, report.balance_loss + f64::from(training.entropy) * report.gate_entropy, saved)
    }

    fn dense(params: &[f32], x: &[f32]) -> Vec<f32> {
        let dense = DenseFfn::new(HIDDEN, WIDTH);
        infer(&*dense.pack(&params[..block_len(&dense.tensors())], Precision::F32), x)
    }

    #[test]
    fn all_experts_are_the_dense_ffn() {
        let all = TopKConfig::new(EXPERTS, EXPERTS).unwrap();
        let x = normals(7 * HIDDEN, 2);
        let ones = TopKConfig { scores: Scores::One, score_scale: 1.0, ..all };
        let residual = TopKConfig { num_experts: 2, top_k: 2, num_residual: 3, ..ones };
        for router in [ones, residual] {
            let ffn = TopkMoeFfn::new(HIDDEN, WIDTH, spec(router, GateNetwork::Mlp));
            let params = params(&ffn, 1);
            let want = f64s(&dense(&params, &x));
            assert_close("y", &packed(&ffn, &params, &x), &want, 1e-5);
        }
        // Even softmax scores give 1/n of it at scale 1, and all of it at scale n.
        for (score_scale, factor) in [(1.0, 1.0 / EXPERTS as f64), (EXPERTS as f32, 1.0)] {
            let router = TopKConfig { score_scale, ..all };
            let ffn = TopkMoeFfn::new(HIDDEN, WIDTH, spec(router, GateNetwork::Linear));
            let mut params = params(&ffn, 1);
            gate_network(&ffn, &mut params).fill(0.0);
            let want: Vec<f64> = f64s(&dense(&params, &x)).iter().map(|y| factor * y).collect();
            assert_close("y", &packed(&ffn, &params, &x), &want, 1e-5);
        }
    }

    #[test]
    fn logits_of_any_size_give_no_nan() {
        for (k, sign) in [(2, 1.0f32), (2, -1.0), (EXPERTS, 1.0)] {
            let router = TopKConfig::new(EXPERTS, k).unwrap();
            let ffn = TopkMoeFfn::new(HIDDEN, WIDTH, spec(router, GateNetwork::Linear));
            let mut params = params(&ffn, 4);
            gate_network(&ffn, &mut params).iter_mut().for_each(|a| *a *= 1e30 * sign);
            let y = packed(&ffn, &params, &normals(TOKENS * HIDDEN, 5));
            assert!(y.iter().all(|y| y.is_finite()) && y.iter().any(|&y| y != 0.0));
        }
    }

    /// The objective `<y, dy>` + the losses of gates, and the experts of each token.
    fn loss(
        ffn: &TopkMoeFfn,
        [x, params, dy]: [&[f32]; 3],
        training: GateTraining,
    ) -> (f64, Vec<u32>, Vec<usize>) {
        let (y, of_gates, saved) = train(ffn, x, params, training);
        let routed = saved.downcast_ref::<TopkSaved>().and_then(|saved| saved.router.routed.as_ref());
        let routing = &routed.expect("routed").routing;
        let value = f64s(&y).iter().zip(f64s(dy)).map(|(y, dy)| y * dy).sum::<f64>();
        (value + of_gates, routing.tokens.clone(), routing.offsets.clone())
    }

    #[test]
    fn gradients_are_differences_while_the_selection_holds() {
        let plain = GateTraining { seed: 9, ..GateTraining::default() };
        let faded = GateTraining { entropy: 0.4, fade: Fade { kept: 1, factor: 0.6 }, ..plain };
        for (network, normalize, noise, scores, num_residual, balance_weight, training) in [
            (GateNetwork::Mlp, false, true, Scores::Softmax, 0, 0.5, plain),
            (GateNetwork::Linear, false, true, Scores::Softmax, 1, 0.5, plain),
            (GateNetwork::Linear, false, false, Scores::Softmax, 0, 0.0, plain),
            (GateNetwork::Mlp, true, false, Scores::One, 0, 0.0, plain),
            (GateNetwork::Linear, false, true, Scores::Softmax, 1, 0.5, faded),
            (GateNetwork::Mlp, false, false, Scores::Softmax, 0, 0.0, faded),
            (GateNetwork::Linear, false, false, Scores::One, 0, 0.0, faded),
        ] {
            let plain = TopKConfig::new(EXPERTS - num_residual, 2).unwrap();
            let router = TopKConfig { num_residual, scores, ..plain };
            let bias = network == GateNetwork::Linear;
            let gate = GateSpec { network, normalize, noise, bias, hidden: None };
            let ffn = TopkMoeFfn::new(HIDDEN, WIDTH, TopkSpec { router, gate, balance_weight });
            let params = params(&ffn, 3);
            let (x, dy) = (normals(TOKENS * HIDDEN, 4), normals(TOKENS * HIDDEN, 5));
            let (_, _, mut saved) = train(&ffn, &x, &params, training);
            let (mut dx, mut grads) = (vec![0.0; x.len()], Buf::zeros(params.len()));
            ffn.backward(FfnBackward {
                dx: &mut dx,
                grads: &mut grads,
                dy: &dy,
                saved: &mut *saved,
                x: &x,
                params: &params,
                sparsity: SparsityGrad { weight: 0.0, over: SparsityOver::Active },
                training,
                scratch: &mut FfnScratch::default(),
            });

            let (_, tokens, offsets) = loss(&ffn, [&x, &params, &dy], training);
            let (h, mut checked) = (1e-3f32, 0);
            let mut check = |what: String, got: f32, at: &dyn Fn(f32) -> (f64, Vec<u32>, Vec<usize>)| {
                let (up, down) = (at(h), at(-h));
                // The loss jumps where the step changes which experts run.
                if [&up, &down].iter().any(|side| (&side.1, &side.2) != (&tokens, &offsets)) {
                    return;
                }
                let want = (up.0 - down.0) / (2.0 * f64::from(h));
                assert!((f64::from(got) - want).abs() < 1e-2 * want.abs().max(1.0), "{what}: {got} {want}");
                checked += 1;
            };
            let gate_start = ffn.router_start();
            let points = (0..gate_start).step_by(41).chain((gate_start..params.len()).step_by(3));
            let moved = |values: &[f32], i: usize, h: f32| {
                let mut moved = values.to_vec();
                moved[i] += h;
                moved
            };
            for i in points.clone() {
                let what = format!("{gate:?} parameter {i}");
                check(what, grads[i], &|h| loss(&ffn, [&x, &moved(&params, i, h), &dy], training));
            }
            for i in (0..x.len()).step_by(5) {
                let what = format!("{gate:?} input {i}");
                check(what, dx[i], &|h| loss(&ffn, [&moved(&x, i, h), &params, &dy], training));
            }
            assert!(checked > points.clone().count(), "{checked} of {} parameters", points.count());
        }
    }

    #[test]
    fn noise_is_a_function_of_the_seed_and_inference_has_none() {
        let router = TopKConfig::new(EXPERTS, 2).unwrap();
        let network = GateNetwork::Mlp;
        let gate = GateSpec { network, normalize: false, noise: true, bias: false, hidden: None };
        let ffn = TopkMoeFfn::new(HIDDEN, WIDTH, TopkSpec { router, gate, balance_weight: 0.01 });
        let params = params(&ffn, 6);
        let x = normals(TOKENS * HIDDEN, 7);
        let outputs = |seed| train(&ffn, &x, &params, GateTraining { seed, ..GateTraining::default() }).0;
        assert_eq!(outputs(1), outputs(1));
        assert_ne!(outputs(1), outputs(2));
        assert_eq!(packed(&ffn, &params, &x), packed(&ffn, &params, &x));
    }
}
