//! Measurement of the speed and memory of one model in its own process.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::model::{Batch, Workspace};
use dsmoe_core::{Device, Inference};
use dsmoe_kernels::Precision;

use super::records::Speed;
use crate::cli::gates::GateArgs;
use crate::files::read_json;
use crate::models::{default_precision, load_inference};
use crate::timing::resident::Mark;
use crate::ui::Ui;

/// Measurements of a speed, of which the best counts.
const ROUNDS: usize = 3;
/// Tokens of the prompt before decoding.
const PROMPT: usize = 16;
/// Longest sequence of a prefill.
const SEQUENCE: usize = 1024;

/// Measures the speed and memory of the model in `dir` on the token ids in the file `ids`.
pub(crate) fn run(
    dir: &Path,
    ids: &Path,
    decode: usize,
    threshold: Option<f32>,
    device: Device,
    ui: &mut Ui,
) -> Result<()> {
    let mark = Mark::now();
    let gates = GateArgs { threshold, active: None };
    let model = load_inference(dir, default_precision(device, Precision::F32), device, gates)?;
    let config = model.config();
    let ids: Vec<u32> = read_json(ids)?;
    let seq = SEQUENCE.min(config.max_position).min(ids.len());
    let decode = decode.min(config.max_position - PROMPT.min(config.max_position));
    if seq < 2 || decode < 2 {
        bail!("a model of {} positions is too short for timing", config.max_position);
    }
    let ids = &ids[..ids.len() / seq * seq];
    let prefill = best(|| prefill(&model, ids, seq))?;
    let options = GenerateOptions { max_tokens: decode, ..GenerateOptions::default() };
    let decoded = best(|| {
        let made = generate(&model, &ids[..PROMPT.min(ids.len())], &options, |_| true)?;
        Ok(made.tokens.len().saturating_sub(1) as f64 / made.decode_seconds.max(1e-9))
    })?;
    let speed = Speed {
        prefill_tokens_per_s: prefill,
        decode_tokens_per_s: decoded,
        peak_bytes: mark.and_then(Mark::peak_since),
        weight_bytes: model.bytes() as u64,
        threads: rayon::current_num_threads(),
    };
    ui.result(&speed, |speed| format!("{speed:?}"))
}

fn best(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    (0..ROUNDS).try_fold(0.0f64, |most, _| Ok(most.max(measure()?)))
}

/// Measures the tokens per second of scoring.
fn prefill(model: &Inference, ids: &[u32], seq: usize) -> Result<f64> {
    let (mut losses, mut workspace) = (vec![0.0; ids.len()], Workspace::default());
    let started = Instant::now();
    model.score(&mut losses, Batch { inputs: ids, targets: ids, seq }, None, &mut workspace)?;
    Ok(ids.len() as f64 / started.elapsed().as_secs_f64().max(1e-9))
}
