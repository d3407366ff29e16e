//! Estimators of the routers' gradient: against the definition in f64 with weights on inactive pairs, and in the mean over draws.

use dsmoe_core::config::MoeConfig;
use dsmoe_core::ffn::{
    DsmoeFfn, DsmoeForm, Ffn, FfnBackward, FfnForward, FfnScratch, GateTraining, Gated, block_len, split,
};
use dsmoe_core::init::LlamaSizes;
use dsmoe_core::model::{Batch, Model, StepArgs, TrainWorkspace};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::expert_ffn::{Dims, reference as experts};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::{assert_close, assert_same_on_threads, f64s, normals};
use dsmoe_kernels::{Activation, Precision};
use dsmoe_router::{
    GateValue, InactivePairs, InactiveSample, Rescale, RouterConfig, RouterGradient, RouterGradientAt,
    SparsityGrad, SparsityOver, ZeroActive, reference as router,
};
use ndarray::Array2;

use crate::ids;

const HIDDEN: usize = 12;
const EXPERTS: usize = 6;
const NEURONS: usize = 5 * EXPERTS;
const TOKENS: usize = 40;
const SPARSITY: f32 = 0.3;
/// Error as a share of the largest value.
const TOLERANCE: f64 = 1e-5;

/// A layer with its input and the gradient of its output.
struct Layer {
    gated: Gated,
    form: DsmoeForm,
    params: Buf,
    x: Vec<f32>,
    dy: Vec<f32>,
}

/// The results of a forward and a backward pass.
struct Pass {
    y: Vec<f32>,
    dx: Vec<f32>,
    grads: Buf,
}

/// The same in f64: gradients of gate, up and down, of the router's weight and of its bias.
struct Wanted {
    y: Vec<f64>,
    dx: Vec<f64>,
    dprojections: [Vec<f64>; 3],
    dlogits: Vec<f64>,
    drouter: Vec<f64>,
    dbias: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

impl Layer {
    fn new(router: RouterConfig, core: usize) -> Layer {
        let (gated, form) =
            (Gated::silu(HIDDEN, NEURONS), DsmoeForm { core, ..DsmoeForm::new(router, true) });
        let mut params = Buf::zeros(block_len(&DsmoeFfn::of(gated, form.clone()).tensors()));
        let values = normals(params.len(), 2);
        params.iter_mut().zip(values).for_each(|(p, value)| *p = 0.5 * value);
        Layer { gated, form, params, x: normals(TOKENS * HIDDEN, 3), dy: normals(TOKENS * HIDDEN, 4) }
    }

    fn ffn(&self) -> DsmoeFfn {
        DsmoeFfn::of(self.gated, self.form.clone())
    }

    fn routed(&self) -> usize {
        EXPERTS - self.form.core
    }

    /// The weight and the bias of the router in parameters or gradients.
    fn router_of<'a>(&self, block: &'a [f32]) -> [&'a [f32]; 2] {
        split(&block[self.gated.len()..], [self.routed() * HIDDEN, self.routed()])
    }

    fn run(&self, inactive: InactivePairs) -> Pass {
        self.run_all([inactive]).remove(0)
    }

    /// One forward pass and a backward pass for each of several draws of one kind.
    fn run_all(&self, draws: impl IntoIterator<Item = InactivePairs>) -> Vec<Pass> {
        let (ffn, mut scratch) = (self.ffn(), FfnScratch::default());
        let mut saved = ffn.new_saved(TOKENS);
        let mut y = vec![f32::NAN; self.x.len()];
        let pass = |(i, inactive): (usize, InactivePairs)| {
            let training = GateTraining { inactive, ..GateTraining::default() };
            if i == 0 {
                ffn.forward_train(FfnForward {
                    y: &mut y,
                    saved: saved.as_mut(),
                    x: &self.x,
                    params: &self.params,
                    training,
                    record: None,
                    scratch: &mut scratch,
                });
            }
            let (mut dx, mut grads) = (vec![f32::NAN; self.x.len()], Buf::zeros(self.params.len()));
            ffn.backward(FfnBackward {
                dx: &mut dx,
                grads: &mut grads,
                dy: &self.dy,
                saved: saved.as_mut(),
                x: &self.x,
                params: &self.params,
                sparsity: SparsityGrad { weight: SPARSITY, over: SparsityOver::Active },
                training,
                scratch: &mut scratch,
            });
            Pass { y: y.clone(), dx, grads }
        };
        draws.into_iter().enumerate().map(pass).collect()
    }

