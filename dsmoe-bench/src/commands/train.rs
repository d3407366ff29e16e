//! `dsmoe train`: plans and runs a training.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, bail};
use dsmoe_core::Device;
use dsmoe_core::Model;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_datasets::{CorpusOptions, Tokenizer};
use dsmoe_kernels::Precision;
use dsmoe_kernels::comm::{Communicator, What};
use dsmoe_router::RouterGradient;
use dsmoe_train::config::{Budget, NearDuplicates, TEACHER_TOP, TrainConfig};
use dsmoe_train::engine::Share;
use dsmoe_train::run::{RunOptions, TrainData, Trainer, check_out, lanes_of};
use dsmoe_train::{LARGEST_CACHE, RowShape, Zero, check_teacher};
use serde::Serialize;

use crate::cli::train::Train;
use crate::cli::values::Active;
use crate::estimate::{self, H100, flops_per_second, training_flops};
use crate::files::lossy;
use crate::format;
use crate::gpu;
use crate::interrupts::{INTERRUPTED, catch_interrupts_for, interrupted};
use crate::memory;
use crate::models::{load_model, show_config_notices, tokenizer, tokenizer_files};
use crate::processes::agree;
use crate::texts::{Text, load_on, open, total_bytes};
#[cfg(feature = "cuda")]
use crate::training::host_plan;
use crate::training::{MemoryUse, device_plan, drive, memory_plan, show_summary, teacher_memory};
use crate::ui::{Ui, stderr_line};

/// The plan of a run.
#[derive(Debug, Serialize)]
struct TrainPlan {
    #[serde(serialize_with = "lossy")]
    model: PathBuf,
    #[serde(serialize_with = "lossy")]
    out: PathBuf,
    steps: u64,
    tokens: u64,
    tokens_per_step: u64,
    /// Bytes of all files as stored.
    data_bytes: u64,
    data_files: usize,
    params: u64,
    budget: String,
    flops_per_step: f64,
    /// FLOPs of the whole run with the wanted share of active experts, its teacher included.
    flops: f64,
    /// Measured for a dry run alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<TimePlan>,
    /// Memory of the run by use.
    memory: Vec<MemoryUse>,
    /// The sum of `memory`.
    memory_bytes: u64,
    /// Memory of the GPU by use.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    device_memory: Vec<MemoryUse>,
    /// All memory of the GPU, where it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    device_memory_total: Option<u64>,
    /// Largest size of the teacher's cache on the disk after this run.
    #[serde(skip_serializing_if = "Option::is_none")]
    teacher_cache_bytes: Option<u64>,
    config: TrainConfig,
}

impl TrainPlan {
    /// The memory of the GPU that the run takes.
    fn device_bytes(&self) -> u64 {
        self.device_memory.iter().map(|memory| memory.bytes).sum()
    }
}

/// The time of a run at rates that were measured.
#[derive(Debug, Serialize)]
struct TimePlan {
    flops_per_second: f64,
    hours: f64,
    hours_h100: f64,
    #[serde(skip)]
    words: String,
}

/// The remedy where memory is short.
const LESS_MEMORY: &str = "use a smaller --batch and a larger --accumulate";

const START: What = What::of("the start of the training");

pub(crate) fn run(
    args: &Train,
    threads: Option<u16>,
    comm: &Arc<dyn Communicator>,
    ui: &mut Ui,
) -> Result<ExitCode> {
    let prepared = prepare(args, threads, &**comm, ui);
    let Some((config, texts)) = agree(&**comm, START, prepared)? else { return Ok(ExitCode::SUCCESS) };
    let zero = Zero::of(args.zero).unwrap_or_default();
    let outline = zero.on(comm.size()) == Zero::Parameters;
    let (model, tokenizer) = agree(&**comm, START, model_of(args, outline, ui))?;
    let cache = args.data.cache.as_deref();
    let sources = load_on(&**comm, &texts, (&tokenizer, config.bos), cache, ui)?;
    let filter = texts.len() > 1 || config.near_duplicates == Some(NearDuplicates::Drop);
    let data = TrainData { sources, texts: filter.then(|| tokenizer.token_texts()) };
    let options = RunOptions {
        resume: args.resume,
        force: args.force,
        stop_after: args.stop_after,
        teacher: args.teacher.clone(),
        teacher_cache: args.teacher_cache.clone(),
        device: args.device,
        recompute: args.recompute,
        zero,
        comm: comm.clone(),
        ..RunOptions::new(&args.model, &args.out)
    };
    let mut trainer = Trainer::new(model, data, config, options)?;
    catch_interrupts_for(ui, comm.rank() == 0)?;

    let summary = drive(&mut trainer, "training", &args.out, ui)?;
    ui.result(&summary, show_summary)?;
    if summary.finished || ui.call.is_some() {
        return Ok(ExitCode::SUCCESS);
    }
    let advice = format!("continue with: {}", resume_command(std::env::args()));
    if !interrupted() {
        ui.note(advice);
        return Ok(ExitCode::SUCCESS);
    }
    if comm.rank() == 0 {
        stderr_line(advice);
    }
    Ok(ExitCode::from(INTERRUPTED))
}

