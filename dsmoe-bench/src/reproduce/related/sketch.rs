//! The stages of experiments and their costs, known before anything is computed.

use std::collections::HashSet;

use anyhow::Result;
use dsmoe_train::TrainConfig;
use serde::Serialize;

use super::super::cost::Costs;

/// Cost of a token of a mixture of eight experts over that of the dense model, about.
pub(crate) const MIXTURE: f64 = 2.0;

/// Returns the settings of a training that has so many steps.
pub(crate) fn shortened(config: TrainConfig, steps: u64) -> TrainConfig {
    TrainConfig { steps: Some(steps), tokens: None, ..config }
}

/// The stages of one experiment and seed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Planned {
    pub(crate) stages: usize,
    /// Cost in tokens of forward passes of the dense model.
    pub(crate) tokens: f64,
}

/// Counts the stages of the experiments of one seed, which share some.
pub(crate) struct Sketch<'a> {
    costs: Costs<'a>,
    planned: Planned,
    /// The stages that other experiments have, too.
    shared: HashSet<String>,
}

impl<'a> Sketch<'a> {
    pub(crate) fn new(costs: Costs<'a>) -> Sketch<'a> {
        Sketch { costs, planned: Planned::default(), shared: HashSet::new() }
    }

    /// Returns the stages since the last call.
    pub(crate) fn take(&mut self) -> Planned {
        std::mem::take(&mut self.planned)
    }

    /// Returns the costs of stages of the profile.
    pub(crate) fn costs(&self) -> Costs<'a> {
        self.costs
    }

    /// Returns the settings that trainings of experiments start from.
    pub(crate) fn train_config(&self) -> Result<TrainConfig> {
        self.costs.profile.train()
    }

    /// The trained mixture, which experiments share.
    pub(crate) fn mixture(&mut self) -> Result<()> {
        if self.is_new("mixture") {
            self.mixture_trainings(1, &self.train_config()?)?;
        }
        Ok(())
    }

    /// Reports whether stages of that name, which several experiments have, are counted for the first time.
    pub(crate) fn is_new(&mut self, name: &str) -> bool {
        self.shared.insert(name.to_owned())
    }

    /// Stages that make models on calibration text.
    pub(crate) fn made(&mut self, stages: usize) {
        self.other(stages, self.costs.make());
    }

    /// Measurements of losses.
    pub(crate) fn losses(&mut self, stages: usize) {
        self.other(stages, self.costs.text());
    }

    /// Trainings of a dense model.
    pub(crate) fn trainings(&mut self, stages: usize, config: &TrainConfig) -> Result<()> {
        self.other(stages, self.costs.train(config)?);
        Ok(())
    }

    /// Changed dense models that are measured as made and after a training of `steps`, beside the dense model itself.
    pub(crate) fn made_and_tuned(&mut self, models: usize, steps: u64) -> Result<()> {
        self.dense_losses();
        self.made(models);
        self.losses(2 * models);
        self.trainings(models, &shortened(self.train_config()?, steps))
    }

    /// The losses of the dense model, which experiments share.
    pub(crate) fn dense_losses(&mut self) {
        if self.is_new("dense losses") {
            self.losses(1);
        }
    }

    /// Passes over the calibration text.
    pub(crate) fn calibration_passes(&mut self, stages: usize, passes: f64) {
        let text = self.costs.profile.calibration.samples * self.costs.seq;
        self.other(stages, passes * text as f64);
    }

    /// Trainings of a mixture.
    pub(crate) fn mixture_trainings(&mut self, stages: usize, config: &TrainConfig) -> Result<()> {
        self.other(stages, MIXTURE * self.costs.train(config)?);
        Ok(())
    }

    /// Returns what a training of the dense model costs.
    pub(crate) fn training_cost(&self, config: &TrainConfig) -> Result<f64> {
        self.costs.train(config)
    }

    /// Stages that each cost `tokens` of forward passes of the dense model.
    pub(crate) fn other(&mut self, stages: usize, tokens: f64) {
        self.planned.stages += stages;
        self.planned.tokens += stages as f64 * tokens;
    }
}
