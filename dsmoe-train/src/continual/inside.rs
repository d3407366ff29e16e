//! Checkpoints inside a task, from which a task that was interrupted goes on.
//!
//! ```text
//! OUT/checkpoints/02-00000120/    the second task after 120 steps: the model, the optimiser's moments, and inside.json
//! ```
//! A checkpoint appears complete. Those before it are then removed, and all of a task when it is done.

use std::path::{Path, PathBuf};

use dsmoe_core::Model;
use dsmoe_core::checkpoint::Manifest;
use dsmoe_core::params::Layout;
use dsmoe_datasets::Mixture;
use dsmoe_kernels::comm::Alone;
use dsmoe_router::BudgetController;
use serde::{Deserialize, Serialize};

use super::stream::Drawn;
use crate::checkpoint::{read_moments, write_together};
use crate::error::{Error, Result};
use crate::files;
use crate::optim::AdamW;

const CHECKPOINTS: &str = "checkpoints";
const STATE_FILE: &str = "inside.json";

/// The state of a task's steps beside the model and the moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Inside {
    /// Steps that are done.
    pub(super) step: u64,
    /// The density of the model before the first step.
    pub(super) start_density: f64,
    /// Loss of the last step.
    pub(super) loss: f64,
    /// The sum of the shares of active experts over steps, and the steps that had one.
    pub(super) active: (f64, u64),
    /// Tokens of all passes forward and backward.
    pub(super) passed: u64,
    /// Weight of the sparsity loss.
    pub(super) sparsity: f32,
    pub(super) controller: Option<BudgetController>,
    pub(super) drawn: Drawn,
    /// The bits of the held-out loss before the weights were pruned at the end; none if they were not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) before: Option<u64>,
}

/// The checkpoints of one task.
#[derive(Debug)]
pub(super) struct Checkpoints {
    /// The directory of those of all tasks.
    dir: PathBuf,
    task: usize,
    /// Steps between them.
    every: Option<u64>,
}

impl Checkpoints {
    pub(super) fn new(out: &Path, task: usize, every: Option<u64>) -> Checkpoints {
        Checkpoints { dir: out.join(CHECKPOINTS), task, every }
    }

    /// Reports whether there is to be one after so many steps.
    pub(super) fn is_due(&self, steps: u64) -> bool {
        self.every.is_some_and(|every| steps.is_multiple_of(every))
    }

    /// Writes a checkpoint, then removes the others.
    pub(super) fn save(&self, inside: &Inside, model: &Model, optimizer: &AdamW) -> Result<()> {
        let name = format!("{}{:08}", self.prefix(), inside.step);
        // A resumed run that is interrupted before its first step is where it began.
        if self.dir.join(&name).is_dir() {
            return Ok(());
        }
        let temporary = self.dir.join(format!(".{name}.tmp"));
        files::make_dir(&temporary, &self.dir.join(&name), |dir| {
            let sums = write_together(dir, model, optimizer, &Alone)?;
            files::write_json(&dir.join(STATE_FILE), inside)?;
            Manifest::write(dir, &sums)?;
            Ok(())
        })?;
        for other in files::names(&self.dir)?.iter().filter(|other| **other != name) {
            files::remove_dir(&self.dir.join(other))?;
        }
        Ok(())
    }

    /// Returns the newest checkpoint of the task, whose model must be laid out as `layout`.
    pub(super) fn newest(
        &self,
        layout: &Layout,
        texts: &[Mixture],
    ) -> Result<Option<(Inside, Model, AdamW)>> {
        let names = files::names(&self.dir)?;
        let Some(name) = names.iter().filter(|name| name.starts_with(&self.prefix())).max() else {
            return Ok(None);
        };
        let path = self.dir.join(name);
        files::check_dir(&path)?;
        let inside: Inside = files::read_json(&path.join(STATE_FILE))?;
        let file = path.join(STATE_FILE);
        let windows = texts[self.task].parts()[0].split.num_windows();
        if !inside.drawn.is_of(windows) || inside.active.1 > inside.step {
            return Err(Error::checkpoint(&file, "its windows or counts are not those of this task"));
        }
        inside
            .controller
            .iter()
            .try_for_each(BudgetController::check)
            .map_err(|problem| Error::checkpoint(&file, problem.to_string()))?;
        let model = Model::load(&path)?;
        if model.layout().entries() != layout.entries() {
            return Err(Error::checkpoint(&path, "its tensors are not those of the starting model"));
        }
        let mut optimizer = AdamW::new(layout);
        read_moments(&path, layout, &mut optimizer)?;
        Ok(Some((inside, model, optimizer)))
    }

    /// Removes the checkpoints of all tasks.
    pub(super) fn clear(out: &Path) -> Result<()> {
        files::remove_dir(&out.join(CHECKPOINTS))
    }

    fn prefix(&self) -> String {
        format!("{:02}-", self.task + 1)
    }
}
