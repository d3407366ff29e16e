//! Files that appear whole, directories that one process holds, and hashes of files.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Read as _, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

/// Replaces the file at `path` by what `write` writes. After a crash the file has either the old or the new content.
///
/// # Errors
/// The error of `write`, or of the file system.
pub fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let temporary = Temporary::for_path(path)?;
    let mut file = BufWriter::new(temporary.as_file());
    write(&mut file)?;
    file.flush()?;
    drop(file);
    temporary.persist()?;
    sync_dir(parent(path))
}

/// Returns the directory of `path`.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file that is to become another one. Dropped before that, it is removed.
///
/// It lies beside the other file as `.NAME.tmp-PID`, the name by which dsmoe-core recognises what a killed process left. The
/// next [`Temporary`] for the same file removes what such a process left of it.
///
/// ```
/// use std::io::Write;
/// use dsmoe_datasets::files::Temporary;
///
/// let work = tempfile::tempdir()?;
/// let path = work.path().join("report.json");
/// let file = Temporary::for_path(&path)?;
/// file.as_file().write_all(b"{}")?;
/// assert!(!path.exists());
/// file.persist()?;
/// assert_eq!(std::fs::read(&path)?, b"{}");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Temporary {
    file: tempfile::NamedTempFile,
    path: PathBuf,
    held: Held,
}

impl Temporary {
    /// Makes the file that is to become `path`. Others may read it as far as the user's settings allow.
    ///
    /// # Errors
    /// The error of the file system.
    pub fn for_path(path: &Path) -> io::Result<Temporary> {
        let (file, held) = beside(path, |dir, name| {
            let mut builder = tempfile::Builder::new();
            builder.prefix(name).rand_bytes(0);
            // By default only the user may read such a file.
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
            builder.tempfile_in(dir)
        })?;
        if cfg!(unix) {
            // Where files cannot be locked, the number of the process has to do.
            let _ = file.as_file().try_lock();
        }
        Ok(Temporary { file, path: path.to_path_buf(), held })
    }

    /// Returns the file, to write it.
    pub fn as_file(&self) -> &File {
        self.file.as_file()
    }

    /// Waits until the file is on the disk and gives it its name. After a crash the name may still be that of the old file;
    /// [`sync_dir`] ends that.
    ///
    /// # Errors
    /// The error of the file system.
    pub fn persist(self) -> io::Result<()> {
        let Temporary { file, path, held } = self;
        file.as_file().sync_all()?;
        file.persist(path)?;
        drop(held);
        Ok(())
    }
}

/// A directory for what is to become `path`, or to lie beside it. It is removed when it is dropped; after a kill the next one
/// for the same path removes it.
///
/// ```
/// use dsmoe_datasets::files::TemporaryDir;
///
/// let work = tempfile::tempdir()?;
/// let target = work.path().join("tokenizer.json");
/// let dir = TemporaryDir::for_path(&target)?;
/// std::fs::write(dir.path().join("tokenizer.json"), "{}")?;
/// std::fs::rename(dir.path().join("tokenizer.json"), &target)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct TemporaryDir {
    dir: tempfile::TempDir,
    _lock: Option<File>,
    _held: Held,
}

impl TemporaryDir {
    /// Makes a directory `.NAME.tmp-PID` beside `path`.
    ///
    /// # Errors
    /// The error of the file system.
    pub fn for_path(path: &Path) -> io::Result<TemporaryDir> {
        let make =
            |dir: &Path, name: &OsStr| tempfile::Builder::new().prefix(name).rand_bytes(0).tempdir_in(dir);
        let (dir, held) = beside(path, make)?;
        let lock = lock_dir(dir.path()).ok().flatten();
        Ok(TemporaryDir { dir, _lock: lock, _held: held })
    }

