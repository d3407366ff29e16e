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
    let mut builder = tempfile::Builder::new();
    // Others may read the file, as far as the user's settings allow.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = BufWriter::new(builder.tempfile_in(dir)?);
    write(&mut file)?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_dir(dir)
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
