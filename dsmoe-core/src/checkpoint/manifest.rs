//! Manifests: sizes and hashes of the files of a directory, by which damage is found.
//!
//! ```text
//! {"format_version": 1, "files": [{"name": "config.json", "bytes": 612, "xxh3_128": "32 hexadecimal digits"}, ...]}
//! ```
//! The hash is XXH3-128, as `xxh128sum` prints it. It finds accidents; who can change a file can change its manifest too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dsmoe_kernels::mmap::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use twox_hash::xxhash3_128::Hasher;

use crate::error::{Error, Result};
use crate::files::{open_regular, replace_synced};
use crate::json::{parse, read_json};

/// Name of the manifest in its directory.
pub const MANIFEST_FILE: &str = "checksums.json";
const FORMAT_VERSION: u32 = 1;
/// Bytes that are read and hashed at a time.
const CHUNK: usize = 1 << 20;
const UNDAMAGED: &str = "take an undamaged copy, or make the directory again";

/// The size and the hash of a file.
///
/// ```
/// use dsmoe_core::checkpoint::FileSum;
///
/// let sum = FileSum::of(b"written");
/// assert_eq!((sum.bytes, sum.hex().len()), (7, 32));
/// assert_ne!(sum, FileSum::of(b"damaged"));
/// // Its bytes, for a file of its own.
/// assert_eq!(FileSum::from_bytes(&sum.to_bytes()), Some(sum));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSum {
    /// Size.
    pub bytes: u64,
    /// XXH3-128.
    pub hash: u128,
}

impl FileSum {
    /// Computes those of a file with this content.
    pub fn of(content: &[u8]) -> FileSum {
        FileSum { bytes: content.len() as u64, hash: Hasher::oneshot(content) }
    }

    /// Returns the hash as manifests have it.
    pub fn hex(&self) -> String {
        format!("{:032x}", self.hash)
    }

    /// Computes those of the file at `path`. `progress` receives the sizes of the parts as they are hashed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn of_file(path: &Path, progress: &mut dyn FnMut(u64)) -> Result<FileSum> {
        let (mut file, mut summing) = (open_regular(path)?, Summing::default());
        let len = file.metadata().map_err(Error::io(path))?.len();
        let mut buffer = vec![0; len.clamp(1, CHUNK as u64) as usize];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(summing.finish()),
                Ok(read) => {
                    summing.add(&buffer[..read]);
                    progress(read as u64);
                }
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(Error::io(path)(cause)),
            }
        }
    }

    /// Returns the 24 bytes from which [`FileSum::from_bytes`] makes it again.
    pub fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[8..].copy_from_slice(&self.hash.to_le_bytes());
        bytes
    }

    /// Reads what [`FileSum::to_bytes`] made; none of another number of bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<FileSum> {
        let (bytes, hash) = bytes.split_at_checked(8)?;
        let (bytes, hash) = (bytes.try_into().ok()?, hash.try_into().ok()?);
        Some(FileSum { bytes: u64::from_le_bytes(bytes), hash: u128::from_le_bytes(hash) })
    }
}

impl FileSum {
    /// Computes those of a file that is mapped afterwards anyhow: nothing is copied.
    fn of_map(path: &Path) -> Result<FileSum> {
        let file = open_regular(path)?;
        // There is no map of an empty file.
        if file.metadata().map_err(Error::io(path))?.len() == 0 {
            return Ok(FileSum::of(b""));
        }
        Ok(FileSum::of(&Mmap::open(&file).map_err(Error::io(path))?))
    }
}

/// Computes a [`FileSum`] while the file is written.
#[derive(Default)]
pub(crate) struct Summing {
    bytes: u64,
    hasher: Hasher,
}

impl Summing {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.hasher.write(bytes);
    }

    /// Returns what was added, and starts again.
    pub(crate) fn finish(&mut self) -> FileSum {
        let Summing { bytes, hasher } = std::mem::take(self);
        FileSum { bytes, hash: hasher.finish_128() }
    }
}

