//! A run: its directory, its loop, and how it resumes after an interruption.
//!
//! ```text
//! OUT/run.toml                     the resolved configuration
//! OUT/metrics.jsonl                a header, then a line per step and per evaluation
//! OUT/events.out.tfevents.*        the same for TensorBoard, one file per invocation
//! OUT/checkpoints/step-00000020/   see the checkpoint files there
//! OUT/config.json, *.safetensors   the trained model, with its tokenizer, once the run is finished
//! OUT/stop                         made by the user: stop after this step, with a checkpoint
//! ```
//! Several processes may share the steps of a run. The first one writes all files but those of checkpoints.

mod after;
mod directory;
mod gates;
mod options;
mod records;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use dsmoe_core::checkpoint::{Manifest, copy_companions};
use dsmoe_core::shard::Shards;
use dsmoe_core::{Device, Model};
use dsmoe_datasets::overlap::TokenTexts;
use dsmoe_datasets::{Interleaving, Mixture};
use dsmoe_kernels::Isa;
use dsmoe_kernels::comm::{Communicator, What};
use dsmoe_router::{RoutingSummary, SparsityOver};

use self::after::is_asked;
pub use self::directory::check_out;
use self::directory::{CHECKPOINTS, FINAL_TEMPORARY, load_newest, prepare_directory, remove_stop_file};
pub(crate) use self::gates::{Held, held};
use self::gates::{lower_top_k, with_top_k};
pub use self::options::{RunOptions, TrainData};
use self::records::{Records, header};
use crate::budgets;
use crate::checkpoint::{self, FORMAT_VERSION, Left, State};
use crate::config::{Budget, NearDuplicates, TEACHER_TOP, TEACHER_WEIGHT, TrainConfig};
use crate::engine::StepResult;
#[cfg(feature = "cuda")]
use crate::engine::check_gpu;
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::files;
use crate::metrics::{StepRecord, resident_bytes, step_line};
use crate::optim::AdamW;
use crate::ranks::{Zero, agree, by_first, check_alike, check_shared, own_lanes};
#[cfg(feature = "cuda")]
use crate::step::engine_options;
use crate::step::{Gates, Setup, StepText, Stepper};
use crate::teacher::{self, Lessons, TeacherId};
use crate::teacher_cache::{RowShape, TeacherCache};

/// Settings that may differ between processes: results do not depend on them.
const MAY_DIFFER: [&str; 2] = ["threads", "log_every"];
const START: What = What::of("the start of the run");
/// Receives the events of a run.
///
/// ```
/// use dsmoe_train::{EvalReport, Observer, StepRecord};
///
/// /// Keeps the best perplexity and prints notes.
/// #[derive(Default)]
/// struct Best(Option<f64>);
///
/// impl Observer for Best {
///     fn evaluated(&mut self, _step: u64, report: &EvalReport) {
///         self.0 = Some(self.0.map_or(report.ppl, |best| best.min(report.ppl)));
///     }
///
///     fn note(&mut self, message: &str) {
///         eprintln!("{message}");
///     }
/// }
///
/// // Steps are ignored: every method has a default that does nothing.
/// let mut best = Best::default();
/// best.step(&StepRecord::default());
/// assert_eq!(best.0, None);
/// ```
pub trait Observer: Send {
    /// Receives a finished step.
    fn step(&mut self, _record: &StepRecord) {}
    /// Receives how many of all tokens the thresholds have been fitted to.
    fn fitting(&mut self, _done: usize, _all: usize) {}
    /// Receives how many of all windows of the held-out text have been evaluated.
    fn evaluating(&mut self, _done: usize, _all: usize) {}
    /// Receives an evaluation of the held-out text after `step` steps.
    fn evaluated(&mut self, _step: u64, _report: &EvalReport) {}
    /// Receives the checkpoint of `step` once it is on the disk.
    fn saved(&mut self, _step: u64, _path: &Path) {}
    /// Receives a note for the user.
    fn note(&mut self, _message: &str) {}
}

