//! Files that appear whole, directories that one process holds, and hashes of files.

use std::fs::{File, TryLockError};
use std::io::{self, BufWriter, Read as _, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Replaces the file at `path` by what `write` writes. After a crash the file has either the old or the new content.
///
/// # Errors
/// The error of `write`, or of the file system.
pub fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = BufWriter::new(temporary_in(dir)?);
    write(&mut file)?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_dir(dir)
}

/// Makes a temporary file that others may read, as far as the user's settings allow; by default they may not.
///
/// # Errors
/// The error of the file system.
pub fn temporary_in(dir: &Path) -> io::Result<tempfile::NamedTempFile> {
    #[cfg(unix)]
    let made = {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        tempfile::Builder::new().permissions(permissions).tempfile_in(dir)
    };
    #[cfg(not(unix))]
    let made = tempfile::NamedTempFile::new_in(dir);
    made
}

/// Waits until the names in `dir` are on the disk.
///
/// # Errors
/// The error of the file system.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    // Only Unix can open a directory, and only there is it needed.
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Locks `dir` for this process until the returned file is dropped. Where directories cannot be locked, nothing is.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when another process holds the directory, or the error of the file system.
pub fn lock_dir(dir: &Path) -> io::Result<Option<File>> {
    if !cfg!(unix) {
        return Ok(None);
    }
    let directory = File::open(dir)?;
    match directory.try_lock() {
        Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
        // Some network file systems have no locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(directory)),
    }
}

/// The first bytes of what Git leaves of a large file that it did not download.
pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
/// The problem of such a file, and the remedy.
pub(crate) const IS_LFS_POINTER: (&str, &str) = (
    "is a Git LFS pointer and not the file itself",
    "run `git lfs pull` in that repository, or download the file",
);

/// Reads a file of at most `limit` bytes. A pipe is read to its end; a device without an end gives an error.
///
/// # Errors
/// [`io::ErrorKind::FileTooLarge`] for more bytes, [`io::ErrorKind::InvalidData`] for the pointer that Git LFS leaves of
/// a file, or the error of the file system.
pub fn read_at_most(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let reason = format!("more than {limit} bytes, too many for such a file");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
    }
    if bytes.starts_with(LFS_POINTER) {
        let (what, help) = IS_LFS_POINTER;
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{what}; {help}")));
    }
    Ok(bytes)
}

/// Returns `bytes` without the byte-order mark of UTF-8 that some editors write.
pub(crate) fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes)
}

/// Returns lowercase hexadecimal of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the SHA-256 of a file in hexadecimal. `progress` receives the sizes of the parts as they are hashed.
///
/// # Errors
/// The file cannot be read.
pub fn sha256_of(path: &Path, progress: &mut dyn FnMut(u64)) -> io::Result<String> {
    let mut file = File::open(path)?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            read => {
                hasher.update(&buffer[..read]);
                progress(read as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_is_read_up_to_the_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        assert_eq!(read_at_most(file.path(), 3).unwrap(), b"abc");
        assert_eq!(read_at_most(file.path(), 2).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        std::fs::write(file.path(), [LFS_POINTER, b"v1\n"].concat()).unwrap();
        let error = read_at_most(file.path(), 100).unwrap_err();
        assert!(
            error.to_string().contains("Git LFS pointer")
                && error.to_string().contains("; run `git lfs pull`")
        );
        if cfg!(unix) {
            let error = read_at_most(Path::new("/dev/zero"), 1 << 20).unwrap_err();
            assert!(error.to_string().contains("1048576"), "{error}");
        }
    }
}
