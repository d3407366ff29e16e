//! Files that are read and written as a whole, with errors that name them.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use dsmoe_core::checkpoint::{CONFIG_FILE, MANIFEST_FILE, Manifest, OutputDir};
use dsmoe_datasets::files::{Temporary, json_values, open_regular, read_at_most};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::cli::resumable::NOT_EMPTY;
use crate::{format, memory};

/// The largest file that is read whole, in bytes.
const LARGEST: u64 = 256 << 20;
/// The largest file of JSON that is no part of longer work, in bytes.
const LARGEST_JSON: u64 = 64 << 20;
/// The largest file of TOML, in bytes.
const LARGEST_TOML: u64 = 1 << 20;
/// Bytes that a value of JSON takes where all of them are kept.
const BYTES_OF_VALUE: u64 = 72;

/// Reads a file of text.
pub(crate) fn read(path: &Path) -> Result<String> {
    read_up_to(path, LARGEST)
}

/// Reads a file of settings.
pub(crate) fn read_toml(path: &Path) -> Result<String> {
    read_up_to(path, LARGEST_TOML)
}

fn read_up_to(path: &Path, largest: u64) -> Result<String> {
    let place = || path.display().to_string();
    let bytes = read_at_most(path, largest).with_context(place)?;
    String::from_utf8(bytes).map_err(|_| anyhow!("{}: not UTF-8; convert it (iconv -t UTF-8)", place()))
}

/// Reads a file of text in a folder, which is no pipe and no device.
pub(crate) fn read_inside(path: &Path) -> Result<String> {
    read_inside_up_to(path, LARGEST)
}

fn read_inside_up_to(path: &Path, largest: u64) -> Result<String> {
    open_regular(path).with_context(|| path.display().to_string())?;
    read_up_to(path, largest)
}

/// Parses the JSON of the file `path`, which a command of dsmoe wrote. Its values may take a quarter of the memory.
fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    check_values(path, text.as_bytes(), memory::total())?;
    let again = "copy it again, or repeat the command that wrote it";
    serde_json::from_str(text).map_err(|cause| anyhow!("{}: {cause}; {again}", path.display()))
}

/// Refuses JSON whose values would take more than a quarter of the memory `total`, before they are parsed.
pub(crate) fn check_values(path: &Path, json: &[u8], total: Option<u64>) -> Result<()> {
    let values = json_values(json) as u64;
    let needed = values.saturating_mul(BYTES_OF_VALUE);
    match total {
        Some(total) if needed > total / 4 => {
            let ([needed, total], place) = ([needed, total].map(format::bytes), path.display());
            bail!(
                "{place}: its {values} values take {needed}, more than a quarter of {total} of memory; use a machine \
                 with more, or make it again"
            )
        }
        _ => Ok(()),
    }
}

/// Paths as a report shows them.
pub(crate) trait Paths {
    /// Returns the paths as text. Bytes that are not UTF-8 become U+FFFD.
    fn text(&self) -> Value;
}

impl Paths for Path {
    fn text(&self) -> Value {
        self.to_string_lossy().into()
    }
}

impl Paths for PathBuf {
    fn text(&self) -> Value {
        self.as_path().text()
    }
}

impl<T: Paths + ?Sized> Paths for &T {
    fn text(&self) -> Value {
        T::text(self)
    }
}

impl<T: Paths> Paths for Option<T> {
    fn text(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::text)
    }
}

impl<T: Paths> Paths for [T] {
    fn text(&self) -> Value {
        self.iter().map(T::text).collect()
    }
}

impl<T: Paths> Paths for Vec<T> {
    fn text(&self) -> Value {
        self.as_slice().text()
    }
}

/// Serialises paths, which serde refuses where they are not UTF-8.
pub(crate) fn lossy<T: Paths, S: Serializer>(
    paths: &T,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    paths.text().serialize(serializer)
}

/// Reads a file of JSON that the command line names, as text. Its values may take a quarter of the memory.
pub(crate) fn read_json_text(path: &Path) -> Result<String> {
    let text = read_up_to(path, LARGEST_JSON)?;
    check_values(path, text.as_bytes(), memory::total())?;
    Ok(text)
}

