//! Writes files and removes directories, with errors of the file system.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Result, Write};
use std::path::{Path, PathBuf};

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

/// Replaces a file by one with these bytes, which is on the disk before it has the name. It is `.NAME.tmp-PID` meanwhile; a call that
/// fails leaves none, and one that was killed leaves what the next call removes.
pub(crate) fn replace_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    recover(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp-{}", std::process::id()));
    let replaced = write_synced(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    replaced.inspect_err(|_| drop(fs::remove_file(&temporary)))
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

/// A file or directory that a process that no longer runs left beside its output.
///
/// ```
/// use dsmoe_core::files::{Leftover, leftovers};
///
/// let work = tempfile::tempdir()?;
/// let found: Vec<Leftover> = leftovers(work.path())?;
/// assert!(found.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Where it is.
    pub path: PathBuf,
    /// Name of the output.
    pub of: String,
    /// True for what the output replaced, false for a part of the new one.
    pub is_old: bool,
}

impl Leftover {
    /// Returns what the name `.NAME.tmp-PID` or `.NAME.old-PID` of an entry says, and the process.
    fn parse(name: &str) -> Option<(&str, bool, u32)> {
        let (rest, pid) = name.strip_prefix('.')?.rsplit_once('-')?;
        let kinds = [(".tmp", false), (".old", true)];
        let (of, is_old) = kinds.iter().find_map(|(end, old)| Some((rest.strip_suffix(end)?, *old)))?;
        let pid = pid.parse().ok().filter(|_| pid.bytes().all(|digit| digit.is_ascii_digit()))?;
        (!of.is_empty()).then_some((of, is_old, pid))
    }
}

/// Lists what processes that no longer run left in `dir`, by name. Where processes are not listed in /proc it is nothing. What has
/// the number of this process counts as left by an earlier one, as in a container, where every process has number 1; so this is
/// for before an output is begun.
///
/// # Errors
/// The directory cannot be read.
pub fn leftovers(dir: &Path) -> Result<Vec<Leftover>> {
    let mut found = Vec::new();
    if !Path::new("/proc/self").exists() {
        return Ok(found);
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if let Some((of, is_old, pid)) = name.to_str().and_then(Leftover::parse)
            && (pid == std::process::id() || !Path::new("/proc").join(pid.to_string()).exists())
        {
            found.push(Leftover { path: entry.path(), of: of.to_owned(), is_old });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Removes what killed processes left of the output `target`. If one was killed while it replaced the output, what was there
/// before is put back.
pub(crate) fn recover(target: &Path) -> Result<()> {
    let (Some(name), dir) = (target.file_name().and_then(|name| name.to_str()), parent(target)) else {
        return Ok(());
    };
    if !dir.is_dir() {
        return Ok(());
    }
    for Leftover { path, is_old, .. } in leftovers(dir)?.into_iter().filter(|left| left.of == name) {
        if is_old && fs::symlink_metadata(target).is_err() {
            fs::rename(&path, target)?;
            sync_dir(dir)?;
        } else if path.is_dir() {
            remove_dir(&path)?;
        } else {
            match fs::remove_file(&path) {
                Err(cause) if cause.kind() != ErrorKind::NotFound => return Err(cause),
                _ => {}
            }
        }
    }
    Ok(())
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

/// Returns whether there is a regular file. What is there and is none, as a directory, a pipe, a device or a link to nothing, is an
/// error: taken for absent, what the file says would be left out without a word.
pub(crate) fn is_present(path: &Path) -> crate::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) if path.is_file() => Ok(true),
        Ok(_) => Err(Error::path(path, "is not a regular file", "put the file itself there, or remove it")),
        // The name of a GGUF file has nothing below it.
        Err(cause) if matches!(cause.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        Err(cause) => Err(Error::io(path)(cause)),
    }
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

/// Checks that a model's directory is there. A name such as `org/name` that is no directory, or an address, is taken for
/// that of a model on the Hugging Face Hub.
pub(crate) fn check_exists(dir: &Path) -> crate::Result<()> {
    if fs::symlink_metadata(dir).is_ok() {
        return Ok(());
    }
    if let Some(HubName { id, file, .. }) = dir.to_str().and_then(HubName::of) {
        let missing = if file.is_some() { "file" } else { "directory" };
        let problem = format!("there is no such {missing}; it looks like a name on the Hugging Face Hub");
        let file = file.map(|file| format!(" {file}")).unwrap_or_default();
        let help = format!("download it first: `hf download {id}{file}` prints the {missing}");
        return Err(Error::path(dir, problem, help));
    }
    if dir.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Err(Error::path(dir, "there is no such file", "name a GGUF file or a model directory"));
    }
    let help = match dir.to_str().filter(|name| is_hub_part(name)) {
        Some(name) => format!(
            "name a model directory or a GGUF file; one of the Hugging Face Hub is downloaded first: `hf download {name}` \
             prints the directory"
        ),
        None => "name a model directory or a GGUF file".to_owned(),
    };
    Err(Error::path(dir, "there is no such directory", help))
}

/// The name of a model on the Hugging Face Hub, or of a file of it.
///
/// ```
/// use dsmoe_core::files::HubName;
///
/// let HubName { id, revision, file } = HubName::of("https://hf.co/org/model/tree/v2").unwrap();
/// assert_eq!((&id[..], &revision[..], file), ("org/model", "v2", None));
/// assert!(HubName::of("./model").is_none());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// Owner and name of the model.
    pub id: String,
    /// Branch, tag or commit; `main` where the text names none.
    pub revision: String,
    /// A file of the model; absent for the whole model.
    pub file: Option<String>,
}

impl HubName {
    /// Reads an address, `owner/name`, or a weights file as `owner/name/file`. A path whose first directory exists is none
    /// of them.
    #[must_use]
    pub fn of(text: &str) -> Option<HubName> {
        const ADDRESSES: [&str; 5] = [
            "https://huggingface.co/",
            "http://huggingface.co/",
            "huggingface.co/",
            "https://hf.co/",
            "hf://",
        ];
        let address = ADDRESSES.iter().find_map(|start| text.strip_prefix(start));
        let path = address.unwrap_or(text).trim_end_matches('/');
        let parts: Vec<&str> = path.split(['?', '#']).next()?.split('/').collect();
        let [owner, name, rest @ ..] = &parts[..] else { return None };
        // An address names the revision before the file.
        let (revision, rest) = match rest {
            ["resolve" | "blob" | "tree", revision, file @ ..] if address.is_some() => (*revision, file),
            rest => ("main", rest),
        };
        let is_weights = |file: &str| file.ends_with(".gguf") || file.ends_with(".safetensors");
        let is_known = rest.last().is_none_or(|file| address.is_some() || is_weights(file));
        let is_free = address.is_some() || !Path::new(owner).exists();
        let is_id = is_known && is_free && parts.iter().all(|part| is_hub_part(part));
        let file = (!rest.is_empty()).then(|| rest.join("/"));
        is_id.then(|| HubName { id: format!("{owner}/{name}"), revision: revision.to_owned(), file })
    }
}

/// Returns whether a name on the Hub may have this part.
fn is_hub_part(part: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !part.is_empty() && part.len() <= 96 && part.chars().all(is_plain) && !part.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_get_its_name_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        fs::write(dir.path().join(".a.json.tmp-4294967295"), "half").unwrap();
        replace_synced(&path, b"{}").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{}");
        fs::remove_file(&path).unwrap();
        // A folder is in its place, which no file replaces.
        fs::create_dir_all(path.join("folder")).unwrap();
        replace_synced(&path, b"[]").unwrap_err();
        let alive = if Path::new("/proc/self").exists() { 1 } else { 2 };
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), alive);
    }

    #[test]
    fn what_killed_processes_left_is_told_from_other_names() {
        // No process has the largest number; process 1 is always there.
        let [dead, live] = [u32::MAX, 1];
        for (name, wanted) in [
            (format!(".out.tmp-{dead}"), Some(("out", false, dead))),
            (format!(".a.gguf.old-{live}"), Some(("a.gguf", true, live))),
            (format!("out.tmp-{dead}"), None),
            (format!(".out.temp-{dead}"), None),
            (format!("..tmp-{dead}"), None),
            (".out.tmp-+7".to_owned(), None),
            (".out.tmp-".to_owned(), None),
        ] {
            assert_eq!(Leftover::parse(&name), wanted, "{name}");
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let names = [".out.tmp-4294967295", ".other.tmp-4294967295", ".out.tmp-1"];
        names.iter().for_each(|name| fs::create_dir(at(name)).unwrap());
        fs::write(at(".out.gguf.tmp-4294967295"), "half").unwrap();
        if !Path::new("/proc/self").exists() {
            return;
        }
        assert_eq!(leftovers(dir.path()).unwrap().len(), 3);
        recover(&at("out")).unwrap();
        recover(&at("out.gguf")).unwrap();
        assert!(!at(names[0]).exists() && !at(".out.gguf.tmp-4294967295").exists());
        assert!(at(names[1]).exists() && at(names[2]).exists());
    }

    #[test]
    fn an_output_that_was_being_replaced_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let (old, out) = (dir.path().join(".out.old-4294967295"), dir.path().join("out"));
        if !Path::new("/proc/self").exists() {
            return;
        }
        fs::create_dir(&old).unwrap();
        fs::write(old.join("config.json"), "first").unwrap();
        recover(&out).unwrap();
        assert_eq!(fs::read(out.join("config.json")).unwrap(), b"first");
        fs::create_dir(&old).unwrap();
        fs::write(old.join("config.json"), "second").unwrap();
        recover(&out).unwrap();
        assert!(!old.exists());
        assert_eq!(fs::read(out.join("config.json")).unwrap(), b"first");
    }

    #[test]
    fn what_an_earlier_process_of_the_same_number_left_is_recovered() {
        let dir = tempfile::tempdir().unwrap();
        if !Path::new("/proc/self").exists() {
            return;
        }
        let [old, part] = ["old", "tmp"].map(|kind| {
            let path = dir.path().join(format!(".out.{kind}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            fs::write(path.join("config.json"), kind).unwrap();
            path
        });
        let out = dir.path().join("out");
        recover(&out).unwrap();
        assert_eq!(fs::read(out.join("config.json")).unwrap(), b"old");
        assert!(!old.exists() && !part.exists());
    }

    #[test]
    fn names_on_the_hub_are_told_from_paths() {
        for (text, wanted) in [
            ("no-org/no-name", "no-org/no-name"),
            ("no-org/no-name/", "no-org/no-name"),
            ("no-org/no-name/x.Q4_0.gguf", "no-org/no-name x.Q4_0.gguf"),
            ("https://huggingface.co/a/b", "a/b"),
            ("https://huggingface.co/a/b/tree/main", "a/b"),
            ("https://huggingface.co/a/b/tree/v1.0", "a/b@v1.0"),
            ("https://huggingface.co/a/b/resolve/main/dir/x.gguf?download=true", "a/b dir/x.gguf"),
            ("hf://a/b", "a/b"),
            ("gpt2", ""),
            ("no-org/no-name/part", ""),
            ("src/no-name", ""),
            ("../a/b", ""),
            ("./a/b", ""),
            ("/no-org/no-name", ""),
            ("no org/name", ""),
            ("https://other.org/a/b", ""),
        ] {
            let found = HubName::of(text).map(|HubName { id, revision, file }| {
                let revision = if revision == "main" { String::new() } else { format!("@{revision}") };
                let file = file.map(|file| format!(" {file}")).unwrap_or_default();
                format!("{id}{revision}{file}")
            });
            assert_eq!(found.unwrap_or_default(), wanted, "{text}");
        }
    }
}
