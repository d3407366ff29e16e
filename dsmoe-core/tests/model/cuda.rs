//! Compares models on a GPU with the same models on the CPU.

use std::path::{Path, PathBuf};

use dsmoe_core::Device;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::model::cuda::{CudaStep, CudaTrainer};
use dsmoe_core::model::{After, Batch, Cache, Inference, Model, Segment, StepArgs, Workspace};
use dsmoe_core::surgery::{LayerSurgery, operate};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::{distance, has_gpu, norm, refused, shared, too_far};
use dsmoe_kernels::{Precision, adamw};
use dsmoe_router::{GateValue, LogitCounts, Rescale, RouterConfig, RoutingStats, SparsityOver, ZeroActive};
use serde_json::{Value, json};

use crate::{golden, logits, losses, step_args, train, write_dense};

/// Makes random models: dense ones, and ones with several kinds of experts. The widths of the first let products run over
/// active pairs alone.
fn models(dir: &Path) -> Vec<(String, PathBuf)> {
    let mut all = Vec::new();
    for (name, heads, kv_heads, hidden, intermediate, tied) in
        [("square", 4, 4, 64, 512, true), ("grouped", 6, 2, 96, 160, false), ("odd", 3, 1, 36, 56, false)]
    {
        let sizes = [
            ("hidden_size", hidden),
            ("intermediate_size", intermediate),
            ("vocab_size", 75),
            ("num_hidden_layers", 2),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("head_dim", hidden / heads),
            ("max_position_embeddings", 256),
        ];
        let dense = |name: &str, initializer_range: f64| {
            let out = dir.join(name);
            write_dense(&out, &sizes, Dtype::BF16, tied, initializer_range);
            out
        };
        all.push((name.to_owned(), dense(name, 0.1)));
        let dense = dense(&format!("{name}-small"), 0.03);
        let kinds = [
            (GateValue::Sigmoid, Rescale::None, ZeroActive::Skip, true),
            (GateValue::Binary, Rescale::Eq8, ZeroActive::ForceArgmax, true),
            (GateValue::Sigmoid, Rescale::Eq8, ZeroActive::Skip, false),
        ];
        for (i, (gate_value, rescale, zero_active, ste)) in kinds.into_iter().enumerate() {
            let out = dir.join(format!("{name}-{i}"));
            let router = RouterConfig { gate_value, rescale, zero_active, ste, ..RouterConfig::new(8) };
            let options = ConvertOptions { router, ..ConvertOptions::new(8) };
            convert(&dense, &out, &options, &mut |_| {}).unwrap();
            decide_gates(&out);
            all.push((format!("{name} {gate_value} {rescale} {zero_active} ste {ste}"), out));
        }
        // Thresholds of a few shares are close to 0, and those beyond are below all logits.
        let budgets = json!([{"active": 0.4, "thresholds": [0.2, 0.1]}, {"active": 0.5, "thresholds": [-0.2, -0.3]},
            {"active": 0.8, "thresholds": [-9.0, -9.0]}]);
        let forms = [
            json!({"core": [3, 1], "router_rank": 3, "correction": true, "budgets": budgets, "active_target": 0.5,
                "gate_value": "binary", "router_bias": true}),
            json!({"core": 2, "rescale": "eq8", "zero_active": "force_argmax", "ste": false}),
            json!({"router_rank": 5, "budgets": budgets, "active_target": 0.4}),
        ];
        for (i, form) in forms.into_iter().enumerate() {
            let out = dir.join(format!("{name}-parts-{i}"));
            with_parts(&dir.join(format!("{name}-0")), &out, &form);
            decide_gates(&out);
            all.push((format!("{name} {form}"), out));
        }
        // A core and budgets, where each layer has lost two experts that have a gate.
        let (from, out) = (dir.join(format!("{name}-parts-0")), dir.join(format!("{name}-fewer")));
        let kept = [LayerSurgery::keep([0, 1, 3]), LayerSurgery::keep([0, 1, 2, 4, 6])];
        operate(&from, &out, (&kept, None), false, &mut |_| {}).unwrap();
        all.push((format!("{name}, experts dropped"), out));
        // Layers of different numbers of experts.
        let out = dir.join(format!("{name}-uneven"));
        let kept = [LayerSurgery::keep([0, 1, 3]), LayerSurgery::keep([0, 2, 4])];
        operate(&from, &out, (&kept, None), false, &mut |_| {}).unwrap();
        all.push((format!("{name}, different numbers of experts"), out));
    }
    all
}

