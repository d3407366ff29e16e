//! The FFN of Duo-LLM: every token takes the big one or the small one, or skips both.
//!
//! ```text
//! random    big with probability p, else small; coefficient 1
//! router    training   P = softmax(z / temperature),  y = P_big big(x) + P_small small(x),  z = x R^T
//!           inference  the way of the largest logit, of equal ones the cheapest; coefficient 1
//! backward  dP_big = <dy, big(x)> + weight c_big,   dP_small = <dy, small(x)> + weight c_small,   dP_skip = 0
//!           dz_j = P_j (dP_j - sum over k of P_k dP_k) / temperature,   dR += dz^T x,   dx += dz R
//!           weight is that of the share's loss: a controller's, or 2 weight (mean gate - share) / gates of the squared one
//! costs     without skip   c_big = 1, c_small = 0: the gates are P_big of one expert, the big FFN
//!           with skip      c = 2 neurons / (neurons of both): the gates are P c of two experts of different widths
//! ```
//! A router that does not skip has two ways, and its softmax is a sigmoid of the difference of the logits.
//!
//! Draws are functions of the micro-batch's seed in training, and of a token's input in inference, so that they are the same
//! however a text is fed.

use std::any::Any;
use std::sync::Arc;

use dsmoe_core::ffn::{
    Ffn, FfnBackward, FfnForward, FfnInference, FfnKind, FfnReport, FfnScratch, GateTraining, Gated,
    PackedFfn, Record, SMALL_FFN, routes,
};
use dsmoe_core::params::TensorSpec;
use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Pairs, Saved};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::{Precision, linear};
use dsmoe_router::{Routing, SparsityGrad, SparsityOver};
use ndarray::Array2;

use super::spec::{DuoSpec, Stage};

/// The stream of draws.
const DRAWS: u64 = u64::from_be_bytes(*b"duoroute");

/// The ways of a token, ascending in what they compute. The last two are the choices that can be made for all tokens.
const SKIP: usize = 0;
const SMALL: usize = 1;
const BIG: usize = 2;

/// The two FFNs of a layer and what chooses between them.
#[derive(Clone, Debug)]
pub struct DuoFfn {
    big: Gated,
    small: Gated,
    spec: DuoSpec,
}

/// One of the two FFNs in a pass: the tokens that take it.
#[derive(Debug)]
struct Side {
    experts: Saved,
    routing: Routing,
    /// True if all tokens take it with coefficient 1: it is then a dense FFN, to the bit.
    is_dense: bool,
}

/// Probabilities of a token: of big, of small and of skipping, 0 where the router does not skip.
type Probabilities = [f32; 3];

/// Values that the backward pass needs: of big and small, and P of every token where a router chooses.
#[derive(Debug)]
struct DuoSaved {
    sides: [Side; 2],
    probabilities: Vec<Probabilities>,
}

/// A duo FFN for inference.
#[derive(Debug)]
struct PackedDuo {
    ffn: DuoFfn,
    weights: [PackedWeights; 2],
    router: Vec<f32>,
    /// The choice for all tokens.
    choice: Option<usize>,
}