    /// The definition, with the derivative by the coefficient of every inactive pair times its weight in `weights`
    /// `[TOKENS, routed]`.
    fn wanted(&self, weights: &[f64]) -> Wanted {
        let n = self.routed();
        let [x, dy] = [&self.x, &self.dy].map(|values| f64s(values));
        let [weight, bias] = self.router_of(&self.params).map(f64s);
        let projections = self.gated.weights(&self.params);
        let [gate, up, down] = [projections.gate, projections.up, projections.down].map(f64s);
        let rows: Vec<&[f64]> = weight.chunks_exact(HIDDEN).collect();
        let logits: Vec<f64> = x
            .chunks_exact(HIDDEN)
            .flat_map(|x| rows.iter().zip(&bias).map(move |(row, bias)| dot(x, row) + bias))
            .collect();
        let gates = RouterConfig { num_experts: n, ..self.form.router.clone() };
        let routed = router::route(&gates, &logits);

        let dims = Dims::dense(TOKENS, HIDDEN, NEURONS, Activation::Silu);
        let layer = experts::Layer {
            x: &x,
            gate: &gate,
            up: &up,
            down: &down,
            biases: None,
            mask: &routed.mask,
            coef: &routed.coef,
            dims: Dims { num_experts: EXPERTS, core: self.form.core, ..dims },
        };
        let y = experts::forward(layer);
        let experts::Grads { mut dx, dgate, dup, ddown, mut dcoef, .. } = experts::backward(&dy, layer);
        for ((d, active), weight) in dcoef.iter_mut().zip(&routed.mask).zip(weights) {
            *d *= if *active { 1.0 } else { *weight };
        }
        // The loss of the layer is a mean over the gates that it has.
        let sparsity = f64::from(SPARSITY) * EXPERTS as f64 / n as f64;
        let dlogits = router::backward(&gates, &routed, &dcoef, sparsity, SparsityOver::Active);
        let (mut drouter, mut dbias) = (vec![0.0; n * HIDDEN], vec![0.0; n]);
        for t in 0..TOKENS {
            for i in 0..n {
                let dz = dlogits[t * n + i];
                dbias[i] += dz;
                for c in 0..HIDDEN {
                    drouter[i * HIDDEN + c] += dz * x[t * HIDDEN + c];
                    dx[t * HIDDEN + c] += dz * rows[i][c];
                }
            }
        }
        Wanted { y, dx, dprojections: [dgate, dup, ddown], dlogits, drouter, dbias }
    }

    /// The weights that a rule gives to the pairs, whether they are active or not.
    fn weights(&self, inactive: InactivePairs) -> Vec<f64> {
        let n = self.routed();
        match inactive {
            InactivePairs::All { weight } => vec![f64::from(weight); TOKENS * n],
            InactivePairs::None => vec![0.0; TOKENS * n],
            InactivePairs::Sample { share, seed } => {
                // A draw does not depend on the mask but for the pairs that it leaves out.
                let mut sample = InactiveSample::default();
                sample.draw(Array2::from_elem((TOKENS, n), false).view(), share, seed);
                let mut weights = vec![0.0; TOKENS * n];
                for i in 0..n {
                    for slot in sample.routing.offsets[i]..sample.routing.offsets[i + 1] {
                        weights[sample.routing.tokens[slot] as usize * n + i] = 1.0 / share;
                    }
                }
                weights
            }
        }
    }
}

