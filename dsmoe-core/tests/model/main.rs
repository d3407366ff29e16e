//! Models: their layers, gradients, inference and variants against oracles and golden numbers.

mod calibrate;
#[cfg(feature = "cuda")]
mod cuda;
mod distill;
mod divergence;
mod golden;
mod golden_layer;
mod golden_model;
mod inference;
#[cfg(feature = "cuda")]
mod mixtures_on_gpu;
mod model_oracle;
mod ragged;
mod router_gradient;
mod variants;

use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::Config;
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::model::{Batch, Cache, Inference, Model, StepArgs, StepOutput, TrainWorkspace, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_router::RoutingStats;

/// Writes a random dense model with the given sizes to `out`. At an initializer range of 0.1 activations are of the order of
/// 1, and logits tell tokens apart.
fn write_dense(out: &Path, sizes: &[(&str, usize)], dtype: Dtype, tied: bool, initializer_range: f64) {
    let mut json: serde_json::Value = serde_json::from_str(&preset("tiny").unwrap().to_json()).unwrap();
    for &(key, value) in sizes {
        json[key] = value.into();
    }
    json["tie_word_embeddings"] = tied.into();
    json["initializer_range"] = initializer_range.into();
    let config = Config::from_json(Path::new("config.json"), &json.to_string()).unwrap();
    init(&config, out, &InitOptions { dtype, seed: 3, ..InitOptions::default() }, &mut |_| {}).unwrap();
}

/// Writes such a model to a new directory in `dir`.
fn dense(dir: &Path, sizes: &[(&str, usize)], dtype: Dtype, tied: bool) -> PathBuf {
    let out = dir.join(format!("dense-{dtype}-{tied}"));
    write_dense(&out, sizes, dtype, tied, 0.1);
    out
}

/// Returns `count` ids below `vocab`, which `seed` varies.
fn ids(count: usize, seed: u32, vocab: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 7 + 3 * i + seed * 13) % vocab).collect()
}

/// Returns the arguments of a step of one micro-batch without a sparsity loss.
fn step_args(tokens: usize) -> StepArgs {
    StepArgs { loss_scale: 1.0 / tokens as f32, ..StepArgs::default() }
}

/// Takes a training step. Returns its results, its gradients and its workspace.
fn train(
    model: &Model,
    batch: Batch<'_>,
    args: &StepArgs,
    precision: Precision,
) -> (StepOutput, Vec<f32>, TrainWorkspace) {
    let mut grads = vec![0.0; model.layout().len()];
    let mut workspace = TrainWorkspace::new(model, batch.inputs.len(), precision);
    let output = model.train_step(&mut grads, batch, args, &mut workspace).unwrap();
    (output, grads, workspace)
}

/// Returns the losses of a batch, and adds its routing to `stats`.
fn losses(model: &Inference, batch: Batch<'_>, stats: Option<&mut RoutingStats>) -> Vec<f32> {
    let mut losses = vec![f32::NAN; batch.inputs.len()];
    model.score(&mut losses, batch, stats, &mut Workspace::default()).unwrap();
    losses
}

/// Returns the logits of a text that is fed in pieces.
fn logits<'a>(model: &Inference, pieces: impl IntoIterator<Item = &'a [u32]>) -> Vec<f32> {
    let (mut cache, mut workspace) = (Cache::new(model, 8), Workspace::default());
    let each = pieces.into_iter().flat_map(|piece| {
        model.logits(piece, piece.len(), &mut cache, None, &mut workspace).unwrap().to_vec()
    });
    each.collect()
}
