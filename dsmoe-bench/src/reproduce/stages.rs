//! The stages: a dense model, and of every method and seed a model made, trained and measured.

use std::cell::{Cell, OnceCell, RefCell};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use dsmoe_baselines::{Budget, Job as Pruning};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::copy_companions;
use dsmoe_core::config::Config;
use dsmoe_core::init::{InitOptions, init};
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::tasks::{self, Loaded, Source, TASKS};
use dsmoe_datasets::world::{Probe, World};
use dsmoe_kernels::Precision;
use dsmoe_train::TrainConfig;
use dsmoe_train::metrics::StepRecord;
use dsmoe_train::run::{Observer, Outcome, RunOptions, Trainer};
use dsmoe_train::tasks::model_sha256;
use serde::Serialize;
use serde_json::{Value, json};

use super::cache::{Cache, Interrupted, Key, read_json, write_json};
use super::cost::{Costs, Ledger};
use super::jobs::Job;
use super::measure::{self, PerToken, TextResult};
use super::options::Options;
use super::outputs::Part;
use super::profile::{MethodSpec, Profile, Role};
use super::records::{BASE, FORMAT_VERSION, Machine, Made, Milestone, Run, Speed, Timing, Trained};
use super::text::Text;
use crate::interrupts::STOP;
use crate::models::default_precision;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// The dense model that every method starts from.
pub(crate) struct Base {
    pub(crate) dir: PathBuf,
    pub(crate) key: Key,
    pub(crate) config: Config,
    /// Hash of its files, where it was given.
    pub(crate) sha256: Option<String>,
}

/// Everything that stages share.
pub(crate) struct Lab<'a> {
    pub(crate) profile: &'a Profile,
    pub(crate) args: &'a Options,
    pub(crate) text: &'a Text,
    pub(crate) cache: &'a Cache,
    pub(crate) ui: Ui,
    pub(crate) costs: Costs<'a>,
    pub(crate) ledger: Ledger,
    /// Training steps that may still be taken.
    pub(crate) steps_left: Cell<Option<u64>>,
    pub(crate) tasks: OnceCell<Vec<Loaded>>,
    /// Losses of the dense model on the held-out text.
    pub(crate) dense_losses: RefCell<Option<Vec<f32>>>,
}

