//! Execution of stages: each is found in the cache or computed, and a line reports the progress of the whole work.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::cache::{Busy, Cache, IfBusy, Interrupted, Key};
use crate::format::duration;
use crate::interrupts::STOP;
use crate::ui::Ui;

/// One stage of the work on a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stage<'a> {
    pub(crate) name: &'a str,
    /// The model.
    pub(crate) of: &'a str,
    pub(crate) key: &'a Key,
    /// Cost in tokens of forward passes.
    pub(crate) cost: f64,
}

/// All stages of a reproduction.
pub(crate) struct Work<'a> {
    pub(crate) cache: &'a Cache,
    ui: &'a Ui,
    started: Instant,
    stages: usize,
    /// The stages that are done, by the texts of their keys.
    finished: HashSet<String>,
    /// The behaviour at a stage that another process works on.
    pub(crate) if_busy: IfBusy,
    /// Cost of the stages that this process computed.
    computed: f64,
    /// Cost of the stages to come.
    left: f64,
}

impl<'a> Work<'a> {
    pub(crate) fn new(cache: &'a Cache, ui: &'a Ui, stages: usize, cost: f64) -> Work<'a> {
        let (started, finished, if_busy) = (Instant::now(), HashSet::new(), IfBusy::Wait);
        Work { cache, ui, started, stages, finished, if_busy, computed: 0.0, left: cost }
    }

    /// Returns the result of a stage, from the cache or by `compute`, which receives the directory of the stage.
    pub(crate) fn stage<T: Serialize + DeserializeOwned>(
        &mut self,
        stage: Stage<'_>,
        compute: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        let Stage { name, of, key, cost } = stage;
        if STOP.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        let result = match self.cache.get(name, key) {
            Some(done) => done,
            None => {
                let mut computes = false;
                let done = self.cache.stage(name, key, self.if_busy, |dir| {
                    computes = true;
                    self.announce(&format!("{name} {of}"));
                    compute(dir)
                });
                let result = match done {
                    Err(error) if error.is::<Interrupted>() || error.is::<Busy>() => return Err(error),
                    other => other.with_context(|| format!("stage {name} of {of}"))?,
                };
                if computes {
                    self.computed += cost;
                }
                result
            }
        };
        // A model whose later stage another process did is come back to.
        if self.finished.insert(format!("{name} {}", key.text())) {
            self.left = (self.left - cost).max(0.0);
        }
        Ok(result)
    }

    fn announce(&self, what: &str) {
        let elapsed = self.started.elapsed().as_secs_f64();
        let left = match self.computed > 0.0 {
            true => format!(", about {} left", duration(elapsed / self.computed * self.left)),
            false => String::new(),
        };
        let (number, stages, elapsed) = (self.finished.len() + 1, self.stages, duration(elapsed));
        self.ui.note(format_args!("[{number}/{stages}] {what} ({elapsed}{left})"));
    }
}