fn layers() -> [(&'static str, Layer); 3] {
    let plain = RouterConfig::new(EXPERTS);
    let binary = RouterConfig { gate_value: GateValue::Binary, ..plain.clone() };
    let scaled = RouterConfig {
        threshold: 0.7,
        rescale: Rescale::Eq8,
        zero_active: ZeroActive::ForceArgmax,
        ..plain.clone()
    };
    [
        ("plain", Layer::new(plain, 0)),
        ("binary behind a core", Layer::new(binary, 2)),
        ("scaled", Layer::new(scaled, 0)),
    ]
}

const SAMPLES: [InactivePairs; 2] =
    [InactivePairs::Sample { share: 0.5, seed: 3 }, InactivePairs::Sample { share: 0.125, seed: 4 }];

#[test]
fn gradients_are_those_of_weighted_inactive_pairs() {
    for (name, layer) in layers() {
        let others = [InactivePairs::ALL, InactivePairs::All { weight: 4.0 }, InactivePairs::None];
        for inactive in others.into_iter().chain(SAMPLES) {
            let (got, want) = (layer.run(inactive), layer.wanted(&layer.weights(inactive)));
            let projections = layer.gated.weights(&got.grads);
            let [drouter, dbias] = layer.router_of(&got.grads);
            for (what, got, want) in [
                ("y", &got.y[..], &want.y),
                ("dx", &got.dx[..], &want.dx),
                ("dgate", projections.gate, &want.dprojections[0]),
                ("dup", projections.up, &want.dprojections[1]),
                ("ddown", projections.down, &want.dprojections[2]),
                ("drouter", drouter, &want.drouter),
                ("dbias", dbias, &want.dbias),
            ] {
                assert_close(&format!("{name}, {inactive:?}: {what}"), got, want, TOLERANCE);
            }
        }
    }
}

/// Estimates differ from the full gradient in the router and in the input alone.
#[test]
fn only_the_router_and_the_input_see_the_estimate() {
    for (name, layer) in layers() {
        let full = layer.run(InactivePairs::ALL);
        let of_router = |pass: &Pass| layer.router_of(&pass.grads)[0].to_vec();
        for inactive in SAMPLES.into_iter().chain([InactivePairs::None]) {
            let got = layer.run(inactive);
            assert_close(name, &got.y, &f64s(&full.y), TOLERANCE);
            let projections = layer.gated.len();
            assert_close(name, &got.grads[..projections], &f64s(&full.grads[..projections]), TOLERANCE);
            let differ = of_router(&got).iter().zip(of_router(&full)).any(|(a, b)| (a - b).abs() > 1e-2);
            assert!(differ, "{name}, {inactive:?}: the router's gradient is the full one");
        }
    }
}

/// Without the straight-through rule inactive pairs have no gradient to estimate.
#[test]
fn without_the_rule_estimates_change_no_bit() {
    let layer = Layer::new(RouterConfig { ste: false, ..RouterConfig::new(EXPERTS) }, 1);
    let full = layer.run(InactivePairs::ALL);
    for inactive in SAMPLES.into_iter().chain([InactivePairs::None, InactivePairs::All { weight: 8.0 }]) {
        let got = layer.run(inactive);
        assert!(got.y == full.y && got.dx == full.dx && got.grads[..] == full.grads[..], "{inactive:?}");
    }
}

/// One of K micro-batches has the inactive pairs K times: in all they are there as often as the active ones.
#[test]
fn micro_batches_of_every_add_up_to_the_full_gradient() {
    for (name, layer) in layers() {
        let full = layer.run(InactivePairs::ALL);
        for k in [2, 3, 8] {
            let (rule, mut sum) = (RouterGradient::Every(k), vec![0.0f32; layer.params.len()]);
            for index in 0..k {
                let pass = layer.run(RouterGradientAt { rule, seed: 5, index }.of_layer(1));
                sum.iter_mut().zip(&pass.grads[..]).for_each(|(sum, g)| *sum += g / k as f32);
            }
            assert_close(&format!("{name}, K {k}"), &sum, &f64s(&full.grads), TOLERANCE);
        }
    }
}

/// The mean of N draws of a sum of terms, each kept with probability p and weight 1 / p, has the variance
/// `(1 - p) / (p N)` times the sum of the squared terms. Here the terms of an entry of the router's gradient are those of its
/// inactive pairs, `x[t, c] dz[t, i]`.
#[test]
fn the_mean_over_samples_is_the_full_gradient() {
    const DRAWS: u64 = 4000;
    for (name, layer) in layers() {
        let n = layer.routed();
        let [full, active] = [1.0, 0.0].map(|weight| layer.wanted(&vec![weight; TOKENS * n]));
        let terms: Vec<f64> =
            full.dlogits.iter().zip(&active.dlogits).map(|(all, some)| all - some).collect();
        let inactive_part = norm(full.drouter.iter().zip(&active.drouter).map(|(all, some)| all - some));
        for share in [0.5, 0.125] {
            let draws = layer.run_all((0..DRAWS).map(|seed| InactivePairs::Sample { share, seed }));
            let mut mean = vec![0.0; n * HIDDEN];
            for pass in &draws {
                let [drouter, _] = layer.router_of(&pass.grads);
                mean.iter_mut().zip(drouter).for_each(|(mean, &g)| *mean += f64::from(g) / DRAWS as f64);
            }
            let deviation = |entry: usize| {
                let (i, c) = (entry / HIDDEN, entry % HIDDEN);
                let term = |t: usize| f64::from(layer.x[t * HIDDEN + c]) * terms[t * n + i];
                let squares: f64 = (0..TOKENS).map(|t| term(t).powi(2)).sum();
                ((1.0 - share) / (share * DRAWS as f64) * squares).sqrt()
            };
            for (entry, (mean, want)) in mean.iter().zip(&full.drouter).enumerate() {
                // Six deviations, and the rounding of f32.
                let allowed = 6.0 * deviation(entry) + TOLERANCE * want.abs().max(1.0);
                let error = (mean - want).abs();
                assert!(error <= allowed, "{name}, {share}: {error:.2e} over {allowed:.2e} at {entry}");
            }
            // The bounds are narrow: what is estimated is many times as large.
            let noise = norm((0..n * HIDDEN).map(deviation));
            assert!(5.0 * noise < inactive_part, "{name}, {share}: {noise:.2e} beside {inactive_part:.2e}");
            // One draw is not the mean.
            let [first, _] = layer.router_of(&draws[0].grads);
            let off = norm(first.iter().zip(&full.drouter).map(|(&got, want)| f64::from(got) - want));
            assert!(off > 5.0 * noise, "{name}, {share}: {off:.2e} of one draw, {noise:.2e} of the mean");
        }
    }
}

const LAYERS: usize = 2;
const VOCAB: usize = 29;
const SEQ: usize = 12;

fn model() -> Model {
    let [hidden, intermediate, layers, heads, kv_heads, positions] = [16, 24, LAYERS, 2, 1, 32];
    let (vocab, bos_eos) = (VOCAB, [1, 2]);
    let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos };
    let mut config = sizes.config().unwrap();
    config.moe = Some(MoeConfig { router_bias: true, ..MoeConfig::new(RouterConfig::new(4)) });
    let mut model = Model::new(config);
    for (i, entry) in model.layout().clone().entries().iter().enumerate() {
        let (mut rng, is_norm) = (Rng::new(13, i as u64), entry.spec.name.contains("norm"));
        for p in &mut model.params_mut()[entry.range.clone()] {
            *p = if is_norm { 1.0 + 0.2 * rng.normal() } else { 0.3 * rng.normal() };
        }
    }
    model
}

