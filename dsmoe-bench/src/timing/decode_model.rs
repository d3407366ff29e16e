//! `dsmoe bench decode MODEL`: times decoding by a model directory beside a dense one.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_core::config::{CONFIG_FILE, Config};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::{Device, Inference};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use dsmoe_train::eval::{EvalOptions, evaluate};

use super::checks::{check_memory, check_positions};
use super::decode::{Used, active_share, cost, decode};
use super::model::{describe, parameters};
use super::output::Output;
use super::row::Row;
use super::turns::medians;
use super::values::random_ids;
use crate::cli::bench::Decode;
use crate::models::cache_bytes;

pub(crate) fn check(args: &Decode, dir: &Path) -> Result<()> {
    check_positions(args.prompt, args.tokens)?;
    let config = Config::load(dir)?;
    if config.thresholds.is_none() && args.dense.is_none() {
        let place = dir.join(CONFIG_FILE);
        bail!(
            "{}: the model has no thresholds to leave out; name the dense one with --dense",
            place.display()
        );
    }
    let configs = [Some(config), args.dense.as_deref().map(Config::load).transpose()?];
    for config in configs.iter().flatten() {
        let (positions, asked) = (config.max_position, args.prompt + args.tokens + 1);
        if asked > positions {
            bail!("--prompt and --tokens ask for {asked} positions and the model has {positions}; use fewer");
        }
        for precision in args.common.precisions(&super::decode::PRECISIONS) {
            let weights = parameters(config) * (4 + 2 * precision.bytes() as u128);
            check_memory(weights + cache_bytes(config, args.prompt + args.tokens))?;
        }
    }
    Ok(())
}

pub(crate) fn run(args: &Decode, dir: &Path, output: &mut Output<'_>) -> Result<()> {
    let precisions = args.common.precisions_on(args.device, &super::decode::PRECISIONS);
    output.each(&[dir], precisions, |dir, precision, output| measure(args, dir, precision, output))
}

fn measure(args: &Decode, dir: &Path, precision: Precision, output: &mut Output<'_>) -> Result<Vec<Row>> {
    let dense = match &args.dense {
        Some(dense) => Inference::load_on(dense, precision, args.device)?,
        None => without_thresholds(dir, precision, args.device)?,
    };
    let models = [dense, Inference::load_on(dir, precision, args.device)?];
    let vocab = models.iter().map(|model| model.config().vocab_size).min().unwrap_or(1);
    let prompt = random_ids(args.prompt, vocab, Rng::new(0x9a, 0));
    let times = medians(models.len(), usize::from(args.common.repeats), |model| {
        decode(&models[model], &prompt, args.tokens)
    })?;
    // The positions in the cache, mean over the new tokens.
    let context = args.prompt as f64 + args.tokens as f64 / 2.0;
    let whole = cost(models[0].config(), precision, Used::of_experts(1.0), context);
    let rows = models.iter().zip(&times).zip(["dense", "model"]);
    rows.map(|((model, &seconds), name)| {
        let (share, used) = used(model, &prompt, args.tokens)?;
        let config = model.config();
        let mut row = Row::new("decode", name, args.tokens, config.hidden, precision);
        describe(&mut row, config, None);
        (row.active, row.active_measured) = (None, Some(share));
        let cost = cost(config, precision, used, context);
        row.measured_on(args.device, seconds / args.tokens as f64, cost, precision, &mut output.ceilings);
        row.seconds = seconds;
        row.tokens_per_s = Some(args.tokens as f64 / seconds);
        row.against_dense(times[0], cost.bytes / whole.bytes);
        Ok(row)
    })
    .collect()
}

/// Loads the weights of a model with thresholds as a dense model: thresholds change none.
fn without_thresholds(dir: &Path, precision: Precision, device: Device) -> Result<Inference> {
    let mut config = Config::load(dir)?;
    config.thresholds = None;
    // Another configuration beside the same files.
    let beside = tempfile::tempdir().context("the folder for temporary files")?;
    config.save(beside.path())?;
    let dir = fs::canonicalize(dir).with_context(|| dir.display().to_string())?;
    for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        if name.to_string_lossy().contains(".safetensors") {
            link(&path, &beside.path().join(name)).with_context(|| path.display().to_string())?;
        }
    }
    Ok(Inference::load_on(beside.path(), precision, device)?)
}

/// Makes a file that is read as `from` is.
fn link(from: &Path, to: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::symlink(from, to);
    #[cfg(not(unix))]
    return fs::copy(from, to).map(drop);
}

/// Returns the share of the experts, or with thresholds of the linears' weights, that the new tokens use, and its parts.
fn used(model: &Inference, prompt: &[u32], tokens: usize) -> Result<(f64, Used)> {
    if model.config().thresholds.is_none() {
        let has_experts = model.config().num_experts().is_some();
        let active = if has_experts { active_share(model, prompt, tokens)? } else { 1.0 };
        return Ok((active, Used::of_experts(active)));
    }
    let options = GenerateOptions { max_tokens: tokens, ..GenerateOptions::default() };
    let generation = generate(model, prompt, &options, |_| true)?;
    let ids = [prompt, &generation.tokens].concat();
    let found = evaluate(model, &ids, EvalOptions::new(ids.len()), &mut |_, _| {})?.used_weights;
    let Some(found) = found else { bail!("no token of the text used a weight; use more --tokens") };
    // Of the FFN's three products two read what gate and up read.
    let ffn = (2.0 * found.ffn + found.neurons) / 3.0;
    let [queries, keys] = model.config().attention_widths(0).map(|width| width as f64);
    let attention =
        (found.attention * (queries + 2.0 * keys) + found.heads * queries) / (2.0 * (queries + keys));
    Ok((found.all, Used { attention, ffn }))
}