/// Writes the model with experts in `from` to `out`, with other keys of its form and random values of new tensors.
fn with_parts(from: &Path, out: &Path, keys: &Value) {
    let source = Model::load(from).unwrap();
    let mut json: Value = serde_json::from_str(&source.config().to_json()).unwrap();
    json["dsmoe"].as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    json["dsmoe"]["format_version"] = 2.into();
    let mut model = Model::new(Config::from_json(Path::new("config.json"), &json.to_string()).unwrap());
    for (i, entry) in model.layout().entries().to_vec().into_iter().enumerate() {
        let values = &mut model.params_mut()[entry.range.clone()];
        match source.layout().get(&entry.spec.name).filter(|old| old.spec.shape == entry.spec.shape) {
            Some(old) => values.copy_from_slice(&source.params()[old.range.clone()]),
            None => Rng::new(7, i as u64).fill_normal(values, 0.05),
        }
    }
    std::fs::create_dir(out).unwrap();
    model.save(out, Dtype::F32).unwrap();
}

/// Makes the gates of the model in `dir` depend on three bits of a token's id, and keeps their logits away from the
/// threshold and from each other. A gate that is active in one precision and inactive in another would change an output by
/// its whole expert, so the comparison would not be one of rounding.
pub(crate) fn decide_gates(dir: &Path) {
    let mut model = Model::load(dir).unwrap();
    let hidden = model.config().hidden;
    let entries = model.layout().entries().to_vec();
    for entry in entries {
        let name = &entry.spec.name;
        let embeds = name.contains("embed_tokens");
        let decides = name.contains("router.") || name.ends_with("mlp.gate.weight");
        let values = &mut model.params_mut()[entry.range.clone()];
        if name.ends_with("router.b.weight") {
            // The result of the first product from these bits.
            for (row, values) in values.chunks_exact_mut(entry.spec.shape[1]).enumerate() {
                values.iter_mut().for_each(|w| *w *= 0.05);
                values[row % 3] = 0.4 + 0.05 * row as f32;
            }
            continue;
        }
        for (row, values) in values.chunks_exact_mut(hidden).enumerate() {
            if embeds {
                // These values exceed by far what layers of small weights add.
                values.iter_mut().take(3).enumerate().for_each(|(bit, x)| *x = [-0.5, 0.5][row >> bit & 1]);
            } else if decides {
                values.iter_mut().for_each(|w| *w *= 0.05);
                values[row % 3] =
                    if name.ends_with("router.a.weight") { 1.0 } else { 0.4 + 0.05 * row as f32 };
            } else if name.ends_with("correction.weight") {
                // It reads the large values.
                values.iter_mut().for_each(|w| *w *= 0.1);
            }
        }
    }
    model.save(dir, Dtype::F32).unwrap();
}

fn ids(count: usize, seed: u32) -> Vec<u32> {
    crate::ids(count, seed, 75)
}

/// Returns the distance over the size.
fn off(got: &[f32], want: &[f32]) -> f64 {
    let (distance, size) = (distance(got, want), norm(want));
    if size == 0.0 { distance } else { distance / size }
}

fn hyper(step: u64, decay: bool) -> adamw::Hyper {
    let weight_decay = if decay { 0.1 } else { 0.0 };
    adamw::Hyper { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, step }
}

/// Takes a step of one micro-batch. Returns its results, its routing and the gradients.
fn take_step(
    trainer: &mut CudaTrainer,
    model: &Model,
    Batch { inputs, targets, seq }: Batch<'_>,
    args: &StepArgs,
) -> (CudaStep, Option<RoutingStats>, Vec<f32>) {
    let mut stats = model.new_stats();
    trainer.begin().unwrap();
    trainer.micro_batch(inputs, targets, seq, args).unwrap();
    (trainer.finish(stats.as_mut()).unwrap(), stats, trainer.download_grads().unwrap())
}

