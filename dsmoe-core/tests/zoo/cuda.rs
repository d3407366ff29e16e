//! Models of every family on a GPU: the zoo against transformers, and switch by switch against the processor.

use dsmoe_core::kept::LayerThresholds;
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_core::model::{
    After, Batch, Cache, Inference, Model, Segment, StepArgs, TrainWorkspace, Workspace,
};
use dsmoe_core::{Device, Result};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{has_gpu, norm, refused, too_far};
use dsmoe_router::{RoutingStats, SparsityOver};
use serde_json::json;

use crate::gradients::{FORMS, VOCAB, config, families, random};
use crate::{Case, each};

const SEQ: usize = 18;
const TOKENS: usize = 3 * SEQ;

/// The results of inference.
struct Found {
    losses: Vec<f32>,
    /// By a cache: pieces of several tokens and single ones.
    logits: Vec<f32>,
    /// These belong to segments, some of which continue others.
    likelihoods: Vec<f32>,
    stats: Option<RoutingStats>,
}

/// Scores rows of `seq` ids, and feeds and looks up the first of them.
fn infer(model: &Inference, ids: &[u32], seq: usize) -> Result<Found> {
    let mut workspace = Workspace::default();
    let mut stats = model.new_stats();
    let next: Vec<u32> = ids.iter().skip(1).chain([&ids[0]]).copied().collect();
    let mut losses = vec![0.0; ids.len()];
    let batch = Batch { inputs: ids, targets: &next, seq };
    model.score(&mut losses, batch, stats.as_mut(), &mut workspace)?;

    let (mut cache, mut logits, mut start) = (Cache::new(model, 2), Vec::new(), 0);
    for piece in [seq / 2, 2, 1, 1, 1].into_iter().chain(std::iter::repeat_n(1, seq / 2 - 5)) {
        let ids = &ids[start..start + piece];
        logits.extend_from_slice(model.logits(ids, piece, &mut cache, None, &mut workspace)?);
        start += piece;
    }

    let tokens = [seq / 2, seq, seq - 3];
    let after = [After::Nothing, After::Nothing, After::Segment(0)];
    let segments: Vec<Segment> =
        tokens.into_iter().zip(after).map(|(tokens, after)| Segment { tokens, after }).collect();
    let count: usize = tokens.iter().sum();
    let targets: Vec<(usize, u32)> = (0..count).map(|i| (i, next[i % ids.len()])).collect();
    let ids: Vec<u32> = ids.iter().cycle().take(count).copied().collect();
    let likelihoods = model.likelihoods(&ids, &segments, &targets, None, &mut workspace)?;
    let likelihoods = likelihoods.iter().map(|found| found.log_probability).collect();
    Ok(Found { losses, logits, likelihoods, stats })
}

/// Compares inference on the GPU with that of the processor.
fn compare(what: &str, models: [&Inference; 3], ids: &[u32], seq: usize) -> Result<Vec<String>> {
    let [want, half, got] = models.map(|model| infer(model, ids, seq));
    let (want, half, got) = (want?, half?, got?);
    let mut wrong = Vec::new();
    for (part, got, want, half) in [
        ("losses", &got.losses, &want.losses, &half.losses),
        ("logits", &got.logits, &want.logits, &half.logits),
        ("likelihoods", &got.likelihoods, &want.likelihoods, &half.likelihoods),
    ] {
        wrong.extend(too_far(&format!("{what}: {part}"), got, want, half, norm(want)));
    }
    if got.stats != want.stats {
        wrong.push(format!("{what}: other routing"));
    }
    Ok(wrong)
}

/// Feeds a prompt and a text token by token; returns the logits before each token of the text.
fn follow(model: &Inference, prompt: &[u32], text: &[u32]) -> Result<Vec<f32>> {
    let (mut cache, mut workspace) = (Cache::new(model, prompt.len()), Workspace::default());
    let mut all = model.decode(prompt, &mut cache, None, &mut workspace)?.to_vec();
    for id in &text[..text.len() - 1] {
        all.extend_from_slice(model.decode(&[*id], &mut cache, None, &mut workspace)?);
    }
    Ok(all)
}

