//! A training run with its progress, and the memory that it takes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use dsmoe_core::Device;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::model::TrainWorkspace;
#[cfg(feature = "cuda")]
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_datasets::overlap::Removed;
use dsmoe_kernels::{Precision, cross_entropy};
use dsmoe_train::config::{Budget, TrainConfig};
use dsmoe_train::engine::Share;
use dsmoe_train::eval::{DomainReport, EvalReport};
use dsmoe_train::metrics::StepRecord;
use dsmoe_train::run::{Observer, Outcome, Trainer};
use serde::Serialize;

use crate::caller::Call;
use crate::evaluation::domain_table;
use crate::files::lossy;
use crate::format;
use crate::interrupts::stop_of;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// Memory of a tokenizer per token of its vocabulary, as measured; most of it while its file is read.
const TOKENIZER_BYTES: u64 = 1700;

/// One use of memory.
#[derive(Debug, Serialize)]
pub(crate) struct MemoryUse {
    pub(crate) what: &'static str,
    pub(crate) bytes: u64,
}

/// The outcome of a run.
#[derive(Debug, Serialize)]
pub(crate) struct TrainSummary {
    pub(crate) finished: bool,
    step: u64,
    steps: u64,
    tokens: u64,
    loss: Option<f64>,
    lm_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kl: Option<f64>,
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
    #[serde(serialize_with = "lossy")]
    out: PathBuf,
    #[serde(serialize_with = "lossy")]
    checkpoint: Option<PathBuf>,
}

/// The training text of one of several sources.
#[derive(Debug, Serialize)]
struct SourceSummary {
    name: String,
    share: f64,
    train_tokens: usize,
    valid_tokens: usize,
    near_duplicates: Removed,
}

/// Returns the sources of a mixture, or the one source whose near duplicates were dropped.
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