impl std::fmt::Debug for Summing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Summing").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Sums of files that were computed while they were written, by name. Clones share them.
///
/// ```
/// use dsmoe_core::checkpoint::{FileSum, Manifest, Sums};
///
/// let work = tempfile::tempdir()?;
/// std::fs::write(work.path().join("notes.txt"), "written")?;
/// let (sums, of_writer) = (Sums::default(), Sums::default());
/// let shared = of_writer.clone();
/// shared.set("notes.txt", FileSum::of(b"written")); // by whoever writes the file
/// assert_eq!(of_writer.get("notes.txt"), Some(FileSum::of(b"written")));
/// // The manifest is the same whether a file was hashed before or is read for it.
/// assert_eq!(Manifest::write(work.path(), &of_writer)?, Manifest::write(work.path(), &sums)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Sums(Arc<Mutex<BTreeMap<String, FileSum>>>);

impl Sums {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, FileSum>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets that of the file `name`.
    pub fn set(&self, name: impl Into<String>, sum: FileSum) {
        self.all().insert(name.into(), sum);
    }

    /// Returns that of the file `name`, if it was computed.
    pub fn get(&self, name: &str) -> Option<FileSum> {
        self.all().get(name).copied()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format_version: u32,
    files: Vec<StoredFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredFile {
    name: String,
    bytes: u64,
    xxh3_128: String,
}

/// The manifest of a directory.
///
/// ```
/// use dsmoe_core::checkpoint::{FileSum, Manifest, Sums, Verification};
///
/// let work = tempfile::tempdir()?;
/// std::fs::write(work.path().join("notes.txt"), "written")?;
/// // What was hashed while it was written is not read again.
/// let sums = Sums::default();
/// sums.set("notes.txt", FileSum::of(b"written"));
/// let manifest = Manifest::write(work.path(), &sums)?;
///
/// std::fs::write(work.path().join("notes.txt"), "changed")?;
/// let found: Verification = manifest.verify(work.path(), &mut |_, _| {})?;
/// assert_eq!(found.changed, ["notes.txt"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    files: BTreeMap<String, FileSum>,
}

/// The comparison of a directory with its manifest.
///
/// ```
/// use dsmoe_core::checkpoint::{Manifest, Sums, Verification};
///
/// let work = tempfile::tempdir()?;
/// let file = |name: &str| work.path().join(name);
/// std::fs::write(file("a.txt"), "kept")?;
/// std::fs::write(file("b.txt"), "lost")?;
/// let manifest = Manifest::write(work.path(), &Sums::default())?;
/// std::fs::remove_file(file("b.txt"))?;
///
/// let found: Verification = manifest.verify(work.path(), &mut |_, _| {})?;
/// assert!(!found.holds());
/// assert_eq!((found.good, &found.missing[..]), (1, &["b.txt".to_owned()][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// The number of files that are as the manifest says.
    pub good: usize,
    /// Bytes of all files of the manifest.
    pub bytes: u64,
    /// Files that are not there.
    pub missing: Vec<String>,
    /// Files of another size or content.
    pub changed: Vec<String>,
}

impl Verification {
    /// Returns whether every file of the manifest exists as it says.
    pub fn holds(&self) -> bool {
        self.missing.is_empty() && self.changed.is_empty()
    }
}

impl Manifest {
    /// Writes the manifest of `dir`, synced. Files that `known` does not have are read.
    ///
    /// # Errors
    /// A file cannot be read, or the file system refuses.
    pub fn write(dir: &Path, known: &Sums) -> Result<Manifest> {
        let mut files = BTreeMap::new();
        for name in names(dir)? {
            let sum = match known.get(&name) {
                Some(sum) => sum,
                None => FileSum::of_file(&dir.join(&name), &mut |_| ())?,
            };
            files.insert(name, sum);
        }
        let manifest = Manifest { files };
        manifest.replace(dir)?;
        Ok(manifest)
    }