/// Reads the settings and opens the text. Wrong settings are reported before the model and the text are read. Returns nothing
/// when the plan was all that is wanted.
fn prepare(
    args: &Train,
    threads: Option<u16>,
    comm: &dyn Communicator,
    ui: &mut Ui,
) -> Result<Option<(TrainConfig, Vec<Text>)>> {
    let mut config = settings(args, threads)?;
    fit_sequences(args, &mut config, ui)?;
    let processes = args.plan_for.unwrap_or(comm.size());
    config.lanes.get_or_insert(processes);
    keep_apart(&args.model, &args.out)?;
    let (resume, force) = (args.resume, args.force);
    check_out(&RunOptions { resume, force, ..RunOptions::new(&args.model, &args.out) })?;
    let options = CorpusOptions {
        doc_separator: config.doc_separator.clone(),
        text_column: config.text_column.clone(),
        ..CorpusOptions::default()
    };
    let texts = open(&args.data, &options)?;
    for (name, folder) in [("--cache", &args.data.cache), ("--teacher-cache", &args.teacher_cache)] {
        if let Some(folder) = folder.as_ref().filter(|folder| folder.is_file()) {
            bail!("{name} {}: it is a file; name a folder", folder.display());
        }
    }
    let mut plan = plan(args, config.clone(), &texts, processes)?;
    if args.dry_run {
        if let Err(missing) = tokenizer_files(&args.model) {
            ui.note(format_args!("note: the training needs it: {missing:#}"));
        }
        ui.note("measuring this machine");
        plan.time = Some(time_plan(&plan)?);
        ui.result(&plan, show_plan)?;
        return Ok(None);
    }
    let here = plan.memory_bytes.saturating_mul(comm.place().locals as u64);
    memory::check("training", here, memory::total(), LESS_MEMORY)?;
    let on_gpu = plan.device_bytes();
    if let Some(total) = plan.device_memory_total.filter(|total| on_gpu > *total) {
        let [needed, total] = [on_gpu, total].map(format::bytes);
        bail!("training needs {needed} of the GPU's memory and it has {total}; {LESS_MEMORY}");
    }
    Ok(Some((config, texts)))
}

fn model_of(args: &Train, outline: bool, ui: &mut Ui) -> Result<(Model, Tokenizer)> {
    let model = if outline { Model::load_outline(&args.model)? } else { load_model(&args.model)? };
    show_config_notices(model.config(), ui);
    let tokenizer = tokenizer(&args.model, model.config(), ui)?;
    Ok((model, tokenizer))
}

/// Reads the settings of the file, overridden by flags, overridden by `--set`.
fn settings(args: &Train, threads: Option<u16>) -> Result<TrainConfig> {
    let mut config = match &args.config {
        Some(path) => TrainConfig::from_toml(path)?,
        None => TrainConfig::default(),
    };
    fn over<T: Clone>(field: &mut T, flag: &Option<T>) {
        if let Some(value) = flag {
            field.clone_from(value);
        }
    }
    if args.steps.is_some() || args.tokens.is_some() {
        (config.steps, config.tokens) = (args.steps, args.tokens);
    }
    if args.sparsity.is_some() || args.active_target.is_some() {
        config.sparsity = args.sparsity;
        (config.active_target, config.active_range) = match args.active_target {
            None => (None, None),
            Some(Active::Share(share)) => (Some(share), None),
            Some(Active::Range(range)) => (None, Some(range)),
        };
    }
    over(&mut config.batch, &args.batch);
    over(&mut config.seq, &args.seq);
    over(&mut config.accumulate, &args.accumulate);
    config.lanes = args.lanes.or(config.lanes);
    over(&mut config.lr, &args.lr);
    over(&mut config.router_lr_scale, &args.router_lr_scale);
    over(&mut config.separability, &args.separability);
    over(&mut config.gate_entropy, &args.gate_entropy);
    config.top_k = args.top_k.or(config.top_k);
    config.hold = args.hold.or(config.hold);
    config.teacher_weight = args.teacher_weight.or(config.teacher_weight);
    if args.device.is_gpu() {
        config.dtype = Precision::Bf16;
    }
    over(&mut config.dtype, &args.dtype);
    over(&mut config.seed, &args.seed);
    over(&mut config.keep, &args.keep);
    over(&mut config.valid_fraction, &args.valid_fraction);
    over(&mut config.valid_samples, &args.valid_samples);
    config.near_duplicates = args.near_duplicates.or(config.near_duplicates);
    over(&mut config.bos, &args.bos);
    over(&mut config.text_column, &args.data.text_column);
    config.warmup_steps = args.warmup_steps.or(config.warmup_steps);
    config.eval_every = args.eval_every.or(config.eval_every);
    config.save_every = args.save_every.or(config.save_every);
    config.doc_separator = args.data.doc_separator.clone().or(config.doc_separator);
    config.threads = threads.map(usize::from).or(config.threads);
    for setting in &args.set {
        config.set(setting)?;
    }
    if args.resume {
        config.lanes = config.lanes.or_else(|| lanes_of(&args.out));
    }
    Ok(config)
}

