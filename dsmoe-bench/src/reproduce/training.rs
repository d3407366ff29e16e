//! Training with stops at milestones.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use dsmoe_core::{Device, Model};
use dsmoe_train::TrainConfig;
use dsmoe_train::metrics::StepRecord;
use dsmoe_train::run::{Observer, Outcome, RunOptions, TrainData, Trainer};
use serde_json::Value;

use super::cache::Interrupted;
use crate::files::{discard, read_inside};
use crate::interrupts::{STOP, polled};
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// A training of the model in `source` that writes to `out`.
pub(crate) struct Training<'a> {
    pub(crate) source: &'a Path,
    pub(crate) out: &'a Path,
    pub(crate) config: TrainConfig,
    /// Shares of the steps at which the model is measured, ascending.
    pub(crate) milestones: &'a [f64],
    /// Those of them that were not measured yet.
    pub(crate) missing: &'a [f64],
    pub(crate) data: TrainData,
    /// The model whose distribution is learnt, and the directory that keeps its likeliest tokens for other trainings.
    pub(crate) teacher: Option<(PathBuf, Option<PathBuf>)>,
    pub(crate) device: Device,
    /// The name of the model for progress lines.
    pub(crate) name: &'a str,
}

impl Training<'_> {
    /// Trains, from the newest checkpoint if there is one. `at` receives the share, the step and the model at every
    /// milestone. `steps_left` is the number of steps that may still be taken. A training that went past a milestone that was not
    /// measured starts over, with a line that says so: the model of that step is gone.
    pub(crate) fn run(
        self,
        steps_left: &mut Option<u64>,
        ui: &Ui,
        at: &mut dyn FnMut(f64, u64, &Model) -> Result<()>,
    ) -> Result<()> {
        let mut trainer = self.trainer()?;
        let steps = trainer.config().steps.unwrap_or(0);
        let step_of = |share: f64| ((share * steps as f64).ceil() as u64).min(steps);
        if let Some(&passed) = self.missing.iter().find(|&&share| step_of(share) < trainer.step()) {
            ui.note(format_args!(
                "training {}: the milestone {passed} was passed and its measurement is missing; it starts over",
                self.name
            ));
            // It holds the lock of its directory.
            drop(trainer);
            discard(self.out)?;
            trainer = self.trainer()?;
        }
        let due = self.milestones.iter().map(|&share| (step_of(share), share));
        let due: Vec<(u64, f64)> = due.filter(|(step, _)| *step >= trainer.step()).collect();
        let mut due = due.into_iter().peekable();
        let stop = AtomicBool::new(false);
        let mut progress = Progress::new(ui, format!("training {}", self.name), Unit::Steps, steps);
        progress.line_every(trainer.config().log_every);
        let mut watch = Watch { progress, steps, next: None, stop: &stop, left: steps_left };
        loop {
            while let Some((step, share)) = due.next_if(|(step, _)| *step == trainer.step()) {
                at(share, step, trainer.measured_model())?;
            }
            watch.next = due.peek().map(|(step, _)| *step);
            // After the last step the model is still to be written.
            stop.store(watch.must_stop() && trainer.step() < steps, Ordering::Relaxed);
            if polled(|| trainer.run(&mut watch, &stop))? == Outcome::Finished {
                for (step, share) in due {
                    at(share, step, trainer.measured_model())?;
                }
                watch.progress.finish();
                return Ok(());
            }
            if watch.must_stop() {
                watch.progress.finish();
                return Err(Interrupted.into());
            }
        }
    }

    /// Makes the run or opens it at its newest checkpoint.
    fn trainer(&self) -> Result<Trainer> {
        let (teacher, teacher_cache) = self.teacher.clone().unzip();
        let options = RunOptions {
            resume: true,
            device: self.device,
            teacher,
            teacher_cache: teacher_cache.flatten(),
            ..RunOptions::new(self.source, self.out)
        };
        Ok(Trainer::new(Model::load(self.source)?, self.data.clone(), self.config.clone(), options)?)
    }
}

/// Shows a training and stops it at milestones.
struct Watch<'a> {
    progress: Progress,
    steps: u64,
    /// Step of the next milestone.
    next: Option<u64>,
    stop: &'a AtomicBool,
    /// Steps that may still be taken.
    left: &'a mut Option<u64>,
}

impl Watch<'_> {
    fn must_stop(&self) -> bool {
        STOP.load(Ordering::Relaxed) || *self.left == Some(0)
    }

    /// Stops the training if the user wants it to.
    fn hear(&self) {
        if STOP.load(Ordering::Relaxed) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

impl Observer for Watch<'_> {
    fn step(&mut self, record: &StepRecord) {
        let ratio = record.activation_ratio.map(|ratio| format!("  active {:.1} %", 100.0 * ratio));
        let detail = format!("loss {:.3}{}", record.lm_loss, ratio.unwrap_or_default());
        self.progress.set(record.step, self.steps, &detail);
        if let Some(left) = &mut *self.left {
            *left = left.saturating_sub(1);
        }
        // After the last step the run goes to its end, unless the user wants it to stop.
        let is_due = *self.left == Some(0) || self.next == Some(record.step);
        if is_due && record.step < self.steps {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.hear();
    }

    fn fitting(&mut self, _: usize, _: usize) {
        self.hear();
    }

    fn evaluating(&mut self, _: usize, _: usize) {
        self.hear();
    }

    fn note(&mut self, message: &str) {
        if message.contains("broken") {
            self.progress.note(message);
        }
    }
}

/// Returns the settings with all derived ones filled in and without those that cannot change the numbers.
pub(crate) fn settled(config: &TrainConfig) -> Result<Value> {
    let mut config = config.clone().resolve()?;
    (config.save_every, config.keep, config.log_every, config.threads) = (None, 1, 1, None);
    // Stages keep their keys of before there was a choice.
    let chosen = [
        ("router_gradient", !config.router_gradient.is_full()),
        ("hold_weight", config.hold_weight.is_some()),
        ("router_temperature", config.router_temperature.is_some()),
    ];
    let mut settings = serde_json::to_value(config)?;
    if let Some(settings) = settings.as_object_mut() {
        settings.retain(|key, _| !chosen.contains(&(&key[..], false)));
    }
    Ok(settings)
}

/// Removes the checkpoints of a finished run: they take three times the room of the model.
pub(crate) fn remove_checkpoints(run: &Path) -> Result<()> {
    let dir = run.join("checkpoints");
    if dir.is_dir() {
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    Ok(())
}

/// Removes the weights of a model, and leaves everything else of its directory.
pub(crate) fn remove_weights(model: &Path) -> Result<()> {
    if !model.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(model).with_context(|| model.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Returns the tokens per second of the median training step.
pub(crate) fn training_speed(run: &Path) -> Option<f64> {
    let text = read_inside(&run.join("metrics.jsonl")).ok()?;
    let speed = |line: &str| serde_json::from_str::<Value>(line).ok()?["tokens_per_s"].as_f64();
    let mut speeds: Vec<f64> = text.lines().filter_map(speed).collect();
    speeds.sort_by(f64::total_cmp);
    speeds.get(speeds.len() / 2).copied()
}