/// Otherwise the tests below would compare models that run different experts.
#[test]
fn models_route_alike_in_both_precisions() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for (name, path) in models(dir.path()) {
        let [want, got] = [Precision::F32, Precision::Bf16].map(|precision| {
            let model = Inference::load(&path, precision).unwrap();
            let mut stats = model.new_stats().map(RoutingStats::traced);
            losses(&model, Batch { inputs: &ids(120, 4), targets: &ids(120, 5), seq: 40 }, stats.as_mut());
            stats
        });
        assert_eq!(got, want, "{name}");
        if let Some(stats) = want {
            seen += 1;
            let active = stats.active_of_tokens();
            assert!(active.iter().any(|&k| k != active[0]), "{name}: {active:?}");
        }
    }
    assert!(seen > 0);
}

/// Compares a training step of the model in `path` on the GPU with that of the processor, and a second one with the first.
/// Returns what is wrong.
pub(crate) fn compare_step(name: &str, path: &Path) -> Vec<String> {
    let (seq, tokens) = (33, 99);
    let (inputs, targets) = (ids(tokens, 1), ids(tokens, 2));
    let batch = Batch { inputs: &inputs, targets: &targets, seq };
    let mut wrong = Vec::new();
    let model = Model::load(path).unwrap();
    let has_budgets = model.config().moe.as_ref().is_some_and(|moe| moe.budget().is_some());
    let sparsity_over = if has_budgets { SparsityOver::Held } else { SparsityOver::All };
    let args = StepArgs { sparsity_weight: 0.5, sparsity_over, seed: 1, ..step_args(tokens) };
    let (want, grads, workspace) = train(&model, batch, &args, Precision::F32);
    let (half, half_grads, _) = train(&model, batch, &args, Precision::Bf16);
    let zeros = vec![0.0; model.layout().len()];
    let mut trainer = CudaTrainer::new(0, &model, &zeros, &zeros, tokens, seq).unwrap();
    let step = |trainer: &mut CudaTrainer| take_step(trainer, &model, batch, &args);
    let (got, stats, got_grads) = step(&mut trainer);
    // Errors of tokens cancel in the mean by chance: half a per mille is four times the error that remains on the CPU.
    // PyTorch's bf16 autocast on a CPU has a larger one on `grouped`.
    let [got_loss, want_loss, half_loss] =
        [got.loss, want.loss_sum, half.loss_sum].map(|sum| sum / tokens as f64);
    if (got_loss - want_loss).abs() > 4.0 * (half_loss - want_loss).abs() + 5e-4 * want_loss {
        wrong.push(format!("{name}: loss {got_loss}, not {want_loss}; {half_loss} in bf16"));
    }
    let [of_got, of_want, of_half] =
        [got.balance_loss, want.balance_loss, half.balance_loss].map(|loss| [loss as f32]);
    wrong.extend(too_far(&format!("{name}: balance loss"), &of_got, &of_want, &of_half, norm(&of_want)));
    if let Some(stats) = &stats {
        let gates = (tokens * model.config().num_layers) as f64;
        if (got.all_gates / gates - want.mean_gate).abs() > 1e-3 {
            wrong.push(format!("{name}: gates {}, not {}", got.all_gates / gates, want.mean_gate));
        }
        if Some(stats) != workspace.stats() {
            wrong.push(format!("{name}: other routing"));
        }
    }
    for entry in model.layout().entries() {
        let [got, want, half] = [&got_grads, &grads, &half_grads].map(|grads| &grads[entry.range.clone()]);
        // Gradients of queries and keys are differences of products as large as the gradients of values; those of
        // gates are sums over the down projection's gradient, times its weights, whose terms cancel.
        let own = &entry.spec.name;
        let alike = match (own.split_once("router."), own.strip_suffix("gate.weight")) {
            (Some((mlp, _)), _) => format!("{mlp}down_proj.weight"),
            (None, Some(mlp)) => format!("{mlp}experts.0.down_proj.weight"),
            (None, None) => own.replace("q_proj", "v_proj").replace("k_proj", "v_proj"),
        };
        let alike = model.layout().get(&alike).unwrap().range.clone();
        let size = norm(want).max(norm(&grads[alike]));
        wrong.extend(too_far(&format!("{name}: gradient of {own}"), got, want, half, size));
    }
    let squares: f64 = got_grads.iter().map(|&g| f64::from(g).powi(2)).sum();
    assert!((got.squares / squares - 1.0).abs() < 1e-9, "{name}: squares {} and {squares}", got.squares);
    let (again, _, grads_again) = step(&mut trainer);
    assert!(again.loss == got.loss && grads_again == got_grads, "{name}: other bits the second time");

    trainer.update(0.5, |decay, _| hyper(1, decay)).unwrap();
    let mut updated = Model::load(path).unwrap();
    trainer.download(&mut updated).unwrap();
    let (mut params, mut m, mut v) = (model.params().to_vec(), zeros.clone(), zeros.clone());
    for entry in model.layout().entries() {
        let range = entry.range.clone();
        adamw::Step {
            param: &mut params[range.clone()],
            m: &mut m[range.clone()],
            v: &mut v[range.clone()],
            grad: &got_grads[range],
            grad_scale: 0.5,
            hyper: &hyper(1, entry.spec.decay),
        }
        .run();
    }
    assert!(off(updated.params(), &params) < 1e-6, "{name}: the update");
    let (mut m_got, mut v_got) = (zeros.clone(), zeros);
    trainer.download_moments(&mut m_got, &mut v_got).unwrap();
    assert!(off(&m_got, &m) < 1e-6 && off(&v_got, &v) < 1e-6, "{name}: the moments");
    wrong
}

