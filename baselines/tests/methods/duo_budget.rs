//! The squared loss on the share of Duo-LLM's routers, and their temperature.

use std::path::Path;

use dsmoe_baselines::DuoFfn;
use dsmoe_baselines::duo::{DuoSpec, Stage};
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::ffn::{
    Ffn, FfnBackward, FfnForward, FfnReport, FfnScratch, FfnSpec, GateTraining, Gated, block_len,
};
use dsmoe_core::model::{Batch, StepArgs, StepOutput, TrainWorkspace};
use dsmoe_core::{Config, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::normals;
use dsmoe_router::{ShareLoss, SparsityGrad, SparsityOver};
use serde_json::json;

use super::common::{Run, VOCAB, made, tiny, tokens};

const HIDDEN: usize = 8;
const BIG: usize = 20;
const SMALL: usize = 4;
const TEMPERATURE: f64 = 0.5;

fn spec(skip: bool) -> DuoSpec {
    let (stage, probability, share) = (Stage::Router, 0.5, 0.3);
    DuoSpec { small: SMALL, stage, probability, share, temperature: TEMPERATURE, skip }
}

/// The report of a training forward and the gradient of the inputs, of which the loss on the share is all. Every way's logit is an
/// input of its own, so that it has the probabilities `of_tokens`: of big, of small and of skipping.
fn backward(spec: DuoSpec, of_tokens: &[[f64; 3]], share: ShareLoss) -> (FfnReport, Vec<f32>) {
    let ffn = DuoFfn::of(Gated::silu(HIDDEN, BIG), spec);
    let ways = if spec.skip { 3 } else { 2 };
    let mut params = Buf::zeros(block_len(&ffn.tensors()));
    let router = Gated::silu(HIDDEN, BIG).len() + Gated::silu(HIDDEN, SMALL).len();
    params[..router].copy_from_slice(&normals(router, 1));
    (0..ways).for_each(|way| params[router + way * HIDDEN + way] = 1.0);
    let mut x = vec![0.0; of_tokens.len() * HIDDEN];
    for (x, p) in x.chunks_exact_mut(HIDDEN).zip(of_tokens) {
        x.iter_mut().zip(&p[..ways]).for_each(|(x, p)| *x = (spec.temperature * p.ln()) as f32);
    }
    let (mut y, mut saved) = (vec![0.0; x.len()], ffn.new_saved(of_tokens.len()));
    let (training, scratch) = (GateTraining::default(), &mut FfnScratch::default());
    let (params, dy) = (&params[..], vec![0.0; x.len()]);
    let args = FfnForward { y: &mut y, saved: &mut *saved, x: &x, params, training, record: None, scratch };
    let report = ffn.forward_train(args);
    let gates = of_tokens.len() * ffn.num_experts().unwrap();
    let weight = (share.slope(report.mean_gate) / gates as f64) as f32;
    let sparsity = SparsityGrad { weight, over: SparsityOver::All };
    let (mut dx, mut grads) = (vec![0.0; x.len()], Buf::zeros(params.len()));
    ffn.backward(FfnBackward {
        dx: &mut dx,
        grads: &mut grads,
        dy: &dy,
        saved: &mut *saved,
        x: &x,
        params,
        sparsity,
        training,
        scratch,
    });
    (report, dx)
}

/// The gradients of a token's logits where its ways have these probabilities and gradients.
fn of_logits<const N: usize>(p: [f64; N], dp: [f64; N]) -> [f64; N] {
    let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
    std::array::from_fn(|way| p[way] * (dp[way] - mean) / TEMPERATURE)
}

#[test]
fn the_loss_on_the_share_of_big_tokens_by_hand() {
    let share = ShareLoss { weight: 1.0, target: 0.3 };
    let big = [0.9, 0.1, 0.5, 0.5];
    let (report, dx) = backward(spec(false), &big.map(|p| [p, 1.0 - p, 0.0]), share);
    assert!((report.mean_gate - 0.5).abs() < 1e-6, "{report:?}");
    assert!((share.square(report.mean_gate) - 0.04).abs() < 1e-6, "{report:?}");
    // The gradient of every token's P is 2 (0.5 - 0.3) / 4 = 0.1.
    for (p, dx) in big.into_iter().zip(dx.chunks_exact(HIDDEN)) {
        let want = of_logits([p, 1.0 - p], [0.1, 0.0]);
        for (got, want) in dx.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{p}: {dx:?} {want}");
        }
    }
}