/// The gradient of a model on two sequences.
fn gradient(model: &Model, workspace: &mut TrainWorkspace, router_gradient: RouterGradientAt) -> Vec<f32> {
    let [inputs, targets] = [1, 2].map(|seed| ids(2 * SEQ, seed, VOCAB as u32));
    let loss_scale = 1.0 / inputs.len() as f32;
    let args = StepArgs { loss_scale, sparsity_weight: 0.5, router_gradient, ..StepArgs::default() };
    let mut grads = vec![0.0; model.layout().len()];
    let batch = Batch { inputs: &inputs, targets: &targets, seq: SEQ };
    model.train_step(&mut grads, batch, &args, workspace).unwrap();
    grads
}

fn workspace(model: &Model) -> TrainWorkspace {
    TrainWorkspace::new(model, 2 * SEQ, Precision::F32)
}

/// The gradients of all parameters, those before and behind a router included. The variance of the mean is estimated from the draws; a
/// norm of the error above three times its expected square root has a chance far below one in a hundred.
#[test]
fn the_mean_over_seeds_is_the_gradient_of_the_whole_model() {
    const DRAWS: u64 = 1000;
    let model = model();
    let mut workspace = workspace(&model);
    let full = gradient(&model, &mut workspace, RouterGradientAt::FULL);
    // A micro-batch in which no layer has its turn.
    let rule = RouterGradient::Every(1 << 16);
    let at = |index| RouterGradientAt { rule, seed: 1, index };
    let is_none = |at: &RouterGradientAt| (0..LAYERS).all(|i| at.of_layer(i) == InactivePairs::None);
    let none = (0..9).map(at).find(is_none).expect("a micro-batch of active pairs alone");
    let none = gradient(&model, &mut workspace, none);
    let inactive_part = norm(full.iter().zip(&none).map(|(&all, &some)| f64::from(all) - f64::from(some)));
    for rule in [RouterGradient::Sample(0.5), RouterGradient::Sample(0.25), RouterGradient::Every(2)] {
        let [mut mean, mut square] = [(); 2].map(|()| vec![0.0f64; full.len()]);
        for seed in 0..DRAWS {
            let grads = gradient(&model, &mut workspace, RouterGradientAt { rule, seed, index: 0 });
            for ((mean, square), &g) in mean.iter_mut().zip(&mut square).zip(&grads) {
                *mean += f64::from(g) / DRAWS as f64;
                *square += f64::from(g).powi(2) / DRAWS as f64;
            }
        }
        let error = norm(mean.iter().zip(&full).map(|(mean, &full)| mean - f64::from(full)));
        let variances = mean.iter().zip(&square).map(|(mean, square)| (square - mean * mean).max(0.0));
        let noise = (variances.sum::<f64>() / DRAWS as f64).sqrt();
        assert!(error <= 3.0 * noise, "{rule}: {error:.2e} where {noise:.2e} is expected");
        assert!(4.0 * noise < inactive_part, "{rule}: {noise:.2e} beside {inactive_part:.2e}");
    }
}

#[test]
fn estimates_have_the_same_bits_on_any_threads_and_when_recomputed() {
    let model = model();
    let full = gradient(&model, &mut workspace(&model), RouterGradientAt::FULL);
    for rule in [RouterGradient::Every(2), RouterGradient::Sample(0.25)] {
        let differ = (0..4).any(|index| {
            let at = RouterGradientAt { rule, seed: 3, index };
            let of = || gradient(&model, &mut workspace(&model), at);
            assert_same_on_threads(&rule.to_string(), of);
            let mut recomputing = TrainWorkspace::recomputing(&model, 2 * SEQ, Precision::F32);
            assert!(gradient(&model, &mut recomputing, at) == of(), "{rule}");
            of() != full
        });
        assert!(differ, "{rule}");
    }
    for rule in [RouterGradient::Every(1), RouterGradient::Sample(1.0)] {
        let at = RouterGradientAt { rule, seed: 3, index: 7 };
        assert!(gradient(&model, &mut workspace(&model), at) == full, "{rule}");
    }
}
