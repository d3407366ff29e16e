//! Profiles of experiments: the TOML file that names the text, the dense model and the experiments.

use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_datasets::mixture::SourceTable;
use serde::{Deserialize, Serialize};

use super::super::profile::{
    self, Calibration, Measure, ModelSpec, PaperModel, Profile, TrainSettings, WorldText, check_tables,
    one_line,
};
use super::experiment::Experiment;
use crate::files;

/// The key that a comparison of methods does not have.
const MARK: &str = "experiments";

/// The definition of a set of experiments. Unknown keys are errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Definition {
    pub(crate) name: String,
    /// A description in one line.
    pub(crate) about: String,
    /// Runs of every experiment, with seeds 0, 1, ...
    pub(crate) seeds: u64,
    /// Names of experiments, in the order of the report.
    pub(crate) experiments: Vec<String>,
    /// Text of the embedded world; without it the user names text.
    #[serde(skip_serializing_if = "Option::is_none")]
    world: Option<WorldText>,
    /// Text as in a profile of methods, seen from the folder that the user names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    source: Vec<SourceTable>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    held_out: Vec<SourceTable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<ModelSpec>,
    /// Training of the dense model from random weights; without it the user names a model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pretrain: Option<TrainSettings>,
    /// Training of a mixture, and the settings that shorter trainings of experiments start from.
    train: TrainSettings,
    calibration: Calibration,
    measure: Windows,
}

/// The text on which losses are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Windows {
    /// Held-out windows of every source, as long as the sequences of the training.
    windows: usize,
}

impl Definition {
    /// Loads the profile of that name or file if it is one of experiments.
    pub(crate) fn load(name: &str, known: &[Experiment]) -> Result<Option<Definition>> {
        let (text, place) = match profile::text(name) {
            Some(text) => (text.to_owned(), format!("profile {name}")),
            None if Path::new(name).is_file() => (files::read_toml(Path::new(name))?, name.to_owned()),
            None => return Ok(None),
        };
        let is_one = toml::from_str::<toml::Table>(&text).is_ok_and(|table| table.contains_key(MARK));
        is_one.then(|| Definition::parse(&text, &place, known)).transpose()
    }

    /// Tells whether it is the embedded profile of its name, apart from the choice of seeds and experiments.
    pub(crate) fn is_embedded(&self) -> bool {
        let text = profile::text(&self.name);
        let embedded = text.and_then(|text| toml::from_str::<Definition>(text).ok());
        embedded.is_some_and(|embedded| {
            let (seeds, experiments) = (self.seeds, self.experiments.clone());
            Definition { seeds, experiments, ..embedded } == *self
        })
    }

    fn parse(text: &str, place: &str, known: &[Experiment]) -> Result<Definition> {
        let definition: Definition = toml::from_str(text).map_err(|cause| {
            let line = cause.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let message = one_line(&cause);
            anyhow::anyhow!(
                "{place}: line {line}: {message}; `dsmoe reproduce --print-profile related` prints an example"
            )
        })?;
        definition.check(known).with_context(|| place.to_owned())?;
        Ok(definition)
    }

    /// Refuses settings that cannot work before anything is computed.
    fn check(&self, known: &[Experiment]) -> Result<()> {
        if self.experiments.is_empty() {
            bail!("experiments is empty; name one or more of {}", names(known));
        }
        for (i, name) in self.experiments.iter().enumerate() {
            if !known.iter().any(|experiment| experiment.name == name) {
                bail!("experiments has {name:?}; use {}", names(known));
            }
            if self.experiments[..i].contains(name) {
                bail!("experiments has {name:?} twice; name it once");
            }
        }
        let counts = [("seeds", self.seeds as usize), ("calibration.samples", self.calibration.samples)];
        for (name, value) in counts.into_iter().chain([("measure.windows", self.measure.windows)]) {
            if value == 0 {
                bail!("{name} is 0; use 1 or more");
            }
        }
        if self.world.is_some() && (self.model.is_none() || self.pretrain.is_none()) {
            bail!("with [world] there must be [model] and [pretrain], by which the dense model is made");
        }
        check_tables(self.world.is_some(), &self.source, &self.held_out)?;
        let profile = self.profile(0);
        if let Some(pretrain) = profile.pretrain() {
            pretrain?.resolve().context("pretrain")?;
        }
        profile.train()?.resolve().context("train")?;
        Ok(())
    }

    /// Returns the profile that the stages of a seed read: its dense model has a seed of its own.
    pub(crate) fn profile(&self, seed: u64) -> Profile {
        let none = ModelSpec::default();
        Profile {
            name: self.name.clone(),
            about: self.about.clone(),
            seeds: self.seeds,
            experts: None,
            active: 1.0,
            budgets: Vec::new(),
            outputs: Vec::new(),
            paper: PaperModel::One,
            world: self.world.clone(),
            source: self.source.clone(),
            held_out: self.held_out.clone(),
            model: self.model.clone().unwrap_or(none),
            pretrain: self.pretrain.as_ref().map(|settings| settings.with_seed(seed)),
            train: self.train.clone(),
            calibration: self.calibration,
            milestones: vec![1.0],
            curve: Vec::new(),
            measure: Measure::of_windows(self.measure.windows),
            method: Vec::new(),
        }
    }
}

fn names(known: &[Experiment]) -> String {
    known.iter().map(|experiment| experiment.name).collect::<Vec<_>>().join(", ")
}