/// Ignores all events.
impl Observer for () {}

/// The end of a run.
///
/// ```
/// use dsmoe_train::{Outcome, RunOptions, TrainConfig, Trainer};
/// # use dsmoe_core::{Model, init::{LlamaSizes, init}};
/// # let work = tempfile::tempdir()?;
/// # let (source, out) = (work.path().join("source"), work.path().join("run"));
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 1, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # init(&sizes.config()?, &source, &Default::default(), &mut |_| {})?;
/// # let mut stream = dsmoe_datasets::TokenStream::default();
/// # (0..64).for_each(|i| stream.push(&[1, 5 + i % 3, 9, 2, 7, 3, 8, 4 + i % 5]));
///
/// let config = TrainConfig { steps: Some(2), batch: 2, seq: 8, ..TrainConfig::default() };
/// let options = RunOptions { stop_after: Some(1), ..RunOptions::new(&source, &out) };
/// let mut trainer = Trainer::new(Model::load(&source)?, &stream, config, options)?;
/// match trainer.run(&mut (), &Default::default())? {
///     Outcome::Interrupted { step } => assert_eq!(step, 1), // `resume` continues from here
///     Outcome::Finished => panic!("two steps were asked for"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done and the trained model is in the run directory.
    Finished,
    /// Stopped on request after `step` steps, with a checkpoint if a step was taken. After all steps the evaluation is left.
    Interrupted {
        /// Steps done.
        step: u64,
    },
}

/// Returns the lanes of the run in `out`, from its newest checkpoint that can be read; none without one.
pub fn lanes_of(out: &Path) -> Option<usize> {
    let newest_first = checkpoint::list(&out.join(CHECKPOINTS)).ok()?;
    newest_first.iter().find_map(|(_, path)| Some(checkpoint::read_state(path).ok()?.config.lanes()))
}

/// A run that is ready to start or resume.
///
/// ```
/// use std::sync::atomic::AtomicBool;
///
/// use dsmoe_core::Model;
/// use dsmoe_core::init::{init, preset};
/// use dsmoe_datasets::TokenStream;
/// use dsmoe_train::{
///     EvalReport, Observer, Outcome, RunOptions, StepRecord, TrainConfig, TrainData, Trainer,
/// };
///
/// /// Keeps the losses.
/// #[derive(Default)]
/// struct Losses(Vec<f64>);
///
/// impl Observer for Losses {
///     fn step(&mut self, record: &StepRecord) {
///         self.0.push(record.loss);
///     }
///
///     fn evaluated(&mut self, _step: u64, report: &EvalReport) {
///         assert!(report.ppl > 1.0);
///     }
/// }
///
/// let work = tempfile::tempdir()?;
/// let (source, out) = (work.path().join("source"), work.path().join("run"));
/// init(&preset("tiny")?, &source, &Default::default(), &mut |_| {})?;
/// let mut stream = TokenStream::default();
/// (0..64).for_each(|i| stream.push(&[1, 5 + i % 3, 9, 2, 7, 3, 8, 4 + i % 5]));
///
/// let config = TrainConfig { steps: Some(2), batch: 2, seq: 8, ..TrainConfig::default() };
/// let data: TrainData = (&stream).into();
/// let mut trainer = Trainer::new(Model::load(&source)?, data, config, RunOptions::new(&source, &out))?;
/// let mut losses = Losses::default();
/// let outcome = trainer.run(&mut losses, &AtomicBool::new(false))?;
/// assert_eq!((outcome, losses.0.len()), (Outcome::Finished, 2));
/// assert!(out.join("model.safetensors").exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Trainer {
    options: RunOptions,
    model: Model,
    mixture: Mixture,
    order: Interleaving,
    stepper: Stepper,
    state: State,
    /// The records of the run, which the first process writes.
    records: Option<Records>,
    pool: Option<rayon::ThreadPool>,
    notes: Vec<String>,
    /// Step of the newest checkpoint.
    saved: Option<u64>,
    /// Held as long as the trainer lives.
    _lock: Option<fs::File>,
}

