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

/// Reads a file of at most `limit` bytes that this crate wrote. A pipe or a device is none, and reading a pipe would block.
pub(crate) fn read_own(path: &Path, limit: u64) -> Result<Vec<u8>> {
    if !fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return Err(Error::checkpoint(path, "it is not a regular file"));
    }
    files::read_at_most(path, limit).map_err(Error::io(path))
}

/// Reads a file of JSON that this crate wrote.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = read_own(path, LARGEST_JSON)?;
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

/// Removes `dir` and all in it, if it is there, or the file that has its place.
pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    let is_other = |kind: fs::FileType| !kind.is_dir() && !kind.is_symlink();
    let removed = match fs::symlink_metadata(dir) {
        Ok(metadata) if is_other(metadata.file_type()) => fs::remove_file(dir),
        _ => fs::remove_dir_all(dir),
    };
    match removed {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(Error::io(dir)(cause)),
        _ => Ok(()),
    }
}

/// Fills the new directory `temporary` with `write` and gives it the place `place`, of what is there. Removes it where that fails.
pub(crate) fn make_dir(
    temporary: &Path,
    place: &Path,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let made = || -> Result<()> {
        new_dir(temporary)?;
        write(temporary)?;
        sync_dir(temporary)?;
        remove_dir(place)?;
        fs::rename(temporary, place).map_err(Error::io(place))?;
        place.parent().map_or(Ok(()), sync_dir)
    };
    // Frees the disk; the error that matters is the first one.
    made().inspect_err(|_| drop(remove_dir(temporary)))
}

/// Removes `dir` and all in it, if it is there. It is `.NAME.tmp` meanwhile: if the process is killed, what is left of it is not
/// taken for the whole.
pub(crate) fn retire_dir(dir: &Path) -> Result<()> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let gone = dir.with_file_name(format!(".{name}.tmp"));
    remove_dir(&gone)?;
    match fs::rename(dir, &gone) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(Error::io(dir)(cause)),
        Ok(()) => remove_dir(&gone),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_device_is_no_file_of_a_run() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("state.json");
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        let error = read_json::<u64>(&path).unwrap_err().to_string();
        assert!(error.contains("state.json: it is not a regular file"), "{error}");
    }

    #[test]
    fn a_directory_that_is_removed_leaves_nothing_of_an_earlier_try() {
        let work = tempfile::tempdir().unwrap();
        let (dir, gone) = (work.path().join("layer"), work.path().join(".layer.tmp"));
        for dir in [&dir, &gone] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("weights"), "w").unwrap();
        }
        retire_dir(&dir).unwrap();
        assert!(names(work.path()).unwrap().is_empty());
        retire_dir(&dir).unwrap();
    }

    #[test]
    fn a_directory_that_cannot_get_its_place_is_not_left() {
        let work = tempfile::tempdir().unwrap();
        let (temporary, place) = (work.path().join(".01-a.tmp"), work.path().join("01-a"));
        let write = |dir: &Path| fs::write(dir.join("weights"), "w").map_err(Error::io(dir));
        // The folder of the place is not there.
        make_dir(&temporary, &work.path().join("absent/01-a"), write).unwrap_err();
        assert!(names(work.path()).unwrap().is_empty());
        // A file is in the place.
        fs::write(&place, "").unwrap();
        make_dir(&temporary, &place, write).unwrap();
        assert_eq!(names(work.path()).unwrap(), ["01-a"]);
        assert_eq!(names(&place).unwrap(), ["weights"]);
    }
}
