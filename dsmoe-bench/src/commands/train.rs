//! `dsmoe train`: a run, its plan, and its progress.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};
use dsmoe_core::Device;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
#[cfg(feature = "cuda")]
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_datasets::CorpusOptions;
use dsmoe_datasets::overlap::Removed;
use dsmoe_kernels::{Precision, cross_entropy};
use dsmoe_train::config::{Budget, NearDuplicates, TrainConfig};
use dsmoe_train::eval::{DomainReport, EvalReport};
use dsmoe_train::metrics::StepRecord;
use dsmoe_train::run::{Observer, Outcome, RunOptions, TrainData, Trainer};
use serde::Serialize;

use super::eval::domain_table;
use super::sources::{Text, load, open, total_bytes};
use super::{INTERRUPTED, STOP, catch_interrupts, load_model, tokenizer};
use crate::cli::Train;
use crate::format;
use crate::memory;
use crate::progress::{Progress, Unit};
use crate::ui::{Ui, stderr_line};

/// What a run would do.
#[derive(Debug, Serialize)]
struct Plan {
    model: PathBuf,
    out: PathBuf,
    steps: u64,
    tokens: u64,
    tokens_per_step: u64,
    /// Of all files, as they lie.
    data_bytes: u64,
    data_files: usize,
    params: u64,
    budget: String,
    flops_per_step: f64,
    /// What the run will hold in memory, by its use.
    memory: Vec<Memory>,
    /// All of it together.
    memory_bytes: u64,
    /// The same of a GPU.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    device_memory: Vec<Memory>,
    config: TrainConfig,
}

/// One use of memory.
#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    what: &'static str,
    pub(crate) bytes: u64,
}

/// What a run came to.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) finished: bool,
    step: u64,
    steps: u64,
    tokens: u64,
    loss: Option<f64>,
    lm_loss: Option<f64>,
    sparsity_loss: Option<f64>,
    activation_ratio: Option<f64>,
    valid_tokens: usize,
    valid_nll: Option<f64>,
    valid_ppl: Option<f64>,
    valid_active_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    valid_domains: Vec<DomainReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sources: Vec<SourceSummary>,
    seconds: f64,
    tokens_per_s: f64,
    out: PathBuf,
    checkpoint: Option<PathBuf>,
}

/// What was trained on of one of several sources.
#[derive(Debug, Serialize)]
struct SourceSummary {
    name: String,
    share: f64,
    train_tokens: usize,
    valid_tokens: usize,
    near_duplicates: Removed,
}

/// The sources of a mixture, or the one whose near duplicates were dropped.
fn sources_of(trainer: &Trainer) -> Vec<SourceSummary> {
    let mixture = trainer.mixture();
    if mixture.parts().len() == 1 && !mixture.filtered() {
        return Vec::new();
    }
    let source = |part: &dsmoe_datasets::mixture::Part| SourceSummary {
        name: part.name.clone(),
        share: part.share,
        train_tokens: part.split.train_len(),
        valid_tokens: part.split.valid_tokens().len(),
        near_duplicates: part.removed,
    };
    mixture.parts().iter().map(source).collect()
}

