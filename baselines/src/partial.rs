//! The finished parts of a work, from which an interrupted one continues with the same result.
//!
//! Those of the work whose output is `OUT` lie in the folder `OUT.partial` beside it. Each is a folder with numbers and the identity
//! of the work in `part.json`, tensors in `model.safetensors`, and a manifest; it appears when it is complete. A damaged part is made
//! again, and one of other work is an error.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dsmoe_core::checkpoint::{Checkpoint, Dtype, Manifest, OutputDir, TensorInfo};
use dsmoe_core::files::write_synced;
use dsmoe_kernels::Isa;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The file of a part's numbers.
const NUMBERS: &str = "part.json";
/// Beginning of the names of parts.
const PREFIX: &str = "part-";
/// End of the name of a complete part whose earlier version is not removed yet.
const NEXT: &str = ".next";
/// The least time between two writes of a part that changes all the time.
const EVERY: Duration = if cfg!(test) { Duration::ZERO } else { Duration::from_secs(20) };

/// The finished parts of a work.
///
/// ```
/// use dsmoe_baselines::Partial;
///
/// let work = tempfile::tempdir()?;
/// let partial = Partial::open(&work.path().join("model"), "model, text and settings".to_owned(), true)?;
/// // A method or `grow_from` gets it, and keeps its parts there until all is done.
/// partial.remove()?;
/// assert_eq!(std::fs::read_dir(work.path())?.count(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Partial {
    kept: Option<Kept>,
}

/// The place of parts and the identity of their work.
#[derive(Debug)]
struct Kept {
    dir: PathBuf,
    made_by: String,
}

impl Kept {
    /// Returns the places of a part and of the one that replaces it, after it has completed a replacement that was begun.
    fn places(&self, name: &str) -> Result<[PathBuf; 2]> {
        let [part, next] = ["", NEXT].map(|end| self.dir.join(format!("{PREFIX}{name}{end}")));
        if next.is_dir() {
            remove(&part)?;
            fs::rename(&next, &part).map_err(dsmoe_core::Error::io(&part))?;
        }
        Ok([part, next])
    }
}

/// The contents of `part.json`.
#[derive(Serialize)]
struct Numbers<'a, T> {
    made_by: &'a str,
    value: &'a T,
}

/// The identity in `part.json`.
#[derive(Deserialize)]
struct Identity {
    made_by: String,
}

/// The numbers in `part.json`.
#[derive(Deserialize)]
struct Value<T> {
    value: T,
}

/// A part that was kept.
pub(crate) struct Part<T> {
    /// Its numbers.
    pub(crate) value: T,
    dir: PathBuf,
}

impl<T> Part<T> {
    /// Reads a tensor of this part.
    pub(crate) fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        let checkpoint = Checkpoint::open(&self.dir)?;
        let mut values = vec![0.0; checkpoint.tensor(name).map_or(0, |view| view.numel())];
        checkpoint.read_f32(name, &mut values)?;
        Ok(values)
    }
}

/// Tells when a part that changes all the time is to be written again.
pub(crate) struct Pace(Instant);

impl Pace {
    pub(crate) fn new() -> Pace {
        Pace(Instant::now())
    }

    /// Returns whether the last time is long ago, and begins anew if it is.
    pub(crate) fn is_due(&mut self) -> bool {
        let is_due = self.0.elapsed() >= EVERY;
        if is_due {
            self.0 = Instant::now();
        }
        is_due
    }
}

