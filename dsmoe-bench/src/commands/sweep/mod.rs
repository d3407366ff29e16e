//! `dsmoe sweep`: loss, tasks and time of one model at several shares of active experts.

mod point;
mod report;

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_datasets::CorpusOptions;
use dsmoe_datasets::tasks::{Loaded, Options, Task, TaskFiles, sha256};
use dsmoe_train::tasks::model_sha256;
use serde_json::{Value, json};

use self::point::{Point, Text, Work};
use crate::cli::gates::GateArgs;
use crate::cli::sweep::Sweep;
use crate::files::{self, POINTS, PointFolder, write_json};
use crate::interrupts::{CONTINUE, INTERRUPTED, STOP, Unpolled, catch_interrupts};
use crate::models::{load_inference, tokenizer};
use crate::reproduce::speed::check_decode;
use crate::texts::{load, open, options};
use crate::ui::Ui;

/// The default window length.
const SEQ: usize = 1024;
/// File of what a sweep measures.
const SETTINGS: &str = "sweep.json";

pub(crate) fn run(args: &Sweep, ui: &mut Ui) -> Result<ExitCode> {
    let config = Config::load(&args.model)?;
    let shares = shares(args, &config)?;
    check_times(args, &config)?;
    let tokenizer = tokenizer(&args.model, &config, ui)?;
    let tasks = tasks(args)?;
    let texts = texts(args, &tokenizer, ui)?;
    let settings = settings(args, &config, &texts, &tasks)?;
    let folder = args.out.as_deref().map(|out| PointFolder {
        out,
        resume: args.resume,
        file: SETTINGS,
        settings: &settings,
    });
    if let Some(folder) = folder {
        folder.check()?;
        catch_interrupts()?;
    }
    let _unpolled = args.out.as_ref().map(|_| Unpolled::begin(CONTINUE));
    let open = |model: &Path| -> Result<Inference> {
        load_inference(model, args.dtype, dsmoe_core::Device::Cpu, GateArgs::default())
    };
    let dense = args.against.as_deref().map(open).transpose()?;
    let mut model = open(&args.model)?;
    // A command that is refused until here leaves no folder, for which the corrected one would need --resume.
    if let Some(folder) = folder {
        folder.make()?;
    }
    let work =
        Work { args, texts: &texts, tokenizer: &tokenizer, tasks: &tasks, seq: seq(args, &config), ui };
    let mut points = Vec::new();
    // The dense model has no share.
    for active in dense.iter().map(|_| None).chain(shares.into_iter().map(Some)) {
        let name = active.map_or("dense".to_owned(), |active| active.to_string());
        let point = done_or(args, &name, || match (active, &dense) {
            (None, Some(dense)) => work.measure(dense, None, None),
            _ => {
                model.set_active(active.unwrap_or(1.0))?;
                work.measure(&model, active, dense.as_ref())
            }
        });
        if STOP.load(Ordering::Relaxed) {
            ui.note("dsmoe: stopped; run the same command with --resume to continue");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        points.push(point?);
    }
    if let Some(out) = &args.out {
        write_json(&out.join("results.json"), &json!({ "settings": settings, "points": points }))?;
        crate::report::files::write(&report::of(&args.model, &points), out)?;
    }
    ui.result(&json!({ "settings": settings, "points": points }), |_| report::show(&points))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns a point that is done, or computes and keeps it.
fn done_or(args: &Sweep, name: &str, compute: impl FnOnce() -> Result<Point>) -> Result<Point> {
    match &args.out {
        Some(out) => files::done_or(&out.join(POINTS).join(format!("{name}.json")), compute),
        None => compute(),
    }
}

/// Returns the shares to measure, ascending: those asked for, or all that the model stores.
fn shares(args: &Sweep, config: &Config) -> Result<Vec<f64>> {
    let budgets = config.moe.as_ref().map_or(&[][..], |moe| &moe.parts.budgets);
    let (Some(first), Some(last)) = (budgets.first(), budgets.last()) else {
        bail!(
            "{}: this model stores no thresholds by budget; give one made by `dsmoe convert` with --calib, or trained by \
             `dsmoe train --active-target 0.25..1.0`",
            args.model.display()
        );
    };
    let mut shares = match args.active[..] {
        [] => budgets.iter().map(|budget| budget.active).collect(),
        _ => args.active.clone(),
    };
    let known = first.active..=last.active;
    if let Some(wrong) = shares.iter().find(|share| !known.contains(share)) {
        bail!("--active {wrong}: the model serves shares from {} to {}", first.active, last.active);
    }
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    Ok(shares)
}

fn seq(args: &Sweep, config: &Config) -> usize {
    args.seq.unwrap_or(SEQ.min(config.max_position))
}

fn tasks(args: &Sweep) -> Result<Vec<Loaded>> {
    let Some(folder) = args.task_data.as_ref().filter(|_| !args.tasks.is_empty()) else {
        return Ok(Vec::new());
    };
    let options = Options { limit: args.limit, ..Options::default() };
    let files = TaskFiles::folder(folder);
    args.tasks.iter().map(|name| Ok(Loaded::load(Task::named(name)?, &files, &options)?)).collect()
}

fn texts(args: &Sweep, tokenizer: &dsmoe_datasets::Tokenizer, ui: &Ui) -> Result<Vec<Text>> {
    let defaults: CorpusOptions = options(&args.data);
    let sources = load(&open(&args.data, &defaults)?, tokenizer, args.bos, args.data.cache.as_deref(), ui)?;
    let total: f64 = sources.iter().map(|source| source.weight).sum();
    let limit = args.limit_tokens.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let text = |source: &dsmoe_datasets::TokenSource| {
        let mut ids = Vec::new();
        source.tokens.read(0..source.tokens.len().min(limit), &mut ids)?;
        Ok(Text { name: source.name.clone(), share: source.weight / total, ids })
    };
    sources.iter().map(text).collect()
}

/// Describes everything that the numbers of a point depend on, apart from its share.
fn settings(args: &Sweep, config: &Config, texts: &[Text], tasks: &[Loaded]) -> Result<Value> {
    let texts = texts.iter().map(|text| {
        let ids: String = text.ids.iter().map(|id| format!("{id} ")).collect();
        json!({ "name": text.name, "share": text.share, "tokens": text.ids.len(), "sha256": sha256(&ids) })
    });
    let tasks = tasks.iter().map(|task| json!({ "name": task.name(), "items": task.documents().len() }));
    Ok(json!({
        "model": args.model.display().to_string(),
        "model_sha256": model_sha256(&args.model)?,
        "against_sha256": args.against.as_deref().map(model_sha256).transpose()?,
        "dtype": args.dtype.name(),
        "seq": seq(args, config),
        "texts": texts.collect::<Vec<Value>>(),
        "tasks": tasks.collect::<Vec<Value>>(),
        "prefill": args.prefill,
        "decode": args.decode,
        "batch": args.batch,
        "repeats": args.repeats,
        "threads": rayon::current_num_threads(),
    }))
}

/// Refuses to time more than the models have positions and the machine memory for.
fn check_times(args: &Sweep, config: &Config) -> Result<()> {
    if args.repeats == 0 {
        return Ok(());
    }
    let dense = args.against.as_deref().map(Config::load).transpose()?;
    let configs = || [Some(config), dense.as_ref()].into_iter().flatten();
    let weights: u64 = configs().map(|config| Accounting::of(config).total * args.dtype.bytes() as u64).sum();
    configs().try_for_each(|config| check_decode(config, weights, args.decode, ("--batch", args.batch)))
}
