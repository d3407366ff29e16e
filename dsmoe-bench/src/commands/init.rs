//! `dsmoe init`: writes a model with random weights.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::init::{InitOptions, init, preset, preset_names};
use serde::Serialize;

use crate::cli::model::Init;
use crate::format::{self, Table};
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct InitReport {
    out: PathBuf,
    params_total: u64,
    bytes: u64,
    dtype: String,
    seed: u64,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Preset {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    num_layers: usize,
    vocab_size: usize,
    params_total: u64,
}

#[derive(Debug, Serialize)]
struct Presets {
    presets: Vec<Preset>,
}

pub(crate) fn run(args: &Init, ui: &mut Ui) -> Result<()> {
    if args.list {
        return list(ui);
    }
    let out = args.out.as_deref().context("no output directory; use --out DIR")?;
    let config = match (&args.preset, &args.config) {
        (Some(name), _) => preset(name)?,
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
            Config::from_json(path, &text)?
        }
        (None, None) => anyhow::bail!("no architecture; use --preset NAME or --config FILE"),
    };
    // Read first, so that a wrong name is reported before gigabytes are written.
    let tokenizer = args.tokenizer.as_deref().map(read).transpose()?;
    let started = Instant::now();
    let options = InitOptions {
        dtype: args.dtype,
        seed: args.seed,
        max_shard_bytes: args.max_shard_size,
        force: args.force,
    };
    let mut progress = Progress::new(ui, "writing", Unit::Bytes, 0);
    let mut bytes = 0;
    let done = init(&config, out, &options, &mut |at| {
        bytes = at.done_bytes;
        progress.set(at.done_bytes, at.total_bytes, "");
    });
    progress.finish();
    done?;
    if let Some(tokenizer) = tokenizer {
        let path = out.join("tokenizer.json");
        std::fs::write(&path, tokenizer).with_context(|| format!("{}", path.display()))?;
    }
    let report = InitReport {
        out: out.to_path_buf(),
        params_total: Accounting::of(&config).total,
        bytes,
        dtype: args.dtype.to_string(),
        seed: args.seed,
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, |report| {
        format!(
            "{}: {} random parameters, {} of {} in {}",
            report.out.display(),
            format::count(report.params_total),
            format::bytes(report.bytes),
            report.dtype,
            format::duration(report.seconds)
        )
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("{}", path.display()))
}

fn list(ui: &mut Ui) -> Result<()> {
    let preset = |name: &'static str| -> Result<Preset> {
        let config = preset(name)?;
        Ok(Preset {
            name,
            hidden: config.hidden,
            intermediate: config.intermediate,
            num_layers: config.num_layers,
            vocab_size: config.vocab_size,
            params_total: Accounting::of(&config).total,
        })
    };
    let presets = Presets { presets: preset_names().map(preset).collect::<Result<_>>()? };
    ui.result(&presets, |presets| {
        let mut table =
            Table::new(["preset", "parameters", "layers", "hidden", "intermediate", "vocabulary"]);
        for preset in &presets.presets {
            table.row([
                preset.name.to_owned(),
                format::count(preset.params_total),
                preset.num_layers.to_string(),
                preset.hidden.to_string(),
                preset.intermediate.to_string(),
                preset.vocab_size.to_string(),
            ]);
        }
        table.show()
    })
}
