//! The cache of stages. The result of a stage is found by a hash of its settings and inputs.

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dsmoe_datasets::tasks::sha256;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Version of the computations of stages: it is raised when the same settings give another result.
const CODE_FORMAT: u32 = 2;
const RESULT: &str = "result.json";

/// The work was stopped on request. Finished stages are kept.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

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

    /// Returns the result of a stage, if it was done.
    pub(crate) fn get<T: DeserializeOwned>(&self, stage: &str, key: &Key) -> Option<T> {
        let text = fs::read_to_string(self.dir(stage, key).join(RESULT)).ok()?;
        serde_json::from_str(&text).ok()
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

/// Writes a file atomically.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let place = || path.display().to_string();
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(place)?;
    let mut builder = tempfile::Builder::new();
    // Temporary files are private by default; this one gets the usual permissions.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).with_context(place)?;
    file.write_all(bytes).with_context(place)?;
    file.as_file().sync_all().with_context(place)?;
    file.persist(path).with_context(place)?;
    Ok(())
}

/// Writes indented JSON atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write(path, text.as_bytes())
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let place = || path.display().to_string();
    let text = fs::read_to_string(path).with_context(place)?;
    serde_json::from_str(&text).with_context(place)
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
        let failed: Result<u64> = cache.stage("s", &Key::of("s", &json!(3)), |_| Err(Interrupted.into()));
        assert!(
            failed.unwrap_err().is::<Interrupted>()
                && cache.get::<u64>("s", &Key::of("s", &json!(3))).is_none()
        );
    }
}