/// Reads a file of JSON in a folder.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse(path, &read_inside_up_to(path, LARGEST_JSON)?)
}

/// Writes a file atomically, and the folders above it.
pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    write_with(path, |out| Ok(out.write_all(bytes.as_ref())?))
}

/// Writes indented JSON atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write(path, serde_json::to_string_pretty(value)? + "\n")
}

/// Writes a part of longer work as indented JSON, and enters it into the manifest of its folder.
pub(crate) fn write_part(path: &Path, value: &impl Serialize) -> Result<()> {
    let (folder, name) = (folder_of(path), name_of(path));
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    // Between the two the manifest does not have it: what a killed process leaves does not count as damaged, nor as whole.
    Manifest::withhold(folder, &name)?;
    write_json(path, value)?;
    Ok(Manifest::enter(folder, &name)?)
}

/// Reads what [`write_part`] wrote. In a folder without a manifest it was written before there were manifests; otherwise one that was
/// not entered is refused, since nothing says that it is whole.
pub(crate) fn read_part<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let (text, name, place) = (read_inside(path)?, name_of(path), path.display());
    if let Some(manifest) = Manifest::read(folder_of(path))? {
        if !manifest.names(&name) {
            bail!(
                "{place}: {MANIFEST_FILE} beside it does not have it: its command still runs or was killed; \
                 wait for its end, or run it again"
            );
        }
        if !manifest.holds(&name, text.as_bytes()) {
            bail!("{place}: it is not what was written, by {MANIFEST_FILE} beside it; remove it");
        }
    }
    parse(path, &text)
}

/// Returns a part that is done. One that the manifest of its folder does not have as it is is not: it was changed, a process was
/// killed before it entered it, or there were no manifests yet.
pub(crate) fn done<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let manifest = Manifest::read(folder_of(path)).ok().flatten()?;
    if manifest.names(&name_of(path)) { read_part(path).ok() } else { None }
}

/// Returns a part that is [`done`], or computes and keeps it.
pub(crate) fn done_or<T: Serialize + DeserializeOwned>(
    path: &Path,
    compute: impl FnOnce() -> Result<T>,
) -> Result<T> {
    if let Some(done) = done(path) {
        return Ok(done);
    }
    let made = compute()?;
    write_part(path, &made)?;
    Ok(made)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Removes a folder, if it is there. It has another name meanwhile: if the process is killed, what is left of it is not taken for the
/// whole, and the next call removes it.
pub(crate) fn discard(folder: &Path) -> Result<()> {
    let gone = folder.with_file_name(format!(".{}.gone", name_of(folder)));
    let missing_or = |outcome: std::io::Result<()>| match outcome {
        Err(cause) if cause.kind() != ErrorKind::NotFound => Err(cause),
        _ => Ok(()),
    };
    let removed = missing_or(fs::remove_dir_all(&gone))
        .and_then(|()| missing_or(fs::rename(folder, &gone)))
        .and_then(|()| missing_or(fs::remove_dir_all(&gone)));
    removed.with_context(|| folder.display().to_string())
}

/// Writes atomically what `fill` writes.
pub(crate) fn write_with(path: &Path, fill: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<()> {
    let folder = folder_of(path);
    let written = || -> Result<()> {
        fs::create_dir_all(folder)?;
        let file = Temporary::for_path(path)?;
        let mut out = BufWriter::new(file.as_file());
        fill(&mut out)?;
        out.flush()?;
        drop(out);
        Ok(file.persist()?)
    };
    written().with_context(|| path.display().to_string())
}

/// Returns the folder that holds `path`.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Refuses an output directory of a model before the work whose result it would not take.
pub(crate) fn check_output(source: &Path, out: &Path, force: bool) -> Result<()> {
    let is_file = out.exists() && !out.is_dir();
    let is_full = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
    let replaced = force && out.join(CONFIG_FILE).is_file();
    let holds = source.canonicalize().ok().zip(out.canonicalize().ok());
    let holds_source = holds.is_some_and(|(source, out)| source.starts_with(out));
    if is_file || holds_source || (is_full && !replaced) {
        // This has the words of the refusal, and makes nothing.
        OutputDir::create_from(source, out, force)?;
    }
    Ok(())
}

/// Refuses to write over a file before the work for it.
pub(crate) fn check_file(path: &Path, force: bool) -> Result<()> {
    let place = path.display();
    if path.is_dir() {
        bail!("{place} is a folder; choose another --out");
    }
    if path.exists() && !force {
        bail!("{place} exists; choose another --out, or pass --force to replace it");
    }
    Ok(())
}

/// Makes a folder, and refuses one that is not empty unless `anyway`.
pub(crate) fn make_folder(path: &Path, anyway: bool, remedy: &str) -> Result<()> {
    check_folder(path, anyway, remedy)?;
    fs::create_dir_all(path).with_context(|| path.display().to_string())
}

/// Name of the folder of the finished points in a [`PointFolder`].
pub(crate) const POINTS: &str = "points";

/// A folder of points, which are measured one after the other, and of the settings that they were measured with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PointFolder<'a> {
    pub(crate) out: &'a Path,
    pub(crate) resume: bool,
    /// Name of the file of the settings.
    pub(crate) file: &'static str,
    pub(crate) settings: &'a Value,
}

impl PointFolder<'_> {
    /// Refuses a folder that is not empty, unless its points are resumed and have the same settings. Makes nothing.
    pub(crate) fn check(&self) -> Result<()> {
        check_folder(self.out, self.resume, NOT_EMPTY)?;
        let path = self.out.join(self.file);
        if path.is_file() && read_json::<Value>(&path)? != *self.settings {
            bail!(
                "{}: its points are of another model, text or setting; choose another --out",
                path.display()
            );
        }
        Ok(())
    }

    /// Makes the folder, unless [`PointFolder::check`] refuses it.
    pub(crate) fn make(&self) -> Result<()> {
        self.check()?;
        fs::create_dir_all(self.out.join(POINTS)).with_context(|| self.out.display().to_string())?;
        write_json(&self.out.join(self.file), self.settings)
    }
}