/// Compares all models on a GPU, if there is one, and fails with everything that is wrong.
pub(crate) fn compare_all(
    test: &str,
    models: fn(&Path) -> Vec<(String, PathBuf)>,
    compare: fn(&str, &Path) -> Vec<String>,
) {
    if !has_gpu(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let wrong: Vec<String> = models(dir.path()).iter().flat_map(|(name, path)| compare(name, path)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_training_step_is_that_of_the_processor() {
    compare_all("a_training_step_is_that_of_the_processor", models, compare_step);
}

#[test]
fn recorded_steps_have_the_bits_of_queued_ones() {
    if !has_gpu("recorded_steps_have_the_bits_of_queued_ones") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (seq, tokens) = (16, 64);
    for (name, path) in models(dir.path()) {
        let mut model = Model::load(&path).unwrap();
        let zeros = vec![0.0; model.layout().len()];
        let (mut m, mut v) = (zeros.clone(), zeros.clone());
        let mut trainer = CudaTrainer::new(0, &model, &m, &v, tokens, seq).unwrap();
        for step in 1..=5u32 {
            // Each step has other ids, repeated differently, and another sparsity weight; thresholds move twice.
            let inputs: Vec<u32> = ids(tokens, step).iter().map(|id| id % (10 * step)).collect();
            let targets = ids(tokens, step + 20);
            let batch = Batch { inputs: &inputs, targets: &targets, seq };
            let (sparsity_weight, sparsity_over) = (0.1 * step as f32, SparsityOver::All);
            let args = StepArgs { sparsity_weight, sparsity_over, seed: 1, ..step_args(tokens) };
            let take = |trainer: &mut CudaTrainer, model: &Model| {
                let (shown, stats, grads) = take_step(trainer, model, batch, &args);
                (shown.loss, shown.all_gates, stats.map(|stats| stats.active_ratio()), grads)
            };
            if step == 3 && model.num_experts().is_some() {
                trainer.set_thresholds(&[0.3, f32::NEG_INFINITY]).unwrap();
                model.set_thresholds(&[0.3, f32::NEG_INFINITY]).unwrap();
            }
            if step == 4 && model.num_experts().is_some() {
                trainer.set_threshold(0.9).unwrap();
                model.set_threshold(0.9).unwrap();
            }
            let got = take(&mut trainer, &model);
            // A new trainer queues its ops one by one.
            let mut fresh = CudaTrainer::new(0, &model, &m, &v, tokens, seq).unwrap();
            let want = take(&mut fresh, &model);
            assert!(!fresh.is_recorded(), "{name}");
            assert_eq!(trainer.is_recorded(), step > 1, "{name}: step {step}");
            assert!(got == want, "{name}: step {step} has other bits");
            trainer.update(1.0, |decay, _| hyper(u64::from(step), decay)).unwrap();
            trainer.download(&mut model).unwrap();
            trainer.download_moments(&mut m, &mut v).unwrap();
        }
    }
}

#[test]
fn logits_are_those_of_transformers() {
    if !has_gpu("logits_are_those_of_transformers") {
        return;
    }
    let Some(shared) = shared("logits_are_those_of_transformers", "models") else { return };
    let (mut seen, mut wrong) = (0, Vec::new());
    for name in ["babyllama-1m", "tinystories-656k", "stories-260k"] {
        let dir = shared.join("models").join(name);
        if !dir.is_dir() {
            continue;
        }
        seen += 1;
        let (ids, want) = golden::logits(&dir);
        let half = Inference::load(&dir, Precision::Bf16).unwrap();
        let gpu = Inference::load_on(&dir, Precision::Bf16, Device::Cuda(0)).unwrap();
        for chunk in [ids.len(), 1, 5, 17] {
            let [got, half] = [&gpu, &half].map(|model| logits(model, ids.chunks(chunk)));
            let what = format!("{name}, {chunk} tokens at a time");
            wrong.extend(too_far(&what, &got, &want, &half, norm(&want)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 0, "none of the checkpoints at {}", shared.display());
}

/// The results of inference.
#[derive(PartialEq)]
struct Found {
    losses: Vec<f32>,
    /// The model computes these with a cache, from pieces of many tokens, of a few, and of one.
    logits: Vec<f32>,
    /// These belong to segments, some of which continue others.
    likelihoods: Vec<f32>,
    /// These belong to three sequences that are decoded side by side.
    each: Vec<f32>,
    /// Loads, numbers of active experts, and those of single tokens.
    stats: Option<RoutingStats>,
}

fn infer(model: &Inference) -> Found {
    let (all, targets) = (ids(120, 4), ids(120, 5));
    let mut workspace = Workspace::default();
    let mut stats = model.new_stats().map(RoutingStats::traced);
    let batch = Batch { inputs: &all, targets: &targets, seq: 40 };
    let losses = losses(model, batch, stats.as_mut());
    let pieces = [0..30, 30..33, 33..34, 34..35, 35..36, 36..70, 70..71];
    let logits = logits(model, pieces.map(|piece| &all[piece]));
    let segments = [
        Segment { tokens: 7, after: After::Nothing },
        Segment { tokens: 90, after: After::Nothing },
        Segment { tokens: 3, after: After::Segment(0) },
        Segment { tokens: 20, after: After::Segment(0) },
    ];
    let places: Vec<(usize, u32)> = [0, 6, 50, 50, 99, 119, 3].map(|at| (at, targets[at])).to_vec();
    let found = model.likelihoods(&all, &segments, &places, None, &mut workspace).unwrap();
    let mut caches = [Cache::new(model, 9), Cache::new(model, 9), Cache::new(model, 9)];
    for (i, cache) in caches.iter_mut().enumerate() {
        model.decode(&all[..4 * i + 1], cache, None, &mut workspace).unwrap();
    }
    let mut each = Vec::new();
    for step in 0..5 {
        let next = [all[step], all[step + 9], all[step + 30]];
        let mut refs: Vec<&mut Cache> = caches.iter_mut().collect();
        each.extend_from_slice(model.decode_each(&next, &mut refs, None, &mut workspace).unwrap());
    }
    let likelihoods = found.iter().map(|likelihood| likelihood.log_probability).collect();
    Found { losses, logits, likelihoods, each, stats }
}

/// Compares inference of the model in `path` on the GPU with that of the processor. Returns what is wrong.
pub(crate) fn compare_inference(name: &str, path: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    let [mut cpu, mut half] = [Precision::F32, Precision::Bf16].map(|p| Inference::load(path, p).unwrap());
    let mut gpu = Inference::load_on(path, Precision::Bf16, Device::Cuda(0)).unwrap();
    let (want, rounded, got) = (infer(&cpu), infer(&half), infer(&gpu));
    for (what, got, want, half) in [
        ("losses", &got.losses, &want.losses, &rounded.losses),
        ("logits", &got.logits, &want.logits, &rounded.logits),
        ("likelihoods", &got.likelihoods, &want.likelihoods, &rounded.likelihoods),
        ("logits of several", &got.each, &want.each, &rounded.each),
    ] {
        wrong.extend(too_far(&format!("{name}: {what}"), got, want, half, norm(want)));
    }
    if got.stats != want.stats {
        wrong.push(format!("{name}: other routing"));
    }
    let again = infer(&gpu);
    assert!(again == got, "{name}: other bits the second time");
    // Thresholds of another budget, which a recorded step of decoding takes up.
    if gpu.config().moe.as_ref().is_some_and(|moe| moe.budget().is_some()) {
        for model in [&mut cpu, &mut half, &mut gpu] {
            model.set_active(0.7).unwrap();
        }
        let (want, half, got) = (infer(&cpu), infer(&half), infer(&gpu));
        let (of_want, size) = (&want.logits, norm(&want.logits));
        wrong.extend(too_far(&format!("{name}: at 0.7"), &got.logits, of_want, &half.logits, size));
        assert!(got.stats == want.stats && got.stats != again.stats, "{name}: routing at 0.7");
    }
    wrong
}

#[test]
fn inference_is_that_of_the_processor() {
    compare_all("inference_is_that_of_the_processor", models, compare_inference);
}

#[test]
fn logits_of_routers_are_counted() {
    if !has_gpu("logits_of_routers_are_counted") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (inputs, targets) = (ids(99, 1), ids(99, 2));
    let batch = Batch { inputs: &inputs, targets: &targets, seq: 33 };
    for (name, path) in models(dir.path()) {
        let model = Model::load(&path).unwrap();
        let Some(stats) = model.new_stats() else { continue };
        let count = |model: &Inference| {
            let mut stats = stats.clone().with_logits();
            losses(model, batch, Some(&mut stats));
            stats.logits().unwrap().curves()
        };
        let want = count(&Inference::new(&model, Precision::F32));
        let got = count(&Inference::new_on(&model, Precision::Bf16, Device::Cuda(0)).unwrap());
        let zeros = vec![0.0; model.layout().len()];
        let mut trainer = CudaTrainer::new(0, &model, &zeros, &zeros, 99, 33).unwrap();
        let mut counts = LogitCounts::new(model.config().num_layers);
        trainer.logits(&mut counts).unwrap();
        assert!(counts.is_empty(), "{name}: counted unasked");
        trainer.count_logits().unwrap();
        // Of the last micro-batch alone.
        for _ in 0..2 {
            take_step(&mut trainer, &model, batch, &step_args(99));
            trainer.logits(&mut counts).unwrap();
        }
        let trained = counts.curves();
        for bar in [-1.5, -0.6, -0.2, 0.0, 0.2, 0.6, 1.5] {
            let [want, got, trained] = [&want, &got, &trained].map(|curves| curves.share(&[bar, bar]));
            // Rounding moves logits beside a threshold to its other side.
            let near = (got - want).abs() < 0.02 && (trained - want).abs() < 0.02;
            assert!(near, "{name}, {bar}: {got} and {trained} for {want}");
        }
        assert_eq!(got.share(&[-40.0, -40.0]), 1.0, "{name}: all pairs");
    }
}

#[test]
fn other_precisions_are_refused() {
    if !has_gpu("other_precisions_are_refused") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, path) = models(dir.path()).remove(0);
    refused(Inference::load_on(&path, Precision::F32, Device::Cuda(0)), &["set dtype to bf16"]);
    refused(Inference::load_on(&path, Precision::Bf16, Device::Cuda(63)), &["cuda:63"]);
}