pub(crate) fn run(args: &Train, threads: Option<u16>, ui: &mut Ui) -> Result<ExitCode> {
    let config = settings(args, threads)?;
    keep_apart(&args.model, &args.out)?;
    let options = CorpusOptions {
        doc_separator: config.doc_separator.clone(),
        text_column: config.text_column.clone(),
    };
    let texts = open(&args.data, &options)?;
    // Wrong settings are told before the model and the text are read.
    let plan = plan(args, config.clone().resolve()?, &texts)?;
    if args.dry_run {
        ui.result(&plan, show_plan)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mend = "use a smaller --batch and a larger --accumulate";
    memory::check("training", plan.memory_bytes, memory::total(), mend)?;
    let model = load_model(&args.model)?;
    let tokenizer = tokenizer(&args.model, model.config())?;
    let sources = load(&texts, &tokenizer, config.bos, args.data.cache.as_deref(), ui)?;
    let filter = texts.len() > 1 || config.near_duplicates == Some(NearDuplicates::Drop);
    let data = TrainData { sources, texts: filter.then(|| tokenizer.token_texts()) };
    let options = RunOptions {
        out: args.out.clone(),
        source: args.model.clone(),
        resume: args.resume,
        force: args.force,
        stop_after: args.stop_after,
        device: args.device,
    };
    let mut trainer = Trainer::new(model, data, config, options)?;
    catch_interrupts()?;

    let summary = drive(&mut trainer, "training", &args.out, ui)?;
    ui.result(&summary, show_summary)?;
    if summary.finished {
        return Ok(ExitCode::SUCCESS);
    }
    let advice = format!("continue with: {}", resume_command(std::env::args()));
    if STOP.load(Ordering::Relaxed) {
        stderr_line(advice);
        return Ok(ExitCode::from(INTERRUPTED));
    }
    ui.note(advice);
    Ok(ExitCode::SUCCESS)
}

/// Runs `trainer` to its end or to an interruption, with progress.
pub(crate) fn drive(trainer: &mut Trainer, what: &str, out: &Path, ui: &Ui) -> Result<Summary> {
    let config = trainer.config().clone();
    let steps = config.steps.unwrap_or(0);
    let first = trainer.step();
    ui.note(format_args!(
        "{what}: {} parameters, {} steps of {} tokens out of {}",
        format::amount(
            trainer.model().layout().entries().iter().map(|entry| entry.range.len()).sum::<usize>() as f64
        ),
        format::count(steps),
        format::count(config.tokens_per_step()),
        format::count(trainer.mixture().train_len() as u64)
    ));
    let mut progress = Progress::new(ui, what, Unit::Steps, steps);
    progress.line_every(config.log_every);
    let mut view = View { progress, steps, last: None, eval: None, saved: None };
    let outcome = trainer.run(&mut view, &STOP);
    let View { progress, last, eval, saved, .. } = view;
    progress.finish();
    let finished = outcome? == Outcome::Finished;
    let step = trainer.step();
    let seconds = last.as_ref().map_or(0.0, |record| record.wall_s);
    let trained = (step - first) * config.tokens_per_step();
    Ok(Summary {
        finished,
        step,
        steps,
        tokens: step * config.tokens_per_step(),
        loss: last.as_ref().map(|record| record.loss),
        lm_loss: last.as_ref().map(|record| record.lm_loss),
        sparsity_loss: last.as_ref().and_then(|record| record.sparsity_loss),
        activation_ratio: last.as_ref().and_then(|record| record.activation_ratio),
        valid_tokens: trainer.mixture().valid_len(),
        valid_nll: eval.as_ref().map(|eval| eval.nll),
        valid_ppl: eval.as_ref().map(|eval| eval.ppl),
        valid_active_ratio: eval.as_ref().and_then(|eval| eval.active_ratio),
        valid_domains: eval.map(|eval| eval.domains).unwrap_or_default(),
        sources: sources_of(trainer),
        seconds,
        tokens_per_s: if seconds > 0.0 { trained as f64 / seconds } else { 0.0 },
        out: out.to_path_buf(),
        checkpoint: saved,
    })
}

/// The file's settings, overridden by flags, overridden by `--set`.
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
    fn over_option<T: Clone>(field: &mut Option<T>, flag: &Option<T>) {
        if flag.is_some() {
            field.clone_from(flag);
        }
    }
    if args.steps.is_some() || args.tokens.is_some() {
        (config.steps, config.tokens) = (args.steps, args.tokens);
    }
    if args.sparsity.is_some() || args.active_target.is_some() {
        (config.sparsity, config.active_target) = (args.sparsity, args.active_target);
    }
    over(&mut config.batch, &args.batch);
    over(&mut config.seq, &args.seq);
    over(&mut config.accumulate, &args.accumulate);
    over(&mut config.lr, &args.lr);
    over(&mut config.router_lr_scale, &args.router_lr_scale);
    if args.device.is_gpu() {
        config.dtype = Precision::Bf16;
    }
    over(&mut config.dtype, &args.dtype);
    over(&mut config.seed, &args.seed);
    over(&mut config.keep, &args.keep);
    over(&mut config.valid_fraction, &args.valid_fraction);
    over(&mut config.valid_samples, &args.valid_samples);
    over_option(&mut config.near_duplicates, &args.near_duplicates);
    over(&mut config.bos, &args.bos);
    over(&mut config.text_column, &args.data.text_column);
    over_option(&mut config.warmup_steps, &args.warmup_steps);
    over_option(&mut config.eval_every, &args.eval_every);
    over_option(&mut config.save_every, &args.save_every);
    over_option(&mut config.doc_separator, &args.data.doc_separator);
    over_option(&mut config.threads, &threads.map(usize::from));
    for setting in &args.set {
        config.set(setting)?;
    }
    Ok(config)
}