impl Trainer {
    /// Prepares a run of `model` on `data`: checks everything, and makes the run directory or reads its state. All processes
    /// of [`RunOptions::comm`] do so together, and return an error if one of them does.
    ///
    /// # Errors
    /// The configuration, text and model do not fit together; the directory is not empty or holds another run; the processes
    /// differ in what they compute.
    pub fn new(
        model: Model,
        data: impl Into<TrainData>,
        config: TrainConfig,
        options: RunOptions,
    ) -> Result<Trainer> {
        let (data, comm) = (data.into(), options.comm.clone());
        let wished_warmup = config.warmup_steps;
        let made_for = config.made_for(model.config());
        let prepared = agree(&*comm, START, Prepared::new(&model, &data, config, &options))?;
        let Prepared { mixture, order, lessons, pool, mut state, owned } = prepared;
        check_alike(&*comm, &alike(&state, &options))?;
        let lock = by_first(&*comm, START, || prepare_directory(&options))?.flatten();
        check_shared(&*comm, &options.out)?;

        let mut notes = mixture_notes(&mixture);
        notes.extend(processes_note(&*comm, &state.config, options.zero));
        if let Some(share) = made_for {
            notes.push(format!("active_target is {share}, the share of experts that the model was made for"));
        }
        let (model, optimizer) = match options.resume {
            true => load_newest(&options, model, &mut state, wished_warmup, &mut notes)?,
            false => (model, None),
        };
        let model = with_top_k(model, &state)?;
        let saved = optimizer.as_ref().map(|_| state.step);
        let mut optimizer = optimizer.unwrap_or(owned);
        optimizer.train_only(state.config.trained());

        let origin = made_for.map_or("", |_| "# active_target is the model's own.\n");
        let header = header(&model, &mixture, &state);
        let records = by_first(&*comm, START, || Records::open(&options, &state, saved, (origin, &header)))?;
        let RunOptions { device, recompute, zero, .. } = options;
        let setup = Setup { optimizer, device, recompute, zero, lessons, comm: comm.clone() };
        let mut stepper = agree(&*comm, START, Stepper::new(&model, &state.config, setup))?;
        if state.thresholds.is_some() {
            stepper.engine.count_logits()?;
        }
        Ok(Trainer {
            options,
            model,
            mixture,
            order,
            stepper,
            state,
            records,
            pool,
            notes,
            saved,
            _lock: lock,
        })
    }

    /// Returns the resolved configuration.
    pub fn config(&self) -> &TrainConfig {
        &self.state.config
    }

    /// Returns the model in its present state.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Returns the model for a measurement. The memory of the gradients is free until the next step.
    pub fn measured_model(&mut self) -> &Model {
        self.stepper.engine.release();
        &self.model
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// Returns the tokens to train on and the tokens held out.
    pub fn mixture(&self) -> &Mixture {
        &self.mixture
    }

    /// Trains until all steps are done, `stop` is raised, or [`RunOptions::stop_after`] steps have been taken. The
    /// numbers do not depend on how often a run was interrupted, nor on the number of threads.
    ///
    /// # Errors
    /// A loss or gradient that is not finite (nothing is saved after it), or the file system refuses.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Outcome> {
        match self.pool.take() {
            // On a thread of the pool: parallel work then starts without waking one first.
            None => rayon::scope(|_| self.run_here(observer, stop)),
            Some(pool) => {
                let outcome = pool.install(|| self.run_here(observer, stop));
                self.pool = Some(pool);
                outcome
            }
        }
    }