/// Runs `trainer` to its end or to an interruption, with progress.
pub(crate) fn drive(trainer: &mut Trainer, what: &str, out: &Path, ui: &Ui) -> Result<TrainSummary> {
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
    progress.polled();
    let mut view =
        View { progress, first, steps, call: ui.call.clone(), last: None, eval: None, saved: None };
    let outcome = trainer.run(&mut view, stop_of(ui));
    let View { progress, last, eval, saved, .. } = view;
    progress.finish();
    let finished = outcome? == Outcome::Finished;
    let step = trainer.step();
    let seconds = last.as_ref().map_or(0.0, |record| record.wall_s);
    let trained = (step - first) * config.tokens_per_step();
    Ok(TrainSummary {
        finished,
        step,
        steps,
        tokens: step * config.tokens_per_step(),
        loss: last.as_ref().map(|record| record.loss),
        lm_loss: last.as_ref().map(|record| record.lm_loss),
        kl: last.as_ref().and_then(|record| record.kl),
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

/// Returns the memory of one of the processes that share a training, from the sizes alone: parameters, gradients and moments,
/// the work space of a micro-batch, the text, and what an evaluation needs beyond the gradients that it frees.
pub(crate) fn memory_plan(
    model: &Config,
    config: &TrainConfig,
    data_bytes: u64,
    (share, recompute): (Share, bool),
) -> Vec<MemoryUse> {
    let active = match config.budget() {
        _ if model.moe.is_none() => {
            model.fixed_active().map_or(1.0, |active| active / Accounting::of(model).num_experts)
        }
        Budget::Target(share) | Budget::Range(_, share) => share,
        Budget::Weight(_) => 1.0,
    };
    let memory = |what, bytes| MemoryUse { what, bytes };
    let state = share.memory(model);
    let gradients = state.iter().find(|part| part.what == "  gradients").map_or(0, |part| part.bytes as u64);
    let step = TrainWorkspace::memory(model, config.batch * config.seq, active, recompute);
    let parts = state.iter().chain(&step).map(|part| memory(part.what, part.bytes as u64));
    let mut uses: Vec<MemoryUse> = parts.collect();
    // A token of text is about four bytes, and four bytes as a number.
    uses.push(memory("  text", data_bytes));
    uses.push(memory("  tokenizer", TOKENIZER_BYTES * model.vocab_size as u64));
    let packed = Accounting::of(model).total * if config.dtype == Precision::F32 { 4 } else { 2 };
    if config.valid_fraction > 0.0 && packed > gradients {
        uses.push(memory("  evaluation", packed - gradients));
    }
    uses
}

/// Returns the memory of a teacher of `config`: weights in bf16, one chunk of logits, and the activations of a layer.
pub(crate) fn teacher_memory(config: &Config, settings: &TrainConfig) -> MemoryUse {
    let tokens = settings.batch * settings.seq;
    let logits = cross_entropy::Dims { tokens, hidden: config.hidden, vocab: config.vocab_size };
    let activations = tokens * (7 * config.hidden + 3 * config.intermediate);
    let values = logits.chunk().min(tokens) * config.vocab_size + activations;
    MemoryUse { what: "  teacher", bytes: 2 * Accounting::of(config).total + 4 * values as u64 }
}

/// Returns the memory of the host for a training on a GPU: the state that it loads and saves.
#[cfg(feature = "cuda")]
pub(crate) fn host_plan(params: u64, data_bytes: u64) -> Vec<MemoryUse> {
    let memory = |what, bytes| MemoryUse { what, bytes };
    vec![memory("  weights", 4 * params), memory("  moments", 8 * params), memory("  text", data_bytes)]
}

/// Returns the memory of the GPU for a training on `device`; empty for the CPU.
#[cfg(feature = "cuda")]
pub(crate) fn device_plan(model: &Config, config: &TrainConfig, device: Device) -> Result<Vec<MemoryUse>> {
    if !device.is_gpu() {
        return Ok(Vec::new());
    }
    let uses = CudaTrainer::memory(model, config.batch * config.seq)?;
    Ok(uses.iter().map(|part| MemoryUse { what: part.what, bytes: part.bytes as u64 }).collect())
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn device_plan(_: &Config, _: &TrainConfig, _: Device) -> Result<Vec<MemoryUse>> {
    Ok(Vec::new())
}

pub(crate) fn show_summary(summary: &TrainSummary) -> String {
    let state = if summary.finished { "finished" } else { "stopped" };
    let TrainSummary { step, steps, tokens_per_s, .. } = summary;
    let (tokens, time) = (format::count(summary.tokens), format::duration(summary.seconds));
    // A resumed run took its time for the tokens since it was resumed.
    let since = (tokens_per_s * summary.seconds).round() as u64;
    let trained = match since < summary.tokens {
        true => format!("{tokens} tokens, {} of them in {time}", format::count(since)),
        false => format!("{tokens} tokens in {time}"),
    };
    let mut fields = vec![(state, format!("step {step} of {steps}, {trained} ({tokens_per_s:.0}/s)"))];
    if let Some(loss) = summary.lm_loss {
        let kl = summary.kl.map(|kl| format!(", {kl:.4} from the teacher")).unwrap_or_default();
        fields.push(("training loss", format!("{loss:.4} nats per token{kl}")));
    }
    if let Some(ratio) = summary.activation_ratio {
        fields.push(("active share", format!("{} of experts in the last step", format::percent(ratio))));
    }
    if let (Some(ppl), Some(nll)) = (summary.valid_ppl, summary.valid_nll) {
        let share = summary.valid_active_ratio.map(format::percent);
        let share = share.map(|share| format!(", {share} of experts active")).unwrap_or_default();
        let held_out = format::count(summary.valid_tokens as u64);
        fields
            .push(("held-out text", format!("perplexity {ppl:.3}, nll {nll:.4}{share} ({held_out} tokens)")));
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

/// Shows a run, and keeps its last records.
struct View {
    progress: Progress,
    /// Steps that were done before.
    first: u64,
    steps: u64,
    call: Option<Arc<Call>>,
    last: Option<StepRecord>,
    eval: Option<EvalReport>,
    saved: Option<PathBuf>,
}

impl View {
    /// Shows the part that is done of the work behind a step.
    fn show_after(&mut self, what: &str, done: usize, all: usize) {
        let share = format::percent(done as f64 / all as f64);
        let step = self.last.as_ref().map_or(self.first, |record| record.step);
        self.progress.set(step, self.steps, &format!("{what}: {share}"));
    }
}

impl Observer for View {
    fn step(&mut self, record: &StepRecord) {
        let mut detail = format!("loss {:.4}", record.lm_loss);
        if let Some(ratio) = record.activation_ratio {
            detail += &format!("  active {}", format::percent(ratio));
        }
        detail += &format!("  {} tokens/s", format::count(record.tokens_per_s as u64));
        self.progress.set(record.step, self.steps, &detail);
        if let Some(call) = &self.call {
            call.caller.step(record);
        }
        self.last = Some(record.clone());
    }

    fn fitting(&mut self, done: usize, all: usize) {
        self.show_after("fitting thresholds", done, all);
    }

    fn evaluating(&mut self, done: usize, all: usize) {
        self.show_after("evaluating", done, all);
    }

    fn evaluated(&mut self, step: u64, report: &EvalReport) {
        let share = report.active_ratio.map(|ratio| format!(", {} active", format::percent(ratio)));
        let domains: Vec<String> =
            report.domains.iter().map(|domain| format!("{} {:.3}", domain.name, domain.ppl)).collect();
        let domains = if domains.is_empty() { String::new() } else { format!(" ({})", domains.join(", ")) };
        let share = share.unwrap_or_default();
        self.progress.note(&format!("step {step}: held-out perplexity {:.3}{domains}{share}", report.ppl));
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