    /// Returns where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// The temporary files and directories that this process has. Another one with its number was made by a process that no longer
/// runs: in containers the numbers are the same again and again.
static HELD: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn all_held() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An entry of [`HELD`], which ends with it.
#[derive(Debug)]
struct Held(PathBuf);

impl Drop for Held {
    fn drop(&mut self) {
        all_held().remove(&self.0);
    }
}

/// Removes what processes that no longer run left of `path`, and calls `make` with the directory and a free name in it.
fn beside<T>(path: &Path, make: impl FnOnce(&Path, &OsStr) -> io::Result<T>) -> io::Result<(T, Held)> {
    let (Some(name), dir) = (path.file_name(), parent(path)) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"));
    };
    // One directory has one name among those held. Where there is none, `make` has the words for it.
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    let (held, own) = {
        let mut all = all_held();
        remove_left(&whole, name, &all);
        // Threads may write the same file, and processes of two containers that have one number; the last one wins.
        let (mut number, mut own) = (0, temporary_name(name, 0));
        while all.contains(&whole.join(&own)) || fs::symlink_metadata(whole.join(&own)).is_ok() {
            number += 1;
            own = temporary_name(name, number);
        }
        all.insert(whole.join(&own));
        (Held(whole.join(&own)), own)
    };
    Ok((make(dir, &own)?, held))
}

/// Returns the name of the temporary file for an output of this name, or of a further one at the same time.
fn temporary_name(name: &OsStr, number: u32) -> OsString {
    let mut own = OsString::from(".");
    own.push(name);
    if number > 0 {
        own.push(format!(".{number}"));
    }
    own.push(format!(".tmp-{}", std::process::id()));
    own
}

/// Removes what processes that no longer run left in `dir` of an output. A failure changes nothing: the output does not
/// depend on it. A process in another container, or on another machine that shares the directory, has no number here that
/// says that it runs, but it holds a lock.
fn remove_left(dir: &Path, name: &OsStr, held: &BTreeSet<PathBuf>) {
    let (Some(name), Ok(entries)) = (name.to_str(), fs::read_dir(dir)) else { return };
    let lists_processes = Path::new("/proc/self").exists();
    for entry in entries.flatten() {
        let path = entry.path();
        let maker = entry.file_name().to_str().and_then(|entry| maker_of(entry, name));
        let is_left = maker.is_some_and(|pid| match pid == std::process::id() {
            true => !held.contains(&path),
            false => lists_processes && !Path::new("/proc").join(pid.to_string()).exists(),
        });
        if is_left && lock_dir(&path).is_ok() {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let _ = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

/// Returns the number of the process that made the temporary file `entry`, if it is one for an output of this name.
fn maker_of(entry: &str, name: &str) -> Option<u32> {
    let (of, pid) = parse_temporary(entry)?;
    let unnumbered = of.rsplit_once('.').filter(|(_, number)| is_number(number)).map(|(of, _)| of);
    let name = undated(name);
    [Some(of), unnumbered].into_iter().flatten().any(|of| undated(of) == name).then_some(pid)
}

/// Returns whether `name` is that of a [`Temporary`], or of an unfinished output of dsmoe-core.
///
/// ```
/// use dsmoe_datasets::files::is_temporary;
///
/// assert!(is_temporary(".run.toml.tmp-4711"));
/// assert!(!is_temporary(".run.toml") && !is_temporary("run.tmp-4711"));
/// ```
pub fn is_temporary(name: &str) -> bool {
    parse_temporary(name).is_some()
}

/// Returns what the name `.NAME.tmp-PID` of an entry says. dsmoe-core reads the same names; this crate does not use it.
fn parse_temporary(name: &str) -> Option<(&str, u32)> {
    let (of, pid) = name.strip_prefix('.')?.rsplit_once(".tmp-")?;
    let pid = pid.parse().ok().filter(|_| is_number(pid))?;
    (!of.is_empty()).then_some((of, pid))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns a name without dates: the results of an evaluation have another one in each run.
fn undated(name: &str) -> String {
    /// `2026-11-30T09-30`; what is shorter may be a number that tells outputs from each other.
    const SHORTEST: usize = 16;
    let of_date = |c: char| c.is_ascii_digit() || "-:.T".contains(c);
    let (mut kept, mut rest) = (String::new(), name);
    while let Some(start) = rest.find(of_date) {
        let len = rest[start..].find(|c: char| !of_date(c)).unwrap_or(rest.len() - start);
        let end = if len < SHORTEST { start + len } else { start };
        kept.push_str(&rest[..end]);
        rest = &rest[start + len..];
    }
    kept + rest
}

/// Waits until the names in `dir` are on the disk.
///
/// # Errors
/// The error of the file system.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    // Only Unix can open a directory, and only there is it needed.
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Locks `dir`, or a file, for this process until the returned file is dropped. Where directories cannot be locked, nothing is.
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
        let reason = format!(
            "more than {limit} bytes, too many for such a file; name the right one, or copy it again"
        );
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
    }
    if bytes.starts_with(LFS_POINTER) {
        let (what, help) = IS_LFS_POINTER;
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{what}; {help}")));
    }
    Ok(bytes)
}

/// Opens a file that lies in a folder. A pipe there would block and a device need not end, so that neither is opened.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] for what is no regular file, or the error of the file system.
pub fn open_regular(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        let reason = "not a regular file; put the file itself there";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    File::open(path)
}

/// Reads a file in a folder by [`open_regular`], and at most as many bytes as [`read_at_most`] does.
///
/// # Errors
/// Those of both.
pub fn read_regular(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    open_regular(path)?;
    read_at_most(path, limit)
}

/// Returns `bytes` without the byte-order mark of UTF-8 that some editors write.
pub(crate) fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes)
}

