//! Compares models whose gates choose k of n experts on a GPU with the same models on the CPU.
#![cfg(feature = "cuda")]

use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dsmoe_baselines::TopkMoeFfn;
use dsmoe_baselines::duo::{DuoSpec, Stage};
use dsmoe_baselines::topk::{GateNetwork, GateSpec, TopkSpec};
use dsmoe_core::config::Config;
use dsmoe_core::ffn::{
    DeviceFfn, Ffn, FfnBackward, FfnForward, FfnInference, FfnReport, FfnScratch, GateTraining, PackedFfn,
};
use dsmoe_core::init::preset;
use dsmoe_core::model::cuda::{CudaStep, CudaTrainer};
use dsmoe_core::model::{Batch, Cache, StepArgs, StepOutput, TrainWorkspace, Workspace};
use dsmoe_core::params::TensorSpec;
use dsmoe_core::{Device, Inference, Model};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::{has_gpu, norm, refused, too_far};
use dsmoe_kernels::{Precision, adamw};
use dsmoe_router::topk::{Scores, TopKConfig};
use dsmoe_router::{RoutingStats, SparsityOver};
use serde_json::{Value, json};

const VOCAB: usize = 75;
const LAYERS: usize = 2;
/// Tokens of a training step and of its sequences.
const TOKENS: usize = 24;
const SEQ: usize = 12;
/// Tokens of the text that is scored and decoded.
const TEXT: usize = 20;
/// The change of a gate's input, as a share of its size, that must not change any token's experts. It exceeds the
/// rounding to bf16.
const MARGIN: f32 = 0.01;

/// A kind of FFN, and the sizes of a model that has it.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    spec: TopkSpec,
    heads: usize,
    kv_heads: usize,
    hidden: usize,
    intermediate: usize,
}

fn cases() -> [Case; 6] {
    let topk = |n, k| TopKConfig::new(n, k).unwrap();
    let gate = |network, normalize, noise| GateSpec {
        network,
        normalize,
        noise,
        bias: network == GateNetwork::Linear,
        hidden: None,
    };
    let llama_moe =
        TopkSpec { router: topk(6, 2), gate: gate(GateNetwork::Mlp, false, true), balance_weight: 0.5 };
    let residual =
        TopkSpec { router: TopKConfig { num_residual: 1, ..topk(5, 2) }, balance_weight: 0.1, ..llama_moe };
    let ones = TopKConfig { scores: Scores::One, score_scale: 1.0, ..topk(8, 3) };
    let moefication =
        TopkSpec { router: ones, gate: gate(GateNetwork::Mlp, true, false), balance_weight: 0.0 };
    let random_k =
        TopkSpec { router: topk(4, 2), gate: gate(GateNetwork::Linear, false, false), balance_weight: 0.01 };
    let cmoe = TopkSpec {
        router: TopKConfig { num_residual: 2, scores: Scores::One, score_scale: 1.0, ..topk(4, 2) },
        gate: gate(GateNetwork::Neuron, false, false),
        balance_weight: 0.0,
    };
    // The gate of six experts, of which one was dropped.
    let dropped = TopkSpec {
        router: TopKConfig { num_experts: 5, ..llama_moe.router },
        gate: GateSpec { hidden: Some(6), ..llama_moe.gate },
        ..llama_moe
    };
    let square = |name, spec| Case { name, spec, heads: 4, kv_heads: 4, hidden: 64, intermediate: 96 };
    [
        square("LLaMA-MoE", llama_moe),
        square("LLaMA-MoE with a residual expert", residual),
        Case { heads: 6, kv_heads: 2, hidden: 96, intermediate: 160, ..square("MoEfication", moefication) },
        Case { heads: 3, kv_heads: 1, hidden: 36, intermediate: 60, ..square("random-k", random_k) },
        square("CMoE", cmoe),
        // Experts are wide enough for products over active pairs alone.
        Case { intermediate: 5 * 64, ..square("LLaMA-MoE after a dropped expert", dropped) },
    ]
}

