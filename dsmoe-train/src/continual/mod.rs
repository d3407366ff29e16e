//! Continual learning: one model learns tasks in a row and is pruned while it does, and what it forgets is measured.
//!
//! The method is a construction after EsaCL (Ren and Honavar, 2024), of whose body only the abstract was available, from named
//! parts: sharpness-aware steps (`sharpness`), pruning by a sharpness-aware score or by regularised dual averaging (`prune`,
//! `dual`), and the selection of sequences whose loss rises most uphill (`stream`).
//!
//! ```text
//! OUT/continual.json              what is learnt, from which model, on which text
//! OUT/start.json                  the losses before the first task
//! OUT/tasks/01-NAME/              the model after that task, with masks and report.json
//! OUT/checkpoints/02-00000120/    a task that is not done, after so many steps
//! ```
//! A directory appears complete. Learning that was interrupted goes on at the first task that is not done, from its newest
//! checkpoint, and comes to the same bytes.

mod dual;
mod inside;
mod learner;
mod passes;
mod prune;
mod settings;
mod sharpness;
mod stream;

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::Model;
use dsmoe_core::checkpoint::{Manifest, copy_companions};
use dsmoe_core::config::Config;
use dsmoe_core::model::TrainWorkspace;
use dsmoe_datasets::{Mixture, TokenSource};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::inside::{Checkpoints, Inside};
use self::learner::{Anchor, Given, Learner, Learnt, held_out_losses};
use self::passes::fisher;
use self::prune::density;
pub use self::settings::{Method, Over, Prune, TRAIN_KEYS, When};
pub use self::stream::Window;
use self::stream::merge;
use crate::checkpoint::{data_identity, model_identity};
use crate::config::{Budget, Hold, TrainConfig};
use crate::error::{Error, Result};
use crate::files::{self, Hashed};
use crate::optim::AdamW;
use crate::run::held;

const SETTINGS_FILE: &str = "continual.json";
const START_FILE: &str = "start.json";
const REPORT_FILE: &str = "report.json";
const TASKS: &str = "tasks";
/// Windows of a task whose gradients say how firmly its weights are held.
const ANCHOR_WINDOWS: usize = 32;

/// The largest number of tasks.
pub const MOST_TASKS: usize = 1000;

/// A text to learn.
///
/// ```
/// use dsmoe_datasets::{TokenSource, TokenStream};
/// use dsmoe_train::continual::Task;
///
/// let mut stream = TokenStream::default();
/// stream.push(&[1, 5, 9, 2]);
/// let source = |name: &str| TokenSource { name: name.to_owned(), weight: 1.0, tokens: (&stream).into() };
/// let learnt = Task { name: "code".to_owned(), steps: 200, source: source("code") };
/// // No step is taken on this text, but its loss is measured after every task.
/// let watched = Task { name: "web".to_owned(), steps: 0, source: source("web") };
/// assert_eq!([&learnt, &watched].map(|task| task.steps).iter().sum::<u64>(), 200);
/// ```
#[derive(Clone, Debug)]
pub struct Task {
    /// Its name in reports and directories.
    pub name: String,
    /// Optimiser steps; 0 for a text that is measured and not learnt.
    pub steps: u64,
    /// The text.
    pub source: TokenSource,
}

/// The tasks, the configuration and the output folder.
///
/// ```no_run
/// use dsmoe_datasets::TokenSource;
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::continual::{
///     ContinualOptions, ContinualReport, Method, Over, Prune, Task, TaskProgress, TaskReport, When, Window, learn,
/// };
///
/// fn in_turn(first: TokenSource, second: TokenSource) -> dsmoe_train::Result<()> {
///     let task = |source: TokenSource| Task { name: source.name.clone(), steps: 200, source };
///     let method = Method {
///         prune: Prune::Scores,
///         when: Some(When::During),
///         over: Some(Over::Row),
///         replay: 64,
///         ..Method::default()
///     };
///     let options = ContinualOptions {
///         model: "model".into(),
///         out: "learnt".into(),
///         resume: false,
///         train: TrainConfig { seq: 256, ..TrainConfig::default() },
///         method,
///     };
///     let show = &mut |TaskProgress { name, done, total, .. }: TaskProgress<'_>| {
///         println!("{name}: {done} of {total}");
///         true
///     };
///     let ContinualReport { learnt, forgetting, .. } = learn(&options, &[task(first), task(second)], show)?;
///     for TaskReport { name, losses, replay, .. } in learnt {
///         let replayed: Vec<usize> = replay.iter().map(|Window { window, .. }| *window).collect();
///         println!("after {name}: losses {losses:?}; windows {replayed:?} are shown again");
///     }
///     println!("forgotten: {forgetting:?}");
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug)]
pub struct ContinualOptions {
    /// The directory of the model that learns.
    pub model: PathBuf,
    /// The directory to write.
    pub out: PathBuf,
    /// Goes on at the first task that is not done, from its newest checkpoint.
    pub resume: bool,
    /// Settings of the steps of every task: those of [`TRAIN_KEYS`].
    pub train: TrainConfig,
    /// The method.
    pub method: Method,
}

