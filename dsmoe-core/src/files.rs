//! Writes files and removes directories, with errors of the file system.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Result, Write};
use std::path::{Component, Path};

use crate::error::Error;

/// The first bytes of what Git leaves of a large file that it did not download.
pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Writes a file and waits until it is on the disk.
///
/// # Errors
/// The file system refuses.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Waits until renames in `dir` are on the disk.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    // Only Unix can open a directory, and only there is it needed.
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Removes a directory and all in it, if it is there.
pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => Err(cause),
        _ => Ok(()),
    }
}

/// Returns the directory of `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Opens a file for reading. A pipe would block and a device need not end, so that neither is opened.
pub(crate) fn open_regular(path: &Path) -> crate::Result<File> {
    let metadata = fs::metadata(path).map_err(Error::io(path))?;
    if !metadata.is_file() {
        return Err(Error::path(path, "is not a regular file", "put the file itself there"));
    }
    File::open(path).map_err(Error::io(path))
}

/// Returns whether a file is only the pointer that Git LFS leaves of it.
pub(crate) fn is_lfs_pointer(path: &Path) -> crate::Result<bool> {
    let mut start = Vec::new();
    let file = open_regular(path)?;
    file.take(LFS_POINTER.len() as u64).read_to_end(&mut start).map_err(Error::io(path))?;
    Ok(start == LFS_POINTER)
}

/// Makes the error for such a file.
pub(crate) fn lfs_pointer(path: &Path) -> Error {
    let problem = "is a Git LFS pointer and not the file itself";
    Error::path(path, problem, "run `git lfs pull` in that repository, or download the file")
}

/// Checks that a model's directory is there. A name such as `org/name` that is no directory is taken for that of a model on
/// the Hugging Face Hub.
pub(crate) fn check_exists(dir: &Path) -> crate::Result<()> {
    if fs::symlink_metadata(dir).is_ok() {
        return Ok(());
    }
    let mut names = dir.components().map(|component| matches!(component, Component::Normal(_)));
    let is_id = names.next() == Some(true) && names.next() == Some(true) && names.next().is_none();
    if is_id && !parent(dir).exists() {
        let problem = "there is no such directory; it looks like a name on the Hugging Face Hub";
        let help = format!("download it first: `hf download {}` prints the directory", dir.display());
        return Err(Error::path(dir, problem, help));
    }
    if dir.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Err(Error::path(dir, "there is no such file", "name a GGUF file or a model directory"));
    }
    Err(Error::path(dir, "there is no such directory", "name a model directory or a GGUF file"))
}
