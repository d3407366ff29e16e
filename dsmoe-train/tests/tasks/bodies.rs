//! Readers of this crate's files on any bytes. A body accepts the bytes or refuses them in one line, and never panics.
//! The tests and the targets of cargo-fuzz share these functions.

use std::fs;

use dsmoe_train::Error;
use dsmoe_train::config::TrainConfig;
use dsmoe_train::tasks::Journal;

fn accepted<T>(result: Result<T, Error>) -> bool {
    result.inspect_err(|error| assert!(!error.to_string().contains('\n'), "{error}")).is_ok()
}

/// Opens a journal of answers of a model without routers.
pub(crate) fn journal(bytes: &[u8]) -> bool {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("responses.jsonl");
    fs::write(&path, bytes).unwrap();
    accepted(Journal::open(&path, "this", None))
}

/// Reads a configuration of training and resolves it.
pub(crate) fn settings(bytes: &[u8]) -> bool {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("train.toml");
    fs::write(&path, bytes).unwrap();
    accepted(TrainConfig::from_toml(&path).and_then(TrainConfig::resolve))
}
