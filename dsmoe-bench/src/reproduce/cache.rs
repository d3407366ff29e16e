//! The cache of stages. The result of a stage is found by a hash of its settings and inputs.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use dsmoe_core::checkpoint::{Manifest, Sums};
use dsmoe_datasets::files::open_regular;
use dsmoe_datasets::tasks::sha256;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::files::{read_part, write_json};
use crate::interrupts::STOP;

/// Version of the computations of stages: it is raised when the same settings give another result.
const CODE_FORMAT: u32 = 3;
pub(crate) const RESULT: &str = "result.json";
/// A file that the process which does the stage holds a lock of. The system releases the lock of a process that ends.
const CLAIM: &str = ".claim";
/// How often a stage that another process does is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The work was stopped on request. Finished stages are kept.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// Another process does the stage.
#[derive(Debug, thiserror::Error)]
#[error("another process does this stage")]
pub(crate) struct Busy;

/// The behaviour at a stage that another process works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfBusy {
    /// Its result is waited for.
    Wait,
    /// The error [`Busy`] is returned.
    Leave,
}

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
    /// Directories of stages whose files this process has compared with their manifests.
    whole: Mutex<BTreeSet<PathBuf>>,
}

impl Cache {
    pub(crate) fn new(dir: PathBuf) -> Cache {
        Cache { dir, whole: Mutex::default() }
    }

    /// Returns the directory of a stage.
    pub(crate) fn dir(&self, stage: &str, key: &Key) -> PathBuf {
        self.dir.join(format!("{stage}-{}", &key.0[..16]))
    }

