//! Costs of stages in tokens of forward passes.

use anyhow::Result;
use dsmoe_train::TrainConfig;

use super::jobs::Job;
use super::outputs::Part;
use super::profile::{Profile, Role};

/// Cost of an item of a task: about three passes over a hundred tokens.
const ITEM_TOKENS: usize = 300;
const TASKS: usize = 10;
/// Passes of the search for a threshold.
const SEARCH: usize = 24;
/// Estimated cost of a calibration sequence, small beside training.
const SAMPLE_TOKENS: usize = 100;

/// Costs of the stages of a profile on text of that many sources.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs<'a> {
    pub(crate) profile: &'a Profile,
    pub(crate) sources: usize,
    pub(crate) seq: usize,
}

impl Costs<'_> {
    /// Returns the cost of a training. The backward pass costs two forward passes.
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

    /// Returns the cost of a part of measuring. `late` models get their threshold after training.
    pub(crate) fn part(self, part: Part, late: bool) -> f64 {
        let measure = &self.profile.measure;
        match part {
            Part::Text => self.text(),
            Part::Tasks => {
                let tasks = if measure.tasks.is_empty() { TASKS } else { measure.tasks.len() };
                (measure.items * tasks * ITEM_TOKENS) as f64
            }
            Part::Sweep if late => {
                self.passes(measure.sweep_windows, measure.late_thresholds().len() + SEARCH)
            }
            Part::Sweep => self.passes(measure.windows, measure.thresholds.len()),
            Part::Difficulty => 2.0 * self.text(),
            Part::Speed => (measure.prefill + measure.decode) as f64,
        }
    }

    /// Returns the cost of all measuring of a model, in training and after it.
    pub(crate) fn measuring(self, job: Job<'_>, parts: &[Part]) -> f64 {
        let late = job.spec.role == Role::WithoutThreshold;
        let milestones = self.profile.milestones_of(job.spec).len() as f64;
        milestones * self.text() + parts.iter().map(|part| self.part(*part, late)).sum::<f64>()
    }

    fn passes(self, windows: usize, times: usize) -> f64 {
        (windows * times * self.sources * self.seq) as f64
    }
}