/// The folders that [`MadeFolders::make`] made. Those that are empty when it is dropped are removed again: work that was refused
/// leaves nothing.
#[derive(Debug)]
pub(crate) struct MadeFolders(Vec<PathBuf>);

impl MadeFolders {
    /// Makes a folder and those above it.
    pub(crate) fn make(folder: &Path) -> Result<MadeFolders> {
        let named = folder.ancestors().take_while(|folder| !folder.as_os_str().is_empty());
        let missing = named.take_while(|folder| !folder.exists()).map(Path::to_path_buf).collect();
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        Ok(MadeFolders(missing))
    }
}

impl Drop for MadeFolders {
    fn drop(&mut self) {
        // The deepest one is the first. A folder that holds something is not removed, nor are those above it.
        for folder in &self.0 {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Refuses what [`make_folder`] refuses, and makes nothing.
pub(crate) fn check_folder(path: &Path, anyway: bool, remedy: &str) -> Result<()> {
    let place = || path.display().to_string();
    if path.is_file() {
        bail!("{} is a file; choose another --out", path.display());
    }
    let mut entries = match fs::read_dir(path) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(place)?,
    };
    if entries.next().is_some() && !anyway {
        bail!("{} is not empty; {remedy}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_was_not_entered_is_made_again() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("runs/a.json");
        write_part(&path, &1).unwrap();
        write_part(&path, &2).unwrap();
        assert_eq!((read_part::<u8>(&path).unwrap(), done_or(&path, || Ok(9)).unwrap()), (2, 2));
        // JSON has no such keys: the write ends before the new content is entered.
        write_part(&path, &std::collections::BTreeMap::from([((1, 2), 3)])).unwrap_err();
        write_json(&path, &4).unwrap();
        let message = read_part::<u8>(&path).unwrap_err().to_string();
        let wanted =
            "a.json: checksums.json beside it does not have it: its command still runs or was killed; wait";
        assert!(message.contains(wanted), "{message}");
        // The process was killed while it wrote the manifest. No process has the largest number.
        let left = work.path().join("runs/.checksums.json.tmp-4294967295");
        fs::write(&left, "{").unwrap();
        assert_eq!(done_or(&path, || Ok(5)).unwrap(), 5);
        assert!(Manifest::read(folder_of(&path)).unwrap().unwrap().names("a.json"));
        assert!(!left.exists() || !Path::new("/proc/self").exists());
        fs::write(&path, "6").unwrap();
        let message = read_part::<u8>(&path).unwrap_err().to_string();
        assert!(message.contains("a.json: it is not what was written"), "{message}");
        assert_eq!(done_or(&path, || Ok(7)).unwrap(), 7, "another content than was entered");
    }

    #[test]
    fn a_first_part_that_was_not_entered_is_no_part_of_before_there_were_manifests() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("runs/a.json");
        write_part(&path, &std::collections::BTreeMap::from([((1, 2), 3)])).unwrap_err();
        write_json(&path, &4).unwrap();
        read_part::<u8>(&path).unwrap_err();
        // Records of earlier versions are read as they are, and points of them are measured again.
        fs::remove_file(path.with_file_name(MANIFEST_FILE)).unwrap();
        assert_eq!(read_part::<u8>(&path).unwrap(), 4);
        fs::write(&path, "").unwrap();
        let message = read_part::<u8>(&path).unwrap_err().to_string();
        assert!(message.contains("a.json: EOF while parsing"), "{message}");
        assert!(message.ends_with("copy it again, or repeat the command that wrote it"), "{message}");
        assert_eq!(done_or(&path, || Ok(5)).unwrap(), 5);
    }

    #[test]
    fn values_take_a_quarter_of_the_memory_at_most() {
        let check = |text: &str, total| check_values(Path::new("r.json"), text.as_bytes(), total);
        let list = format!("[{}0]", "0,".repeat(999));
        assert!(check(&list, Some(4 * 72_000)).is_ok() && check(&list, None).is_ok());
        let message = check(&list, Some(4 * 72_000 - 1)).unwrap_err().to_string();
        assert!(message.starts_with("r.json: its 1000 values take 72"), "{message}");
        assert!(
            message.contains("more than a quarter of") && message.ends_with("make it again"),
            "{message}"
        );
        // Strings take what the file has of them.
        assert!(check(&format!("[{list:?}]"), Some(1000)).is_ok());
    }

    #[test]
    fn files_of_settings_and_of_json_have_their_limits() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(LARGEST_TOML + 1).unwrap();
        let message = format!("{:#}", read_toml(file.path()).unwrap_err());
        assert!(message.contains("more than 1048576 bytes"), "{message}");
        file.as_file().set_len(LARGEST_JSON + 1).unwrap();
        let json = [read_json::<Value>(file.path()).map(drop), read_json_text(file.path()).map(drop)];
        for read in json {
            let message = format!("{:#}", read.unwrap_err());
            assert!(message.contains("more than 67108864 bytes"), "{message}");
        }
    }

    #[test]
    fn folders_that_stay_empty_are_removed_again() {
        let work = tempfile::tempdir().unwrap();
        let deep = work.path().join("a/b/c");
        drop(MadeFolders::make(&deep).unwrap());
        assert!(!work.path().join("a").exists());
        let made = MadeFolders::make(&deep).unwrap();
        fs::write(work.path().join("a/kept"), "x").unwrap();
        drop(made);
        assert!(work.path().join("a/kept").is_file() && !work.path().join("a/b").exists());
        // A folder that was there stays.
        fs::create_dir_all(&deep).unwrap();
        drop(MadeFolders::make(&deep).unwrap());
        assert!(deep.is_dir());
    }

    #[test]
    fn a_discarded_folder_leaves_nothing_of_an_earlier_try() {
        let work = tempfile::tempdir().unwrap();
        let (run, gone) = (work.path().join("run"), work.path().join(".run.gone"));
        for folder in [&run, &gone] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("weights"), "w").unwrap();
        }
        discard(&run).unwrap();
        assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0);
        discard(&run).unwrap();
    }
}