impl Partial {
    /// Returns a work of which no part is kept.
    pub fn none() -> &'static Partial {
        static NONE: Partial = Partial { kept: None };
        &NONE
    }

    /// Opens the parts of the work whose output is `out`; with `resume` those that are there, and otherwise none. `made_by` names
    /// all that the result depends on, but for the version of the program and the instruction set.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn open(out: &Path, made_by: String, resume: bool) -> Result<Partial> {
        // The name of `.` is that of the directory.
        let out = out.canonicalize().unwrap_or_else(|_| out.to_path_buf());
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let dir = out.with_file_name(format!("{name}.partial"));
        if !resume {
            remove_parts(&dir)?;
        }
        let made_by = format!("{made_by} {} {}", env!("CARGO_PKG_VERSION"), Isa::current().name());
        Ok(Partial { kept: Some(Kept { dir, made_by }) })
    }

    /// Returns the part of that name; none if it was not kept, or is damaged.
    ///
    /// # Errors
    /// The part is of other work, or the file system refuses.
    pub(crate) fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<Part<T>>> {
        let Some(kept) = &self.kept else { return Ok(None) };
        let (Kept { dir, made_by }, [part, _]) = (kept, kept.places(name)?);
        let is_whole = |manifest: Manifest| matches!(manifest.damaged(&part, |_| true), Ok(None));
        if !Manifest::read(&part).ok().flatten().is_some_and(is_whole) {
            return Ok(None);
        }
        let numbers = part.join(NUMBERS);
        // A pipe would block.
        if !numbers.is_file() {
            return Ok(None);
        }
        let Ok(bytes) = fs::read(numbers) else { return Ok(None) };
        match serde_json::from_slice::<Identity>(&bytes) {
            Ok(found) if found.made_by != *made_by => {
                let problem = "holds the parts of another model, text, settings, version or instruction set";
                let help = "give the arguments of that work, or leave {resume} out to start over";
                return Err(dsmoe_core::Error::path(dir, problem, help).into());
            }
            Ok(_) => {}
            Err(_) => return Ok(None),
        }
        let value = serde_json::from_slice::<Value<T>>(&bytes).ok();
        Ok(value.map(|Value { value }| Part { value, dir: part }))
    }

    /// Returns the first of `count` parts, whose names `name` gives by number, up to the first that was not kept or is damaged.
    ///
    /// # Errors
    /// Those of [`Partial::read`].
    pub(crate) fn first<T: DeserializeOwned>(
        &self,
        count: usize,
        name: impl Fn(usize) -> String,
    ) -> Result<Vec<Part<T>>> {
        (0..count).map_while(|number| self.read::<T>(&name(number)).transpose()).collect()
    }

    /// Keeps a part in place of an earlier one of that name, which stays until the new one is complete.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn keep(&self, name: &str, value: &impl Serialize, tensors: &[(&str, &[f32])]) -> Result<()> {
        let Some(kept) = &self.kept else { return Ok(()) };
        let [_, next] = kept.places(name)?;
        let output = OutputDir::create(&next, false)?;
        if !tensors.is_empty() {
            let info = |(name, values): &(&str, &[f32])| TensorInfo {
                name: (*name).to_owned(),
                dtype: Dtype::F32,
                shape: vec![values.len()],
            };
            let mut writer = output.writer(tensors.iter().map(info).collect())?;
            for (name, values) in tensors {
                writer.write_f32(name, values)?;
            }
            writer.finish()?;
        }
        let numbers = Numbers { made_by: &kept.made_by, value };
        let bytes = serde_json::to_vec(&numbers).expect("numbers and strings are JSON");
        let path = output.path().join(NUMBERS);
        write_synced(&path, &bytes).map_err(dsmoe_core::Error::io(&path))?;
        output.commit()?;
        kept.places(name)?;
        Ok(())
    }

    /// Removes a part that is no longer needed.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn forget(&self, name: &str) -> Result<()> {
        let Some(kept) = &self.kept else { return Ok(()) };
        let [part, _] = kept.places(name)?;
        remove(&part)
    }

    /// Removes all parts: the work is done.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove(self) -> Result<()> {
        self.kept.map_or(Ok(()), |kept| remove_parts(&kept.dir))
    }
}

/// Removes a folder and all in it, if it is there.
fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => Err(dsmoe_core::Error::io(dir)(cause).into()),
        _ => Ok(()),
    }
}