#[test]
fn the_loss_on_the_share_of_neurons_by_hand() {
    // Neurons used of the 24 of both FFNs: (10 + 1) / 24 and (2.5 + 0.5) / 24, 7 / 24 in the mean. The budget is 5 / 24.
    let share = ShareLoss { weight: 1.5, target: 5.0 / 24.0 };
    let of_tokens = [[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]];
    let (report, dx) = backward(spec(true), &of_tokens, share);
    assert!((report.mean_gate - 7.0 / 24.0).abs() < 1e-6, "{report:?}");
    assert!((share.square(report.mean_gate) - 1.0 / 144.0).abs() < 1e-6, "{report:?}");
    // 2 * 1.5 * (2 / 24) = 1 / 4 by the share, half of it for each token, times 20 / 24 for big and 4 / 24 for small.
    for (p, dx) in of_tokens.into_iter().zip(dx.chunks_exact(HIDDEN)) {
        let want = of_logits(p, [20.0 / 192.0, 4.0 / 192.0, 0.0]);
        for (got, want) in dx.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{p:?}: {dx:?} {want}");
        }
    }
}

#[test]
fn routers_alone_have_a_temperature() {
    assert_eq!(spec(true).router_temperature(), Some(TEMPERATURE));
    assert_eq!(DuoSpec { stage: Stage::Random, ..spec(false) }.router_temperature(), None);
    // A smaller one makes the same logits more decided, as does one that training sets in its place.
    let mean = |temperature: f64, set: Option<f32>| {
        let ffn = DuoFfn::of(Gated::silu(HIDDEN, BIG), DuoSpec { temperature, ..spec(false) });
        let params = normals(block_len(&ffn.tensors()), 2);
        let (x, mut y, mut saved) = (normals(HIDDEN, 3), vec![0.0; HIDDEN], ffn.new_saved(1));
        let training = GateTraining { temperature: set, ..GateTraining::default() };
        let report = ffn.forward_train(FfnForward {
            y: &mut y,
            saved: &mut *saved,
            x: &x,
            params: &params,
            training,
            record: None,
            scratch: &mut FfnScratch::default(),
        });
        (report.mean_gate, y)
    };
    assert_eq!(mean(0.5, Some(2.0)), mean(2.0, None));
    let decided = |temperature: f64| (mean(temperature, None).0 - 0.5).abs();
    assert!(decided(0.5) > decided(2.0) + 1e-3, "{} {}", decided(0.5), decided(2.0));
}

/// A model whose routers have two ways, or three with `skip`.
fn routed(dir: &Path, skip: bool) -> Model {
    let [duo, out] = ["duo", "out"].map(|name| dir.join(name));
    dsmoe_baselines::register();
    let sizes = json!({"vocab_size": VOCAB, "intermediate_size": 96, "num_hidden_layers": 2});
    let dense = made(&tiny(&sizes), dir, Dtype::F32);
    Run::new("duo", &["ratio=8", "start=random"], 0.9, &[]).run(&dense, &duo).unwrap();
    let set: &[&str] = if skip { &["skip=true"] } else { &[] };
    let share = if skip { 0.8 } else { 0.9 };
    Run::new("duo-router", set, share, &[]).run(&duo, &out).unwrap();
    assert!(Config::load(&out).unwrap().ffn.unwrap().router_temperature().is_some());
    let mut model = Model::load(&out).unwrap();
    // Routers that tell tokens apart.
    for entry in model.layout().entries().to_vec() {
        if entry.spec.router {
            let values = normals(entry.range.len(), entry.range.start as u64);
            model.params_mut()[entry.range].iter_mut().zip(values).for_each(|(p, v)| *p = 0.15 * v);
        }
    }
    model
}