/// Returns the tokens for which `takes` gives a coefficient, as the pairs of a single expert.
fn side(tokens: usize, takes: impl Fn(usize) -> Option<f32>) -> (Routing, bool) {
    let mask = Array2::from_shape_fn((tokens, 1), |(t, _)| takes(t).is_some());
    let routing = Routing::from_mask(mask.view(), |t, _| takes(t).unwrap_or(0.0));
    let is_dense = routing.num_routed() == tokens && routing.coefficients.iter().all(|&c| c == 1.0);
    (routing, is_dense)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn softmax([big, small, skip]: [f32; 3]) -> Probabilities {
    let largest = big.max(small).max(skip);
    let powers = [big, small, skip].map(|z| (z - largest).exp());
    let sum: f32 = powers.iter().sum();
    powers.map(|power| power / sum)
}

/// Returns the way of the largest of the values of big, of small and, where there are three, of skipping; of equal ones the cheapest.
fn way(values: &[f32]) -> usize {
    match *values {
        [big, small] if big > small => BIG,
        [_, _] => SMALL,
        [big, small, skip] if big > small && big > skip => BIG,
        [_, small, skip] if small > skip => SMALL,
        _ => SKIP,
    }
}

/// Returns a number from 0 to 1 that depends on the input `x` alone.
fn draw_of(x: &[f32]) -> f64 {
    let fold = |hash: u64, x: &f32| (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3);
    Rng::new(x.iter().fold(0xcbf2_9ce4_8422_2325, fold), DRAWS).uniform().into()
}

impl DuoFfn {
    /// Creates the FFN whose big one is `big`.
    ///
    /// # Panics
    /// `big` has biases, which would belong to neither of the two.
    pub fn of(big: Gated, spec: DuoSpec) -> DuoFfn {
        assert!(!big.bias && !big.output_bias, "duo ffn: {big:?}");
        DuoFfn { small: Gated { intermediate: spec.small, ..big }, big, spec }
    }

    /// Returns the starts of the parameters of the small FFN and of the router.
    fn starts(&self) -> [usize; 2] {
        [self.big.len(), self.big.len() + self.small.len()]
    }

    fn dims(gated: &Gated, tokens: usize, is_dense: bool) -> Dims {
        Dims { all_pairs: is_dense, ..gated.dims(tokens) }
    }

    fn router_dims(&self, rows: usize) -> linear::Dims {
        let outputs = self.spec.ways();
        linear::Dims { rows, inputs: self.big.hidden, outputs, precision: Precision::F32 }
    }

    /// Returns the router's weights at the start of `router`.
    fn router_len(&self) -> usize {
        self.spec.ways() * self.big.hidden
    }

    /// Returns the logits `[tokens, ways]`: of big, of small and, where tokens may, of skipping.
    fn logits(&self, x: &[f32], router: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.big.hidden;
        let mut z = vec![0.0; self.spec.ways() * rows];
        let w = &router[..self.router_len()];
        linear::Forward { y: &mut z, x, w, bias: None, dims: self.router_dims(rows) }.run();
        z
    }

    /// Returns what the router's logits are multiplied by in training.
    fn scale(&self, training: GateTraining) -> f32 {
        1.0 / training.temperature.unwrap_or(self.spec.temperature as f32)
    }

    /// Returns P of every token in training, from logits that are multiplied by `scale`; empty with random routes.
    fn probabilities(&self, x: &[f32], router: &[f32], scale: f32) -> Vec<Probabilities> {
        if self.spec.stage == Stage::Random {
            return Vec::new();
        }
        let of = |z: &[f32]| match *z {
            [big, small] => {
                let p = sigmoid(scale * (big - small));
                [p, 1.0 - p, 0.0]
            }
            [big, small, skip] => softmax([scale * big, scale * small, scale * skip]),
            _ => unreachable!("a router has two or three ways"),
        };
        self.logits(x, router).chunks_exact(self.spec.ways()).map(of).collect()
    }

    /// Returns the way of the largest probability.
    fn likeliest(&self, probabilities: &Probabilities) -> usize {
        way(&probabilities[..self.spec.ways()])
    }

    /// Returns the neurons of big and small.
    fn widths(&self) -> [usize; 2] {
        [self.big.intermediate, self.small.intermediate]
    }

    /// Returns what P of big and of small are multiplied by to be the gates of experts.
    fn costs(&self) -> [f32; 2] {
        if !self.spec.skip {
            return [1.0, 0.0];
        }
        let [big, small] = self.widths().map(|width| width as f64);
        [big, small].map(|width| (2.0 * width / (big + small)) as f32)
    }

    /// Returns the routing that statistics count, of tokens that take those ways: to the big FFN and, where tokens may skip both,
    /// to the small one.
    fn counted(&self, takes: &[usize]) -> Routing {
        let experts = [BIG, SMALL];
        let mask = Array2::from_shape_fn((takes.len(), self.spec.experts()), |(t, expert)| {
            takes[t] == experts[expert]
        });
        Routing::from_mask(mask.view(), |_, _| 1.0)
    }

    /// Returns the sizes of the experts, where there are two.
    fn sizes(&self) -> Option<Vec<u64>> {
        self.spec.skip.then(|| self.widths().map(|width| width as u64).to_vec())
    }

    /// Sets the tokens of both sides for training; returns the routing that statistics count.
    fn route(&self, saved: &mut DuoSaved, tokens: usize, training: GateTraining) -> Routing {
        let DuoSaved { sides: [big, small], probabilities } = saved;
        let (of_big, of_small, takes) = match self.spec.stage {
            Stage::Random => {
                let mut rng = Rng::new(training.seed, DRAWS);
                let mut draw = || f64::from(rng.uniform()) < self.spec.probability;
                let takes: Vec<usize> = (0..tokens).map(|_| if draw() { BIG } else { SMALL }).collect();
                let of = |way: usize| side(tokens, |t| (takes[t] == way).then_some(1.0));
                (of(BIG), of(SMALL), takes)
            }
            Stage::Router => (
                side(tokens, |t| Some(probabilities[t][0])),
                side(tokens, |t| Some(probabilities[t][1])),
                probabilities.iter().map(|of_token| self.likeliest(of_token)).collect(),
            ),
        };
        // With coefficients that are learned both sides are routed, whatever the values.
        let may_be_dense = self.spec.stage == Stage::Random;
        for (side, (routing, is_dense)) in [(big, of_big), (small, of_small)] {
            (side.routing, side.is_dense) = (routing, is_dense && may_be_dense);
        }
        self.counted(&takes)
    }

    fn report(&self, probabilities: &[Probabilities]) -> FfnReport {
        let costs = self.costs().map(f64::from);
        let gates = (probabilities.len() * self.spec.experts()).max(1) as f64;
        let (mut active, mut all) = (0.0, 0.0);
        for of_token in probabilities {
            let taken = self.likeliest(of_token);
            for ((&p, cost), way) in of_token.iter().zip(costs).zip([BIG, SMALL]) {
                let gate = f64::from(p) * cost;
                all += gate;
                active += if way == taken { gate } else { 0.0 };
            }
        }
        FfnReport { sparsity_loss: active / gates, mean_gate: all / gates, ..FfnReport::default() }
    }

    /// Adds the gradients of the router of tokens whose coefficients have the gradients `by_coefficient`, of big and of small.
    fn router_backward(&self, args: RouterBackward<'_>) {
        let RouterBackward { dx, grads, by_coefficient, probabilities, x, params, sparsity, scale } = args;
        let [of_big, of_small] = by_coefficient;
        let (ways, costs) = (self.spec.ways(), self.costs());
        let mut dlogits = Vec::with_capacity(ways * probabilities.len());
        for ((&big, &small), p) in of_big.iter().zip(of_small).zip(probabilities) {
            let taken = self.likeliest(p);
            let weight = |way: usize, cost: f32| match sparsity.over == SparsityOver::Active && way != taken {
                true => 0.0,
                false => sparsity.weight * cost,
            };
            match self.spec.skip {
                false => {
                    let dp = big - small + weight(BIG, costs[0]);
                    let dz = scale * dp * p[0] * (1.0 - p[0]);
                    dlogits.extend([dz, -dz]);
                }
                true => {
                    let [dbig, dsmall] = [big + weight(BIG, costs[0]), small + weight(SMALL, costs[1])];
                    let mean = p[0] * dbig + p[1] * dsmall;
                    let of = [dbig, dsmall, 0.0].into_iter().zip(p);
                    dlogits.extend(of.map(|(dp, p)| scale * p * (dp - mean)));
                }
            }
        }
        let dims = self.router_dims(probabilities.len());
        let len = self.router_len();
        linear::BackwardWeight { dw: &mut grads[..len], dy: &dlogits, x, dims }.run();
        linear::BackwardInput { dx, dy: &dlogits, w: &params[..len], dims, add: true }.run();
    }
}

/// Arguments of the router's backward. Gradients are added to.
struct RouterBackward<'a> {
    dx: &'a mut [f32],
    grads: &'a mut [f32],
    by_coefficient: &'a [Vec<f32>; 2],
    probabilities: &'a [Probabilities],
    x: &'a [f32],
    params: &'a [f32],
    sparsity: SparsityGrad,
    /// The factor of the logits in the forward.
    scale: f32,
}

