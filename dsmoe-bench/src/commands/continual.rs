//! `dsmoe continual`: tasks in a row, pruned while they are learnt.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_datasets::{CorpusOptions, SourceSpec};
use dsmoe_train::TrainConfig;
use dsmoe_train::continual::{
    self, ContinualOptions, ContinualReport, MOST_TASKS, Method, TRAIN_KEYS, Task, TaskReport, learn,
    step_memory,
};
use serde::{Deserialize, Serialize};

use crate::cli::continual::Continual;
use crate::files::{folder_of, lossy, write_json};
use crate::format::{self, Table};
use crate::interrupts::{INTERRUPTED, catch_interrupts_for, stop_of};
use crate::memory;
use crate::models::{show_config_notices, tokenizer};
use crate::progress::{Progress, Unit};
use crate::texts::{Text, find, load};
use crate::ui::{Ui, stderr_line};

/// Arenas of parameters in memory: weights, gradients three times, both moments, a copy, Fisher information, what the next task is
/// pulled to, and the packed weights of a measurement.
const ARENAS: u64 = 11;

/// The file of the tasks.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    train: toml::Table,
    #[serde(default)]
    method: Method,
    #[serde(default)]
    task: Vec<TaskTable>,
}

/// A `[[task]]` table. What is missing is said by the number of the task.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskTable {
    name: Option<String>,
    data: Option<Data>,
    steps: Option<u64>,
    text_column: Option<String>,
    doc_separator: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Data {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

/// The configuration and the tasks to learn.
struct Wanted {
    train: TrainConfig,
    method: Method,
    texts: Vec<Text>,
    steps: Vec<u64>,
    /// The file gives the length of sequences.
    names_seq: bool,
}

#[derive(Debug, Serialize)]
struct Plan<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a Path,
    params: u64,
    tokens_per_step: u64,
    memory_bytes: u64,
    tasks: Vec<PlannedTask>,
    train: TrainConfig,
    method: Method,
}

#[derive(Debug, Serialize)]
struct PlannedTask {
    name: String,
    steps: u64,
    tokens: u64,
    data_files: usize,
    data_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Results<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a Path,
    #[serde(serialize_with = "lossy")]
    out: &'a Path,
    #[serde(flatten)]
    report: ContinualReport,
}

pub(crate) fn run(args: &Continual, ui: &mut Ui) -> Result<ExitCode> {
    let config = Config::load(&args.model)?;
    let mut wanted = read(&args.tasks)?;
    if !wanted.names_seq && config.max_position < wanted.train.seq {
        ui.note(format_args!("sequences of {} tokens, the positions of the model", config.max_position));
        wanted.train.seq = config.max_position;
    }
    let names: Vec<&str> = wanted.texts.iter().map(|text| &text.spec.name[..]).collect();
    let tasks: Vec<(&str, u64)> = names.iter().copied().zip(wanted.steps.iter().copied()).collect();
    let (configs, method) = continual::check(&config, &tasks, &wanted.train, &wanted.method)?;
    let plan = plan(args, &config, &wanted, (&configs[0], method));
    memory::check("continual learning", plan.memory_bytes, memory::total(), "use a smaller model or batch")?;
    args.work.check()?;
    let Some(out) = args.work.out() else {
        ui.result(&plan, show_plan)?;
        return Ok(ExitCode::SUCCESS);
    };
    show_config_notices(&config, ui);
    let tokenizer = tokenizer(&args.model, &config, ui)?;
    let sources = load(&wanted.texts, &tokenizer, wanted.train.bos, None, ui)?;
    let tasks = sources.into_iter().zip(&wanted.steps);
    let tasks: Vec<Task> =
        tasks.map(|(source, &steps)| Task { name: source.name.clone(), steps, source }).collect();
    let options = ContinualOptions {
        model: args.model.clone(),
        out: out.to_path_buf(),
        resume: args.work.resume,
        train: wanted.train,
        method: wanted.method,
    };
    catch_interrupts_for(ui, true)?;
    let report = drive(&options, &tasks, ui)?;
    let results = Results { model: &args.model, out, report };
    if results.report.finished {
        write_json(&out.join("results.json"), &results)?;
    }
    ui.result(&results, show)?;
    if results.report.finished {
        return Ok(ExitCode::SUCCESS);
    }
    if ui.call.is_none() {
        stderr_line("continue with the same command and --resume");
    }
    Ok(ExitCode::from(INTERRUPTED))
}

/// Learns the tasks with progress.
fn drive(options: &ContinualOptions, tasks: &[Task], ui: &Ui) -> Result<ContinualReport> {
    let total = tasks.iter().map(|task| task.steps).sum();
    let mut progress = Progress::new(ui, "learning", Unit::Steps, total);
    progress.polled();
    let report = learn(options, tasks, &mut |now| {
        let loss = now.loss.map(|loss| format!("  loss {loss:.4}")).unwrap_or_default();
        progress.set(now.done, now.total, &format!("{}{loss}", now.name));
        !stop_of(ui).load(Ordering::Relaxed)
    });
    progress.finish();
    Ok(report?)
}

