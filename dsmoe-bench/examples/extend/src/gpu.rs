//! Compares models with the added FFN on a GPU with the same models on the processor. Each test is skipped where there is no GPU.

use std::sync::Arc;

use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::ffn::register;
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_core::model::{Batch, Cache, StepArgs, TrainWorkspace, Workspace};
use dsmoe_core::{Config, Device, Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::{has_gpu, norm, too_far};
use dsmoe_router::RoutingStats;
use serde_json::json;

use crate::scaled::{READER, SCALE, ScaledSpec};

const VOCAB: usize = 75;
const SEQ: usize = 16;
const TOKENS: usize = 3 * SEQ;
/// Widths of the residual stream and of the FFN. Kernels of experts take the first; the second is narrower than they take.
const SIZES: [[usize; 2]; 2] = [[64, 128], [40, 60]];
/// The factors of both layers.
const SCALES: [f32; 2] = [0.7, -1.3];

fn model([hidden, intermediate]: [usize; 2]) -> Model {
    let json = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": SCALES.len(), "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    });
    let mut config = Config::from_json("config.json".as_ref(), &json.to_string()).expect("a configuration");
    config.ffn = Some(Arc::new(ScaledSpec));
    let mut model = Model::new(config);
    for (i, entry) in model.layout().entries().to_vec().into_iter().enumerate() {
        let values = &mut model.params_mut()[entry.range];
        if entry.spec.name.ends_with(SCALE) {
            values.fill(SCALES[entry.layer.expect("a tensor of a layer")]);
        } else if entry.spec.name.ends_with("norm.weight") {
            values.fill(1.0);
        } else {
            Rng::new(5, i as u64).fill_normal(values, 0.1);
        }
    }
    model
}

fn ids(seed: u32) -> Vec<u32> {
    (0..TOKENS as u32).map(|i| (i * i * 7 + 3 * i + seed * 13) % VOCAB as u32).collect()
}

/// Returns the losses of sequences, logits by a cache in pieces of many tokens, a few and single ones, and the routing of the
/// losses.
fn infer(model: &Inference) -> ([Vec<f32>; 2], RoutingStats) {
    let (inputs, targets, mut workspace) = (ids(1), ids(2), Workspace::default());
    let mut stats = model.new_stats().expect("an expert in each layer");
    let mut losses = vec![0.0; TOKENS];
    let batch = Batch { inputs: &inputs, targets: &targets, seq: SEQ };
    model.score(&mut losses, batch, Some(&mut stats), &mut workspace).expect("losses");
    let (mut cache, mut logits) = (Cache::new(model, SEQ), Vec::new());
    for piece in [0..20, 20..23, 23..24, 24..25] {
        let piece = &inputs[piece];
        let found = model.logits(piece, piece.len(), &mut cache, None, &mut workspace).expect("logits");
        logits.extend_from_slice(found);
    }
    ([losses, logits], stats)
}

#[test]
fn a_directory_is_the_same_model_on_a_gpu() {
    if !has_gpu("a_directory_is_the_same_model_on_a_gpu") {
        return;
    }
    register(&READER).expect("a name of its own");
    let mut wrong = Vec::new();
    for sizes in SIZES {
        let dir = tempfile::tempdir().expect("a folder");
        model(sizes).save(dir.path(), Dtype::F32).expect("a disk with room");
        let load = |precision, device| Inference::load_on(dir.path(), precision, device).expect("a model");
        let gpu = load(Precision::Bf16, Device::Cuda(0));
        let (want, stats) = infer(&load(Precision::F32, Device::Cpu));
        let (half, _) = infer(&load(Precision::Bf16, Device::Cpu));
        let (got, got_stats) = infer(&gpu);
        for (i, what) in ["losses", "logits"].into_iter().enumerate() {
            let what = format!("{sizes:?}: {what}");
            wrong.extend(too_far(&what, &got[i], &want[i], &half[i], norm(&want[i])));
        }
        assert_eq!(got_stats, stats, "{sizes:?}: experts of tokens");
        assert!(infer(&gpu).0 == got, "{sizes:?}: other bits the second time");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_training_step_is_that_of_the_processor() {
    if !has_gpu("a_training_step_is_that_of_the_processor") {
        return;
    }
    let (inputs, targets) = (ids(1), ids(2));
    let batch = Batch { inputs: &inputs, targets: &targets, seq: SEQ };
    let args = StepArgs { loss_scale: 1.0 / TOKENS as f32, ..StepArgs::default() };
    let mut wrong = Vec::new();
    for sizes in SIZES {
        let model = model(sizes);
        let [(want, grads), (half, half_grads)] = [Precision::F32, Precision::Bf16].map(|precision| {
            let mut grads = vec![0.0; model.layout().len()];
            let mut workspace = TrainWorkspace::new(&model, TOKENS, precision);
            let step = model.train_step(&mut grads, batch, &args, &mut workspace).expect("a step");
            (step.loss_sum / TOKENS as f64, grads)
        });
        let zeros = vec![0.0; model.layout().len()];
        let mut trainer = CudaTrainer::new(0, &model, &zeros, &zeros, TOKENS, SEQ).expect("room for a step");
        trainer.begin().expect("a step");
        trainer.micro_batch(&inputs, &targets, SEQ, &args).expect("a step");
        let got = trainer.finish(None).expect("a step").loss / TOKENS as f64;
        if (got - want).abs() > 4.0 * (half - want).abs() + 2e-3 * want {
            wrong.push(format!("{sizes:?}: loss {got}, not {want}; {half} in bf16"));
        }
        let got_grads = trainer.download_grads().expect("gradients");
        for entry in model.layout().entries() {
            let name = &entry.spec.name;
            let [got, want, half] = [&got_grads, &grads, &half_grads].map(|of| &of[entry.range.clone()]);
            // The gradient of a factor is a sum over the down projection's, times its weights, whose terms cancel; those of
            // queries and keys are differences of products as large as the gradients of values.
            let alike = match name.strip_suffix(SCALE) {
                Some(mlp) => format!("{mlp}down_proj.weight"),
                None => name.replace("q_proj", "v_proj").replace("k_proj", "v_proj"),
            };
            let alike = model.layout().get(&alike).expect("a tensor").range.clone();
            let size = norm(want).max(norm(&grads[alike]));
            wrong.extend(too_far(&format!("{sizes:?}: gradient of {name}"), got, want, half, size));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