/// Adds `more` to `sum`.
fn add(sum: &mut [f32], more: &[f32]) {
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
}

impl PackedDuo {
    /// Returns the way of each token.
    fn takes(&self, x: &[f32]) -> Vec<usize> {
        let (hidden, spec) = (self.ffn.big.hidden, self.ffn.spec);
        let drawn = |x: &[f32]| if draw_of(x) < spec.share { BIG } else { SMALL };
        match (self.choice, spec.stage) {
            (Some(choice), _) => vec![choice; x.len() / hidden],
            (None, Stage::Random) => x.chunks_exact(hidden).map(drawn).collect(),
            (None, Stage::Router) => {
                self.ffn.logits(x, &self.router).chunks_exact(spec.ways()).map(way).collect()
            }
        }
    }
}

impl PackedFfn for PackedDuo {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, record, scratch } = args;
        let (takes, tokens) = (self.takes(x), x.len() / self.ffn.big.hidden);
        let sides = [BIG, SMALL].map(|way| side(tokens, |t| (takes[t] == way).then_some(1.0)));
        if let Some(Record { stats, layer }) = record {
            stats.add(layer, &self.ffn.counted(&takes));
        }
        let FfnScratch { experts: scratch, shared, .. } = scratch;
        let mut is_set = false;
        for (((routing, is_dense), weights), gated) in
            sides.iter().zip(&self.weights).zip([&self.ffn.big, &self.ffn.small])
        {
            if routing.num_routed() == 0 {
                continue;
            }
            let (routes, dims) = (routes(routing), DuoFfn::dims(gated, tokens, *is_dense));
            let pairs = if *is_dense { Pairs::Dense } else { Pairs::Routed(&routes) };
            if is_set {
                shared.resize(x.len());
                expert_ffn::ForwardPacked { y: &mut shared[..], x, weights, pairs, dims, scratch }.run();
                add(y, shared);
            } else {
                expert_ffn::ForwardPacked { y: &mut *y, x, weights, pairs, dims, scratch }.run();
                is_set = true;
            }
        }
        if !is_set {
            y.fill(0.0);
        }
    }

    fn bytes(&self) -> usize {
        self.weights.iter().map(PackedWeights::bytes).sum::<usize>() + 4 * self.router.len()
    }

    fn num_experts(&self) -> Option<usize> {
        Some(self.ffn.spec.experts())
    }

    fn expert_sizes(&self) -> Option<Vec<u64>> {
        self.ffn.sizes()
    }

    fn choices(&self) -> usize {
        BIG
    }

    fn set_choice(&mut self, choice: Option<usize>) -> bool {
        self.choice = choice.filter(|choice| (SMALL..=BIG).contains(choice));
        self.choice == choice
    }
}

