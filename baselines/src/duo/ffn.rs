//! The FFN of Duo-LLM: every token takes the big or the small one.
//!
//! ```text
//! random    big with probability p, else small; coefficient 1
//! router    training   P = sigmoid((z_big - z_small) / temperature),  y = P big(x) + (1 - P) small(x),  z = x R^T
//!           inference  big where z_big > z_small, else small; coefficient 1
//! backward  dP_t = <dy, big(x) - small(x)> + sparsity weight
//!           dz_big = -dz_small = dP P (1 - P) / temperature,   dR += dz^T x,   dx += dz R
//! ```
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
use dsmoe_router::{Routing, SparsityOver};
use ndarray::Array2;

use super::spec::{DuoSpec, Stage};

/// The stream of draws.
const DRAWS: u64 = u64::from_be_bytes(*b"duoroute");

/// The choices that can be made for all tokens.
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

/// Values that the backward pass needs: of big and small, and P of every token where a router chooses.
#[derive(Debug)]
struct DuoSaved {
    sides: [Side; 2],
    probabilities: Vec<f32>,
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
        linear::Dims { rows, inputs: self.big.hidden, outputs: 2, precision: Precision::F32 }
    }

    /// Returns the difference of the logits of every token.
    fn differences(&self, x: &[f32], router: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.big.hidden;
        let mut z = vec![0.0; 2 * rows];
        let w = &router[..2 * self.big.hidden];
        linear::Forward { y: &mut z, x, w, bias: None, dims: self.router_dims(rows) }.run();
        z.chunks_exact(2).map(|z| z[0] - z[1]).collect()
    }

    /// Returns P of every token in training; empty with random routes.
    fn probabilities(&self, x: &[f32], router: &[f32]) -> Vec<f32> {
        match self.spec.stage {
            Stage::Random => Vec::new(),
            Stage::Router => {
                let scale = 1.0 / self.spec.temperature as f32;
                self.differences(x, router).iter().map(|difference| sigmoid(scale * difference)).collect()
            }
        }
    }

    /// Sets the tokens of both sides for training; returns the routing that statistics count.
    fn route(&self, saved: &mut DuoSaved, tokens: usize, training: GateTraining) -> Routing {
        let DuoSaved { sides: [big, small], probabilities } = saved;
        let (of_big, of_small, hard) = match self.spec.stage {
            Stage::Random => {
                let mut rng = Rng::new(training.seed, DRAWS);
                let takes: Vec<bool> =
                    (0..tokens).map(|_| f64::from(rng.uniform()) < self.spec.probability).collect();
                let of_big = side(tokens, |t| takes[t].then_some(1.0));
                let hard = of_big.0.clone();
                (of_big, side(tokens, |t| (!takes[t]).then_some(1.0)), hard)
            }
            Stage::Router => (
                side(tokens, |t| Some(probabilities[t])),
                side(tokens, |t| Some(1.0 - probabilities[t])),
                side(tokens, |t| (probabilities[t] > 0.5).then_some(1.0)).0,
            ),
        };
        // With coefficients that are learned both sides are routed, whatever the values.
        let may_be_dense = self.spec.stage == Stage::Random;
        for (side, (routing, is_dense)) in [(big, of_big), (small, of_small)] {
            (side.routing, side.is_dense) = (routing, is_dense && may_be_dense);
        }
        hard
    }

    fn report(&self, probabilities: &[f32]) -> FfnReport {
        let mean = |of: &dyn Fn(f32) -> bool| {
            let chosen = probabilities.iter().filter(|p| of(**p)).map(|&p| f64::from(p));
            chosen.sum::<f64>() / probabilities.len().max(1) as f64
        };
        FfnReport { sparsity_loss: mean(&|p| p > 0.5), mean_gate: mean(&|_| true), ..FfnReport::default() }
    }
}

/// Adds `more` to `sum`.
fn add(sum: &mut [f32], more: &[f32]) {
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
}