impl Case {
    /// Makes a model of random parameters.
    fn model(&self, seed: u64, unsteady: &Arc<AtomicBool>) -> Model {
        let mut json: Value = serde_json::from_str(&preset("tiny").unwrap().to_json()).unwrap();
        let Value::Object(sizes) = json!({
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "vocab_size": VOCAB,
            "num_hidden_layers": LAYERS, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.hidden / self.heads,
            "max_position_embeddings": 64
        }) else {
            unreachable!("an object")
        };
        json.as_object_mut().unwrap().extend(sizes);
        let mut config = Config::from_json(Path::new("config.json"), &json.to_string()).unwrap();
        config.ffn = Some(Arc::new(self.spec));
        let ffn = || -> Box<dyn Ffn> {
            let inner = TopkMoeFfn::new(self.hidden, self.intermediate, self.spec);
            Box::new(Watched { inner, hidden: self.hidden, unsteady: unsteady.clone() })
        };
        let mut model = Model::with_ffns(config, (0..LAYERS).map(|_| ffn()).collect());
        let mut rng = Rng::new(seed, 0);
        for entry in model.layout().entries().to_vec() {
            let (name, values) = (&entry.spec.name, &mut model.params_mut()[entry.range]);
            // Logits are then of a size of about 1.
            let by_input = if self.spec.gate.normalize { 1.5 } else { 1.5 / (self.hidden as f32).sqrt() };
            let std = match name.rsplit_once("mlp.gate.").map(|(_, rest)| rest) {
                Some("weight_noise.weight") => 0.5 / (self.hidden as f32).sqrt(),
                Some("gate_network.2.weight") => 1.0,
                Some(_) => by_input,
                None => 0.1,
            };
            rng.fill_normal(values, std);
            if entry.spec.shape.len() == 1 {
                values.iter_mut().for_each(|x| *x += 1.0);
            }
        }
        model
    }

    /// Makes a model in which no token's choice is closer than the margin. A choice that differs between precisions
    /// would change an output by a whole expert, so the comparison would not be one of rounding. `run` runs the
    /// model.
    fn decided(&self, run: impl Fn(&Model)) -> Model {
        for seed in 1..2000 {
            let unsteady = Arc::new(AtomicBool::new(false));
            let model = self.model(seed, &unsteady);
            run(&model);
            if !unsteady.load(Ordering::Relaxed) {
                return model;
            }
        }
        panic!("{}: choices hang by a hair in all of the models", self.name);
    }

    fn decided_in_training(&self) -> Model {
        self.decided(|model| drop(step(model, Precision::F32)))
    }

    fn decided_in_inference(&self) -> Model {
        self.decided(|model| drop(infer(&Inference::new(model, Precision::F32))))
    }
}

/// An FFN that reports when a token's choice is closer than the margin.
#[derive(Clone, Debug)]
struct Watched {
    inner: TopkMoeFfn,
    hidden: usize,
    unsteady: Arc<AtomicBool>,
}

/// Such an FFN in inference.
#[derive(Debug)]
struct WatchedPacked {
    inner: Box<dyn PackedFfn>,
    gate: Watched,
    params: Vec<f32>,
}

impl Watched {
    fn check(&self, x: &[f32], params: &[f32], training: Option<GateTraining>) {
        if self.unsteady.load(Ordering::Relaxed) {
            return;
        }
        let kind = self.inner.on_device().unwrap();
        let DeviceFfn::Hosted { gate, .. } = &kind else { panic!("no gate of the host") };
        let params = &params[kind.gate_params(params.len())];
        let choices = |x: &[f32]| {
            let mut saved = gate.new_saved();
            let routing = gate.forward(saved.as_mut(), x, params, training).routing;
            (routing.offsets.clone(), routing.tokens.clone())
        };
        let found = choices(x);
        for seed in 0..6 {
            let mut moved = vec![0.0; x.len()];
            Rng::new(seed, 1).fill_normal(&mut moved, MARGIN);
            for (moved, x) in moved.chunks_exact_mut(self.hidden).zip(x.chunks_exact(self.hidden)) {
                let size = (norm(x) / (self.hidden as f64).sqrt()) as f32;
                moved.iter_mut().zip(x).for_each(|(moved, x)| *moved = x + size * *moved);
            }
            if choices(&moved) != found {
                self.unsteady.store(true, Ordering::Relaxed);
            }
        }
    }
}

impl Ffn for Watched {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.inner.tensors()
    }

    fn num_experts(&self) -> Option<usize> {
        self.inner.num_experts()
    }

    fn on_device(&self) -> Option<DeviceFfn> {
        self.inner.on_device()
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        let inner = self.inner.pack(params, precision);
        Box::new(WatchedPacked { inner, gate: self.clone(), params: params.to_vec() })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        self.inner.new_saved(tokens)
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        self.inner.reserve(scratch, tokens);
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        self.check(args.x, args.params, Some(args.training));
        self.inner.forward_train(args)
    }

    fn backward(&self, args: FfnBackward<'_>) {
        self.inner.backward(args);
    }
}

impl PackedFfn for WatchedPacked {
    fn forward(&self, args: FfnInference<'_>) {
        self.gate.check(args.x, &self.params, None);
        self.inner.forward(args);
    }