/// The results of one task.
///
/// ```
/// use dsmoe_train::continual::TaskReport;
///
/// // `report.json` of a finished task.
/// let json = r#"{
///     "name": "code", "steps": 200, "losses": [2.5, 3.1], "density": 0.5, "jump": null, "train_loss": 2.4,
///     "active": null, "tokens": 51200, "scored_tokens": 0, "flops": 1e12, "replay": []
/// }"#;
/// let report: TaskReport = serde_json::from_str(json)?;
/// assert_eq!(report.losses[0], 2.5);
/// assert!(report.jump.is_none(), "nothing was pruned at its end");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskReport {
    /// The task.
    pub name: String,
    /// Its steps.
    pub steps: u64,
    /// The mean held-out losses of all tasks after this one, nats.
    pub losses: Vec<f64>,
    /// Share of the weights of the layers' linears that is left.
    pub density: f64,
    /// The increase of the task's held-out loss by pruning at its end.
    pub jump: Option<f64>,
    /// Loss of the last step.
    pub train_loss: f64,
    /// Mean share of active experts in its steps.
    pub active: Option<f64>,
    /// Tokens of passes forward and backward, and forward alone.
    pub tokens: u64,
    /// See [`TaskReport::tokens`].
    pub scored_tokens: u64,
    /// Floating-point operations of both, as if nothing were pruned.
    pub flops: f64,
    /// The windows that are replayed from now on.
    pub replay: Vec<Window>,
}

/// The results of all finished tasks.
///
/// ```
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::continual::{ContinualOptions, ContinualReport, Method, Task, learn};
/// # use dsmoe_core::init::{LlamaSizes, init};
/// # use dsmoe_datasets::{TokenSource, TokenStream};
/// # let work = tempfile::tempdir()?;
/// # let (model, out) = (work.path().join("model"), work.path().join("learnt"));
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 1, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # init(&sizes.config()?, &model, &Default::default(), &mut |_| {})?;
/// # let task = |name: &str, first: u32| {
/// #     let mut stream = TokenStream::default();
/// #     (0..64).for_each(|i| stream.push(&[1, first + i % 3, 9, 2, 7, 3, 8, first + i % 5]));
/// #     let source = TokenSource { name: name.to_owned(), weight: 1.0, tokens: (&stream).into() };
/// #     Task { name: name.to_owned(), steps: 1, source }
/// # };
/// # let train = TrainConfig { batch: 2, seq: 8, ..TrainConfig::default() };
///
/// let options = ContinualOptions { model, out, resume: false, train, method: Method::default() };
/// let report: ContinualReport = learn(&options, &[task("stories", 4), task("facts", 14)], &mut |_| true)?;
/// assert!(report.finished && report.learnt.len() == 2);
/// // The rise of the loss of the first task by learning the second one.
/// let rise = report.learnt[1].losses[0] - report.learnt[0].losses[0];
/// assert!((report.forgetting.unwrap() - rise).abs() < 1e-9);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ContinualReport {
    /// False if the learning was interrupted.
    pub finished: bool,
    /// The tasks, in their order.
    pub tasks: Vec<String>,
    /// The losses of all tasks before the first one is learnt, nats; empty if the learning was interrupted before they were known.
    pub start: Vec<f64>,
    /// The tasks that were learnt.
    pub learnt: Vec<TaskReport>,
    /// The mean loss of the learnt tasks after the last one.
    pub mean_final: Option<f64>,
    /// The mean rise of a task's loss from when it was learnt to the end; the last task is not in it.
    pub forgetting: Option<f64>,
}