/// Removes the parts in `dir`, those that were begun, and then `dir`. What else is there stays.
fn remove_parts(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(dsmoe_core::Error::io(dir))?,
    };
    for entry in entries {
        let entry = entry.map_err(dsmoe_core::Error::io(dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.trim_start_matches('.').starts_with(PREFIX) {
            remove(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(cause) if ![ErrorKind::NotFound, ErrorKind::DirectoryNotEmpty].contains(&cause.kind()) => {
            Err(dsmoe_core::Error::io(dir)(cause).into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path, made_by: &str, resume: bool) -> Partial {
        Partial::open(&dir.join("out"), made_by.to_owned(), resume).unwrap()
    }

    #[test]
    fn parts_are_read_as_they_were_kept() {
        let work = tempfile::tempdir().unwrap();
        let partial = open(work.path(), "a", true);
        assert!(partial.read::<Vec<u64>>("fit").unwrap().is_none());
        let bits = [1u64, 0.1f64.to_bits(), u64::MAX];
        partial.keep("fit", &bits, &[("w", &[0.5, -0.0, 1e-40]), ("v", &[3.0])]).unwrap();
        partial.keep("other", &7u64, &[]).unwrap();
        let again = open(work.path(), "a", true);
        let part = again.read::<Vec<u64>>("fit").unwrap().unwrap();
        assert_eq!(part.value, bits);
        let values: Vec<u32> = part.tensor("w").unwrap().into_iter().map(f32::to_bits).collect();
        assert_eq!(values, [0.5, -0.0, 1e-40f32].map(f32::to_bits));
        assert_eq!(part.tensor("v").unwrap(), [3.0]);
        // The first parts are those before a gap.
        again.keep("layer-0", &5u64, &[]).unwrap();
        again.keep("layer-2", &6u64, &[]).unwrap();
        let first = again.first::<u64>(3, |layer| format!("layer-{layer}")).unwrap();
        assert_eq!(first.iter().map(|part| part.value).collect::<Vec<_>>(), [5]);
        // The newest one counts; a forgotten one is gone.
        again.keep("fit", &[2u64], &[]).unwrap();
        assert_eq!(again.read::<Vec<u64>>("fit").unwrap().unwrap().value, [2]);
        again.forget("other").unwrap();
        assert!(again.read::<u64>("other").unwrap().is_none());
        again.remove().unwrap();
        assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0);
    }

    #[test]
    fn damaged_parts_are_none_and_those_of_other_work_are_refused() {
        let work = tempfile::tempdir().unwrap();
        let partial = open(work.path(), "a", true);
        partial.keep("fit", &3u64, &[("w", &[0.5; 64])]).unwrap();
        let error = open(work.path(), "b", true).read::<u64>("fit").err().unwrap().to_string();
        assert!(error.contains("out.partial: holds the parts of another model"), "{error}");
        let weights = work.path().join("out.partial/part-fit/model.safetensors");
        let mut bytes = fs::read(&weights).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&weights, &bytes).unwrap();
        assert!(partial.read::<u64>("fit").unwrap().is_none());
        partial.keep("fit", &3u64, &[]).unwrap();
        assert!(partial.read::<u64>("fit").unwrap().is_some());
        // Numbers of another form are those of another version.
        assert!(partial.read::<Vec<String>>("fit").unwrap().is_none());
    }

    /// Numbers of which no file is made: the process dies while it writes them.
    struct Dies;

    impl Serialize for Dies {
        fn serialize<S: serde::Serializer>(&self, _: S) -> std::result::Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("the process dies"))
        }
    }

    #[test]
    fn an_interrupted_replacement_leaves_a_whole_part() {
        let work = tempfile::tempdir().unwrap();
        let partial = open(work.path(), "a", true);
        partial.keep("fit", &1u64, &[]).unwrap();
        let value = || partial.read::<u64>("fit").unwrap().map(|part| part.value);
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| partial.keep("fit", &Dies, &[])));
        assert!(died.is_err());
        assert_eq!(value(), Some(1));
        // It dies while it removes the earlier part.
        let dir = work.path().join("out.partial");
        let [part, next] = ["part-fit", "part-fit.next"].map(|name| dir.join(name));
        fs::rename(&part, &next).unwrap();
        fs::create_dir(&part).unwrap();
        assert_eq!(value(), Some(1));
        assert!(!next.exists());
        partial.keep("fit", &2u64, &[]).unwrap();
        assert_eq!(value(), Some(2));
        partial.forget("fit").unwrap();
        assert_eq!((value(), dir.read_dir().unwrap().count()), (None, 0));
    }

    #[test]
    fn without_resuming_the_work_starts_over_and_other_files_stay() {
        let work = tempfile::tempdir().unwrap();
        let dir = work.path().join("out.partial");
        open(work.path(), "a", true).keep("fit", &3u64, &[]).unwrap();
        fs::create_dir(dir.join(format!(".part-fit.tmp-{}", u32::MAX))).unwrap();
        fs::write(dir.join("notes.txt"), "mine").unwrap();
        let partial = open(work.path(), "b", false);
        assert!(partial.read::<u64>("fit").unwrap().is_none());
        let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["notes.txt"]);
        Partial::none().keep("fit", &1u64, &[]).unwrap();
        assert!(Partial::none().read::<u64>("fit").unwrap().is_none());
    }
}