    fn bytes(&self) -> usize {
        self.inner.bytes()
    }

    fn num_experts(&self) -> Option<usize> {
        self.inner.num_experts()
    }
}

fn ids(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 7 + 3 * i + seed * 13) % VOCAB as u32).collect()
}

fn args() -> StepArgs {
    let (loss_scale, sparsity_over) = (1.0 / TOKENS as f32, SparsityOver::All);
    StepArgs {
        loss_scale,
        sparsity_weight: 0.5,
        sparsity_over,
        balance_scale: 0.5,
        seed: 7,
        ..StepArgs::default()
    }
}

/// Takes a step on the CPU. Returns its results, its routing and the gradients.
fn step(model: &Model, precision: Precision) -> (StepOutput, RoutingStats, Vec<f32>) {
    let mut grads = vec![0.0; model.layout().len()];
    let mut workspace = TrainWorkspace::new(model, TOKENS, precision);
    let (inputs, targets) = (ids(TOKENS, 1), ids(TOKENS, 2));
    let batch = Batch { inputs: &inputs, targets: &targets, seq: SEQ };
    let output = model.train_step(&mut grads, batch, &args(), &mut workspace).unwrap();
    (output, workspace.stats().unwrap().clone(), grads)
}

/// Takes the same step on the GPU.
fn step_on_gpu(trainer: &mut CudaTrainer, model: &Model) -> (CudaStep, RoutingStats, Vec<f32>) {
    let mut stats = model.new_stats().unwrap();
    trainer.begin().unwrap();
    trainer.micro_batch(&ids(TOKENS, 1), &ids(TOKENS, 2), SEQ, &args()).unwrap();
    let shown = trainer.finish(Some(&mut stats)).unwrap();
    (shown, stats, trainer.download_grads().unwrap())
}

/// Returns token losses, logits by pieces, logits of several sequences, and the routing of the losses. All contexts are
/// beginnings of one text.
fn infer(model: &Inference) -> (Vec<f32>, Vec<f32>, Vec<f32>, RoutingStats) {
    let (all, targets) = (ids(TEXT, 4), ids(TEXT, 5));
    let mut workspace = Workspace::default();
    let mut stats = model.new_stats().unwrap();
    let mut losses = vec![f32::NAN; TEXT];
    let batch = Batch { inputs: &all, targets: &targets, seq: TEXT };
    model.score(&mut losses, batch, Some(&mut stats), &mut workspace).unwrap();
    let mut cache = Cache::new(model, TEXT);
    let mut logits = Vec::new();
    for piece in [&all[..10], &all[10..13], &all[13..14], &all[14..15], &all[15..16], &all[16..]] {
        let of = model.logits(piece, piece.len(), &mut cache, None, &mut workspace).unwrap();
        logits.extend_from_slice(of);
    }
    let starts = [1, 5, 9];
    let mut caches = starts.map(|_| Cache::new(model, TEXT));
    for (start, cache) in starts.into_iter().zip(&mut caches) {
        model.decode(&all[..start], cache, None, &mut workspace).unwrap();
    }
    let mut each = Vec::new();
    for step in 0..5 {
        let next = starts.map(|start| all[start + step]);
        let mut refs: Vec<&mut Cache> = caches.iter_mut().collect();
        each.extend_from_slice(model.decode_each(&next, &mut refs, None, &mut workspace).unwrap());
    }
    (losses, logits, each, stats)
}

#[test]
fn there_are_models_whose_choices_have_a_margin() {
    for case in cases() {
        for model in [case.decided_in_training(), case.decided_in_inference()] {
            assert_eq!(model.num_experts(), Some(case.spec.all_experts()), "{}", case.name);
        }
        let (model, inference) = (case.decided_in_training(), case.decided_in_inference());
        let [(_, full, _), (_, half, _)] = [Precision::F32, Precision::Bf16].map(|p| step(&model, p));
        assert_eq!(full, half, "{}: training", case.name);
        let [full, half] = [Precision::F32, Precision::Bf16].map(|p| infer(&Inference::new(&inference, p)).3);
        assert_eq!(full, half, "{}: inference", case.name);
    }
}