impl Ffn for DuoFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = self.big.tensors();
        let small = self.small.tensors().into_iter();
        tensors.extend(small.map(|spec| TensorSpec { name: format!("{SMALL_FFN}{}", spec.name), ..spec }));
        tensors.push(TensorSpec::router("router.weight", vec![self.spec.ways(), self.big.hidden]));
        tensors
    }

    fn num_experts(&self) -> Option<usize> {
        Some(self.spec.experts())
    }

    fn expert_sizes(&self) -> Option<Vec<u64>> {
        self.sizes()
    }

    fn kind(&self) -> Option<FfnKind> {
        Some(FfnKind::Spec(Arc::new(self.spec)))
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        let [small, router] = self.starts();
        let pack = |gated: &Gated, params: &[f32]| {
            PackedWeights::new(precision, &gated.weights(params), gated.dims(0))
        };
        Box::new(PackedDuo {
            ffn: self.clone(),
            weights: [pack(&self.big, params), pack(&self.small, &params[small..])],
            router: params[router..][..self.router_len()].to_vec(),
            choice: None,
        })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        let side = |gated: &Gated| Side {
            experts: Saved::with_room(gated.dims(tokens)),
            routing: Routing::default(),
            is_dense: false,
        };
        Box::new(DuoSaved { sides: [side(&self.big), side(&self.small)], probabilities: Vec::new() })
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        scratch.experts.reserve(self.big.dims(tokens));
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, training, record, scratch } = args;
        let saved = saved.downcast_mut::<DuoSaved>().expect("saved by a duo FFN");
        let ([small, router], tokens) = (self.starts(), x.len() / self.big.hidden);
        saved.probabilities = self.probabilities(x, &params[router..], self.scale(training));
        let hard = self.route(saved, tokens, training);
        if let Some(Record { stats, layer }) = record {
            stats.add(layer, &hard);
        }
        y.fill(0.0);
        let mut output = vec![0.0; x.len()];
        for ((side, gated), start) in saved.sides.iter_mut().zip([&self.big, &self.small]).zip([0, small]) {
            if side.routing.num_routed() == 0 {
                continue;
            }
            let (routes, dims) = (routes(&side.routing), DuoFfn::dims(gated, tokens, side.is_dense));
            let pairs = if side.is_dense { Pairs::Dense } else { Pairs::Routed(&routes) };
            let weights = &gated.weights(&params[start..]);
            let (saved, scratch) = (&mut side.experts, &mut scratch.experts);
            expert_ffn::ForwardTrain { y: &mut output, saved, x, weights, pairs, dims, scratch }.run();
            add(y, &output);
        }
        self.report(&saved.probabilities)
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dx, grads, dy, saved, x, params, sparsity, training, scratch } = args;
        let saved = saved.downcast_mut::<DuoSaved>().expect("saved by a duo FFN");
        let ([small, router], tokens) = (self.starts(), x.len() / self.big.hidden);
        let learns = self.spec.stage == Stage::Router;
        dx.fill(0.0);
        let mut by_side = vec![0.0; x.len()];
        let mut by_coefficient = [vec![0.0; tokens], vec![0.0; tokens]];
        for (((side, gated), start), by_coefficient) in
            saved.sides.iter().zip([&self.big, &self.small]).zip([0, small]).zip(&mut by_coefficient)
        {
            if side.routing.num_routed() == 0 {
                continue;
            }
            let (routes, dims) = (routes(&side.routing), DuoFfn::dims(gated, tokens, side.is_dense));
            let pairs = if side.is_dense { Pairs::Dense } else { Pairs::Routed(&routes) };
            expert_ffn::Backward {
                dx: &mut by_side,
                dcoefficients: (!side.is_dense).then_some(&mut by_coefficient[..]),
                grads: gated.grads(&mut grads[start..]),
                dy,
                saved: &side.experts,
                x,
                weights: &gated.weights(&params[start..]),
                pairs,
                dims,
                scratch: &mut scratch.experts,
            }
            .run();
            add(dx, &by_side);
        }
        if !learns {
            return;
        }
        self.router_backward(RouterBackward {
            dx,
            grads: &mut grads[router..],
            by_coefficient: &by_coefficient,
            probabilities: &saved.probabilities,
            x,
            params: &params[router..],
            sparsity,
            scale: self.scale(training),
        });
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_core::ffn::{DenseFfn, block_len};
    use dsmoe_kernels::buf::Buf;
    use dsmoe_kernels::testing::{assert_close, f64s, finite_differences, normals};
    use dsmoe_router::ShareLoss;

    use super::*;
    use crate::topk::infer;

    const HIDDEN: usize = 12;
    const WIDTH: usize = 20;
    const TOKENS: usize = 7;

    fn of_spec(stage: Stage, probability: f64, skip: bool) -> DuoFfn {
        let spec = DuoSpec { small: 4, stage, probability, share: 0.5, temperature: 0.7, skip };
        DuoFfn::of(Gated::silu(HIDDEN, WIDTH), spec)
    }

    fn ffn(stage: Stage, probability: f64) -> DuoFfn {
        of_spec(stage, probability, false)
    }

    fn skipping() -> DuoFfn {
        of_spec(Stage::Router, 0.5, true)
    }

    fn params(ffn: &DuoFfn, seed: u64) -> Buf {
        let mut params = Buf::zeros(block_len(&ffn.tensors()));
        let values = normals(params.len(), seed);
        params.iter_mut().zip(values).for_each(|(p, v)| *p = 0.4 * v);
        params
    }

    fn dense(params: &[f32], width: usize, x: &[f32]) -> Vec<f32> {
        let dense = DenseFfn::new(HIDDEN, width);
        infer(&*dense.pack(&params[..block_len(&dense.tensors())], Precision::F32), x)
    }

    const SPARSITY: SparsityGrad = SparsityGrad { weight: 0.3, over: SparsityOver::All };

    /// The options of a training step under test: the loss on the share replaces a weight of the gates, and the temperature
    /// replaces the router's own.
    #[derive(Clone, Copy, Debug)]
    struct Beside {
        share: Option<ShareLoss>,
        temperature: Option<f32>,
    }

    const PLAIN: Beside = Beside { share: None, temperature: None };
    const SQUARED: Beside =
        Beside { share: Some(ShareLoss { weight: 9.0, target: 0.3 }), temperature: Some(0.4) };

    /// The forward and the backward of training: outputs, report, and the gradients of x and of the parameters.
    fn train(
        ffn: &DuoFfn,
        (x, params): (&[f32], &[f32]),
        dy: &[f32],
        beside: Beside,
    ) -> (Vec<f32>, FfnReport, Vec<f32>, Buf) {
        let (mut y, mut saved) = (vec![0.0; x.len()], ffn.new_saved(TOKENS));
        let temperature = beside.temperature;
        let training = GateTraining { seed: 4, temperature, ..GateTraining::default() };
        let scratch = &mut FfnScratch::default();
        let args = FfnForward { y: &mut y, saved: &mut *saved, x, params, training, record: None, scratch };
        let report = ffn.forward_train(args);
        let (mut dx, mut grads) = (vec![0.0; x.len()], Buf::zeros(params.len()));
        let gates = (TOKENS * ffn.spec.experts()) as f64;
        let of_share = |share: ShareLoss| (share.slope(report.mean_gate) / gates) as f32;
        let weight = beside.share.map_or(SPARSITY.weight, of_share);
        ffn.backward(FfnBackward {
            dx: &mut dx,
            grads: &mut grads,
            dy,
            saved: &mut *saved,
            x,
            params,
            sparsity: SparsityGrad { weight, ..SPARSITY },
            training,
            scratch,
        });
        (y, report, dx, grads)
    }

    #[test]
    fn one_choice_for_all_is_a_dense_ffn_to_the_bit() {
        let x = normals(TOKENS * HIDDEN, 2);
        for ffn in [ffn(Stage::Random, 1.0), ffn(Stage::Router, 1.0), skipping()] {
            let params = params(&ffn, 1);
            let [small, _] = ffn.starts();
            let mut packed = ffn.pack(&params, Precision::F32);
            for (choice, want) in [(BIG, dense(&params, WIDTH, &x)), (SMALL, dense(&params[small..], 4, &x))]
            {
                assert!(packed.set_choice(Some(choice)));
                assert_eq!(infer(&*packed, &x), want, "{ffn:?} {choice}");
            }
            assert!(!packed.set_choice(Some(3)) && packed.set_choice(None));
        }
        // Random routes that are always big: the dense FFN, in training too.
        let (always, params) = (ffn(Stage::Random, 1.0), params(&ffn(Stage::Random, 1.0), 1));
        let (y, report, ..) = train(&always, (&x, &params), &normals(x.len(), 3), PLAIN);
        assert_eq!((y, report), (dense(&params, WIDTH, &x), FfnReport::default()));
    }

    #[test]
    fn every_token_has_the_output_of_its_side() {
        let x = normals(TOKENS * HIDDEN, 2);
        let duo = ffn(Stage::Router, 0.5);
        let params = params(&duo, 1);
        let [small, router] = duo.starts();
        let logits = duo.logits(&x, &params[router..]);
        let differences: Vec<f32> = logits.chunks_exact(2).map(|z| z[0] - z[1]).collect();
        assert!(differences.iter().any(|&z| z > 0.0) && differences.iter().any(|&z| z < 0.0));
        let [of_big, of_small] = [dense(&params, WIDTH, &x), dense(&params[small..], 4, &x)];
        let got = infer(&*duo.pack(&params, Precision::F32), &x);
        for (t, difference) in differences.iter().enumerate() {
            let want = if *difference > 0.0 { &of_big } else { &of_small };
            let token = t * HIDDEN..(t + 1) * HIDDEN;
            assert_close("y", &got[token.clone()], &f64s(&want[token]), 1e-5);
        }
        // Draws belong to the input: a token alone has what it has among others.
        let random = ffn(Stage::Random, 0.5);
        let packed = random.pack(&params, Precision::F32);
        let all = infer(&*packed, &x);
        for t in 0..TOKENS {
            let token = t * HIDDEN..(t + 1) * HIDDEN;
            assert_close("alone", &infer(&*packed, &x[token.clone()]), &f64s(&all[token]), 1e-5);
        }
    }

    /// Sets the router of `params` so that the logit of the row `row` of every token is its first input, and all others are 0.
    fn prefer(ffn: &DuoFfn, params: &mut [f32], row: usize) {
        let [_, router] = ffn.starts();
        let router = &mut params[router..][..ffn.router_len()];
        router.fill(0.0);
        router[row * HIDDEN] = 1.0;
    }

    #[test]
    fn a_router_takes_each_way_for_all_tokens_to_the_bit() {
        let mut x = normals(TOKENS * HIDDEN, 2);
        x.iter_mut().step_by(HIDDEN).for_each(|x| *x = 1.0 + x.abs());
        let ffn = skipping();
        let mut params = params(&ffn, 1);
        let [small, _] = ffn.starts();
        let of = |params: &[f32]| infer(&*ffn.pack(params, Precision::F32), &x);
        for row in 0..3 {
            prefer(&ffn, &mut params, row);
            let want = match row {
                0 => dense(&params, WIDTH, &x),
                1 => dense(&params[small..], 4, &x),
                _ => vec![0.0; x.len()],
            };
            assert_eq!(of(&params), want, "{row}");
        }
        // Of equal logits the cheapest way.
        let [_, router] = ffn.starts();
        params[router..][..ffn.router_len()].fill(0.0);
        assert!(of(&params).iter().all(|&y| y == 0.0));
        assert_eq!([way(&[1.0, 1.0]), way(&[2.0, 1.0])], [SMALL, BIG]);
        let ways = [[3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 3.0], [2.0, 2.0, 1.0]];
        assert_eq!(ways.map(|z| way(&z)), [BIG, SMALL, SKIP, SKIP, SMALL]);
    }

    #[test]
    fn every_token_of_a_skipping_router_has_the_output_of_its_way() {
        let tokens = 60;
        let x = normals(tokens * HIDDEN, 2);
        let duo = skipping();
        let params = params(&duo, 1);
        let [small, router] = duo.starts();
        let logits = duo.logits(&x, &params[router..]);
        let takes: Vec<usize> = logits.chunks_exact(3).map(way).collect();
        assert!([SKIP, SMALL, BIG].iter().all(|way| takes.contains(way)), "{takes:?}");
        let [of_big, of_small] = [dense(&params, WIDTH, &x), dense(&params[small..], 4, &x)];
        let packed = duo.pack(&params, Precision::F32);
        let (mut got, mut stats) = (vec![0.0; x.len()], dsmoe_router::RoutingStats::new(1, 2));
        stats = stats.with_sizes([packed.expert_sizes()]);
        let record = Some(Record { stats: &mut stats, layer: 0 });
        packed.forward(FfnInference { y: &mut got, x: &x, record, scratch: &mut FfnScratch::default() });
        for (t, &taken) in takes.iter().enumerate() {
            let token = t * HIDDEN..(t + 1) * HIDDEN;
            let want = match taken {
                BIG => f64s(&of_big[token.clone()]),
                SMALL => f64s(&of_small[token.clone()]),
                _ => vec![0.0; HIDDEN],
            };
            assert_close("y", &got[token], &want, 1e-5);
        }
        // The active share is that of neurons: 20 of 24 for big, 4 for small, none for a token that skips.
        let count = |way: usize| takes.iter().filter(|taken| **taken == way).count();
        let neurons = (WIDTH * count(BIG) + 4 * count(SMALL)) as f64;
        let summary = stats.summary();
        assert_eq!(summary.active_ratio, neurons / ((WIDTH + 4) * tokens) as f64);
        assert_eq!(summary.zero_active_share, count(SKIP) as f64 / tokens as f64);
    }

    /// <y, dy> + sparsity weight sum of gates, or the loss on their mean, in f64 loops. Tokens take the ways `takes`, or a router
    /// chooses.
    fn loss(
        ffn: &DuoFfn,
        (takes, beside): (Option<&[bool]>, Beside),
        (x, params): (&[f64], &[f64]),
        dy: &[f32],
    ) -> f64 {
        let [small, router] = ffn.starts();
        let temperature = beside.temperature.map_or(ffn.spec.temperature, f64::from);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let of = |gated: &Gated, params: &[f64], x: &[f64]| -> Vec<f64> {
            let [gate, up, down, ..] = gated.ranges().map(|range| &params[range]);
            let mut y = vec![0.0; HIDDEN];
            for j in 0..gated.intermediate {
                let row = j * HIDDEN..(j + 1) * HIDDEN;
                let a = dot(x, &gate[row.clone()]);
                let c = a / (1.0 + (-a).exp()) * dot(x, &up[row.clone()]);
                y.iter_mut().zip(&down[row]).for_each(|(y, w)| *y += c * w);
            }
            y
        };
        let (mut loss, mut gates) = (0.0, 0.0);
        for (t, x) in x.chunks_exact(HIDDEN).enumerate() {
            let [big, little] = [of(&ffn.big, params, x), of(&ffn.small, &params[small..], x)];
            let rows = params[router..].chunks_exact(HIDDEN).take(ffn.spec.ways());
            let powers: Vec<f64> = rows.map(|row| (dot(x, row) / temperature).exp()).collect();
            let sum: f64 = powers.iter().sum();
            let [p, q] = match takes {
                Some(takes) if takes[t] => [1.0, 0.0],
                Some(_) => [0.0, 1.0],
                None => [powers[0] / sum, powers[1] / sum],
            };
            let y = big.iter().zip(&little).map(|(big, little)| p * big + q * little);
            loss += y.zip(&dy[t * HIDDEN..]).map(|(y, &dy)| y * f64::from(dy)).sum::<f64>();
            // Two experts of 20 and 4 neurons, or one.
            gates += if ffn.spec.skip { (40.0 * p + 8.0 * q) / 24.0 } else { p };
        }
        let mean = gates / (TOKENS * ffn.spec.experts()) as f64;
        match beside.share {
            _ if takes.is_some() => loss,
            None => loss + f64::from(SPARSITY.weight) * gates,
            Some(share) => loss + share.weight * (mean - share.target) * (mean - share.target),
        }
    }

    #[test]
    fn gradients_are_differences_of_the_formulas() {
        let (x, dy) = (normals(TOKENS * HIDDEN, 5), normals(TOKENS * HIDDEN, 6));
        let ffns = [ffn(Stage::Router, 0.5), ffn(Stage::Random, 0.5), skipping()];
        for (ffn, beside) in ffns.iter().flat_map(|ffn| [(ffn, PLAIN), (ffn, SQUARED)]) {
            let stage = ffn.spec.stage;
            let what = format!("{stage:?} {} {beside:?}", ffn.spec.skip);
            let params = params(ffn, 3);
            let (y, report, dx, grads) = train(ffn, (&x, &params), &dy, beside);
            let mut rng = Rng::new(4, DRAWS);
            let drawn: Vec<bool> = (0..TOKENS).map(|_| rng.uniform() < 0.5).collect();
            assert!(drawn.contains(&true) && drawn.contains(&false));
            let takes = (stage == Stage::Random).then_some(&drawn[..]);
            let value: f64 = y.iter().zip(&dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum();
            let gates = (TOKENS * ffn.spec.experts()) as f64;
            let penalty = match beside.share {
                _ if takes.is_some() => 0.0,
                None => f64::from(SPARSITY.weight) * gates * report.mean_gate,
                Some(share) => share.weight * share.square(report.mean_gate),
            };
            let (x64, params64) = (f64s(&x), f64s(&params));
            let of = |x: &[f64], params: &[f64]| loss(ffn, (takes, beside), (x, params), &dy);
            let want = of(&x64, &params64);
            assert!((value + penalty - want).abs() < 1e-4, "{what} {value} {penalty} {want}");
            let by_x = finite_differences(&x64, 1e-5, |x| of(x, &params64));
            assert_close(&format!("{what} dx"), &dx, &by_x, 2e-5);
            let by_params = finite_differences(&params64, 1e-5, |params| of(&x64, params));
            assert_close(&format!("{what} dparams"), &grads, &by_params, 2e-5);
        }
    }
}