fn plan(args: &Train, config: TrainConfig, texts: &[Text]) -> Result<Plan> {
    let model = Config::load(&args.model)?;
    let accounting = Accounting::of(&model);
    let (tokens_per_step, steps) = (config.tokens_per_step(), config.steps.unwrap_or(0));
    let all_experts = model.num_experts().map_or(0.0, |experts| experts as f64);
    // Backward is twice the forward.
    let flops_per_token = 3.0 * accounting.flops_per_token(all_experts, config.seq as f64 / 2.0);
    let text = if args.data.cache.is_some() { 0 } else { total_bytes(texts) };
    let memory = match args.device {
        Device::Cpu => memory_plan(&model, &config, accounting.total, text),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => host_plan(accounting.total, text),
    };
    let device_memory = device_plan(&model, &config, args.device)?;
    Ok(Plan {
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
        },
        flops_per_step: flops_per_token * tokens_per_step as f64,
        memory_bytes: memory.iter().map(|memory| memory.bytes).sum(),
        memory,
        device_memory,
        config,
    })
}

/// Refuses to write a run over the model that it starts from.
fn keep_apart(source: &Path, out: &Path) -> Result<()> {
    let same = match (source.canonicalize(), out.canonicalize()) {
        (Ok(source), Ok(out)) => source.starts_with(&out),
        _ => false,
    };
    if same {
        bail!("--out {}: it holds the model that is read; choose another --out", out.display());
    }
    Ok(())
}

/// What training allocates, from the sizes alone: the arenas, then what a micro-batch of `tokens` needs.
pub(crate) fn memory_plan(model: &Config, config: &TrainConfig, params: u64, data_bytes: u64) -> Vec<Memory> {
    let tokens = config.batch * config.seq;
    let (queries, keys) = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim);
    // Of a layer: its two inputs and their norms, queries and attention's output, keys, values, the FFN's two.
    let kept: usize = model
        .layers()
        .map(|shape| {
            let attention = 2 * model.head_dim * (shape.num_heads + shape.num_kv_heads) + shape.num_heads;
            4 * model.hidden + attention + 2 + 2 * shape.intermediate
        })
        .sum();
    let flow = 5 * model.hidden + 2 * queries + 2 * keys + 2;
    // Of the FFN at work: one activation of every pair, and five of the active ones.
    let active = match config.budget() {
        _ if model.moe.is_none() => {
            model.fixed_active().zip(model.num_experts()).map_or(1.0, |(active, of)| active / of as f64)
        }
        Budget::Target(share) => share,
        Budget::Weight(_) => 1.0,
    };
    let ffn = tokens as f64 * model.intermediate as f64 * (1.0 + 5.0 * active);
    let head = cross_entropy::Dims { tokens, hidden: model.hidden, vocab: model.vocab_size };
    let logits = head.chunk().min(tokens) * model.vocab_size;
    let f32s = |values: usize| 4 * values as u64;
    let memory = |what, bytes| Memory { what, bytes };
    vec![
        memory("  weights", 4 * params),
        memory("  gradients", 4 * params),
        memory("  moments", 8 * params),
        memory("  kept activations", f32s(tokens * kept)),
        memory("  residual stream", f32s(tokens * flow)),
        memory("  FFN at work", 4 * ffn as u64),
        memory("  logits", f32s(logits)),
        // A token of text is about four bytes, and four bytes as a number.
        memory("  text", data_bytes),
    ]
}

/// What a run that trains on a GPU holds here: what it loads and saves.
#[cfg(feature = "cuda")]
fn host_plan(params: u64, data_bytes: u64) -> Vec<Memory> {
    let memory = |what, bytes| Memory { what, bytes };
    vec![memory("  weights", 4 * params), memory("  moments", 8 * params), memory("  text", data_bytes)]
}

#[cfg(feature = "cuda")]
fn device_plan(model: &Config, config: &TrainConfig, device: Device) -> Result<Vec<Memory>> {
    if !device.is_gpu() {
        return Ok(Vec::new());
    }
    let uses = CudaTrainer::memory(model, config.batch * config.seq)?;
    Ok(uses.iter().map(|part| Memory { what: part.what, bytes: part.bytes as u64 }).collect())
}

#[cfg(not(feature = "cuda"))]
fn device_plan(_: &Config, _: &TrainConfig, _: Device) -> Result<Vec<Memory>> {
    Ok(Vec::new())
}

