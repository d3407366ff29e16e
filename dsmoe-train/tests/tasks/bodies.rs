//! Readers of this crate's files on any bytes. A body accepts the bytes or refuses them in one line, and never panics.
//! The tests and the targets of cargo-fuzz share these functions.

use std::fs;
use std::path::Path;

use dsmoe_datasets::tasks::add_task;
use dsmoe_datasets::{CorpusOptions, mixture};
use dsmoe_train::Error;
use dsmoe_train::config::TrainConfig;
use dsmoe_train::tasks::Journal;

fn accepted<T>(bytes: &[u8], read: impl FnOnce(&Path) -> Result<T, Error>) -> bool {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("file");
    fs::write(&path, bytes).unwrap();
    read(&path).inspect_err(|error| assert!(!error.to_string().contains('\n'), "{error}")).is_ok()
}

/// Opens a journal of answers of a model without routers.
pub(crate) fn journal(bytes: &[u8]) -> bool {
    accepted(bytes, |path| Journal::open(path, "this", None))
}

/// Reads a mixture file.
pub(crate) fn mixture(bytes: &[u8]) {
    accepted(bytes, |path| Ok(mixture::from_toml(path, &CorpusOptions::default())?));
}

/// Reads the definition of a benchmark.
pub(crate) fn definition(bytes: &[u8]) {
    accepted(bytes, |_| Ok(add_task(&String::from_utf8_lossy(bytes), "task.toml")?));
}

/// Reads a configuration of training and resolves it.
pub(crate) fn settings(bytes: &[u8]) -> bool {
    accepted(bytes, |path| TrainConfig::from_toml(path).and_then(TrainConfig::resolve))
}