/// Reads the file of the tasks.
fn read(path: &Path) -> Result<Wanted> {
    let place = path.display();
    let text = crate::files::read_toml(path)?;
    let file: File = match toml::from_str(&text) {
        Ok(file) => file,
        Err(cause) => {
            let line = cause.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let message = cause.message().split_whitespace().collect::<Vec<_>>().join(" ");
            bail!("{place}: line {line}: {message}; see dsmoe continual --help for the form of the file");
        }
    };
    if file.task.is_empty() {
        bail!("{place}: there is no task; add [[task]] tables with name, data and steps");
    }
    if file.task.len() > MOST_TASKS {
        bail!("{place}: {} tasks are more than {MOST_TASKS}; use fewer", file.task.len());
    }
    let mut train = TrainConfig::default();
    if let Some(key) = file.train.keys().find(|key| !TRAIN_KEYS.contains(&&key[..])) {
        bail!("{place}: [train] has {key}; use {}", TRAIN_KEYS.join(", "));
    }
    train.apply(&file.train)?;
    let names_seq = file.train.contains_key("seq");
    let (mut specs, mut steps) = (Vec::new(), Vec::new());
    for (i, task) in file.task.into_iter().enumerate() {
        let missing = |key: &str, mend: &str| anyhow::anyhow!("{place}: task {} has no {key}; {mend}", i + 1);
        let name = task.name.ok_or_else(|| missing("name", "add name = \"..\""))?;
        let paths = match task.data {
            Some(Data::One(path)) => vec![path],
            Some(Data::Many(paths)) if !paths.is_empty() => paths,
            _ => return Err(missing("data", "add data = \"FILE\" with its text")),
        };
        steps.push(task.steps.ok_or_else(|| missing("steps", "add steps = N; 0 to measure it alone"))?);
        let defaults = CorpusOptions::default();
        specs.push(SourceSpec {
            name,
            paths: paths.iter().map(|data| folder_of(path).join(data)).collect(),
            weight: 1.0,
            options: CorpusOptions {
                doc_separator: task.doc_separator,
                text_column: task.text_column.unwrap_or(defaults.text_column),
                selection: defaults.selection,
            },
        });
    }
    Ok(Wanted { train, method: file.method, texts: find(specs)?, steps, names_seq })
}

/// Reads the file of the tasks and checks it for a small model.
#[cfg(test)]
pub(crate) fn check_file(path: &Path) -> Result<()> {
    let wanted = read(path)?;
    let config = dsmoe_core::init::preset("tiny")?;
    let names: Vec<(&str, u64)> =
        wanted.texts.iter().zip(&wanted.steps).map(|(text, &steps)| (&text.spec.name[..], steps)).collect();
    let (configs, method) = continual::check(&config, &names, &wanted.train, &wanted.method)?;
    let needed = step_memory(&config, &configs[0], &method);
    memory::check("continual learning", needed, memory::total(), "use a smaller model or batch")
}

fn plan<'a>(
    args: &'a Continual,
    config: &Config,
    wanted: &Wanted,
    (resolved, method): (&TrainConfig, Method),
) -> Plan<'a> {
    let (params, tokens_per_step) = (Accounting::of(config).total, resolved.tokens_per_step());
    let task = |(text, &steps): (&Text, &u64)| PlannedTask {
        name: text.spec.name.clone(),
        steps,
        tokens: steps.saturating_mul(tokens_per_step),
        data_files: text.corpus.files().len(),
        data_bytes: text.corpus.total_bytes(),
    };
    Plan {
        model: &args.model,
        params,
        tokens_per_step,
        memory_bytes: (4 * ARENAS * params).saturating_add(step_memory(config, resolved, &method)),
        tasks: wanted.texts.iter().zip(&wanted.steps).map(task).collect(),
        train: TrainConfig { steps: None, ..resolved.clone() },
        method,
    }
}

fn show_plan(plan: &Plan<'_>) -> String {
    let method = serde_json::to_string(&plan.method).unwrap_or_default();
    let fields = format::fields(vec![
        ("model", format!("{}, {} parameters", plan.model.display(), format::count(plan.params))),
        ("step", format!("{} tokens", format::count(plan.tokens_per_step))),
        ("memory", format!("about {}", format::bytes(plan.memory_bytes))),
        ("method", method),
    ]);
    let mut table = Table::new(["task", "steps", "tokens", "files", "text"]);
    for task in &plan.tasks {
        table.row([
            task.name.clone(),
            format::count(task.steps),
            format::count(task.tokens),
            format::count(task.data_files as u64),
            format::bytes(task.data_bytes),
        ]);
    }
    format!("{fields}\n{}", table.show())
}

/// Formats the matrix: the held-out loss of every task after every task that was learnt.
fn show(results: &Results<'_>) -> String {
    let report = &results.report;
    let head = ["after", "density", "jump"].into_iter().chain(report.tasks.iter().map(String::as_str));
    let mut table = Table::new(head);
    let losses = |losses: &[f64]| losses.iter().map(|loss| format!("{loss:.4}")).collect::<Vec<_>>();
    let row = |cells: [String; 3], of: &[f64]| cells.into_iter().chain(losses(of));
    if !report.start.is_empty() {
        table.row(row(["start".to_owned(), "–".to_owned(), "–".to_owned()], &report.start));
    }
    for TaskReport { name, density, jump, losses, .. } in &report.learnt {
        let jump = format::or_dash(*jump, |jump| format!("{jump:+.4}"));
        table.row(row([name.clone(), format::percent(*density), jump], losses));
    }
    let flops: f64 = report.learnt.iter().map(|task| task.flops).sum();
    let tokens: u64 = report.learnt.iter().map(|task| task.tokens).sum();
    let nats = |value: Option<f64>| format::or_dash(value, |value| format!("{value:.4} nats"));
    let fields = format::fields(vec![
        ("out", results.out.display().to_string()),
        ("mean loss at the end", nats(report.mean_final)),
        ("forgetting", nats(report.forgetting)),
        (
            "training",
            format!("{} tokens forward and backward, {} FLOPs", format::count(tokens), format::flops(flops)),
        ),
    ]);
    format!("{fields}\n{}", table.show())
}
