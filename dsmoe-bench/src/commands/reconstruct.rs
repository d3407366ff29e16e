//! `dsmoe reconstruct`: trains the FFNs of a DSMoE model to give what the dense ones give.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_train::reconstruct::{LayerReport, ReconstructOptions, ReconstructPaths, reconstruct};
use serde::Serialize;

use crate::calibration;
use crate::cli::reconstruct::Reconstruct;
use crate::files::lossy;
use crate::format;
use crate::interrupts::{CONTINUE, INTERRUPTED, Unpolled, catch_interrupts_for, stop_of};
use crate::memory;
use crate::progress::{Progress, Unit};
use crate::ui::{Ui, stderr_line};

#[derive(Debug, Serialize)]
struct Report {
    #[serde(serialize_with = "lossy")]
    model: PathBuf,
    #[serde(serialize_with = "lossy")]
    teacher: PathBuf,
    #[serde(serialize_with = "lossy")]
    out: PathBuf,
    finished: bool,
    tokens: usize,
    /// Means over layers of the relative local error on held-out sequences.
    local_error_before: f64,
    local_error_after: f64,
    layers: Vec<LayerReport>,
    options: ReconstructOptions,
    seconds: f64,
}

pub(crate) fn run(args: &Reconstruct, ui: &mut Ui) -> Result<ExitCode> {
    if args.calibration.calib.is_empty() {
        bail!("there is no text; name it with --calib PATH");
    }
    let config = Config::load(&args.model)?;
    let sequences = calibration::read(&args.calibration, &args.model, &config, args.seed, ui)?;
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    // Weights in f32, two streams, and what one layer reads and is to give.
    let bytes = 4 * (Accounting::of(&config).total + 4 * (tokens * config.hidden) as u64);
    memory::check("the reconstruction", bytes, memory::total(), "use fewer --samples")?;
    let options = ReconstructOptions {
        steps: args.steps,
        tokens: args.batch,
        lr: args.lr,
        router_lr_scale: args.router_lr_scale,
        drift: args.drift,
        seed: args.seed,
        precision: args.dtype,
    };
    let paths = ReconstructPaths {
        model: args.model.clone(),
        teacher: args.teacher.clone(),
        out: args.out.clone(),
        resume: args.resume,
    };
    catch_interrupts_for(ui, true)?;
    // A layer may take long. Those that are done are kept.
    let _unpolled = ui.call.is_none().then(|| Unpolled::begin(CONTINUE));
    let started = Instant::now();
    let mut progress = Progress::new(ui, "reconstructing layers", Unit::Parts, config.num_layers as u64);
    progress.polled();
    let layers = reconstruct(&paths, &sequences, &options, &mut |report, layers| {
        progress.note(&show_layer(report));
        progress.set(report.layer as u64 + 1, layers as u64, "");
        !stop_of(ui).load(Ordering::Relaxed)
    });
    progress.finish();
    let layers = layers?;
    let mean = |of: fn(&LayerReport) -> f64| layers.iter().map(of).sum::<f64>() / layers.len().max(1) as f64;
    let report = Report {
        model: args.model.clone(),
        teacher: args.teacher.clone(),
        out: args.out.clone(),
        finished: layers.len() == config.num_layers,
        tokens,
        local_error_before: mean(|layer| layer.before),
        local_error_after: mean(|layer| layer.after),
        options,
        seconds: started.elapsed().as_secs_f64(),
        layers,
    };
    ui.result(&report, show)?;
    if report.finished {
        return Ok(ExitCode::SUCCESS);
    }
    if ui.call.is_none() {
        stderr_line("continue with the same command and --resume".to_owned());
    }
    Ok(ExitCode::from(INTERRUPTED))
}

fn show_layer(report: &LayerReport) -> String {
    let LayerReport { layer, before, after, .. } = report;
    format!("layer {layer}: local error {before:.4} before, {after:.4} after")
}

fn show(report: &Report) -> String {
    let layers = report.layers.len();
    let state = if report.finished { "reconstructed" } else { "stopped" };
    let (before, after) = (report.local_error_before, report.local_error_after);
    format::fields(vec![
        (
            state,
            format!(
                "{layers} layers on {} tokens in {}",
                format::count(report.tokens as u64),
                format::duration(report.seconds)
            ),
        ),
        (
            "local error",
            format!(
                "{before:.4} before, {after:.4} after, relative to the dense output, on held-out sequences; not a perplexity"
            ),
        ),
        ("out", report.out.display().to_string()),
    ])
}
