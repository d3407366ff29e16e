//! Directories and files of a run: after a crash each has its old or its new content.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use dsmoe_core::checkpoint::{FileSum, MANIFEST_FILE, Manifest};
use dsmoe_datasets::files;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The largest file of JSON, in bytes.
const LARGEST_JSON: u64 = 256 << 20;

/// Replaces a file by one with these bytes.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    files::replace(path, |file| file.write_all(bytes)).map_err(Error::io(path))
}

/// Reads a file of JSON that this crate wrote.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = files::read_at_most(path, LARGEST_JSON).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|cause| Error::checkpoint(path, cause.to_string()))
}

/// Replaces a file by one with this value as JSON.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("numbers and strings are JSON");
    bytes.push(b'\n');
    replace(path, &bytes)
}

/// A value with the hash of its JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hashed<T> {
    value: T,
    xxh3_128: String,
}

impl<T: Serialize> Hashed<T> {
    pub(crate) fn of(value: T) -> Hashed<T> {
        let xxh3_128 = Hashed::hash_of(&value);
        Hashed { value, xxh3_128 }
    }

    /// Returns the value, unless it was changed.
    pub(crate) fn checked(self) -> Option<T> {
        (Hashed::hash_of(&self.value) == self.xxh3_128).then_some(self.value)
    }

    fn hash_of(value: &T) -> String {
        FileSum::of(&serde_json::to_vec(value).expect("numbers and strings are JSON")).hex()
    }
}

/// Checks that the files of `dir` are what was written, if it has a manifest.
pub(crate) fn check_dir(dir: &Path) -> Result<()> {
    let damaged = match Manifest::read(dir)? {
        Some(manifest) => manifest.damaged(dir, |_| true)?,
        None => None,
    };
    match damaged {
        Some(file) => Err(damaged_file(&file, dir)),
        None => Ok(()),
    }
}

fn damaged_file(file: &Path, dir: &Path) -> Error {
    let problem = format!(
        "it is not what was written, by {MANIFEST_FILE} beside it; delete {} to make it again",
        dir.display()
    );
    Error::checkpoint(file, problem)
}

/// Waits until renames in `dir` are on the disk.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    files::sync_dir(dir).map_err(Error::io(dir))
}

/// Makes `dir` and locks it for this process, until the returned file is dropped or the process ends.
pub(crate) fn lock_dir(dir: &Path) -> Result<Option<File>> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    files::lock_dir(dir).map_err(|cause| match cause.kind() {
        io::ErrorKind::WouldBlock => Error::Busy(dir.to_path_buf()),
        _ => Error::io(dir)(cause),
    })
}

/// Makes `dir` anew and fills it with `write`. Removes it where that fails.
pub(crate) fn fill_dir(dir: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    new_dir(dir)?;
    // Frees the disk; the error that matters is the first one.
    write(dir).inspect_err(|_| drop(remove_dir(dir)))
}

/// Makes `dir` anew.
pub(crate) fn new_dir(dir: &Path) -> Result<()> {
    remove_dir(dir)?;
    fs::create_dir_all(dir).map_err(Error::io(dir))
}

/// Removes `dir` and all in it, if it is there.
pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(Error::io(dir)(cause)),
        _ => Ok(()),
    }
}

/// Moves all files of `from` into `to`, `config.json` last, and removes `from`.
pub(crate) fn move_into(from: &Path, to: &Path) -> Result<()> {
    let mut names = names(from)?;
    names.sort_by_key(|name| name == "config.json");
    for name in names {
        let target = to.join(&name);
        fs::rename(from.join(&name), &target).map_err(Error::io(&target))?;
    }
    sync_dir(to)?;
    remove_dir(from)
}

/// Lists the names in `dir`, sorted; none when it does not exist.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io(dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(Error::io(dir))?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}