    /// Returns a directory that stages share.
    pub(crate) fn shared(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Returns the result of a stage, if it was done and its files are what was written.
    pub(crate) fn get<T: DeserializeOwned>(&self, stage: &str, key: &Key) -> Option<T> {
        let dir = self.dir(stage, key);
        if !self.is_whole(&dir) {
            return None;
        }
        read_part(&dir.join(RESULT)).ok()
    }

    /// Compares the files of a stage with their manifest, once. Weights that were discarded are not missed. The manifest has the
    /// result: one that does not is of single parts, and what has none was written before there were manifests, or by a process
    /// that was killed before it wrote it.
    fn is_whole(&self, dir: &Path) -> bool {
        let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        if whole.contains(dir) {
            return true;
        }
        let Ok(Some(manifest)) = Manifest::read(dir) else { return false };
        let is_unchanged =
            || manifest.verify(dir, &mut |_, _| ()).is_ok_and(|found| found.changed.is_empty());
        let holds = manifest.names(RESULT) && is_unchanged();
        if holds {
            whole.insert(dir.to_path_buf());
        }
        holds
    }

    /// Does a stage unless it was done. Of several processes with one directory of stages one does it; when that one dies,
    /// another goes on. `work` receives its directory, which may hold files of an interrupted try.
    pub(crate) fn stage<T: Serialize + DeserializeOwned>(
        &self,
        stage: &str,
        key: &Key,
        if_busy: IfBusy,
        work: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        if let Some(done) = self.get(stage, key) {
            return Ok(done);
        }
        let dir = self.dir(stage, key);
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let claim = loop {
            if let Some(claim) = claim(&dir.join(CLAIM))? {
                break claim;
            }
            match if_busy {
                IfBusy::Leave => return Err(Busy.into()),
                IfBusy::Wait if STOP.load(Ordering::Relaxed) => return Err(Interrupted.into()),
                IfBusy::Wait => std::thread::sleep(LOOK),
            }
        };
        // The process that had it may have finished it.
        if let Some(done) = self.get(stage, key) {
            return Ok(done);
        }
        let path = dir.join(RESULT);
        if path.exists() {
            match Manifest::read(&dir) {
                // Its process was killed before it entered the result. The rest is that of an interrupted try.
                Ok(manifest) if !manifest.as_ref().is_some_and(|manifest| manifest.names(RESULT)) => {
                    fs::remove_file(&path).with_context(|| path.display().to_string())?;
                }
                // It was done, and something in it is damaged.
                _ => empty(&dir)?,
            }
        }
        let result = work(&dir)?;
        write_json(&path, &result)?;
        Manifest::write(&dir, &Sums::default())?;
        drop(claim);
        Ok(result)
    }
}

/// Removes all files of a stage but the claim. The result goes first: without it the rest counts as an interrupted try.
fn empty(dir: &Path) -> Result<()> {
    let (at, result) = (|| dir.display().to_string(), dir.join(RESULT));
    fs::remove_file(&result).with_context(|| result.display().to_string())?;
    for entry in fs::read_dir(dir).with_context(at)? {
        let entry = entry.with_context(at)?;
        let path = entry.path();
        match entry.file_type().with_context(at)?.is_dir() {
            true => fs::remove_dir_all(&path),
            false if entry.file_name() == CLAIM => Ok(()),
            false => fs::remove_file(&path),
        }
        .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Locks the file at `path` for as long as the result lives; none if another process has it.
fn claim(path: &Path) -> Result<Option<File>> {
    // To open a pipe would block.
    if path.exists() {
        open_regular(path).with_context(|| path.display().to_string())?;
    }
    // Not cut: another process may have it locked.
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = file.with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(None),
        // Some network file systems have no locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(file)),
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_core::checkpoint::MANIFEST_FILE;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_stage_is_done_once_for_its_settings() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().to_path_buf());
        let run = |settings: Value, value: u64| -> u64 {
            cache.stage("s", &Key::of("s", &settings), IfBusy::Leave, |_| Ok(value)).unwrap()
        };
        assert_eq!((run(json!({"a": 1}), 7), run(json!({"a": 1}), 8), run(json!({"a": 2}), 9)), (7, 7, 9));
        // A torn result counts as none, and so does a changed one, or one beside a changed file.
        let dir = cache.dir("s", &Key::of("s", &json!({"a": 1})));
        fs::write(dir.join(RESULT), "{").unwrap();
        assert_eq!(run(json!({"a": 1}), 8), 8);
        fs::write(dir.join(RESULT), "7").unwrap();
        assert_eq!(run(json!({"a": 1}), 9), 9);
        let with_file = |value: u64| -> u64 {
            let cache = Cache::new(cache.dir.clone());
            let key = Key::of("s", &json!({"a": 3}));
            let work = |dir: &Path| -> Result<u64> {
                Ok(fs::create_dir_all(dir.join("run"))
                    .and_then(|()| {
                        assert!(!dir.join("run/model").exists());
                        fs::write(dir.join("run/model"), "weights")
                    })
                    .map(|()| value)?)
            };
            cache.stage("s", &key, IfBusy::Leave, work).unwrap()
        };
        let model = cache.dir("s", &Key::of("s", &json!({"a": 3}))).join("run/model");
        assert_eq!((with_file(1), with_file(2)), (1, 1));
        fs::write(&model, "Weights").unwrap();
        assert_eq!((with_file(2), with_file(3)), (2, 2));
        // Weights may be discarded.
        fs::remove_file(&model).unwrap();
        assert_eq!(with_file(4), 2);
        let key = Key::of("s", &json!(3));
        let failed: Result<u64> = cache.stage("s", &key, IfBusy::Wait, |_| Err(Interrupted.into()));
        assert!(failed.unwrap_err().is::<Interrupted>() && cache.get::<u64>("s", &key).is_none());
    }

    #[cfg(unix)]
    #[test]
    fn a_claim_is_a_regular_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CLAIM);
        assert!(claim(&path).unwrap().is_some());
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(format!("{:#}", claim(&path).unwrap_err()).contains("not a regular file"));
    }

    /// The process was killed between the write of the result and that of the manifest.
    #[test]
    fn a_result_that_was_not_entered_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::of("s", &json!(1));
        let run = |value: u64, parts: usize| -> u64 {
            let cache = Cache::new(dir.path().to_path_buf());
            let work = |dir: &Path| -> Result<u64> {
                // What an interrupted try leaves is there, and its result is not.
                assert!(!dir.join(RESULT).exists());
                assert_eq!(
                    fs::read_dir(dir)?.filter(|entry| entry.as_ref().unwrap().file_name() != CLAIM).count(),
                    parts
                );
                crate::files::write_part(&dir.join("at-0.json"), &value)?;
                fs::write(dir.join("weights"), value.to_string())?;
                Ok(value)
            };
            cache.stage("s", &key, IfBusy::Leave, work).unwrap()
        };
        assert_eq!((run(1, 0), run(2, 0)), (1, 1));
        let stage = Cache::new(dir.path().to_path_buf()).dir("s", &key);
        // No manifest at all: the weights are still there.
        fs::remove_file(stage.join(MANIFEST_FILE)).unwrap();
        assert_eq!((run(3, 2), run(4, 0)), (3, 3));
        // A manifest of the part alone.
        fs::remove_file(stage.join(MANIFEST_FILE)).unwrap();
        Manifest::enter(&stage, "at-0.json").unwrap();
        assert_eq!((run(5, 3), run(6, 0)), (5, 5));
        assert!(Manifest::read(&stage).unwrap().unwrap().names(RESULT));
        // What is changed is not used for another try.
        fs::write(stage.join("weights"), "9").unwrap();
        assert_eq!((run(7, 0), run(8, 0)), (7, 7));
        // The process was killed when it had begun to remove what is damaged.
        fs::write(stage.join("weights"), "9").unwrap();
        fs::remove_file(stage.join(RESULT)).unwrap();
        fs::remove_file(stage.join("weights")).unwrap();
        assert_eq!(run(9, 2), 9);
    }

    #[test]
    fn a_stage_that_another_does_is_left_or_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().to_path_buf());
        let key = Key::of("s", &json!(1));
        let result: u64 = cache
            .stage("s", &key, IfBusy::Leave, |_| {
                let other: Result<u64> = cache.stage("s", &key, IfBusy::Leave, |_| Ok(1));
                assert!(other.unwrap_err().is::<Busy>());
                Ok(2)
            })
            .unwrap();
        assert_eq!(result, 2);
        let key = Key::of("s", &json!(2));
        let held = claim(&{
            fs::create_dir_all(cache.dir("s", &key)).unwrap();
            cache.dir("s", &key).join(CLAIM)
        });
        let held = held.unwrap().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| cache.stage("s", &key, IfBusy::Wait, |_| Ok(4u64)).unwrap());
            write_json(&cache.dir("s", &key).join(RESULT), &3u64).unwrap();
            Manifest::write(&cache.dir("s", &key), &Sums::default()).unwrap();
            drop(held);
            assert_eq!(waiting.join().unwrap(), 3);
        });
    }
}
