//! Directories and files of a run: after a crash each has its old or its new content.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use dsmoe_datasets::files;
use serde::Serialize;
use serde::de::DeserializeOwned;

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
