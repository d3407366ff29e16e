//! The inputs that all stages share.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::config::Config;
use dsmoe_datasets::tasks::{Loaded, Options as TaskOptions, Task, TaskFiles, tasks};
use dsmoe_datasets::world::{Probe, World};
use dsmoe_kernels::Precision;

use super::cache::Key;
use super::cost::Costs;
use super::profile::Profile;
use super::text::Text;
use crate::cli::reproduce::Reproduce;
use crate::models::default_precision;
use crate::ui::Ui;

/// The inputs of all stages.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) profile: &'a Profile,
    pub(crate) options: &'a Reproduce,
    pub(crate) text: &'a Text,
    /// Tasks for the models; empty when no output shows them.
    pub(crate) tasks: &'a [Loaded],
    pub(crate) costs: Costs<'a>,
    pub(crate) ui: &'a Ui,
}

impl Inputs<'_> {
    /// Loads a model for inference on the device.
    pub(crate) fn load(&self, model: &Path) -> Result<Inference> {
        Ok(Inference::load_on(model, self.precision(), self.options.device)?)
    }

    /// Returns the precision that models are measured in.
    pub(crate) fn precision(&self) -> Precision {
        let stored = self.profile.measure.dtype.map_or(Precision::F32, Precision::from);
        default_precision(self.options.device, stored)
    }

    /// Returns the number of windows of every source that models are measured on.
    pub(crate) fn windows(&self) -> usize {
        self.profile.measure.windows
    }
}

/// The dense model that every method starts from.
pub(crate) struct Base {
    pub(crate) dir: PathBuf,
    pub(crate) key: Key,
    pub(crate) config: Config,
    /// Hash of its files, if the user named it.
    pub(crate) sha256: Option<String>,
    /// Its losses on the held-out text, once they were needed.
    pub(crate) losses: Option<Vec<f32>>,
}

/// Loads the tasks: files of benchmarks, or else the probes of the embedded world.
pub(crate) fn load_tasks(profile: &Profile, folder: Option<&Path>, ui: &Ui) -> Result<Vec<Loaded>> {
    let items = profile.measure.items;
    match (folder, &profile.world) {
        (Some(folder), _) => tasks_in(folder, profile, ui),
        (None, Some(world)) => {
            let world = World::new(world.seed);
            let load = |probe| world.load(probe, items, &TaskOptions::default());
            Ok(Probe::ALL.into_iter().map(load).collect::<Result<_, _>>()?)
        }
        (None, None) => Ok(Vec::new()),
    }
}

/// Loads the benchmarks in `folder` that the profile names, or else the paper uses.
fn tasks_in(folder: &Path, profile: &Profile, ui: &Ui) -> Result<Vec<Loaded>> {
    if !folder.is_dir() {
        bail!("--task-data {}: no such folder", folder.display());
    }
    let source = TaskFiles::folder(folder);
    let options = TaskOptions { limit: Some(profile.measure.items), ..TaskOptions::default() };
    let mut loaded = Vec::new();
    let named: Vec<&Task> =
        profile.measure.tasks.iter().map(|name| Task::named(name)).collect::<Result<_, _>>()?;
    for task in tasks() {
        let wanted = match &named[..] {
            [] => Probe::ALL.iter().any(|probe| probe.name() == task.name),
            named => named.iter().any(|other| other.name == task.name),
        };
        if wanted && source.files_of(task)?.is_some() {
            loaded.push(Loaded::load(task, &source, &options)?);
        } else if wanted && !profile.measure.tasks.is_empty() {
            ui.note(format_args!("{}: left out, {} has no files of it", task.name, folder.display()));
        }
    }
    if loaded.is_empty() {
        bail!("--task-data {}: no files of the benchmarks of profile {}", folder.display(), profile.name);
    }
    Ok(loaded)
}