/// Shortens the default sequence to the positions of a smaller model.
fn fit_sequences(args: &Train, config: &mut TrainConfig, ui: &Ui) -> Result<()> {
    let names_seq = |setting: &String| setting.split('=').next().is_some_and(|key| key.trim() == "seq");
    let in_file = || -> Result<bool> {
        let Some(path) = &args.config else { return Ok(false) };
        let table: toml::Table = crate::files::read_toml(path)?.parse()?;
        Ok(table.contains_key("seq"))
    };
    let positions = Config::load(&args.model)?.max_position;
    if args.seq.is_some() || args.set.iter().any(names_seq) || in_file()? {
        if config.seq > positions {
            bail!("--seq is {}; use at most the model's max_position_embeddings {positions}", config.seq);
        }
        return Ok(());
    }
    if positions < config.seq {
        ui.note(format_args!("sequences of {positions} tokens, the positions of the model"));
        config.seq = positions;
    }
    Ok(())
}

fn plan(args: &Train, config: TrainConfig, texts: &[Text], processes: usize) -> Result<TrainPlan> {
    let model = Config::load(&args.model)?;
    let config = config.resolve_for(&model)?;
    let accounting = Accounting::of(&model);
    let (tokens_per_step, steps) = (config.tokens_per_step(), config.steps.unwrap_or(0));
    // Backward is twice the forward.
    let flops_per_token = 3.0 * accounting.mean_flops_per_token(accounting.num_experts, config.seq);
    let share = match config.budget() {
        Budget::Target(share) => share,
        Budget::Range(low, high) => (low + high) / 2.0,
        // The share that a fixed weight leads to is not known before.
        Budget::Weight(_) => 1.0,
    };
    let share = model.fixed_active().map_or(share, |active| active / accounting.num_experts);
    let tokens = (steps * tokens_per_step) as f64;
    let shares = (share, config.router_gradient.computed());
    let mut flops = tokens * training_flops(&accounting, model.num_experts().is_some(), shares, config.seq);
    let teacher = args.teacher.as_ref().map(|dir| check_teacher(dir, &model, config.seq)).transpose()?;
    if let Some(teacher) = &teacher {
        flops += tokens * Accounting::of(teacher).mean_flops_per_token(0.0, config.seq);
    }
    let text = if args.data.cache.is_some() { 0 } else { total_bytes(texts) };
    let mut memory = match args.device {
        Device::Cpu => {
            let share = Share::of(&config, processes, Zero::of(args.zero).unwrap_or_default())?;
            memory_plan(&model, &config, text, (share, args.recompute))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => host_plan(accounting.total, text),
    };
    if let Some(teacher) = &teacher {
        memory.push(teacher_memory(teacher, &config));
    }
    let device_memory = device_plan(&model, &config, args.device)?;
    let teacher_cache_bytes = args.teacher_cache.as_ref().map(|_| {
        let top = config.teacher_top.unwrap_or(TEACHER_TOP.min(model.vocab_size));
        let shape = RowShape { seq: config.seq, top, vocab: model.vocab_size };
        shape.bytes(steps * tokens_per_step / config.seq as u64).min(LARGEST_CACHE)
    });
    Ok(TrainPlan {
        model: args.model.clone(),
        out: args.out.clone(),
        steps,
        tokens: steps * tokens_per_step,
        tokens_per_step,
        data_bytes: total_bytes(texts),
        data_files: texts.iter().map(|text| text.corpus.files().len()).sum(),
        params: accounting.total,
        budget: match (model.num_experts(), model.fixed_active(), config.budget()) {
            (None, ..) => "dense model, no routers".to_owned(),
            (Some(experts), Some(active), _) => format!("{active} of {experts} experts active, by design"),
            (Some(_), None, Budget::Weight(weight)) => format!("sparsity loss of weight {weight}"),
            (Some(_), None, Budget::Target(share)) => format!("{} of experts active", format::percent(share)),
            (Some(_), None, Budget::Range(low, high)) => {
                let [low, high] = [low, high].map(format::percent);
                format!("{low} to {high} of experts active, drawn for every micro-batch")
            }
        },
        flops_per_step: flops_per_token * tokens_per_step as f64,
        flops,
        time: None,
        memory_bytes: memory.iter().fold(0u64, |sum, memory| sum.saturating_add(memory.bytes)),
        memory,
        device_memory,
        device_memory_total: gpu::memory_of(args.device),
        teacher_cache_bytes,
        config,
    })
}

/// Measures this machine, and estimates the time of a run.
fn time_plan(plan: &TrainPlan) -> Result<TimePlan> {
    let model = Config::load(&plan.model)?;
    let flops_per_second = flops_per_second(&model, plan.config.dtype);
    let hours = plan.flops / flops_per_second / 3600.0;
    let hours_h100 = H100.hours(plan.flops, model.num_experts().is_some());
    let (speed, dtype) = (format::flops(flops_per_second), plan.config.dtype.name());
    let speed = format!("{speed} FLOP/s in {dtype}, measured");
    let words = estimate::words(hours, &speed, hours_h100, (model.hidden, plan.params));
    Ok(TimePlan { flops_per_second, hours, hours_h100, words })
}

/// Refuses to write a run over the model that it starts from.
fn keep_apart(source: &Path, out: &Path) -> Result<()> {
    if let (Ok(from), Ok(to)) = (source.canonicalize(), out.canonicalize())
        && from.starts_with(to)
    {
        bail!("--out {}: it holds the model that is read; choose another --out", out.display());
    }
    Ok(())
}

fn show_plan(plan: &TrainPlan) -> String {
    let [steps, tokens_per_step, tokens] = [plan.steps, plan.tokens_per_step, plan.tokens].map(format::count);
    let files = match plan.data_files {
        1 => "1 file".to_owned(),
        files => format!("{files} files"),
    };
    let mut fields = vec![
        ("model", format!("{}, {} parameters", plan.model.display(), format::count(plan.params))),
        ("text", format!("{} in {files}", format::bytes(plan.data_bytes))),
        ("steps", format!("{steps} of {tokens_per_step} tokens, {tokens} tokens in all")),
        ("budget", plan.budget.clone()),
    ];
    fields.extend(estimator(plan.config.router_gradient).map(|words| ("router gradient", words)));
    fields.push(("arithmetic", format!("{} FLOPs per step", format::flops(plan.flops_per_step))));
    fields.extend(plan.time.as_ref().map(|time| ("time", time.words.clone())));
    let more = memory::total()
        .filter(|total| plan.memory_bytes > *total)
        .map(|total| format!(", more than the {} of this machine; {LESS_MEMORY}", format::bytes(total)));
    fields
        .push(("memory", format!("about {}{}", format::bytes(plan.memory_bytes), more.unwrap_or_default())));
    let uses = |memory: &[MemoryUse]| {
        memory.iter().map(|one| (one.what, format::bytes(one.bytes))).collect::<Vec<_>>()
    };
    fields.extend(uses(&plan.memory));
    if !plan.device_memory.is_empty() {
        let all = plan.device_bytes();
        let more = plan.device_memory_total.filter(|total| all > *total);
        let more =
            more.map(|total| format!(", more than the {} of the GPU; {LESS_MEMORY}", format::bytes(total)));
        fields.push(("GPU memory", format!("about {}{}", format::bytes(all), more.unwrap_or_default())));
        fields.extend(uses(&plan.device_memory));
    }
    if let Some(bytes) = plan.teacher_cache_bytes {
        fields.push(("teacher cache", format!("at most {} on the disk", format::bytes(bytes))));
    }
    fields.push(("out", plan.out.display().to_string()));
    format::fields(fields)
}

/// Describes the inactive pairs that the routers learn from, where it is not all of them.
fn estimator(rule: RouterGradient) -> Option<String> {
    match rule {
        _ if rule.is_full() => None,
        RouterGradient::Every(k) => Some(format!("inactive pairs of a layer in one of {k} micro-batches")),
        RouterGradient::Sample(share) => {
            Some(format!("{} of the inactive pairs, drawn", format::percent(share)))
        }
        RouterGradient::Full => None,
    }
}

/// Returns the command that continues the run that `args` started.
fn resume_command(args: impl Iterator<Item = String>) -> String {
    let (mut words, mut args) = (Vec::new(), args);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--stop-after" => drop(args.next()),
            "--resume" | "--force" => {}
            word if word.starts_with("--stop-after=") => {}
            word => words.push(quoted(word)),
        }
    }
    words.push("--resume".to_owned());
    words.join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resume_command_can_be_pasted() {
        let args =
            ["dsmoe", "train", "a b", "--force", "--stop-after", "5", "--doc-separator", "it's", "--steps=3"];
        assert_eq!(
            resume_command(args.into_iter().map(str::to_owned)),
            r"dsmoe train 'a b' --doc-separator 'it'\''s' --steps=3 --resume"
        );
    }
}