impl Lab<'_> {
    /// A stage with a line about it.
    fn stage<T: Serialize + serde::de::DeserializeOwned>(
        &self,
        name: &str,
        of: &str,
        key: &Key,
        cost: f64,
        work: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        if STOP.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        let done: Option<T> = self.cache.get(name, key);
        let was_done = done.is_some();
        let result = match done {
            Some(done) => done,
            None => {
                self.ledger.begin(&self.ui, &format!("{name} {of}"));
                match self.cache.stage(name, key, work) {
                    Err(error) if error.is::<Interrupted>() => return Err(error),
                    other => other.with_context(|| format!("stage {name} of {of}"))?,
                }
            }
        };
        self.ledger.end(cost, was_done);
        Ok(result)
    }

    // ---- the dense model ----

    /// The dense model: the one given, or one trained from random weights.
    pub(crate) fn base(&self) -> Result<Base> {
        if let Some(model) = &self.args.model {
            let hash = model_sha256(model)?;
            let config = Config::load(model)?;
            let key = Key::of("given", &json!(hash));
            return Ok(Base { dir: model.clone(), key, config, sha256: Some(hash) });
        }
        let Some(config) = self.profile.pretrain() else {
            bail!("profile {} starts from a checkpoint; name one with --model DIR", self.profile.name);
        };
        let config = config?;
        let key = self.base_key(&config)?;
        let cost = self.costs.train(&config)?;
        let dir = self.cache.dir("dense", &key);
        self.stage("dense", BASE, &key, cost, |dir| {
            let start = dir.join("start");
            let architecture = self.profile.architecture(self.text.tokenizer.vocab_size())?;
            let options = InitOptions { seed: config.seed, force: true, ..InitOptions::default() };
            init(&architecture, &start, &options, &mut |_| {})?;
            copy_companions(&self.text.tokenizer_dir, &start)?;
            self.train(&start, &dir.join("run"), config.clone(), &[], BASE, &mut |_, _, _| Ok(()))
        })?;
        let dir = dir.join("run");
        remove_checkpoints(&dir)?;
        let config = Config::load(&dir)?;
        Ok(Base { dir, key, config, sha256: None })
    }

    fn base_key(&self, config: &TrainConfig) -> Result<Key> {
        let on_gpu = self.args.device.is_gpu();
        Ok(Key::of("dense", &json!([self.text.key, self.profile.model, settled(config)?, on_gpu])))
    }

    // ---- one method and seed ----

    /// Makes, trains and measures a model.
    pub(crate) fn run(&self, job: Job<'_>, base: &Base, parts: &[Part]) -> Result<(Run, Timing)> {
        let id = job.id();
        let config = self.profile.train_of(job.spec, job.seed)?;
        let made_key = self.made_key(job, base)?;
        let made_dir = self.cache.dir("make", &made_key);
        let made: Made =
            self.stage("make", &id, &made_key, self.costs.make(), |dir| self.make(job, base, dir))?;
        let made_model = match job.spec.make.as_str() {
            "dense" => base.dir.clone(),
            _ => made_dir.join("model"),
        };

        let milestones = self.profile.milestones_of(job.spec);
        let device = self.args.device;
        let key = Key::of(
            "train",
            &json!([made_key, settled(&config)?, self.text.key, milestones, self.windows(), device.is_gpu()]),
        );
        let run_dir = self.cache.dir("train", &key).join("run");
        let cost = self.costs.train(&config)? + milestones.len() as f64 * self.costs.text();
        let trained: Trained = self.stage("train", &id, &key, cost, |dir| {
            let file = |share: f64| dir.join(format!("at-{share}.json"));
            self.train(
                &made_model,
                &dir.join("run"),
                config.clone(),
                &milestones,
                &id,
                &mut |share, step, model| {
                    let path = file(share);
                    if path.is_file() {
                        return Ok(());
                    }
                    let model = Inference::new_on(model, default_precision(device, Precision::F32), device)?;
                    let (found, _) =
                        measure::text(&model, &self.text.held_out, self.costs.seq, self.windows())?;
                    let milestone = Milestone {
                        share,
                        step,
                        tokens: step * config.tokens_per_step(),
                        nll: found.nll,
                        ppl: found.ppl,
                        active_ratio: found.active_ratio,
                        params_total: found.params_total,
                        params_activated: found.params_activated,
                    };
                    write_json(&path, &milestone)
                },
            )?;
            let steps = config.clone().resolve()?.steps.unwrap_or(0);
            let milestones =
                milestones.iter().map(|&share| read_json(&file(share))).collect::<Result<_>>()?;
            Ok(Trained { steps, tokens: steps * config.tokens_per_step(), milestones })
        })?;
        remove_checkpoints(&run_dir)?;
        let mut run = self.measure(&run_dir, &key, &id, Some(job.spec), base, parts)?;
        (run.method, run.role, run.seed) = (job.spec.name.clone(), Some(job.spec.role), job.seed);
        (run.made, run.trained) = (Some(made), Some(trained));
        let threshold = run.text.threshold;
        let speed = self.speed(&run_dir, &key, &id, threshold, parts)?;
        let timing = Timing {
            method: job.spec.name.clone(),
            seed: job.seed,
            speed,
            train_tokens_per_s: training_speed(&run_dir),
        };
        Ok((run, timing))
    }

    /// Measures the dense model before continued training.
    pub(crate) fn run_base(&self, base: &Base, parts: &[Part]) -> Result<(Run, Timing)> {
        let run = self.measure(&base.dir, &base.key, BASE, None, base, parts)?;
        let speed = self.speed(&base.dir, &base.key, BASE, None, parts)?;
        let timing =
            Timing { method: BASE.to_owned(), seed: 0, speed, train_tokens_per_s: training_speed(&base.dir) };
        Ok((run, timing))
    }

    fn made_key(&self, job: Job<'_>, base: &Base) -> Result<Key> {
        let spec = job.spec;
        let settings = json!([
            base.key,
            spec.make,
            self.profile.configured(spec)?.resolved(),
            self.profile.active,
            self.profile.calibration,
            self.costs.seq,
            self.text.key,
            job.seed,
        ]);
        Ok(Key::of("make", &settings))
    }

    /// Makes a method's model of the dense one.
    fn make(&self, job: Job<'_>, base: &Base, dir: &Path) -> Result<Made> {
        let method = self.profile.configured(job.spec)?;
        let budget = Budget::Params(self.profile.budget(&base.config).round());
        if method.plan(&base.config, budget)?.unchanged {
            let counts = Accounting::of(&base.config);
            return Ok(Made::of_params(counts.total as f64, counts.total as f64, "nothing"));
        }
        let calibration = match method.needs_calibration() {
            true => self.text.calibration(self.profile.calibration.samples, job.seed)?,
            false => Vec::new(),
        };
        let pruning = Pruning {
            model: &base.dir,
            out: &dir.join("model"),
            force: true,
            budget,
            calibration: &calibration,
            seed: job.seed,
        };
        let made = method.run(&pruning, &mut |_| {})?;
        Ok(Made {
            params_total: made.plan.total,
            params_activated: made.plan.activated,
            reached_by: made.plan.reached_by,
            calibration_tokens: calibration.len() * self.costs.seq,
            settings: made.plan.settings.into_iter().collect(),
            measured: made.measured.into_iter().collect(),
        })
    }

    fn load(&self, model: &Path) -> Result<Inference> {
        let device = self.args.device;
        Ok(Inference::load_on(model, default_precision(device, Precision::F32), device)?)
    }

    fn windows(&self) -> usize {
        self.profile.measure.windows
    }

    /// Trains the model in `source` into `out`, or goes on with it; `at` hears of every milestone.
    fn train(
        &self,
        source: &Path,
        out: &Path,
        config: TrainConfig,
        milestones: &[f64],
        what: &str,
        at: &mut dyn FnMut(f64, u64, &Model) -> Result<()>,
    ) -> Result<()> {
        let options = RunOptions { resume: true, device: self.args.device, ..RunOptions::new(source, out) };
        let mut trainer = Trainer::new(Model::load(source)?, self.text.train_data(), config, options)?;
        let steps = trainer.config().steps.unwrap_or(0);
        let mut due: Vec<(u64, f64)> = milestones
            .iter()
            .map(|&share| (((share * steps as f64).ceil() as u64).min(steps), share))
            .collect();
        due.retain(|(step, _)| *step >= trainer.step());
        let mut due = due.into_iter().peekable();
        let stop = AtomicBool::new(false);
        let mut progress = Progress::new(&self.ui, format!("training {what}"), Unit::Steps, steps);
        progress.line_every(trainer.config().log_every);
        let mut watch = Watch { progress, steps, next: None, stop: &stop, left: self.steps_left.get() };
        loop {
            while let Some(&(step, share)) = due.peek()
                && step == trainer.step()
            {
                at(share, step, trainer.measured_model())?;
                due.next();
            }
            watch.next = due.peek().map(|(step, _)| *step);
            // Nothing is left to do but to write the model.
            stop.store(watch.out_of_time() && trainer.step() < steps, Ordering::Relaxed);
            let outcome = trainer.run(&mut watch, &stop);
            self.steps_left.set(watch.left);
            let finished = outcome? == Outcome::Finished;
            if !finished && watch.out_of_time() {
                watch.progress.finish();
                return Err(Interrupted.into());
            }
            if finished {
                for (step, share) in due {
                    at(share, step, trainer.measured_model())?;
                }
                watch.progress.finish();
                return Ok(());
            }
        }
    }

    // ---- measuring ----

    fn measure(
        &self,
        dir: &Path,
        key: &Key,
        id: &str,
        spec: Option<&MethodSpec>,
        base: &Base,
        parts: &[Part],
    ) -> Result<Run> {
        let measure = &self.profile.measure;
        let late = spec.is_some_and(|spec| spec.role == Role::WithoutThreshold);
        let loaded: OnceCell<Inference> = OnceCell::new();
        let text_key = Key::of("text-of", &json!([key, self.windows(), late.then_some(self.profile.active)]));
        let cost = self.costs.text();
        let text: TextResult = self.stage("measure", id, &text_key, cost, |_| {
            let mut model = self.load(dir)?;
            let threshold = late
                .then(|| {
                    let (held_out, windows) = (&self.text.held_out, measure.sweep_windows);
                    measure::find_threshold(
                        &mut model,
                        held_out,
                        self.costs.seq,
                        windows,
                        self.profile.active,
                    )
                })
                .transpose()?;
            let (mut found, _) = measure::text(&model, &self.text.held_out, self.costs.seq, self.windows())?;
            found.threshold = threshold;
            Ok(found)
        })?;
        // Loaded when a stage needs it.
        let model = || -> Result<&Inference> {
            if loaded.get().is_none() {
                let mut model = self.load(dir)?;
                if let Some(threshold) = text.threshold {
                    model.set_threshold(threshold)?;
                }
                let _ = loaded.set(model);
            }
            loaded.get().context("a model was loaded")
        };

        let tasks = parts.contains(&Part::Tasks).then(|| {
            let tasks = self.tasks()?;
            let place = self.args.task_data.as_ref().map(|dir| dir.display().to_string());
            let world = self.profile.world.as_ref().map(|world| world.seed);
            let hashes: Vec<_> = tasks.iter().map(|task| (task.name(), task.documents().len())).collect();
            let key = Key::of("tasks", &json!([key, text.threshold, world, place, measure.items, hashes]));
            self.stage("tasks", id, &key, self.costs.part(Part::Tasks, late), |_| {
                let mut progress = Progress::new(&self.ui, "tasks", Unit::Parts, tasks.len() as u64);
                let model = model()?;
                let scores = measure::tasks(model, &self.text.tokenizer, tasks, &mut |done, all| {
                    progress.set(done as u64, all as u64, "");
                });
                progress.finish();
                scores
            })
        });
        let sweep = parts.contains(&Part::Sweep).then(|| {
            let thresholds = match late {
                true => measure.late_thresholds(),
                false => measure.thresholds.clone(),
            };
            // The table's rows are measured on all windows, the many of the figure on some.
            let windows = if late { measure.sweep_windows } else { self.windows() };
            let key = Key::of("sweep", &json!([key, thresholds, windows, self.text.key]));
            self.stage("sweep", id, &key, self.costs.part(Part::Sweep, late), |_| {
                let mut model = self.load(dir)?;
                measure::sweep(&mut model, &self.text.held_out, self.costs.seq, windows, &thresholds)
            })
        });
        let difficulty = parts.contains(&Part::Difficulty).then(|| {
            let key = Key::of("difficulty", &json!([key, base.key, self.windows(), self.text.key]));
            self.stage("difficulty", id, &key, self.costs.part(Part::Difficulty, late), |_| {
                let (_, tokens) =
                    measure::text(model()?, &self.text.held_out, self.costs.seq, self.windows())?;
                self.with_dense_losses(base, |dense| {
                    Ok(measure::difficulty(dense, &tokens, self.profile.experts))
                })
            })
        });
        Ok(Run {
            format_version: FORMAT_VERSION,
            method: id.to_owned(),
            role: None,
            seed: 0,
            key: key.text().to_owned(),
            machine: Machine::here(self.args.device),
            made: None,
            trained: None,
            text,
            tasks: tasks.transpose()?,
            sweep: sweep.transpose()?,
            difficulty: difficulty.transpose()?,
        })
    }

    fn with_dense_losses<T>(&self, base: &Base, take: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
        if self.dense_losses.borrow().is_none() {
            let model = self.load(&base.dir)?;
            let (_, PerToken { losses, .. }) =
                measure::text(&model, &self.text.held_out, self.costs.seq, self.windows())?;
            *self.dense_losses.borrow_mut() = Some(losses);
        }
        take(self.dense_losses.borrow().as_deref().unwrap_or_default())
    }

    /// The tasks that models are asked.
    pub(crate) fn tasks(&self) -> Result<&[Loaded]> {
        if let Some(tasks) = self.tasks.get() {
            return Ok(tasks);
        }
        let items = self.profile.measure.items;
        let tasks = match (&self.args.task_data, &self.profile.world) {
            (Some(folder), _) => tasks_of(folder, items)?,
            (None, Some(world)) => {
                let world = World::new(world.seed);
                let load = |probe| world.load(probe, items, &tasks::Options::default());
                Probe::ALL.into_iter().map(load).collect::<Result<Vec<_>, _>>()?
            }
            (None, None) => Vec::new(),
        };
        Ok(self.tasks.get_or_init(|| tasks))
    }

    fn speed(
        &self,
        dir: &Path,
        key: &Key,
        id: &str,
        threshold: Option<f32>,
        parts: &[Part],
    ) -> Result<Option<Speed>> {
        if !parts.contains(&Part::Speed) {
            return Ok(None);
        }
        let (prefill, decode) = (self.profile.measure.prefill, self.profile.measure.decode);
        let threads = rayon::current_num_threads();
        let key = Key::of(
            "speed",
            &json!([key, threshold, prefill, decode, threads, Machine::here(self.args.device)]),
        );
        let speed = self.stage("speed", id, &key, self.costs.part(Part::Speed, false), |stage| {
            // A process of its own: its memory is the model's.
            let program = std::env::current_exe().context("cannot find this program")?;
            // Text as it is, since what is active depends on it.
            let ids: Vec<u32> =
                self.text.held_out.iter().flat_map(|part| &part.ids).copied().take(prefill).collect();
            let file = stage.join("ids.json");
            write_json(&file, &ids)?;
            let mut command = Command::new(program);
            command.args(["reproduce", "speed", "--json", "--quiet"]).arg(dir).arg("--ids").arg(&file);
            for (flag, value) in [("--decode", decode), ("--threads", threads)] {
                command.arg(flag).arg(value.to_string());
            }
            command.arg("--device").arg(self.args.device.to_string());
            if let Some(threshold) = threshold {
                command.arg("--threshold").arg(threshold.to_string());
            }
            let output = command.output().context("cannot start this program")?;
            if STOP.load(Ordering::Relaxed) {
                return Err(Interrupted.into());
            }
            if !output.status.success() {
                bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
            }
            let speed: Speed = serde_json::from_slice(&output.stdout).context("its answer cannot be read")?;
            Ok(speed)
        })?;
        Ok(Some(speed))
    }
}