    /// Enters the present content of the file `name` of `dir` into the manifest there, if there is one that can be read.
    ///
    /// # Errors
    /// The file cannot be read, or the file system refuses.
    pub fn renew(dir: &Path, name: &str) -> Result<()> {
        // One that is damaged is for `verify` to tell.
        match Manifest::read(dir).ok().flatten() {
            Some(manifest) => manifest.with(dir, name),
            None => Ok(()),
        }
    }

    /// Enters the present content of the file `name` of `dir` into the manifest there, or into a new one where there is none, or
    /// none that can be read: what that one said of other files is unknown then.
    ///
    /// # Errors
    /// The file cannot be read, or the file system refuses.
    pub fn enter(dir: &Path, name: &str) -> Result<()> {
        let found = Manifest::read(dir).ok().flatten();
        found.unwrap_or(Manifest { files: BTreeMap::new() }).with(dir, name)
    }

    fn with(mut self, dir: &Path, name: &str) -> Result<()> {
        let sum = FileSum::of_file(&dir.join(name), &mut |_| ())?;
        self.files.insert(name.to_owned(), sum);
        self.replace(dir)
    }

    /// Takes the file `name` out of the manifest of `dir`, if there is one that can be read. Called before the file is replaced, it
    /// keeps a process that is killed before it enters the new content from leaving one that counts as damaged.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn forget(dir: &Path, name: &str) -> Result<()> {
        let Some(mut manifest) = Manifest::read(dir).ok().flatten() else { return Ok(()) };
        match manifest.files.remove(name) {
            Some(_) => manifest.replace(dir),
            None => Ok(()),
        }
    }

    /// Makes the manifest of `dir` one that does not have the file `name`: without it, or a new one without any file where there is
    /// none, or none that can be read. Called before the file is written, it lets a file that no process entered be told from one of
    /// a directory without a manifest.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn withhold(dir: &Path, name: &str) -> Result<()> {
        match Manifest::read(dir).ok().flatten() {
            Some(_) => Manifest::forget(dir, name),
            None => Manifest { files: BTreeMap::new() }.replace(dir),
        }
    }

    /// Replaces the manifest of `dir`.
    fn replace(&self, dir: &Path) -> Result<()> {
        let path = dir.join(MANIFEST_FILE);
        replace_synced(&path, self.to_json().as_bytes()).map_err(Error::io(&path))
    }

    /// Returns whether it names every file of `dir`, of which there is one at least.
    pub(super) fn names_all_of(&self, dir: &Path) -> Result<bool> {
        let (names, manifest_alone) = (names(dir)?, dir.join(MANIFEST_FILE).exists());
        Ok((manifest_alone || !names.is_empty()) && names.iter().all(|name| self.files.contains_key(name)))
    }

    fn to_json(&self) -> String {
        let stored = |(name, sum): (&String, &FileSum)| StoredFile {
            name: name.clone(),
            bytes: sum.bytes,
            xxh3_128: sum.hex(),
        };
        let files = self.files.iter().map(stored).collect();
        let text = serde_json::to_string_pretty(&Stored { format_version: FORMAT_VERSION, files });
        text.expect("strings and numbers are JSON") + "\n"
    }

    /// Reads the manifest of `dir`; none where there is none.
    ///
    /// # Errors
    /// The file cannot be read, or is no manifest.
    pub fn read(dir: &Path) -> Result<Option<Manifest>> {
        let path = dir.join(MANIFEST_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let stored: Stored = parse(&path, &read_json(&path)?, "a manifest", UNDAMAGED)?;
        let wrong = |problem: String| Err(Error::path(&path, problem, UNDAMAGED));
        if stored.format_version != FORMAT_VERSION {
            let version = stored.format_version;
            return wrong(format!("format_version is {version}, this program reads {FORMAT_VERSION}"));
        }
        let mut files = BTreeMap::new();
        for StoredFile { name, bytes, xxh3_128 } in stored.files {
            let inside = Path::new(&name).components().all(|part| matches!(part, Component::Normal(_)));
            if name.is_empty() || !inside {
                return wrong(format!("the name {name:?} leads out of the directory"));
            }
            let Ok(hash) = u128::from_str_radix(&xxh3_128, 16) else {
                return wrong(format!("xxh3_128 {xxh3_128:?} of {name} is no hash"));
            };
            files.insert(name, FileSum { bytes, hash });
        }
        Ok(Some(Manifest { files }))
    }

    /// Returns the first file of `dir`, by name, that is not there or not as the manifest says. `wanted` chooses by name.
    ///
    /// # Errors
    /// A file that is there cannot be read.
    pub fn damaged(&self, dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Option<PathBuf>> {
        let files: Vec<_> = self.files.iter().filter(|(name, _)| wanted(name)).collect();
        let check = |(name, sum): &(&String, &FileSum)| {
            let path = dir.join(name);
            Ok((compare(&path, **sum, FileSum::of_map)? != State::Good).then_some(path))
        };
        let outcomes: Vec<Result<Option<PathBuf>>> = files.par_iter().map(check).collect();
        let damaged: Result<Vec<Option<PathBuf>>> = outcomes.into_iter().collect();
        Ok(damaged?.into_iter().flatten().next())
    }

    /// Returns whether the manifest says that the file `name` has this content.
    pub fn holds(&self, name: &str, content: &[u8]) -> bool {
        self.files.get(name) == Some(&FileSum::of(content))
    }

    /// Returns whether the manifest has the file `name`.
    pub fn names(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// Returns whether the manifest says that the file `name` has another content. Of a file that it does not name it says nothing.
    pub fn contradicts(&self, name: &str, content: &[u8]) -> bool {
        self.files.get(name).is_some_and(|sum| *sum != FileSum::of(content))
    }

    /// Compares all files of `dir` with the manifest. `progress` receives the bytes hashed and the bytes of all files.
    ///
    /// # Errors
    /// A file that is there cannot be read.
    pub fn verify(&self, dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Verification> {
        let total = self.files.values().fold(0u64, |total, sum| total.saturating_add(sum.bytes));
        let mut found = Verification { bytes: total, ..Verification::default() };
        let mut done = 0u64;
        for (name, sum) in &self.files {
            let mut hashed = done;
            let mut show = |more| {
                hashed += more;
                progress(hashed, total);
            };
            match compare(&dir.join(name), *sum, |path| FileSum::of_file(path, &mut show))? {
                State::Good => found.good += 1,
                State::Missing => found.missing.push(name.clone()),
                State::Changed => found.changed.push(name.clone()),
            }
            done = done.saturating_add(sum.bytes);
            progress(done, total);
        }
        Ok(found)
    }
}

/// The state of a file of a manifest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Good,
    Missing,
    Changed,
}

fn compare(path: &Path, sum: FileSum, read: impl FnOnce(&Path) -> Result<FileSum>) -> Result<State> {
    match fs::metadata(path) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(State::Missing),
        Err(cause) => Err(Error::io(path)(cause)),
        // A file of another size need not be read.
        Ok(metadata) if metadata.len() != sum.bytes => Ok(State::Changed),
        Ok(_) if read(path)? != sum => Ok(State::Changed),
        Ok(_) => Ok(State::Good),
    }
}

/// Returns the names of the files below `dir`, with `/` between the parts. The manifest and hidden files are left out.
fn names(dir: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![(dir.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let entry = entry.map_err(Error::io(&folder))?;
            // Names that are not UTF-8 are none of ours.
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with('.') || prefix.is_empty() && name == MANIFEST_FILE {
                continue;
            }
            let kind = entry.file_type().map_err(Error::io(&entry.path()))?;
            let name = format!("{prefix}{name}");
            if kind.is_dir() {
                folders.push((entry.path(), format!("{name}/")));
            } else {
                found.insert(name);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("LICENSES")).unwrap();
        for (name, text) in [("a.txt", "abc"), ("LICENSES/b", "bb"), ("empty", ""), (".hidden", "x")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn every_bit_that_changes_is_found() {
        let dir = filled();
        let big: Vec<u8> = (0..3 * CHUNK + 5).map(|i| ((i * i) >> 7) as u8).collect();
        fs::write(dir.path().join("big"), &big).unwrap();
        let known = Sums::default();
        let mut summing = Summing::default();
        big.chunks(777).for_each(|part| summing.add(part));
        known.set("big", summing.finish());
        assert_eq!(known.get("big"), Some(FileSum::of(&big)), "parts have the hash of the whole");
        assert_eq!(FileSum::from_bytes(&FileSum::of(&big).to_bytes()), known.get("big"));
        // `xxh128sum` prints this hash of a file with these three bytes.
        assert_eq!(FileSum::of(b"abc").hex(), "06b05ab6733a618578af5f94892f3950");
        let written = Manifest::write(dir.path(), &known).unwrap();
        assert_eq!(Manifest::read(dir.path()).unwrap(), Some(written.clone()));
        let mut heard = Vec::new();
        let found = written.verify(dir.path(), &mut |done, of| heard.push((done, of))).unwrap();
        let bytes = big.len() as u64 + 5;
        assert!(found.holds() && found.good == 4 && found.bytes == bytes);
        assert_eq!(heard.last(), Some(&(bytes, bytes)));
        assert_eq!(written.damaged(dir.path(), |_| true).unwrap(), None);
        for (at, bit) in [(0, 0), (CHUNK - 1, 7), (CHUNK, 3), (big.len() - 1, 5)] {
            let mut damaged = big.clone();
            damaged[at] ^= 1 << bit;
            fs::write(dir.path().join("big"), &damaged).unwrap();
            let found = |wanted: fn(&str) -> bool| written.damaged(dir.path(), wanted).unwrap();
            assert_eq!(found(|_| true), Some(dir.path().join("big")));
            assert_eq!(found(|name| name != "big"), None);
            assert!(!written.holds("big", &damaged));
            assert_eq!(written.verify(dir.path(), &mut |_, _| ()).unwrap().changed, ["big"]);
        }
        assert!(written.holds("big", &big) && !written.holds("other", b""));
        assert!(!written.contradicts("big", &big) && written.contradicts("big", b""));
        assert!(!written.contradicts("other", b""));
    }

    #[test]
    fn what_is_missing_is_listed() {
        let dir = filled();
        let written = Manifest::write(dir.path(), &Sums::default()).unwrap();
        fs::rename(dir.path().join("a.txt"), dir.path().join("c.txt")).unwrap();
        fs::write(dir.path().join("LICENSES/b"), "bbb").unwrap();
        let found = written.verify(dir.path(), &mut |_, _| ()).unwrap();
        assert!(!found.holds());
        assert_eq!([found.missing, found.changed], [["a.txt"], ["LICENSES/b"]]);
        assert_eq!(written.damaged(dir.path(), |_| true).unwrap(), Some(dir.path().join("LICENSES/b")));
        Manifest::renew(dir.path(), "LICENSES/b").unwrap();
        let renewed = Manifest::read(dir.path()).unwrap().unwrap();
        assert_eq!(renewed.damaged(dir.path(), |_| true).unwrap(), Some(dir.path().join("a.txt")));
        assert_eq!(renewed.damaged(dir.path(), |name| name != "a.txt").unwrap(), None);
        // Where no manifest can be read, the file is in one of its own.
        for before in [None, Some("{")] {
            drop(fs::remove_file(dir.path().join(MANIFEST_FILE)));
            before.iter().for_each(|text| fs::write(dir.path().join(MANIFEST_FILE), text).unwrap());
            Manifest::renew(dir.path(), "empty").unwrap();
            assert!(!matches!(Manifest::read(dir.path()), Ok(Some(_))), "{before:?}");
            Manifest::enter(dir.path(), "empty").unwrap();
            let entered = Manifest::read(dir.path()).unwrap().unwrap();
            assert!(entered.holds("empty", b"") && entered.files.len() == 1);
        }
        Manifest::enter(dir.path(), "c.txt").unwrap();
        assert_eq!(Manifest::read(dir.path()).unwrap().unwrap().files.len(), 2);
    }

    #[test]
    fn a_file_that_was_forgotten_is_taken_as_it_is() {
        let dir = filled();
        Manifest::forget(dir.path(), "a.txt").unwrap();
        assert_eq!(Manifest::read(dir.path()).unwrap(), None);
        Manifest::write(dir.path(), &Sums::default()).unwrap();
        // The rest of a manifest that a killed process was writing.
        let part = dir.path().join(format!(".{MANIFEST_FILE}.tmp-{}", u32::MAX));
        fs::write(&part, "{").unwrap();
        Manifest::forget(dir.path(), "a.txt").unwrap();
        assert!(!part.exists() || !Path::new("/proc/self").exists());
        fs::write(dir.path().join("a.txt"), "changed").unwrap();
        let forgotten = Manifest::read(dir.path()).unwrap().unwrap();
        assert_eq!(forgotten.damaged(dir.path(), |_| true).unwrap(), None);
        assert!(!forgotten.contradicts("a.txt", b"changed") && forgotten.holds("empty", b""));
        Manifest::renew(dir.path(), "a.txt").unwrap();
        assert!(Manifest::read(dir.path()).unwrap().unwrap().holds("a.txt", b"changed"));
    }

    #[test]
    fn a_file_that_is_withheld_is_told_from_one_of_before_there_was_a_manifest() {
        let dir = filled();
        for before in ["", "{"] {
            fs::write(dir.path().join(MANIFEST_FILE), before).unwrap();
            Manifest::withhold(dir.path(), "a.txt").unwrap();
            let begun = Manifest::read(dir.path()).unwrap().unwrap();
            assert!(begun.files.is_empty() && !begun.names("a.txt"));
            fs::remove_file(dir.path().join(MANIFEST_FILE)).unwrap();
            Manifest::withhold(dir.path(), "a.txt").unwrap();
            assert_eq!(Manifest::read(dir.path()).unwrap(), Some(begun));
        }
        Manifest::enter(dir.path(), "a.txt").unwrap();
        Manifest::enter(dir.path(), "empty").unwrap();
        Manifest::withhold(dir.path(), "a.txt").unwrap();
        let left = Manifest::read(dir.path()).unwrap().unwrap();
        assert!(!left.names("a.txt") && left.holds("empty", b""));
    }

    #[test]
    fn every_flipped_bit_of_a_manifest_is_found_or_without_effect() {
        let dir = filled();
        let written = Manifest::write(dir.path(), &Sums::default()).unwrap();
        let path = dir.path().join(MANIFEST_FILE);
        let bytes = fs::read(&path).unwrap();
        for bit in (0..8 * bytes.len()).step_by(3) {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &damaged).unwrap();
            let Ok(read) = Manifest::read(dir.path()) else { continue };
            let read = read.expect("the file is there");
            let found = read.damaged(dir.path(), |_| true).unwrap();
            assert!(found.is_some() || read == written, "bit {bit}");
        }
    }

    #[test]
    fn manifests_that_cannot_be_used() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Manifest::read(dir.path()).unwrap(), None);
        let message = |text: &str| {
            fs::write(dir.path().join(MANIFEST_FILE), text).unwrap();
            Manifest::read(dir.path()).unwrap_err().to_string()
        };
        let with = |name: &str, hash: &str| {
            format!(
                "{{\"format_version\":1,\"files\":[{{\"name\":\"{name}\",\"bytes\":1,\"xxh3_128\":\"{hash}\"}}]}}"
            )
        };
        for name in ["../x", "/etc/passwd", "a/../../b", ""] {
            assert!(message(&with(name, "00")).contains("leads out of the directory"), "{name}");
        }
        assert!(message(&with("a", "xyz")).contains("is no hash"));
        assert!(message("{").contains(MANIFEST_FILE));
        assert!(message("{\"format_version\":2,\"files\":[]}").contains("format_version is 2"));
    }
}