/// Feeds the greedy text. Checks that the token which is the likeliest on the processor is so on the GPU, but for what rounding
/// to bf16 changes. It is the text's next token, unless the text was fed again from its start as it outgrew a rotation.
fn check_greedy(case: &Case, [f32, half, gpu]: [&Inference; 3]) -> Result<Vec<String>> {
    let (prompt, text) = (case.list("/greedy/prompt_ids"), case.list("/greedy/new_ids"));
    let (prompt, text) = (prompt.expect("a prompt"), text.expect("a text"));
    let [want, half, got] = [f32, half, gpu].map(|model| follow(model, &prompt, &text));
    let (want, half, got) = (want?, half?, got?);
    let rounding = half.iter().zip(&want).fold(0.0f32, |worst, (half, want)| worst.max((half - want).abs()));
    let vocab = gpu.config().vocab_size;
    let mut wrong = Vec::new();
    for (i, (got, want)) in got.chunks(vocab).zip(want.chunks(vocab)).enumerate() {
        let likeliest = |z: &[f32]| (0..vocab).fold(0, |best, id| if z[id] > z[best] { id } else { best });
        let behind = got[likeliest(got)] - got[likeliest(want)];
        if behind.is_nan() || behind > 8.0 * rounding {
            wrong.push(format!("greedy token {i} is {behind} behind; bf16 is {rounding} off"));
        }
    }
    Ok(wrong)
}

#[test]
fn the_zoo_is_that_of_transformers() {
    if !has_gpu("the_zoo_is_that_of_transformers") {
        return;
    }
    each("zoo on a GPU", |case| {
        let f32 = case.model()?;
        let half = Inference::load(&case.dir, Precision::Bf16)?;
        let gpu = Inference::load_on(&case.dir, Precision::Bf16, Device::Cuda(0))?;
        let (columns, vocab) = (case.ids("columns"), gpu.config().vocab_size);
        let (want, rows) = (case.f32s("logits"), case.rows());
        let mut wrong = Vec::new();
        let pieces: &[usize] = if case.depends_on_length(gpu.config()) { &[64] } else { &[64, 13, 1] };
        for &piece in pieces {
            let logits = |model: &Inference| -> Result<Vec<f32>> {
                let mut picked = Vec::new();
                for ids in &rows {
                    let (mut cache, mut workspace) = (Cache::new(model, ids.len()), Workspace::default());
                    for ids in ids.chunks(piece) {
                        let found = model.logits(ids, ids.len(), &mut cache, None, &mut workspace)?;
                        for row in found.chunks(vocab) {
                            picked.extend(columns.iter().map(|&column| row[column as usize]));
                        }
                    }
                }
                Ok(picked)
            };
            let (got, half) = (logits(&gpu)?, logits(&half)?);
            wrong.extend(too_far(&format!("{piece} tokens at a time"), &got, &want, &half, norm(&want)));
        }
        wrong.extend(compare("inference", [&f32, &half, &gpu], &rows.concat(), 64)?);
        wrong.extend(check_greedy(case, [&f32, &half, &gpu])?);
        Ok(wrong)
    });
}

/// Makes random models with each switch, dense and with experts in every form. Their gates are far from the threshold, so that
/// rounding moves no token.
fn switches() -> Vec<(String, Model)> {
    let mut all = Vec::new();
    for (i, (family, mut keys)) in families().into_iter().enumerate() {
        for form in FORMS {
            let map = keys.as_object_mut().unwrap();
            map.insert("hidden_size".into(), json!(16));
            // Lists of active pairs take wide experts, all pairs any number of neurons.
            map.insert("intermediate_size".into(), json!([192, 36, 48, 36][i % 4]));
            map.insert("max_position_embeddings".into(), json!(if i == 1 { 8 } else { 64 }));
            let mut model = random(config(family, &keys, form));
            for entry in model.layout().entries().to_vec() {
                let values = &mut model.params_mut()[entry.range];
                if entry.spec.name.contains("router.") && entry.spec.name.ends_with("weight") {
                    values.iter_mut().for_each(|w| *w *= 0.1);
                } else if entry.spec.name.ends_with("router.bias") {
                    values.iter_mut().zip([1.0, -2.0, 0.7]).for_each(|(b, value)| *b = value);
                }
            }
            all.push((format!("{family} {keys}, {form}"), model));
        }
    }
    all
}

fn ids(seed: usize) -> Vec<u32> {
    (0..TOKENS).map(|i| (i * i + (3 + seed) * i + 1) as u32 % VOCAB as u32).collect()
}

