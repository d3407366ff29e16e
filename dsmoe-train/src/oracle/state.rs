//! The progress of an oracle on disk, from which an interrupted one goes on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dsmoe_datasets::files::read_regular;
use serde::{Deserialize, Serialize};

use super::routes::Digits;
use super::tally::Level;
use crate::error::{Error, Result};
use crate::files::{self, Hashed};

/// The least time between two writes.
const EVERY: Duration = if cfg!(test) { Duration::ZERO } else { Duration::from_secs(20) };
/// The largest file that is read, in bytes.
const LARGEST: u64 = 1 << 31;

/// The work that is done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// Identifies the model, the text and the options.
    pub(crate) made_by: String,
    /// Beginnings of routes that a search has kept; those of no layer at first.
    pub(crate) beams: Vec<Digits>,
    /// Routes that are measured.
    pub(crate) done: u64,
    /// Those of every level.
    pub(crate) levels: Vec<Level>,
    /// The windows whose tokens have taken their best routes, of a greedy oracle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) greedy: Option<Greedy>,
    /// The controls that are measured, by level.
    pub(crate) controls: Vec<Control>,
}

/// The windows that are measured on all routes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Greedy {
    /// Groups of windows.
    pub(crate) groups: u64,
    /// Bits of the sums over their tokens of the losses on every route.
    pub(crate) sums: Vec<u64>,
}

/// The noisy copies that stand beside the routes of a level.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Control {
    /// Bits of their noise; none for a level without a control.
    pub(crate) noise: Option<u64>,
    pub(crate) copies: Level,
}

/// A file that holds the state.
#[derive(Debug)]
pub(crate) struct Store {
    path: Option<PathBuf>,
    written: Instant,
}

impl Store {
    /// Opens the state in `path`, if that is of the same work, or begins.
    pub(crate) fn open(path: Option<&Path>, made_by: &str) -> Result<(Store, State)> {
        let store = Store { path: path.map(Path::to_path_buf), written: Instant::now() };
        let begin = State { made_by: made_by.to_owned(), beams: vec![Digits::new()], ..State::default() };
        let Some(path) = path else { return Ok((store, begin)) };
        let bytes = match read_regular(path, LARGEST) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok((store, begin)),
            read => read.map_err(Error::io(path))?,
        };
        // State of other work, or damaged, is made again.
        let state: Option<State> = serde_json::from_slice(&bytes).ok().and_then(Hashed::checked);
        let state = state.filter(|state| state.made_by == made_by);
        Ok((store, state.unwrap_or(begin)))
    }

    /// Writes the state if the last one is old.
    pub(crate) fn keep(&mut self, state: &State) -> Result<()> {
        if let Some(path) = self.path.as_ref().filter(|_| self.written.elapsed() >= EVERY) {
            let bytes = serde_json::to_vec(&Hashed::of(state)).expect("numbers and names are JSON");
            files::replace(path, &bytes)?;
            self.written = Instant::now();
        }
        Ok(())
    }

    /// Removes the file: the work is done.
    pub(crate) fn remove(self) -> Result<()> {
        match self.path.as_deref().map(fs::remove_file) {
            Some(Err(cause)) if cause.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(&self.path.unwrap_or_default())(cause))
            }
            _ => Ok(()),
        }
    }
}