fn step(model: &Model, args: StepArgs, recompute: bool) -> (StepOutput, Buf) {
    let ids = tokens(1, 25).concat();
    let batch = Batch { inputs: &ids[..24], targets: &ids[1..], seq: 12 };
    let make = if recompute { TrainWorkspace::recomputing } else { TrainWorkspace::new };
    let mut workspace = make(model, 24, Precision::F32);
    let mut grads = Buf::zeros(model.layout().len());
    let output = model.train_step(&mut grads, batch, &args, &mut workspace).unwrap();
    (output, grads)
}

#[test]
fn the_gradient_of_the_share_is_that_of_the_whole_model() {
    for skip in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut model = routed(dir.path(), skip);
        let share = ShareLoss { weight: 5.0, target: 0.1 };
        // The loss on the share alone.
        let args = StepArgs {
            loss_scale: 0.0,
            sparsity_over: SparsityOver::All,
            share: Some(share),
            temperature: Some(0.8),
            ..StepArgs::default()
        };
        let (output, grads) = step(&model, args, false);
        assert_eq!(output.share_loss, share.square(output.mean_gate));
        // It is a weight of the gates that depends on their mean.
        let sparsity_weight = share.slope(output.mean_gate) as f32;
        let constant = StepArgs { sparsity_weight, share: None, ..args };
        assert_eq!(grads[..], step(&model, constant, false).1[..]);
        assert_eq!(grads[..], step(&model, args, true).1[..]);
        let without = step(&model, StepArgs { share: None, ..args }, false);
        assert!(without.1.iter().all(|&g| g == 0.0) && without.0.share_loss == 0.0);

        // Along its gradient the loss changes by the gradient's length, also by what earlier layers give to later routers.
        for routers_alone in [true, false] {
            let mut along = grads.to_vec();
            for entry in model.layout().entries() {
                if routers_alone && !entry.spec.router {
                    along[entry.range.clone()].fill(0.0);
                }
            }
            let length = along.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!(length > 1e-3, "{skip} {routers_alone}: {length}");
            // The longer the gradient, the more it changes within a step.
            let h = (0.02 / length).min(5e-3);
            let before = model.params().to_vec();
            let mut at = |h: f64| {
                let moved = model.params_mut().iter_mut().zip(&before).zip(&along);
                moved.for_each(|((p, before), g)| *p = before + (h * f64::from(*g) / length) as f32);
                share.weight * step(&model, args, false).0.share_loss
            };
            let slope = (at(h) - at(-h)) / (2.0 * h);
            at(0.0);
            assert!((slope / length - 1.0).abs() < 1e-2, "{skip} {routers_alone}: {slope} {length}");
        }
    }
}

#[test]
fn steps_of_routers_bring_the_mean_to_the_share() {
    for skip in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut model = routed(dir.path(), skip);
        let target = 0.1;
        let share = Some(ShareLoss { weight: 4.0, target });
        let args =
            StepArgs { loss_scale: 0.0, sparsity_over: SparsityOver::All, share, ..StepArgs::default() };
        let entries = model.layout().entries().to_vec();
        let (first, _) = step(&model, args, false);
        for _ in 0..300 {
            let (_, grads) = step(&model, args, false);
            for range in entries.iter().filter(|entry| entry.spec.router).map(|entry| entry.range.clone()) {
                let grads = &grads[range.clone()];
                model.params_mut()[range].iter_mut().zip(grads).for_each(|(p, g)| *p -= 0.05 * g);
            }
        }
        let (last, _) = step(&model, args, false);
        assert!((first.mean_gate - target).abs() > 0.1, "{skip}: {}", first.mean_gate);
        assert!((last.mean_gate - target).abs() < 0.02, "{skip}: {}", last.mean_gate);
    }
}

#[test]
#[should_panic(expected = "a loss on the share of Active")]
fn a_loss_on_the_share_is_one_of_all_gates() {
    let dir = tempfile::tempdir().unwrap();
    let share = Some(ShareLoss { weight: 1.0, target: 0.5 });
    step(&routed(dir.path(), false), StepArgs { share, ..StepArgs::default() }, false);
}