/// Progress of a task.
///
/// ```
/// use dsmoe_train::continual::TaskProgress;
///
/// // A closure for `learn`: it shows steps, and stops at a loss that grows out of hand.
/// let mut show = |TaskProgress { name, done, total, loss }: TaskProgress<'_>| {
///     println!("{name}: step {done} of {total}, loss {loss:?}");
///     loss.is_none_or(|loss| loss < 20.0)
/// };
/// assert!(show(TaskProgress { name: "code", done: 1, total: 400, loss: Some(3.2) }));
/// assert!(!show(TaskProgress { name: "code", done: 2, total: 400, loss: Some(55.0) }));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TaskProgress<'a> {
    /// The task.
    pub name: &'a str,
    /// Steps done of all tasks, and the steps of all tasks.
    pub done: u64,
    /// See [`TaskProgress::done`].
    pub total: u64,
    /// Loss of the last step; none before a task's first.
    pub loss: Option<f64>,
}

/// Checks settings and tasks, as far as that is possible without the text, and returns the settings of every task.
///
/// # Errors
/// A setting outside its range or without effect, no task to learn, or names that are wrong or occur twice.
pub fn check(
    model: &Config,
    tasks: &[(&str, u64)],
    train: &TrainConfig,
    method: &Method,
) -> Result<(Vec<TrainConfig>, Method)> {
    let method = method.clone().resolve()?;
    if tasks.len() > MOST_TASKS {
        return Err(Error::field("the number of tasks", tasks.len(), format!("at most {MOST_TASKS}")));
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    for (i, (name, _)) in tasks.iter().enumerate() {
        if name.is_empty() || name.len() > 64 || !name.chars().all(is_plain) || name.starts_with('.') {
            let allowed = "up to 64 letters, digits, `-`, `_` and `.`";
            return Err(Error::field("the name of a task", format!("{name:?}"), allowed));
        }
        if tasks[..i].iter().any(|(other, _)| other == name) {
            return Err(Error::field("the name of a task", format!("{name:?} twice"), "a name once"));
        }
    }
    if tasks.iter().all(|(_, steps)| *steps == 0) {
        return Err(Error::field("steps", "0 in every task", "at least 1 in one of them"));
    }
    if train.seq > model.max_position {
        let allowed = format!("at most the model's max_position_embeddings {}", model.max_position);
        return Err(Error::field("seq", train.seq, allowed));
    }
    if train.valid_fraction == 0.0 || train.valid_samples == 0 {
        return Err(Error::field(
            "valid_fraction",
            "0",
            "a share above 0: losses are those of held-out text",
        ));
    }
    let config = |steps: u64| {
        let lanes = Some(1);
        TrainConfig { steps: Some(steps.max(1)), lanes, ..train.clone() }.resolve_for(model)
    };
    let configs = tasks.iter().map(|(_, steps)| config(*steps)).collect::<Result<Vec<_>>>()?;
    for config in &configs {
        if matches!(config.budget(), Budget::Range(..)) {
            return Err(Error::field("active_range", "set", "one active_target"));
        }
        if !config.router_gradient.is_full() {
            return Err(Error::field("router_gradient", config.router_gradient, "full for tasks in a row"));
        }
        if config.hold == Some(Hold::Squared) {
            return Err(Error::field("hold", Hold::Squared, "loss for tasks in a row"));
        }
        if config.router_temperature.is_some() {
            return Err(Error::field("router_temperature", "set", "none for tasks in a row"));
        }
    }
    Ok((configs, method))
}

/// Returns the memory that the steps of `config` take beside arenas of parameters, bytes: the work space of a micro-batch, and the
/// windows of a step.
pub fn step_memory(model: &Config, config: &TrainConfig, method: &Method) -> u64 {
    let parts = TrainWorkspace::memory(model, config.batch * config.seq, 1.0, false);
    let work = parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.bytes as u64));
    work.saturating_add(stream::memory(config, method))
}