    fn run_here(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Outcome> {
        for note in self.notes.drain(..) {
            observer.note(&note);
        }
        let total = self.state.config.steps.unwrap_or(0);
        let left = self.state.left;
        let is_whole = self.finish_step(observer, stop)?;
        if self.state.left != left && self.is_saved_at(self.state.step) {
            // An undisturbed run has this checkpoint too, of which nothing is left. Without it every resume does the work again.
            self.saved = None;
            self.save(observer)?;
        }
        if !is_whole {
            return self.interrupted();
        }
        if self.state.step >= total {
            observer.note(&format!("all {total} steps are done; writing the trained model"));
            let (dir, keep) = (self.options.out.join(CHECKPOINTS), self.state.config.keep);
            // A process that was killed after its last checkpoint may not have removed the ones before.
            by_first(&*self.options.comm, START, || checkpoint::tidy(&dir, self.state.step, keep))?;
            self.write_final()?;
            return Ok(Outcome::Finished);
        }
        let stores = self.model.config().moe.as_ref().is_some_and(|moe| !moe.parts.budgets.is_empty());
        if self.state.step == 0 && !stores && matches!(self.state.config.budget(), Budget::Range(..)) {
            observer.note("the thresholds of the budgets are fitted to the first training text");
            if !self.fit_thresholds(observer, stop)? {
                return self.interrupted();
            }
        }
        let last = self.options.stop_after.map_or(total, |n| total.min(self.state.step.saturating_add(n)));
        let started = Instant::now();
        while self.state.step < last {
            let Some((record, stopping)) = self.take_step(started, stop)? else { break };
            observer.step(&record);
            lower_top_k(&mut self.model, &self.state.config, self.state.step)?;
            self.stepper.engine.notes().iter().for_each(|note| observer.note(note));
            let step = self.state.step;
            let due = |every: Option<u64>| every.is_some_and(|every| step.is_multiple_of(every));
            if step == total && self.state.thresholds.is_some() {
                self.state.left = Some(Left::Thresholds);
            } else if due(self.state.config.eval_every) || step == total {
                self.state.left = Some(Left::Evaluation);
            }
            let is_whole = self.finish_step(observer, stop)?;
            if due(self.state.config.save_every) {
                self.save(observer)?;
            }
            if !is_whole || stopping && step < total {
                break;
            }
        }
        self.save(observer)?;
        if self.state.step < total || self.state.left.is_some() {
            return self.interrupted();
        }
        self.write_final()?;
        Ok(Outcome::Finished)
    }

    /// Returns whether a run that nobody stops saves a checkpoint of this step.
    fn is_saved_at(&self, step: u64) -> bool {
        let TrainConfig { steps, save_every, .. } = &self.state.config;
        step >= steps.unwrap_or(0) || save_every.is_some_and(|every| step.is_multiple_of(every))
    }

    fn interrupted(&self) -> Result<Outcome> {
        by_first(&*self.options.comm, START, || remove_stop_file(&self.options.out))?;
        Ok(Outcome::Interrupted { step: self.state.step })
    }

    /// Takes one step and writes its records. Returns `None`, with nothing changed, when a single process is to stop. Also
    /// returns whether all processes are to stop after this step.
    fn take_step(&mut self, started: Instant, stop: &AtomicBool) -> Result<Option<(StepRecord, bool)>> {
        let began = Instant::now();
        let options = &self.options;
        let asked = || is_asked(options, stop);
        let (over, penalty): (_, fn(&StepResult) -> f64) = match self.state.config.budget() {
            Budget::Weight(_) => (SparsityOver::Active, |result| result.sparsity_loss),
            _ if self.state.thresholds.is_some() => (SparsityOver::Held, |result| result.mean_gate),
            Budget::Target(_) | Budget::Range(..) => (SparsityOver::All, |result| result.mean_gate),
        };
        let step = self.state.step;
        let config = &self.state.config;
        let text = StepText { mixture: &self.mixture, order: &mut self.order, config, step };
        let threshold_logit = self
            .state
            .thresholds
            .as_ref()
            .map(|held| budgets::threshold_of(held, self.state.config.active_target));
        let thresholds = self.state.thresholds.as_mut();
        let gates = Gates { sparsity: self.state.sparsity_weight, over, thresholds };
        let result = self.stepper.take(&mut self.model, text, gates, &asked)?;
        let Some(result) = result else { return Ok(None) };

        let share = self.state.config.share_loss();
        let routing = self.stepper.engine.stats().map(|stats| stats.summary());
        let routed = routing.is_some();
        let step_tokens = self.state.config.tokens_per_step();
        let shares = |of: fn(&RoutingSummary) -> f64| routing.as_ref().map(of);
        let mut record = StepRecord {
            step: step + 1,
            tokens: self.state.tokens + step_tokens,
            loss: self.state.config.mixed(result.lm_loss, result.divergence)
                + result.balance_loss
                + f64::from(self.state.sparsity_weight) * penalty(&result)
                + self.state.config.separability * result.separability
                + self.state.config.gate_entropy * result.gate_entropy
                + share.map_or(0.0, |share| share.weight * result.share_loss),
            lm_loss: result.lm_loss,
            kl: self.state.teacher.as_ref().map(|_| result.divergence),
            sparsity_loss: routed.then_some(result.sparsity_loss),
            balance_loss: self.model.config().ffn.as_ref().map(|_| result.balance_loss),
            separability_loss: Some(result.separability).filter(|_| self.state.config.separability > 0.0),
            gate_entropy: Some(result.gate_entropy).filter(|_| self.state.config.gate_entropy > 0.0),
            share_loss: share.map(|_| result.share_loss),
            router_temperature: self.state.config.temperature_at(step),
            budget: Some(result.budget).filter(|_| self.state.config.active_range.is_some()),
            threshold_logit,
            lr: self.state.config.schedule().lr_at(step),
            grad_norm: result.norms.all,
            router_grad_norm: routed.then_some(result.norms.router),
            sparsity_weight: routed.then_some(f64::from(self.state.sparsity_weight)),
            activation_ratio: shares(|routing| routing.active_ratio),
            zero_active_share: shares(|routing| routing.zero_active_share),
            load_entropy: shares(|routing| {
                let entropies = &routing.load_entropy_per_layer;
                entropies.iter().sum::<f64>() / entropies.len().max(1) as f64
            }),
            layer_activation: routing.as_ref().map_or(Vec::new(), |r| r.active_ratio_per_layer.clone()),
            rss_bytes: resident_bytes(),
            ..StepRecord::default()
        };
        record.tokens_per_s = step_tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
        record.wall_s = started.elapsed().as_secs_f64();
        if let Some(records) = &mut self.records {
            records.metrics.line(&step_line(&record))?;
        }
        if let Some(place) = result.non_finite {
            self.records.as_ref().map_or(Ok(()), |records| records.metrics.sync())?;
            let of = What::of("what is not finite");
            return agree(&*self.options.comm, of, Err(self.non_finite(place)));
        }
        if let Some(records) = &mut self.records {
            records.events_of(&record)?;
        }

        if let (Some(controller), Some(share)) = (&mut self.state.controller, record.activation_ratio) {
            self.state.sparsity_weight = controller.update(share as f32);
        }
        self.state.step = record.step;
        self.state.tokens = record.tokens;
        self.state.data_cursor = record.step * samples_per_step(&self.state.config);
        Ok(Some((record, result.stop)))
    }

    /// Saves a checkpoint of the present step, unless there is one.
    fn save(&mut self, observer: &mut dyn Observer) -> Result<()> {
        if self.saved == Some(self.state.step) {
            return Ok(());
        }
        self.stepper.engine.fetch(&mut self.model)?;
        self.store_thresholds()?;
        if self.model.is_outline() {
            // The first process gets the tensors one by one, in place of the units of a pass.
            self.stepper.engine.release();
        }
        let layout = self.model.layout();
        let comm = &*self.options.comm;
        let optimizer = self.stepper.engine.optimizer();
        let wrong = match self.model.is_outline() {
            true => optimizer.last_non_finite(layout),
            false => crate::optim::last_non_finite(layout, self.model.params()),
        };
        let outcome = wrong.map_or(Ok(()), |entry| Err(self.non_finite(entry.spec.name.clone())));
        agree(comm, What::of("what is not finite"), outcome)?;
        if let Some(masks) = self.model.masks().filter(|_| !self.model.is_outline()) {
            let wrong = masks.first_nonzero(self.model.params(), layout);
            assert!(wrong.is_none(), "train: a weight that is not kept is not 0: {wrong:?}");
        }
        let dir = self.options.out.join(CHECKPOINTS);
        if let Some(records) = &self.records {
            records.metrics.sync()?;
        }
        let path = checkpoint::save(&dir, &self.state, &self.model, optimizer, comm)?;
        self.saved = Some(self.state.step);
        observer.saved(self.state.step, &path);
        Ok(())
    }

    /// Puts the trained model into the run directory; `config.json` comes last.
    fn write_final(&self) -> Result<()> {
        let (out, comm, of) = (&self.options.out, &*self.options.comm, What::of("the trained model"));
        let temporary = out.join(FINAL_TEMPORARY);
        by_first(comm, of, || files::new_dir(&temporary))?;
        let saved = checkpoint::save_model(&temporary, &self.model, self.stepper.engine.optimizer(), comm)?;
        let written = by_first(comm, of, || {
            let sums = saved?;
            copy_companions(&self.options.source, &temporary)?;
            Manifest::write(&temporary, &sums)?;
            files::move_into(&temporary, out)
        });
        if written.is_err() && comm.rank() == 0 {
            // Frees the disk; the error that matters is the first one.
            drop(files::remove_dir(&temporary));
        }
        written.map(drop)
    }

    fn non_finite(&self, place: String) -> Error {
        let intact = match self.saved {
            Some(step) => format!("the checkpoint of step {step} is intact"),
            None => "no checkpoint was saved yet".to_owned(),
        };
        Error::NonFinite { step: self.state.step + 1, place, intact }
    }
}

/// The parts that a process prepares by itself.
struct Prepared {
    mixture: Mixture,
    order: Interleaving,
    lessons: Option<Lessons>,
    pool: Option<rayon::ThreadPool>,
    /// The state at the start of the run.
    state: State,
    /// The part that this process owns at the start of the run.
    owned: AdamW,
}

impl Prepared {
    fn new(model: &Model, data: &TrainData, config: TrainConfig, options: &RunOptions) -> Result<Prepared> {
        let mut config = config.resolve_for(model.config())?;
        check_fit(model, data, &config)?;
        own_lanes(config.lanes(), &*options.comm, options.zero)?;
        let filter = near_duplicates(data, &mut config)?;
        let mixture = Mixture::new(&data.sources, config.split_options(), filter)?;
        let order = mixture.interleaving(config.batch, config.seed)?;
        let (lessons, teacher) = lessons_of(model, &mut config, options)?.unzip();
        let pool = config.threads.map(thread_pool).transpose()?;
        let Held { controller, thresholds, weight: sparsity_weight } =
            held(model, &mut config, options.device)?;
        check_stage(model, &config, options)?;
        #[cfg(feature = "cuda")]
        check_device(model, &config, options)?;
        let mut owned = AdamW::of(&Shards::new(model.layout(), options.comm.size()), options.comm.rank());
        let model_sha256 = match model.is_outline() {
            true => checkpoint::read_owned(model, &options.source, &mut owned)?,
            false => checkpoint::model_identity(model),
        };
        let state = State {
            format_version: FORMAT_VERSION,
            step: 0,
            tokens: 0,
            data_cursor: 0,
            sparsity_weight,
            controller,
            thresholds,
            left: None,
            model_sha256,
            data_sha256: checkpoint::data_identity(&data.sources)?,
            teacher,
            config,
        };
        Ok(Prepared { mixture, order, lessons, pool, state, owned })
    }
}

/// Returns what has to be equal in all processes, by name.
fn alike(state: &State, options: &RunOptions) -> BTreeMap<String, String> {
    let settings = serde_json::to_value(&state.config).unwrap_or_default();
    let settings = settings.as_object().into_iter().flatten();
    let settings = settings.filter(|(name, _)| !MAY_DIFFER.contains(&&name[..]));
    let mut values: BTreeMap<String, String> =
        settings.map(|(name, value)| (name.clone(), value.to_string())).collect();
    let RunOptions { resume, force, stop_after, device, zero, .. } = options;
    let teacher = state.teacher.as_ref().map(|teacher| &teacher.sha256[..]);
    for (name, value) in [
        ("the version", env!("CARGO_PKG_VERSION").to_owned()),
        ("the instruction set", Isa::current().name().to_owned()),
        ("the device", if device.is_gpu() { "a GPU" } else { "cpu" }.to_owned()),
        ("the starting model", state.model_sha256.clone()),
        ("the text", state.data_sha256.clone()),
        ("the teacher", teacher.unwrap_or("none").to_owned()),
        ("zero", zero.number().to_string()),
        ("resume", resume.to_string()),
        ("force", force.to_string()),
        ("stop_after", format!("{stop_after:?}")),
    ] {
        values.insert(name.to_owned(), value);
    }
    values
}

/// A note of several processes and lanes.
fn processes_note(comm: &dyn Communicator, config: &TrainConfig, zero: Zero) -> Option<String> {
    let (size, lanes) = (comm.size(), config.lanes());
    let machines = comm.place().machines;
    let on = if machines > 1 { format!(" on {machines} machines") } else { String::new() };
    let parts = match zero {
        Zero::Moments => "and the optimiser's state",
        Zero::Gradients => "the optimiser's state and gradients",
        Zero::Parameters => "the optimiser's state, gradients and parameters",
    };
    let comma = if zero == Zero::Moments { "" } else { "," };
    (size > 1).then(|| format!("{size} processes{on} share {lanes} lanes{comma} {parts}"))
}

/// Checks that a model without its parameters is not needed whole.
fn check_stage(model: &Model, config: &TrainConfig, options: &RunOptions) -> Result<()> {
    let outline = options.zero.on(options.comm.size()) == Zero::Parameters;
    if outline != model.is_outline() {
        let found = if outline { "3 for a whole model" } else { "below 3 for a model without parameters" };
        return Err(Error::field("zero", found, "Model::load_outline for 3, Model::load otherwise"));
    }
    if options.zero.on(options.comm.size()) != Zero::Moments
        && let Some(field) = config.freezes()
    {
        return Err(Error::field(field, "set with gradients in parts", "it with {zero} 1 only"));
    }
    Ok(())
}

/// Checks that a GPU, if the run is for one, trains this, before the run's directory is made.
#[cfg(feature = "cuda")]
fn check_device(model: &Model, config: &TrainConfig, options: &RunOptions) -> Result<()> {
    let RunOptions { device, recompute, zero, comm, .. } = options;
    let lanes = own_lanes(config.lanes(), &**comm, *zero)?.len();
    let engine = engine_options(config, lanes, (*device, *recompute, *zero));
    check_gpu(model, &engine, comm.size(), config.freezes())
}

fn samples_per_step(config: &TrainConfig) -> u64 {
    config.batch as u64 * config.micro_batches()
}

/// Checks that model, text and configuration fit together.
fn check_fit(model: &Model, data: &TrainData, config: &TrainConfig) -> Result<()> {
    let of = model.config();
    if config.seq > of.max_position {
        let allowed = format!("at most the model's max_position_embeddings {}", of.max_position);
        return Err(Error::field("seq", config.seq, allowed));
    }
    if let Some(layers) = &config.train_layers
        && (layers.is_empty() || layers.iter().any(|&layer| layer >= of.num_layers))
    {
        let allowed = format!("a list of layers from 0 to {}", of.num_layers - 1);
        return Err(Error::field("train_layers", format!("{layers:?}"), allowed));
    }
    let largest = data.sources.iter().map(|source| source.tokens.max_id()).max().unwrap_or(0);
    if largest as usize >= of.vocab_size {
        let allowed = format!("the model's own tokenizer: ids are below vocab_size {}", of.vocab_size);
        return Err(Error::field("a token id of the text", largest, allowed));
    }
    Ok(())
}

/// Loads the teacher, if there is one, opens its cache, and sets the defaults of its settings in `config`.
fn lessons_of(
    model: &Model,
    config: &mut TrainConfig,
    options: &RunOptions,
) -> Result<Option<(Lessons, TeacherId)>> {
    let Some(dir) = &options.teacher else {
        let cache = options.teacher_cache.as_ref().map(|dir| dir.display().to_string());
        let settings = [
            ("teacher_weight", config.teacher_weight.map(|weight| weight.to_string())),
            ("teacher_top", config.teacher_top.map(|top| top.to_string())),
            ("teacher_cache", cache),
        ];
        return match settings.into_iter().find_map(|(field, found)| Some((field, found?))) {
            None => Ok(None),
            Some((field, found)) => Err(Error::field(field, found, "it with a {teacher} only")),
        };
    };
    if options.device != Device::Cpu {
        return Err(Error::field("teacher", "set for a GPU", "a teacher with {device} cpu only"));
    }
    let weight = *config.teacher_weight.get_or_insert(TEACHER_WEIGHT);
    let vocab = model.config().vocab_size;
    if let Some(top) = config.teacher_top.filter(|&top| top > vocab) {
        return Err(Error::field("teacher_top", top, format!("at most the vocabulary's {vocab}")));
    }
    let (teacher, id) = teacher::load(dir, weight, model.config(), config.seq)?;
    let cache = match &options.teacher_cache {
        None => None,
        Some(cache) => {
            let top = *config.teacher_top.get_or_insert(TEACHER_TOP.min(vocab));
            let shape = RowShape { seq: config.seq, top, vocab };
            Some(TeacherCache::open(cache, &teacher::contents_of(dir)?, shape)?)
        }
    };
    Ok(Some((Lessons::new(teacher, config.teacher_top, cache), id)))
}

/// Returns the filter, if one is wanted, and sets the default in `config`.
fn near_duplicates<'a>(data: &'a TrainData, config: &mut TrainConfig) -> Result<Option<&'a TokenTexts>> {
    let several = data.sources.len() > 1 && data.texts.is_some();
    let wanted =
        config.near_duplicates.unwrap_or(if several { NearDuplicates::Drop } else { NearDuplicates::Keep });
    config.near_duplicates = Some(wanted);
    match (wanted, &data.texts) {
        (NearDuplicates::Keep, _) => Ok(None),
        (NearDuplicates::Drop, Some(texts)) => Ok(Some(texts)),
        (NearDuplicates::Drop, None) => {
            let found = "drop, without the texts of the tokens";
            Err(Error::field("near_duplicates", found, "keep, or give TrainData::texts"))
        }
    }
}

/// Notes about the sources for the user.
fn mixture_notes(mixture: &Mixture) -> Vec<String> {
    let mut notes = Vec::new();
    for part in mixture.parts() {
        let of = if mixture.parts().len() > 1 { format!("{}: ", part.name) } else { String::new() };
        let removed = &part.removed;
        if removed.train_pieces > 0 || removed.valid_pieces > 0 {
            let train = format!("{} pieces ({} tokens", removed.train_pieces, removed.train_tokens);
            let valid = format!("{} ({} tokens) not evaluated", removed.valid_pieces, removed.valid_tokens);
            let copies = removed.train_copies;
            notes.push(format!(
                "{of}near duplicates: {train}, {copies} whole copies) not trained on, {valid}"
            ));
        }
        if removed.valid_pieces > 0 && part.split.valid_tokens().len() < 2 {
            let note =
                "all that was held out is in the training text too: it is not evaluated; remove the copies";
            notes.push(format!("{of}{note}"));
        }
    }
    notes
}

fn thread_pool(threads: usize) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|cause| Error::Threads { threads, cause })
}
