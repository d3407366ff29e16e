//! `dsmoe init`: writes a model with random weights.

use std::time::Instant;

use anyhow::{Context, Result};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::init::{InitOptions, init, preset, preset_names};
use serde_json::json;

use crate::cli::model::Init;
use crate::files::read;
use crate::format::{self, Table};
use crate::memory;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

pub(crate) fn run(args: &Init, ui: &mut Ui) -> Result<()> {
    if args.list {
        return list(ui);
    }
    let out = args.out.as_deref().context("no output directory; use --out DIR")?;
    let config = match (&args.preset, &args.config) {
        (Some(name), _) => preset(name)?,
        (None, Some(path)) => Config::from_json(path, &read(path)?)?,
        (None, None) => anyhow::bail!("no architecture; use --preset NAME or --config FILE"),
    };
    // Read first, so that a wrong name is reported before gigabytes are written.
    let tokenizer = args.tokenizer.as_deref().map(read).transpose()?;
    let needed = Accounting::of(&config).total.saturating_mul(args.dtype.size() as u64);
    memory::check_disk("the model", needed, out, "use a smaller model or --dtype bf16")?;
    let started = Instant::now();
    let options = InitOptions {
        dtype: args.dtype,
        seed: args.seed,
        max_shard_bytes: args.max_shard_size,
        force: args.force,
        tokenizer,
    };
    let mut bytes = 0;
    Progress::during(ui, "writing", Unit::Bytes, |show| {
        init(&config, out, &options, &mut |at| {
            bytes = at.done_bytes;
            show(at.done_bytes, at.total_bytes);
        })
    })?;
    let (place, params) = (out.display().to_string(), Accounting::of(&config).total);
    let (dtype, seconds) = (args.dtype.to_string(), started.elapsed().as_secs_f64());
    let report = json!({
        "out": place, "params_total": params, "bytes": bytes, "dtype": dtype, "seed": args.seed, "seconds": seconds,
    });
    ui.result(&report, |_| {
        let (params, bytes) = (format::count(params), format::bytes(bytes));
        format!("{place}: {params} random parameters, {bytes} of {dtype} in {}", format::duration(seconds))
    })
}

fn list(ui: &mut Ui) -> Result<()> {
    let header = "preset | parameters | layers | hidden | intermediate | vocabulary";
    let (mut table, mut presets) = (Table::new(header.split(" | ")), Vec::new());
    for name in preset_names() {
        let config = preset(name)?;
        let params_total = Accounting::of(&config).total;
        let Config { hidden, intermediate, num_layers, vocab_size, .. } = config;
        table.row([
            name.to_owned(),
            format::count(params_total),
            num_layers.to_string(),
            hidden.to_string(),
            intermediate.to_string(),
            vocab_size.to_string(),
        ]);
        presets.push(json!({
            "name": name, "hidden": hidden, "intermediate": intermediate, "num_layers": num_layers,
            "vocab_size": vocab_size, "params_total": params_total,
        }));
    }
    ui.result(&json!({ "presets": presets }), |_| table.show())
}