/// Learns `tasks`, one after the other. `progress` hears of every step, and while candidates of a step are scored and held-out text is
/// evaluated, and says whether to go on. Returns the report of what is done.
///
/// # Errors
/// Settings, tasks, text and model that do not fit together; an output directory that cannot be used or is of other tasks; a loss
/// that is not finite.
pub fn learn(
    options: &ContinualOptions,
    tasks: &[Task],
    progress: &mut dyn FnMut(TaskProgress<'_>) -> bool,
) -> Result<ContinualReport> {
    let mut model = Model::load(&options.model)?;
    let names: Vec<(&str, u64)> = tasks.iter().map(|task| (&task.name[..], task.steps)).collect();
    let (configs, method) = check(model.config(), &names, &options.train, &options.method)?;
    held(&model, &mut configs[0].clone(), dsmoe_core::Device::Cpu)?;
    let texts = texts(&model, tasks, &configs[0])?;
    let identity = identity(&model, tasks, &configs[0], &method)?;
    let folder = Folder::open(options, &identity)?;

    let total: u64 = tasks.iter().map(|task| task.steps).sum();
    let mut state = State::default();
    let first = tasks.iter().find(|task| task.steps > 0).map_or("", |task| &task.name[..]);
    let goes_on = &mut || progress(TaskProgress { name: first, done: 0, total, loss: None });
    let measure = || held_out_losses(&model, &texts, &configs[0], goes_on);
    let Some(start) = folder.start(tasks.len(), measure)? else {
        return Ok(state.report(false, tasks, Vec::new()));
    };
    let mut finished = true;
    for (at, task) in tasks.iter().enumerate().filter(|(_, task)| task.steps > 0) {
        let place = folder.place(at, &task.name);
        let done: u64 = tasks[..at].iter().map(|task| task.steps).sum();
        let report = match folder.done(&place, task, &texts, at)? {
            Some(report) => {
                model = Model::load(&place)?;
                report
            }
            None => {
                let (config, anchor) = (&configs[at], state.anchor.as_ref());
                let (texts, replay) = (&texts[..], &state.replay[..]);
                let given = Given { task: at, config, method: &method, texts, replay, anchor };
                let checkpoints = Checkpoints::new(&options.out, at, config.save_every);
                let (inside, moments) = begin(&mut model, &checkpoints, &method, texts)?;
                let show = &mut |step: u64, loss: Option<f64>| {
                    progress(TaskProgress { name: &task.name, done: done + step, total, loss })
                };
                let mut learner = Learner::new(&mut model, given)?;
                if let Some(moments) = moments {
                    learner.resume(&inside, moments);
                }
                let Some(learnt) = learner.learn(inside, &checkpoints, show)? else {
                    finished = false;
                    break;
                };
                let replay = merge(&state.replay, &learnt.keep, state.reports.len() + 1, method.replay);
                let report = report_of(&model, task, learnt, (config, replay));
                folder.write(&place, &model, &report)?;
                Checkpoints::clear(&options.out)?;
                report
            }
        };
        state.replay.clone_from(&report.replay);
        state.reports.push((at, report));
        // Nothing is pulled to the weights after the last task.
        if method.ewc > 0.0 && tasks[at + 1..].iter().any(|task| task.steps > 0) {
            let now = TaskProgress { name: &task.name, done: done + task.steps, total, loss: None };
            if !state.hold(&model, &texts, (at, &configs[at]), &mut || progress(now))? {
                finished = false;
                break;
            }
        }
    }
    if finished {
        // Those of the last task, if the process ended just before it removed them.
        Checkpoints::clear(&options.out)?;
    }
    Ok(state.report(finished, tasks, start))
}

/// Makes `model` that of the task's newest checkpoint, or ready for its first step, and returns the state that goes with it.
fn begin(
    model: &mut Model,
    checkpoints: &Checkpoints,
    method: &Method,
    texts: &[Mixture],
) -> Result<(Inside, Option<AdamW>)> {
    if let Some((inside, saved, moments)) = checkpoints.newest(model.layout(), texts)? {
        *model = saved;
        return Ok((inside, Some(moments)));
    }
    if method.regrow == Some(true) {
        model.set_masks(dsmoe_core::masks::Masks::new())?;
    }
    let start_density = density(model.layout(), model.masks());
    Ok((Inside { start_density, ..Inside::default() }, None))
}

/// The state that finished tasks leave for the next ones.
#[derive(Debug, Default)]
struct State {
    /// The tasks' numbers and reports.
    reports: Vec<(usize, TaskReport)>,
    replay: Vec<Window>,
    anchor: Option<Anchor>,
}

impl State {
    /// Adds the weights of `model` after task `at` to what the next tasks are pulled to. Returns false, with nothing added, if
    /// `goes_on` returns false meanwhile.
    fn hold(
        &mut self,
        model: &Model,
        texts: &[Mixture],
        (at, config): (usize, &TrainConfig),
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        let mut order = texts[at].interleaving(ANCHOR_WINDOWS, config.seed)?;
        let windows: Vec<Window> =
            order.batch_at(0).map(|sample| Window { task: at, window: sample.window }).collect();
        let Some(mut sum) = fisher(model, texts, &windows, config, goes_on)? else { return Ok(false) };
        if let Some(before) = &self.anchor {
            sum.iter_mut().zip(&before.fisher).for_each(|(sum, before)| *sum += before);
        }
        self.anchor = Some(Anchor { params: model.params().to_vec(), fisher: sum });
        Ok(true)
    }

    fn report(self, finished: bool, tasks: &[Task], start: Vec<f64>) -> ContinualReport {
        let mean =
            |values: &[f64]| (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
        let last = self.reports.last().map_or(&[][..], |(_, report)| &report.losses);
        let finals: Vec<f64> = self.reports.iter().map(|(at, _)| last[*at]).collect();
        let earlier = self.reports.split_last().map_or(&[][..], |(_, earlier)| earlier);
        let rises: Vec<f64> = earlier.iter().map(|(at, report)| last[*at] - report.losses[*at]).collect();
        ContinualReport {
            finished,
            tasks: tasks.iter().map(|task| task.name.clone()).collect(),
            start,
            mean_final: mean(&finals),
            forgetting: mean(&rises),
            learnt: self.reports.into_iter().map(|(_, report)| report).collect(),
        }
    }
}

fn report_of(
    model: &Model,
    task: &Task,
    learnt: Learnt,
    (config, replay): (&TrainConfig, Vec<Window>),
) -> TaskReport {
    let counts = dsmoe_core::accounting::Accounting::of(model.config());
    let active = learnt.active.unwrap_or(1.0) * counts.num_experts;
    let forward = counts.mean_flops_per_token(active, config.seq);
    // Backward is twice the forward.
    let flops = forward * (3.0 * learnt.tokens as f64 + learnt.scored_tokens as f64);
    TaskReport {
        name: task.name.clone(),
        steps: task.steps,
        losses: learnt.losses,
        density: density(model.layout(), model.masks()),
        jump: learnt.jump,
        train_loss: learnt.loss,
        active: learnt.active,
        tokens: learnt.tokens,
        scored_tokens: learnt.scored_tokens,
        flops,
        replay,
    }
}

/// Splits the texts of all tasks into training and held-out sides.
fn texts(model: &Model, tasks: &[Task], config: &TrainConfig) -> Result<Vec<Mixture>> {
    let split = |task: &Task| {
        let (largest, vocab) = (task.source.tokens.max_id(), model.config().vocab_size);
        if largest as usize >= vocab {
            let allowed = format!("the model's own tokenizer: ids are below vocab_size {vocab}");
            return Err(Error::field("a token id of the text", largest, allowed));
        }
        let text = Mixture::new(std::slice::from_ref(&task.source), config.split_options(), None)?;
        if text.parts()[0].split.valid_tokens().len() < 2 {
            let found = format!("too small to hold out any of task {}", task.name);
            return Err(Error::field("valid_fraction", found, "a larger share, or more text"));
        }
        Ok(text)
    };
    tasks.iter().map(split).collect()
}

/// Describes everything that the bytes of the result depend on.
fn identity(model: &Model, tasks: &[Task], config: &TrainConfig, method: &Method) -> Result<Value> {
    let tasks = tasks.iter().map(|task| {
        let sha256 = data_identity(std::slice::from_ref(&task.source))?;
        Ok(json!({ "name": task.name, "steps": task.steps, "text_sha256": sha256 }))
    });
    let mut train = serde_json::to_value(config).expect("numbers and strings are JSON");
    if let Some(train) = train.as_object_mut() {
        train.retain(|key, _| {
            TRAIN_KEYS.contains(&&key[..]) && !["warmup_steps", "save_every"].contains(&&key[..])
        });
    }
    Ok(json!({
        "model_sha256": model_identity(model),
        "tasks": tasks.collect::<Result<Vec<Value>>>()?,
        "train": train,
        "warmup_steps": config.warmup_steps,
        "method": method,
    }))
}

/// The output directory.
struct Folder {
    out: PathBuf,
    source: PathBuf,
    /// Held as long as tasks are learnt.
    _lock: Option<fs::File>,
}

impl Folder {
    fn open(options: &ContinualOptions, identity: &Value) -> Result<Folder> {
        let out = &options.out;
        let mut names = files::names(out)?;
        // A process that was killed in its first write leaves only a temporary file.
        names.retain(|name| !name.starts_with('.'));
        let path = out.join(SETTINGS_FILE);
        if !names.is_empty() && !options.resume {
            return Err(Error::OutToResume(out.clone()));
        }
        if !names.is_empty() && !path.is_file() {
            return Err(Error::NotARun(out.clone()));
        }
        let lock = files::lock_dir(out)?;
        if path.is_file() {
            same(&path, &files::read_json(&path)?, identity)?;
        } else {
            files::write_json(&path, identity)?;
        }
        fs::create_dir_all(out.join(TASKS)).map_err(Error::io(out))?;
        Ok(Folder { out: out.clone(), source: options.model.clone(), _lock: lock })
    }

    /// Returns the losses before the first task, which `measure` finds where they are not known; none if it was stopped.
    fn start(
        &self,
        tasks: usize,
        measure: impl FnOnce() -> Result<Option<Vec<f64>>>,
    ) -> Result<Option<Vec<f64>>> {
        let path = self.out.join(START_FILE);
        if path.is_file() {
            let known: Hashed<Vec<f64>> = files::read_json(&path)?;
            let known = known.checked().filter(|losses| losses.len() == tasks);
            let known =
                known.ok_or_else(|| Error::checkpoint(&path, "it is not what was written; remove it"));
            return known.map(Some);
        }
        let Some(losses) = measure()? else { return Ok(None) };
        files::write_json(&path, &Hashed::of(&losses))?;
        Ok(Some(losses))
    }

    fn place(&self, at: usize, name: &str) -> PathBuf {
        self.out.join(TASKS).join(format!("{:02}-{name}", at + 1))
    }

    /// Returns the report of a task that is done.
    fn done(&self, place: &Path, task: &Task, texts: &[Mixture], at: usize) -> Result<Option<TaskReport>> {
        let path = place.join(REPORT_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        files::check_dir(place)?;
        let report: TaskReport = files::read_json(&path)?;
        if report.name != task.name {
            return Err(Error::checkpoint(&path, format!("it is of task {:?}", report.name)));
        }
        if report.losses.len() != texts.len() || !are_drawn(&report.replay, texts, at + 1) {
            return Err(Error::checkpoint(&path, "its losses or windows are not those of these tasks"));
        }
        Ok(Some(report))
    }

    /// Writes the model after a task and its report into the directory `place`, which appears complete.
    fn write(&self, place: &Path, model: &Model, report: &TaskReport) -> Result<()> {
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let temporary = place.with_file_name(format!(".{name}.tmp"));
        files::make_dir(&temporary, place, |dir| {
            let sums = model.save(dir, dsmoe_core::checkpoint::Dtype::F32)?;
            copy_companions(&self.source, dir)?;
            files::write_json(&dir.join(REPORT_FILE), report)?;
            Manifest::write(dir, &sums)?;
            Ok(())
        })
    }
}

/// Returns whether there are such windows, all of the first `tasks` tasks.
fn are_drawn(windows: &[Window], texts: &[Mixture], tasks: usize) -> bool {
    let is_one = |at: &Window| {
        at.task < tasks.min(texts.len()) && at.window < texts[at.task].parts()[0].split.num_windows()
    };
    windows.iter().all(is_one)
}

/// Refuses to go on with other tasks or settings.
fn same(path: &Path, saved: &Value, now: &Value) -> Result<()> {
    let none = Value::Null;
    let keys = now.as_object().into_iter().flat_map(|now| now.keys());
    for key in keys {
        let [was, is] = [saved, now].map(|of| of.get(key).unwrap_or(&none));
        if was != is {
            return Err(Error::ResumeMismatch {
                path: path.to_path_buf(),
                field: key.clone(),
                saved: was.to_string(),
                now: is.to_string(),
                help: "use the old ones, or another {out}".into(),
            });
        }
    }
    Ok(())
}