impl PackedDuo {
    /// Returns whether each token takes the big FFN.
    fn takes_big(&self, x: &[f32]) -> Vec<bool> {
        let (hidden, spec) = (self.ffn.big.hidden, self.ffn.spec);
        match (self.choice, spec.stage) {
            (Some(choice), _) => vec![choice == BIG; x.len() / hidden],
            (None, Stage::Random) => x.chunks_exact(hidden).map(|x| draw_of(x) < spec.share).collect(),
            (None, Stage::Router) => {
                self.ffn.differences(x, &self.router).iter().map(|&difference| difference > 0.0).collect()
            }
        }
    }
}

impl PackedFfn for PackedDuo {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, record, scratch } = args;
        let (takes, tokens) = (self.takes_big(x), x.len() / self.ffn.big.hidden);
        let sides = [true, false].map(|big| side(tokens, |t| (takes[t] == big).then_some(1.0)));
        if let Some(Record { stats, layer }) = record {
            stats.add(layer, &sides[0].0);
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
        Some(1)
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
        tensors.push(TensorSpec::router("router.weight", vec![2, self.big.hidden]));
        tensors
    }

    fn num_experts(&self) -> Option<usize> {
        Some(1)
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
            router: params[router..][..2 * self.big.hidden].to_vec(),
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
        saved.probabilities = self.probabilities(x, &params[router..]);
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
        let FfnBackward { dx, grads, dy, saved, x, params, sparsity, scratch, .. } = args;
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
        let [of_big, of_small] = &by_coefficient;
        let scale = 1.0 / self.spec.temperature as f32;
        let pairs = of_big.iter().zip(of_small).zip(&saved.probabilities);
        let dlogits: Vec<f32> = pairs
            .flat_map(|((big, small), &p)| {
                let counts = sparsity.over != SparsityOver::Active || p > 0.5;
                let dp = big - small + if counts { sparsity.weight } else { 0.0 };
                let dz = scale * dp * p * (1.0 - p);
                [dz, -dz]
            })
            .collect();
        let (len, dims) = (2 * self.big.hidden, self.router_dims(tokens));
        let (w, dw) = (&params[router..][..len], &mut grads[router..][..len]);
        linear::BackwardWeight { dw, dy: &dlogits, x, dims }.run();
        linear::BackwardInput { dx, dy: &dlogits, w, dims, add: true }.run();
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_core::ffn::{DenseFfn, block_len};
    use dsmoe_kernels::buf::Buf;
    use dsmoe_kernels::testing::{assert_close, f64s, finite_differences, normals};
    use dsmoe_router::SparsityGrad;

    use super::*;
    use crate::topk::infer;

    const HIDDEN: usize = 12;
    const WIDTH: usize = 20;
    const TOKENS: usize = 7;

    fn ffn(stage: Stage, probability: f64) -> DuoFfn {
        let spec = DuoSpec { small: 4, stage, probability, share: 0.5, temperature: 0.7 };
        DuoFfn::of(Gated::silu(HIDDEN, WIDTH), spec)
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

    /// The forward and the backward of training: outputs, report, and the gradients of x and of the parameters.
    fn train(ffn: &DuoFfn, x: &[f32], params: &[f32], dy: &[f32]) -> (Vec<f32>, FfnReport, Vec<f32>, Buf) {
        let (mut y, mut saved) = (vec![0.0; x.len()], ffn.new_saved(TOKENS));
        let training = GateTraining { seed: 4, ..GateTraining::default() };
        let scratch = &mut FfnScratch::default();
        let args = FfnForward { y: &mut y, saved: &mut *saved, x, params, training, record: None, scratch };
        let report = ffn.forward_train(args);
        let (mut dx, mut grads) = (vec![0.0; x.len()], Buf::zeros(params.len()));
        ffn.backward(FfnBackward {
            dx: &mut dx,
            grads: &mut grads,
            dy,
            saved: &mut *saved,
            x,
            params,
            sparsity: SPARSITY,
            training,
            scratch,
        });
        (y, report, dx, grads)
    }

    #[test]
    fn one_choice_for_all_is_a_dense_ffn_to_the_bit() {
        let x = normals(TOKENS * HIDDEN, 2);
        for stage in [Stage::Random, Stage::Router] {
            let ffn = ffn(stage, 1.0);
            let params = params(&ffn, 1);
            let [small, _] = ffn.starts();
            let mut packed = ffn.pack(&params, Precision::F32);
            for (choice, want) in [(BIG, dense(&params, WIDTH, &x)), (SMALL, dense(&params[small..], 4, &x))]
            {
                assert!(packed.set_choice(Some(choice)));
                assert_eq!(infer(&*packed, &x), want, "{stage:?} {choice}");
            }
            assert!(!packed.set_choice(Some(3)) && packed.set_choice(None));
        }
        // Random routes that are always big: the dense FFN, in training too.
        let (always, params) = (ffn(Stage::Random, 1.0), params(&ffn(Stage::Random, 1.0), 1));
        let (y, report, ..) = train(&always, &x, &params, &normals(x.len(), 3));
        assert_eq!((y, report), (dense(&params, WIDTH, &x), FfnReport::default()));
    }

    #[test]
    fn every_token_has_the_output_of_its_side() {
        let x = normals(TOKENS * HIDDEN, 2);
        let duo = ffn(Stage::Router, 0.5);
        let params = params(&duo, 1);
        let [small, router] = duo.starts();
        let differences = duo.differences(&x, &params[router..]);
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

    /// <y, dy> + sparsity weight sum of P, in f64 loops.
    fn loss(ffn: &DuoFfn, takes: Option<&[bool]>, x: &[f64], params: &[f64], dy: &[f32]) -> f64 {
        let [small, router] = ffn.starts();
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
        let mut loss = 0.0;
        for (t, x) in x.chunks_exact(HIDDEN).enumerate() {
            let [big, little] = [of(&ffn.big, params, x), of(&ffn.small, &params[small..], x)];
            let z = dot(x, &params[router..][..HIDDEN]) - dot(x, &params[router + HIDDEN..][..HIDDEN]);
            let p = match takes {
                Some(takes) => f64::from(u8::from(takes[t])),
                None => 1.0 / (1.0 + (-z / ffn.spec.temperature).exp()),
            };
            let y = big.iter().zip(&little).map(|(big, little)| p * big + (1.0 - p) * little);
            loss += y.zip(&dy[t * HIDDEN..]).map(|(y, &dy)| y * f64::from(dy)).sum::<f64>();
            loss += if takes.is_none() { f64::from(SPARSITY.weight) * p } else { 0.0 };
        }
        loss
    }

    #[test]
    fn gradients_are_differences_of_the_formulas() {
        let (x, dy) = (normals(TOKENS * HIDDEN, 5), normals(TOKENS * HIDDEN, 6));
        for stage in [Stage::Router, Stage::Random] {
            let ffn = ffn(stage, 0.5);
            let params = params(&ffn, 3);
            let (y, report, dx, grads) = train(&ffn, &x, &params, &dy);
            let mut rng = Rng::new(4, DRAWS);
            let drawn: Vec<bool> = (0..TOKENS).map(|_| rng.uniform() < 0.5).collect();
            assert!(drawn.contains(&true) && drawn.contains(&false));
            let takes = (stage == Stage::Random).then_some(&drawn[..]);
            let value: f64 = y.iter().zip(&dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum();
            let penalty = f64::from(SPARSITY.weight) * TOKENS as f64 * report.mean_gate;
            let (x64, params64) = (f64s(&x), f64s(&params));
            let want = loss(&ffn, takes, &x64, &params64, &dy);
            assert!((value + penalty - want).abs() < 1e-4, "{stage:?} {value} {penalty} {want}");
            let by_x = finite_differences(&x64, 1e-5, |x| loss(&ffn, takes, x, &params64, &dy));
            assert_close(&format!("{stage:?} dx"), &dx, &by_x, 2e-5);
            let by_params =
                finite_differences(&params64, 1e-5, |params| loss(&ffn, takes, &x64, params, &dy));
            assert_close(&format!("{stage:?} dparams"), &grads, &by_params, 2e-5);
        }
    }
}
