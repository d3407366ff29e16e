//! Writes files and directories so that a crash leaves the old state or the new one, and locks directories.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Result, Write};
use std::path::Path;

/// Writes a file and waits until it is on the disk.
///
/// # Errors
/// The file system refuses.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Replaces a file as a whole, through `NAME.tmp` beside it.
///
/// # Errors
/// The file system refuses; the old file is then still there.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    write_synced(&temporary, bytes)?;
    fs::rename(&temporary, path)?;
    sync_dir(parent(path))
}

/// Waits until renames in `dir` are on the disk.
///
/// # Errors
/// The file system refuses.
pub fn sync_dir(dir: &Path) -> Result<()> {
    // Only Unix can open a directory, and only there is it needed.
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Removes a directory and all in it, if it is there.
///
/// # Errors
/// The file system refuses.
pub fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => Err(cause),
        _ => Ok(()),
    }
}

/// A lock on a directory or file; the system releases it when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not read")] Option<File>);

/// Locks an existing directory for this process; none when another process holds it. On file systems without locks
/// nothing is locked.
///
/// # Errors
/// The directory cannot be opened.
pub fn lock_dir(dir: &Path) -> Result<Option<Lock>> {
    if !cfg!(unix) {
        return Ok(Some(Lock(None)));
    }
    let directory = File::open(dir)?;
    match directory.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(None),
        // Some network file systems have no locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(Lock(Some(directory)))),
    }
}

/// Returns the directory of `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_a_directory_is_locked_once() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("a.txt");
        for text in ["old", "new"] {
            replace(&path, text.as_bytes()).expect("replaced");
            assert_eq!(fs::read_to_string(&path).expect("file"), text);
        }
        assert_eq!(fs::read_dir(dir.path()).expect("directory").count(), 1, "a temporary file is left");
        let held = lock_dir(dir.path()).expect("lock");
        assert!(held.is_some());
        assert!(!cfg!(unix) || lock_dir(dir.path()).expect("lock").is_none());
        drop(held);
        assert!(lock_dir(dir.path()).expect("lock").is_some());
    }
}
