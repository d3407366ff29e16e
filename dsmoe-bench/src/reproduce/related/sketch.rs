//! The stages of experiments and their costs, known before anything is computed.

use std::collections::HashSet;

use anyhow::Result;
use dsmoe_train::TrainConfig;
use serde::Serialize;

use super::super::cost::Costs;

/// Cost of a token of a mixture of eight experts over that of the dense model, about.
pub(crate) const MIXTURE: f64 = 2.0;

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
