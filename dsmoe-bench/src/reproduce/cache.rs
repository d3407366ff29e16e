//! The cache of stages. The result of a stage is found by a hash of its settings and inputs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dsmoe_datasets::tasks::sha256;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::files::{read_json, write_json};

/// Version of the computations of stages: it is raised when the same settings give another result.
const CODE_FORMAT: u32 = 3;
const RESULT: &str = "result.json";

/// The work was stopped on request. Finished stages are kept.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// A hash of the settings of a stage and of the keys of its inputs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Key(String);

impl Key {
    pub(crate) fn of(stage: &str, settings: &Value) -> Key {
        Key(sha256(&format!("{CODE_FORMAT} {stage} {settings}")))
    }

    pub(crate) fn text(&self) -> &str {
        &self.0
    }
}

/// The directory of all stages.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
}

impl Cache {
    pub(crate) fn new(dir: PathBuf) -> Cache {
        Cache { dir }
    }

    /// Returns the directory of a stage.
    pub(crate) fn dir(&self, stage: &str, key: &Key) -> PathBuf {
        self.dir.join(format!("{stage}-{}", &key.0[..16]))
    }

    /// Returns a directory that stages share.
    pub(crate) fn shared(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Returns the result of a stage, if it was done.
    pub(crate) fn get<T: DeserializeOwned>(&self, stage: &str, key: &Key) -> Option<T> {
        read_json(&self.dir(stage, key).join(RESULT)).ok()
    }

    /// Does a stage unless it was done. `work` receives its directory, which may hold files of an interrupted try.
    pub(crate) fn stage<T: Serialize + DeserializeOwned>(
        &self,
        stage: &str,
        key: &Key,
        work: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        if let Some(done) = self.get(stage, key) {
            return Ok(done);
        }
        let dir = self.dir(stage, key);
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let result = work(&dir)?;
        write_json(&dir.join(RESULT), &result)?;
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_stage_is_done_once_for_its_settings() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().to_path_buf());
        let run = |settings: Value, value: u64| -> u64 {
            cache.stage("s", &Key::of("s", &settings), |_| Ok(value)).unwrap()
        };
        assert_eq!((run(json!({"a": 1}), 7), run(json!({"a": 1}), 8), run(json!({"a": 2}), 9)), (7, 7, 9));
        // A torn result counts as none.
        fs::write(cache.dir("s", &Key::of("s", &json!({"a": 1}))).join(RESULT), "{").unwrap();
        assert_eq!(run(json!({"a": 1}), 8), 8);
        let key = Key::of("s", &json!(3));
        let failed: Result<u64> = cache.stage("s", &key, |_| Err(Interrupted.into()));
        assert!(failed.unwrap_err().is::<Interrupted>() && cache.get::<u64>("s", &key).is_none());
    }
}
