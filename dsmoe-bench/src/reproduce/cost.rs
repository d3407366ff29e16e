//! What stages cost, in tokens of forward passes, and how far the whole work is.

use std::cell::Cell;
use std::time::Instant;

use anyhow::Result;
use dsmoe_train::TrainConfig;

use super::jobs::Job;
use super::outputs::Part;
use super::profile::{Profile, Role};
use crate::format::duration;
use crate::ui::Ui;

/// A task's items, each of about three passes over a hundred tokens, one of them token by token.
const ITEM_TOKENS: usize = 300;
const TASKS: usize = 10;
/// Passes that the search for a threshold takes.
const SEARCH: usize = 24;
/// What making a model takes of a calibration sequence: a guess that weighs little beside training.
const SAMPLE_TOKENS: usize = 100;

/// Costs of a profile's stages on text of so many sources.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs<'a> {
    pub(crate) profile: &'a Profile,
    pub(crate) sources: usize,
    pub(crate) seq: usize,
}

impl Costs<'_> {
    /// Training; backward is twice the forward.
    pub(crate) fn train(self, config: &TrainConfig) -> Result<f64> {
        let config = config.clone().resolve()?;
        Ok(3.0 * (config.steps.unwrap_or(0) * config.tokens_per_step()) as f64)
    }

    pub(crate) fn make(self) -> f64 {
        (self.profile.calibration.samples * SAMPLE_TOKENS) as f64
    }

    pub(crate) fn text(self) -> f64 {
        self.passes(self.profile.measure.windows, 1)
    }

    /// A part of what is measured; `late`: the threshold is found after training.
    pub(crate) fn part(self, part: Part, late: bool) -> f64 {
        let measure = &self.profile.measure;
        match part {
            Part::Text => self.text(),
            Part::Tasks => (measure.items * TASKS * ITEM_TOKENS) as f64,
            Part::Sweep if late => {
                self.passes(measure.sweep_windows, measure.late_thresholds().len() + SEARCH)
            }
            Part::Sweep => self.passes(measure.windows, measure.thresholds.len()),
            Part::Difficulty => 2.0 * self.text(),
            Part::Speed => (measure.prefill + measure.decode) as f64,
        }
    }

    /// All that is measured of a model in training and after it.
    pub(crate) fn measuring(self, job: Job<'_>, parts: &[Part]) -> f64 {
        let late = job.spec.role == Role::WithoutThreshold;
        let milestones = self.profile.milestones_of(job.spec).len() as f64;
        milestones * self.text() + parts.iter().map(|part| self.part(*part, late)).sum::<f64>()
    }

    fn passes(self, windows: usize, times: usize) -> f64 {
        (windows * times * self.sources * self.seq) as f64
    }
}

/// How far the whole work is, in tokens of forward passes.
pub(crate) struct Ledger {
    started: Instant,
    done: Cell<f64>,
    left: Cell<f64>,
    stages: Cell<(usize, usize)>,
}

impl Ledger {
    pub(crate) fn new(stages: usize, cost: f64) -> Ledger {
        Ledger {
            started: Instant::now(),
            done: Cell::new(0.0),
            left: Cell::new(cost),
            stages: Cell::new((0, stages)),
        }
    }

    /// Says what is done next.
    pub(crate) fn begin(&self, ui: &Ui, what: &str) {
        let (at, of) = self.stages.get();
        let elapsed = self.started.elapsed().as_secs_f64();
        let left = match self.done.get() {
            done if done > 0.0 => format!(", about {} left", duration(elapsed / done * self.left.get())),
            _ => String::new(),
        };
        ui.note(format_args!("[{}/{of}] {what} ({}{left})", at + 1, duration(elapsed)));
    }

    /// A stage is done; `was_done`: before this process.
    pub(crate) fn end(&self, cost: f64, was_done: bool) {
        let (at, of) = self.stages.get();
        self.stages.set((at + 1, of));
        self.left.set((self.left.get() - cost).max(0.0));
        if !was_done {
            self.done.set(self.done.get() + cost);
        }
    }
}