/// Returns about how many keys and values a text of JSON has: its commas, colons and opening brackets outside of strings. A program
/// that keeps them as they are takes some 72 bytes for each, of which a list of zeros has one for every two bytes of text.
///
/// ```
/// use dsmoe_datasets::files::json_values;
///
/// assert_eq!(json_values(b"[0, 0, 0]"), 3);
/// assert_eq!(json_values(b"{\"a, b\": [\"[[\"]}"), 3); // an object, its key and a list
/// ```
pub fn json_values(json: &[u8]) -> usize {
    let mut values = JsonValues::default();
    values.pass(json);
    values.found
}

/// Counts the values of [`json_values`] in a text that arrives in pieces.
#[derive(Debug, Default)]
pub(crate) struct JsonValues {
    /// Keys and values of the pieces so far.
    pub(crate) found: usize,
    in_string: bool,
    is_escaped: bool,
}

impl JsonValues {
    /// Reads the next piece of the text.
    pub(crate) fn pass(&mut self, json: &[u8]) {
        for &byte in json {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.in_string => self.is_escaped = true,
                b'"' => self.in_string = !self.in_string,
                b',' | b':' | b'[' | b'{' if !self.in_string => self.found += 1,
                _ => {}
            }
        }
    }
}

/// Returns lowercase hexadecimal of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the SHA-256 of a file in hexadecimal. `progress` receives the sizes of the parts as they are hashed.
///
/// # Errors
/// The file cannot be read, or is no regular one.
pub fn sha256_of(path: &Path, progress: &mut dyn FnMut(u64)) -> io::Result<String> {
    let mut file = open_regular(path)?;
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

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn what_killed_processes_left_of_a_file_is_removed_by_the_next_write_of_it() {
        // No process has the largest number; process 1 is always there.
        let (dead, own) = (u32::MAX, std::process::id());
        let dir = tempfile::tempdir().unwrap();
        let at = |name: String| dir.path().join(name);
        fs::write(at(format!(".a.json.tmp-{own}")), "half").unwrap();
        fs::write(at(format!(".a.json.2.tmp-{own}")), "half").unwrap();
        let others = [".a.json.tmp-1".to_owned(), format!(".b.json.tmp-{own}"), format!("a.json.tmp-{dead}")];
        others.iter().for_each(|name| fs::write(at(name.clone()), "kept").unwrap());
        let lists_processes = Path::new("/proc/self").exists();
        if lists_processes {
            fs::write(at(format!(".a.json.tmp-{dead}")), "half").unwrap();
            fs::create_dir(at(format!(".a.json.7.tmp-{dead}"))).unwrap();
            fs::write(at(format!(".a.json.7.tmp-{dead}/part")), "half").unwrap();
        }
        // A process in another container has one of those numbers and runs.
        let elsewhere = lists_processes.then(|| {
            [format!(".a.json.9.tmp-{dead}"), format!(".a.json.3.tmp-{own}")].map(|name| {
                let file = File::create(at(name)).unwrap();
                file.try_lock().unwrap();
                file
            })
        });
        replace(&at("a.json".into()), |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(at("a.json".into())).unwrap(), b"new");
        let mut wanted = others.to_vec();
        wanted.push("a.json".into());
        if elsewhere.is_some() {
            wanted.extend([format!(".a.json.9.tmp-{dead}"), format!(".a.json.3.tmp-{own}")]);
        }
        wanted.sort();
        assert_eq!(names(dir.path()), wanted);
        if lists_processes {
            fs::write(at(format!(".r_2026-11-30T09-30-00.123456.json.tmp-{dead}")), "half").unwrap();
            replace(&at("r_2026-12-01T10-00-00.000001.json".into()), |_| Ok(())).unwrap();
            wanted.push("r_2026-12-01T10-00-00.000001.json".into());
            wanted.sort();
            assert_eq!(names(dir.path()), wanted);
        }
    }

    #[test]
    fn two_writers_of_a_file_have_their_own_temporary_files_and_leave_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let [first, second] = [(), ()].map(|()| Temporary::for_path(&path).unwrap());
        let folder = TemporaryDir::for_path(&path).unwrap();
        let pid = std::process::id();
        let wanted = ["", ".1", ".2"].map(|number| format!(".a.json{number}.tmp-{pid}"));
        let mut seen = names(dir.path());
        seen.sort_by_key(String::len);
        assert_eq!(seen[0], wanted[0]);
        assert_eq!(seen[1..], wanted[1..]);
        assert!(seen.iter().all(|name| is_temporary(name)));
        first.as_file().write_all(b"first").unwrap();
        first.persist().unwrap();
        drop((second, folder));
        assert_eq!(names(dir.path()), ["a.json"]);
        assert!(replace(&path, |_| Err(io::ErrorKind::Other.into())).is_err());
        assert_eq!(names(dir.path()), ["a.json"]);
        assert_eq!(fs::read(&path).unwrap(), b"first");
    }

    #[cfg(unix)]
    #[test]
    fn written_files_may_be_read_by_others() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let [path, plain] = ["a.json", "plain"].map(|name| dir.path().join(name));
        replace(&path, |_| Ok(())).unwrap();
        fs::write(&plain, "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain));
    }

    #[test]
    fn names_of_temporary_files_say_of_which_output_they_are() {
        for (entry, name, wanted) in [
            (".a.json.tmp-7", "a.json", Some(7)),
            (".a.json.3.tmp-7", "a.json", Some(7)),
            (".a.json.x.tmp-7", "a.json", None),
            (".a.json.tmp-+7", "a.json", None),
            (".a.json.tmp-", "a.json", None),
            ("..tmp-7", "", None),
            (".step-2.tmp-7", "step-3", None),
            (".s_2026-11-30T09-30-00.1.jsonl.tmp-7", "s_2026-12-01T09-30-00.2.jsonl", Some(7)),
            (".s_2026-11-30T09-30-00.1.jsonl.tmp-7", "t_2026-12-01T09-30-00.2.jsonl", None),
        ] {
            assert_eq!(maker_of(entry, name), wanted, "{entry}");
        }
    }

    #[test]
    fn values_in_strings_do_not_count_however_the_text_is_cut() {
        for (text, wanted) in
            [("", 0), (r#"{"a": [1, {"b": 2}], "c": ""}"#, 8), (r#"{"a,[\"{:": ",,\\"}"#, 2), ("[[],[]]", 4)]
        {
            assert_eq!(json_values(text.as_bytes()), wanted, "{text}");
            for cut in 0..=text.len() {
                let mut values = JsonValues::default();
                let (start, end) = text.as_bytes().split_at(cut);
                values.pass(start);
                values.pass(end);
                assert_eq!(values.found, wanted, "{text} cut at {cut}");
            }
        }
    }

    #[test]
    fn what_has_no_end_is_read_up_to_the_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        assert_eq!(read_at_most(file.path(), 3).unwrap(), b"abc");
        assert_eq!(read_regular(file.path(), 3).unwrap(), b"abc");
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
            let error = read_regular(Path::new("/dev/zero"), 1 << 20).unwrap_err();
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
    }
}