fn show_plan(plan: &Plan) -> String {
    let mut fields = vec![
        ("model", format!("{}, {} parameters", plan.model.display(), format::count(plan.params))),
        (
            "text",
            match plan.data_files {
                1 => format!("{} in 1 file", format::bytes(plan.data_bytes)),
                files => format!("{} in {files} files", format::bytes(plan.data_bytes)),
            },
        ),
        (
            "steps",
            format!(
                "{} of {} tokens, {} tokens in all",
                format::count(plan.steps),
                format::count(plan.tokens_per_step),
                format::count(plan.tokens)
            ),
        ),
        ("budget", plan.budget.clone()),
        ("arithmetic", format!("{} FLOPs per step", format::flops(plan.flops_per_step))),
        ("memory", format!("about {}", format::bytes(plan.memory_bytes))),
    ];
    fields.extend(plan.memory.iter().map(|memory| (memory.what, format::bytes(memory.bytes))));
    if !plan.device_memory.is_empty() {
        let all = plan.device_memory.iter().map(|memory| memory.bytes).sum();
        fields.push(("GPU memory", format!("about {}", format::bytes(all))));
        fields.extend(plan.device_memory.iter().map(|memory| (memory.what, format::bytes(memory.bytes))));
    }
    fields.push(("out", plan.out.display().to_string()));
    format::fields(fields)
}

fn show_summary(summary: &Summary) -> String {
    let state = if summary.finished { "finished" } else { "stopped" };
    let mut fields = vec![(
        state,
        format!(
            "step {} of {}, {} tokens in {} ({:.0}/s)",
            summary.step,
            summary.steps,
            format::count(summary.tokens),
            format::duration(summary.seconds),
            summary.tokens_per_s
        ),
    )];
    if let Some(loss) = summary.lm_loss {
        fields.push(("training loss", format!("{loss:.4} nats per token")));
    }
    if let Some(ratio) = summary.activation_ratio {
        fields.push(("active share", format!("{} of experts in the last step", format::percent(ratio))));
    }
    if let (Some(ppl), Some(nll)) = (summary.valid_ppl, summary.valid_nll) {
        let share =
            summary.valid_active_ratio.map(|ratio| format!(", {} of experts active", format::percent(ratio)));
        let held_out = format::count(summary.valid_tokens as u64);
        fields.push((
            "held-out text",
            format!("perplexity {ppl:.3}, nll {nll:.4}{} ({held_out} tokens)", share.unwrap_or_default()),
        ));
    }
    if summary.finished {
        fields.push(("model", summary.out.display().to_string()));
    }
    if let Some(path) = &summary.checkpoint {
        fields.push(("checkpoint", path.display().to_string()));
    }
    let fields = format::fields(fields);
    match summary.valid_domains[..] {
        [] => fields,
        _ => format!("{fields}{}", domain_table(&summary.valid_domains)),
    }
}

/// Shows a run and remembers the last of everything.
struct View {
    progress: Progress,
    steps: u64,
    last: Option<StepRecord>,
    eval: Option<EvalReport>,
    saved: Option<PathBuf>,
}

impl Observer for View {
    fn step(&mut self, record: &StepRecord) {
        let mut detail = format!("loss {:.4}", record.lm_loss);
        if let Some(ratio) = record.activation_ratio {
            detail += &format!("  active {}", format::percent(ratio));
        }
        detail += &format!("  {} tokens/s", format::count(record.tokens_per_s as u64));
        self.progress.set(record.step, self.steps, &detail);
        self.last = Some(record.clone());
    }

    fn evaluated(&mut self, step: u64, report: &EvalReport) {
        let share = report.active_ratio.map(|ratio| format!(", {} active", format::percent(ratio)));
        let domains: Vec<String> =
            report.domains.iter().map(|domain| format!("{} {:.3}", domain.name, domain.ppl)).collect();
        let domains = if domains.is_empty() { String::new() } else { format!(" ({})", domains.join(", ")) };
        self.progress.note(&format!(
            "step {step}: held-out perplexity {:.3}{domains}{}",
            report.ppl,
            share.unwrap_or_default()
        ));
        self.eval = Some(report.clone());
    }

    fn saved(&mut self, step: u64, path: &Path) {
        self.progress.note(&format!("step {step}: saved {}", path.display()));
        self.saved = Some(path.to_path_buf());
    }

    fn note(&mut self, message: &str) {
        self.progress.note(message);
    }
}

/// The command that continues the run that `args` started.
fn resume_command(args: impl Iterator<Item = String>) -> String {
    let mut words = Vec::new();
    let mut skip_value = false;
    for arg in args {
        let stop_after = arg == "--stop-after";
        if !(skip_value
            || stop_after
            || arg.starts_with("--stop-after=")
            || arg == "--resume"
            || arg == "--force")
        {
            words.push(quoted(&arg));
        }
        skip_value = stop_after;
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