/// Settings with all that follows from others filled in, without what cannot change the numbers.
fn settled(config: &TrainConfig) -> Result<Value> {
    let mut config = config.clone().resolve()?;
    (config.save_every, config.keep, config.log_every, config.threads) = (None, 1, 1, None);
    Ok(serde_json::to_value(config)?)
}

/// The benchmarks in `folder` that the paper uses.
fn tasks_of(folder: &Path, items: usize) -> Result<Vec<Loaded>> {
    if !folder.is_dir() {
        bail!("--task-data {}: no such folder", folder.display());
    }
    let source = Source::folder(folder);
    let options = tasks::Options { limit: Some(items), ..tasks::Options::default() };
    let mut loaded = Vec::new();
    for task in &TASKS {
        let of_paper = Probe::ALL.iter().any(|probe| probe.name() == task.name);
        if of_paper && source.files_of(task)?.is_some() {
            loaded.push(Loaded::load(task, &source, &options)?);
        }
    }
    if loaded.is_empty() {
        bail!("--task-data {}: no files of any of the ten benchmarks", folder.display());
    }
    Ok(loaded)
}

/// The model is written; what only going on would need takes three times its room.
fn remove_checkpoints(run: &Path) -> Result<()> {
    let dir = run.join("checkpoints");
    if dir.is_dir() {
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    Ok(())
}

/// Tokens per second of the median training step.
fn training_speed(run: &Path) -> Option<f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).ok()?;
    let speed = |line: &str| serde_json::from_str::<Value>(line).ok()?["tokens_per_s"].as_f64();
    let mut speeds: Vec<f64> = text.lines().filter_map(speed).collect();
    speeds.sort_by(f64::total_cmp);
    speeds.get(speeds.len() / 2).copied()
}

/// Shows a run and stops it where it is due.
struct Watch<'a> {
    progress: Progress,
    steps: u64,
    /// Step of the next milestone.
    next: Option<u64>,
    stop: &'a AtomicBool,
    /// Steps that may still be taken.
    left: Option<u64>,
}

impl Watch<'_> {
    fn out_of_time(&self) -> bool {
        STOP.load(Ordering::Relaxed) || self.left == Some(0)
    }
}

impl Observer for Watch<'_> {
    fn step(&mut self, record: &StepRecord) {
        let ratio = record.activation_ratio.map(|ratio| format!("  active {:.1} %", 100.0 * ratio));
        let detail = format!("loss {:.3}{}", record.lm_loss, ratio.unwrap_or_default());
        self.progress.set(record.step, self.steps, &detail);
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(1);
        }
        if self.out_of_time() || self.next == Some(record.step) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn note(&mut self, message: &str) {
        if message.contains("broken") {
            self.progress.note(message);
        }
    }
}