#[test]
fn a_training_step_is_that_of_the_processor() {
    if !has_gpu("a_training_step_is_that_of_the_processor") {
        return;
    }
    let mut wrong = Vec::new();
    for case in cases() {
        let (name, mut model) = (case.name, case.decided_in_training());
        let (want, stats, grads) = step(&model, Precision::F32);
        let (half, _, half_grads) = step(&model, Precision::Bf16);
        let zeros = vec![0.0; model.layout().len()];
        let mut trainer = CudaTrainer::new(0, &model, &zeros, &zeros, TOKENS, SEQ).unwrap();
        let (got, got_stats, got_grads) = step_on_gpu(&mut trainer, &model);
        let mean = (got.loss / TOKENS as f64, want.loss_sum / TOKENS as f64);
        assert!((mean.0 - mean.1).abs() < 2e-3, "{name}: loss {mean:?}");
        assert_eq!(got_stats, stats, "{name}: experts of tokens");
        assert_eq!((got.active_gates, got.all_gates), (0.0, 0.0), "{name}: gates");
        assert_eq!((want.sparsity_loss, want.mean_gate), (0.0, 0.0), "{name}: gates");
        let balance = [got.balance_loss, want.balance_loss, half.balance_loss].map(|loss| [loss as f32]);
        assert_eq!(want.balance_loss > 0.0, case.spec.balance_weight > 0.0, "{name}");
        let [got_loss, want_loss, half_loss] = &balance;
        let name_of = format!("{name}: balance loss");
        wrong.extend(too_far(&name_of, got_loss, want_loss, half_loss, norm(want_loss)));
        for entry in model.layout().entries() {
            let [got, want, half] = [&got_grads, &grads, &half_grads].map(|of| &of[entry.range.clone()]);
            // Gradients of queries and keys are differences of products as large as the gradients of values.
            let values = entry.spec.name.replace("q_proj", "v_proj").replace("k_proj", "v_proj");
            let values = model.layout().get(&values).unwrap().range.clone();
            let size = norm(want).max(norm(&grads[values]));
            wrong.extend(too_far(&format!("{name}: gradient of {}", entry.spec.name), got, want, half, size));
        }
        let (again, _, grads_again) = step_on_gpu(&mut trainer, &model);
        let losses = |shown: &CudaStep| (shown.loss, shown.balance_loss);
        assert!(losses(&again) == losses(&got) && grads_again == got_grads, "{name}: other bits again");
        assert!(!trainer.is_recorded(), "{name}: recorded, though the host takes part");

        // The gates of the next step are those of the updated parameters.
        let hyper = adamw::Hyper { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, step: 1 };
        trainer.update(1.0, |_, _| hyper).unwrap();
        trainer.download(&mut model).unwrap();
        let (next, stats, next_grads) = step_on_gpu(&mut trainer, &model);
        let mut fresh = CudaTrainer::new(0, &model, &zeros, &zeros, TOKENS, SEQ).unwrap();
        let (want, want_stats, want_grads) = step_on_gpu(&mut fresh, &model);
        assert!(losses(&next) == losses(&want) && losses(&next) != losses(&got), "{name}: after an update");
        assert!(next_grads == want_grads && stats == want_stats, "{name}: after an update");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn inference_is_that_of_the_processor() {
    if !has_gpu("inference_is_that_of_the_processor") {
        return;
    }
    let mut wrong = Vec::new();
    for case in cases() {
        let (name, model) = (case.name, case.decided_in_inference());
        let [want, half] = [Precision::F32, Precision::Bf16].map(|p| infer(&Inference::new(&model, p)));
        let gpu = Inference::new_on(&model, Precision::Bf16, Device::Cuda(0)).unwrap();
        let got = infer(&gpu);
        for (what, got, want, half) in [
            ("losses", &got.0, &want.0, &half.0),
            ("logits", &got.1, &want.1, &half.1),
            ("logits of several", &got.2, &want.2, &half.2),
        ] {
            wrong.extend(too_far(&format!("{name}: {what}"), got, want, half, norm(want)));
        }
        assert_eq!(got.3, want.3, "{name}: experts of tokens");
        let again = infer(&gpu);
        assert!(again == got, "{name}: other bits the second time");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_ffn_without_a_form_for_devices_is_refused_by_its_type() {
    for skip in [false, true] {
        let stage = if skip { Stage::Router } else { Stage::Random };
        let spec = DuoSpec { small: 64, stage, probability: 0.5, share: 0.5, temperature: 1.0, skip };
        let mut config = preset("tiny").unwrap();
        config.ffn = Some(Arc::new(spec));
        let model = Model::new(config);
        let zeros = vec![0.0; model.layout().len()];
        // No device is opened.
        let parts = ["a GPU does not run the FFN of layer 0, which is of type duo; set device to cpu"];
        refused(CudaTrainer::memory(model.config(), TOKENS), &parts);
        refused(CudaTrainer::new(0, &model, &zeros, &zeros, TOKENS, SEQ), &parts);
        refused(Inference::new_on(&model, Precision::Bf16, Device::Cuda(0)), &parts);
    }
}