#[test]
fn every_switch_is_that_of_the_processor() {
    if !has_gpu("every_switch_is_that_of_the_processor") {
        return;
    }
    let mut wrong = Vec::new();
    for (name, model) in switches() {
        let [f32, half] =
            [Precision::F32, Precision::Bf16].map(|precision| Inference::new(&model, precision));
        let gpu = Inference::new_on(&model, Precision::Bf16, Device::Cuda(0)).unwrap();
        wrong.extend(compare(&name, [&f32, &half, &gpu], &ids(0), SEQ).unwrap());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_training_step_with_every_switch_is_that_of_the_processor() {
    if !has_gpu("a_training_step_with_every_switch_is_that_of_the_processor") {
        return;
    }
    let (inputs, targets) = (ids(0), ids(4));
    let batch = Batch { inputs: &inputs, targets: &targets, seq: SEQ };
    let sparsity_over = SparsityOver::All;
    let args = StepArgs {
        loss_scale: 1.0 / TOKENS as f32,
        sparsity_weight: 0.5,
        sparsity_over,
        seed: 1,
        ..StepArgs::default()
    };
    let mut wrong = Vec::new();
    for (name, model) in switches() {
        let [(want, grads), (half, half_grads)] = [Precision::F32, Precision::Bf16].map(|precision| {
            let mut grads = vec![0.0; model.layout().len()];
            let mut workspace = TrainWorkspace::new(&model, TOKENS, precision);
            let step = model.train_step(&mut grads, batch, &args, &mut workspace).unwrap();
            (step.loss_sum / TOKENS as f64, grads)
        });
        let zeros = vec![0.0; model.layout().len()];
        let mut trainer = CudaTrainer::new(0, &model, &zeros, &zeros, TOKENS, SEQ).unwrap();
        // Ops are queued, recorded, and replayed.
        let mut first = None;
        for _ in 0..3 {
            trainer.begin().unwrap();
            trainer.micro_batch(&inputs, &targets, SEQ, &args).unwrap();
            let step = (trainer.finish(None).unwrap().loss, trainer.download_grads().unwrap());
            match &first {
                None => first = Some(step),
                Some(first) => assert!(step == *first, "{name}: other bits the second time"),
            }
        }
        let (loss, got_grads) = first.expect("a step");
        let loss = loss / TOKENS as f64;
        if (loss - want).abs() > 4.0 * (half - want).abs() + 2e-3 * want {
            wrong.push(format!("{name}: loss {loss}, not {want}; {half} in bf16"));
        }
        for entry in model.layout().entries() {
            let of = |grads: &[f32]| grads[entry.range.clone()].to_vec();
            let (got, want, half) = (of(&got_grads), of(&grads), of(&half_grads));
            // Gradients of queries and keys are differences of products as large as the gradients of values; those of
            // biases are sums of the terms of the weights' gradients, and those of gates are sums over the down
            // projection's gradient, times its weights, whose terms cancel: the errors are those of the processor in
            // bf16 in the median, and where the sums cancel up to twenty times as large.
            let name_of_alike = match entry.spec.name.split_once("router.") {
                Some((mlp, _)) => format!("{mlp}down_proj.weight"),
                None => ["q_proj", "k_proj"]
                    .iter()
                    .fold(entry.spec.name.replace("bias", "weight"), |name, of| name.replace(of, "v_proj")),
            };
            let alike = model.layout().get(&name_of_alike);
            let size = norm(&want).max(alike.map_or(0.0, |alike| norm(&grads[alike.range.clone()])));
            wrong.extend(too_far(
                &format!("{name}: gradient of {}", entry.spec.name),
                &got,
                &want,
                &half,
                size,
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_no_gpu_kernel_takes_is_named() {
    let wide = config("gemma", &json!({"head_dim": 256}), "dense");
    let mut scaled = config("olmo2", &json!({}), "dense");
    scaled.architecture.residual_scale = 0.5;
    let mut skipping = config("llama", &json!({}), "dense");
    skipping.thresholds = Some(vec![LayerThresholds::NONE; skipping.num_layers]);
    let experts = json!({"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12});
    let shared = config("qwen2_moe", &experts, "dense");
    for (config, family, missing) in [
        (wide, "gemma", "heads of 256 values, more than 128"),
        (scaled, "olmo2", "residual branches times 0.5 behind norms"),
        (skipping, "llama", "thresholds of inputs"),
        (shared, "qwen2_moe", "a shared expert"),
    ] {
        let model = Model::new(config);
        let zeros = vec![0.0; model.layout().len()];
        // No device is opened.
        let parts = ["a GPU does not run", family, missing, "device to cpu"];
        refused(CudaTrainer::memory(model.config(), 8), &parts);
        refused(CudaTrainer::new(0, &model, &zeros, &zeros, 8, 8), &parts);
        refused(Inference::new_on(&model, Precision::Bf16, Device::Cuda(0)), &parts);
    }
}
