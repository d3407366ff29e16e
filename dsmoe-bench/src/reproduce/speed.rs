//! Measurement of the speed and memory of one model in its own process.

use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::config::Config;
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::model::{Batch, Cache, Workspace};
use dsmoe_kernels::Precision;

use super::limits::UNKNOWN_MACHINE;
use super::records::{GridSpeeds, Speed as Measured};
use crate::cli::reproduce::Speed;
use crate::files::read_json;
use crate::memory;
use crate::models::{cache_bytes, default_precision, load_inference};
use crate::timing::resident::Mark;
use crate::ui::Ui;

/// Measurements of a speed, of which the best counts.
const ROUNDS: usize = 3;
/// Tokens of the prompt before decoding.
const PROMPT: usize = 16;
/// Longest sequence of a prefill.
const SEQUENCE: usize = 1024;

/// Measures the speed and memory of a model on given token ids.
pub(crate) fn run(args: &Speed, ui: &mut Ui) -> Result<()> {
    let mark = Mark::now();
    let precision = default_precision(args.device, args.dtype.unwrap_or(Precision::F32));
    let model = load_inference(&args.model, precision, args.device, args.gates())?;
    let ids: Vec<u32> = read_json(&args.ids)?;
    match args.batches[..] {
        [] => whole(&model, &ids, args.decode, mark, ui),
        _ => grid(&model, &ids, args.decode, &args.batches, ui),
    }
}

fn whole(model: &Inference, ids: &[u32], decode: usize, mark: Option<Mark>, ui: &mut Ui) -> Result<()> {
    let config = model.config();
    let seq = SEQUENCE.min(config.max_position).min(ids.len());
    let decode = decode.min(config.max_position - PROMPT.min(config.max_position));
    if seq < 2 || decode < 2 {
        bail!("a model of {} positions is too short for timing", config.max_position);
    }
    let ids = &ids[..ids.len() / seq * seq];
    let prefill = best(|| prefill(model, ids, seq))?;
    let options = GenerateOptions { max_tokens: decode, ..GenerateOptions::default() };
    let decoded = best(|| {
        let made = generate(model, &ids[..PROMPT.min(ids.len())], &options, |_| true)?;
        Ok(made.tokens.len().saturating_sub(1) as f64 / made.decode_seconds.max(1e-9))
    })?;
    let speed = Measured {
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
pub(crate) fn prefill(model: &Inference, ids: &[u32], seq: usize) -> Result<f64> {
    let (mut losses, mut workspace) = (vec![0.0; ids.len()], Workspace::default());
    let started = Instant::now();
    model.score(&mut losses, Batch { inputs: ids, targets: ids, seq }, None, &mut workspace)?;
    Ok(ids.len() as f64 / started.elapsed().as_secs_f64().max(1e-9))
}

/// Measures a prefill of all ids at once, and decoding of as many texts side by side as `batches` says.
fn grid(model: &Inference, ids: &[u32], tokens: usize, batches: &[usize], ui: &mut Ui) -> Result<()> {
    let seq = ids.len().min(model.config().max_position);
    if seq < PROMPT.saturating_add(tokens) || tokens == 0 {
        bail!("{seq} tokens of text are too few for a prompt of {PROMPT} and {tokens} to decode");
    }
    for &batch in batches {
        check_decode(model.config(), model.bytes() as u64, tokens, ("--batches", batch))?;
    }
    let speeds = GridSpeeds {
        prefill_tokens_per_s: best(|| prefill(model, &ids[..seq], seq))?,
        decode_tokens_per_s: batches
            .iter()
            .map(|&batch| best(|| decode(model, ids, tokens, batch)))
            .collect::<Result<_>>()?,
    };
    ui.result(&speeds, |speeds| format!("{speeds:?}"))
}

/// Refuses what [`decode`] cannot do: more positions than the model has, or more texts than the memory holds beside `weights` bytes of
/// weights. `texts` is the flag of their number, and the number.
pub(crate) fn check_decode(config: &Config, weights: u64, tokens: usize, texts: (&str, usize)) -> Result<()> {
    let (positions, (flag, batch)) = (PROMPT.saturating_add(tokens), texts);
    if positions > config.max_position {
        bail!(
            "--decode {tokens} behind a prompt of {PROMPT} tokens needs {positions} positions and the model has {}; use fewer",
            config.max_position
        );
    }
    // Beside its keys and values a text has logits and activations.
    let widest = config.layers().map(|layer| layer.intermediate).max().unwrap_or(0);
    let activations = 4 * (config.vocab_size as u128 + 16 * config.hidden as u128 + 4 * widest as u128);
    let needed = weights as u128 + batch as u128 * (cache_bytes(config, positions) + activations);
    let needed = u64::try_from(needed).unwrap_or(u64::MAX);
    let total = memory::total().unwrap_or(UNKNOWN_MACHINE);
    memory::check(&format!("{flag} {batch} with --decode {tokens}"), needed, Some(total), "use fewer texts")
}

/// Measures the tokens per second of `batch` texts that continue side by side by given tokens.
pub(crate) fn decode(model: &Inference, ids: &[u32], tokens: usize, batch: usize) -> Result<f64> {
    let mut workspace = Workspace::default();
    let mut caches: Vec<Cache> = (0..batch).map(|_| Cache::new(model, PROMPT + tokens)).collect();
    // Each text begins at another place.
    let text = |at: usize, i: usize| ids[(at * tokens / batch + i) % ids.len()];
    for (at, cache) in caches.iter_mut().enumerate() {
        let prompt: Vec<u32> = (0..PROMPT).map(|i| text(at, i)).collect();
        model.decode(&prompt, cache, None, &mut workspace)?;
    }
    let mut caches: Vec<&mut Cache> = caches.iter_mut().collect();
    let started = Instant::now();
    for i in PROMPT..PROMPT + tokens {
        let next: Vec<u32> = (0..batch).map(|at| text(at, i)).collect();
        model.decode_each(&next, &mut caches, None, &mut workspace)?;
    }
    Ok((tokens * batch) as f64 / started.elapsed().as_secs_f64().max(1e-9))
}
