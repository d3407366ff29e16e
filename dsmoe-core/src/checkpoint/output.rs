//! Output directories that appear complete or not at all.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dsmoe_kernels::comm::{self, CommError, Communicator, What, alone};

use super::{
    CONFIG_FILE, DEFAULT_SHARD_BYTES, MANIFEST_FILE, Manifest, Sums, TensorInfo, Writer, model_writer,
};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::{leftovers, parent, recover, remove_dir, sync_dir};

/// A directory being written beside its target, `.NAME.tmp-PID`; [`OutputDir::commit`] renames it. Dropped without
/// that, it is removed.
///
/// ```
/// use dsmoe_core::checkpoint::OutputDir;
///
/// let work = tempfile::tempdir()?;
/// let target = work.path().join("model");
/// let out = OutputDir::create(&target, false)?;
/// std::fs::write(out.path().join("notes.txt"), "all or nothing")?;
/// assert!(!target.exists());
/// out.commit()?;
/// assert!(target.join("notes.txt").exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct OutputDir {
    target: PathBuf,
    temporary: PathBuf,
    name: String,
    committed: bool,
    /// Of the weights.
    sums: Sums,
    /// The processes of which the first one writes.
    comm: Arc<dyn Communicator>,
}

const OUTPUT: What = What::of("the output directory");

impl OutputDir {
    /// Starts a directory that is to become `path`. With `force`, a model directory that is there is replaced at the
    /// end.
    ///
    /// # Errors
    /// `path` is a file, or a directory that is not empty: without `force`, or with it when there is no config.json
    /// in it; or the file system refuses.
    pub fn create(path: &Path, force: bool) -> Result<OutputDir> {
        let wrong = |problem: &str| Err(Error::path(path, problem, "choose another {out}"));
        finish_fill(path)?;
        recover(path).map_err(Error::io(path))?;
        let target =
            if path.exists() { path.canonicalize().map_err(Error::io(path))? } else { path.to_path_buf() };
        if target != path {
            finish_fill(&target)?;
        }
        if target.exists() && !target.is_dir() {
            return wrong("is a file");
        }
        if !is_empty(&target)? {
            if !force {
                let help = "choose another {out} or set {force}".into();
                return Err(Error::OutputNotEmpty { path: path.to_path_buf(), help });
            }
            if !target.join(CONFIG_FILE).is_file() {
                return wrong("is not a model directory and is not replaced");
            }
        }
        let Some(name) = target.file_name().map(|name| name.to_string_lossy().into_owned()) else {
            return wrong("is not the name of a directory");
        };
        if target != path {
            recover(&target).map_err(Error::io(&target))?;
        }
        let parent = parent(&target);
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let temporary = parent.join(format!(".{name}.tmp-{}", std::process::id()));
        remove_dir(&temporary).map_err(Error::io(&temporary))?;
        fs::create_dir(&temporary).map_err(Error::io(&temporary))?;
        let (sums, comm) = (Sums::default(), Arc::clone(alone()));
        Ok(OutputDir { target, temporary, name, committed: false, sums, comm })
    }

    /// Does as [`OutputDir::create`] for a directory made from `source`, which must survive.
    ///
    /// # Errors
    /// Those of `create`; `source` is `path` or inside it.
    pub fn create_from(source: &Path, path: &Path, force: bool) -> Result<OutputDir> {
        if let (Ok(source), Ok(target)) = (source.canonicalize(), path.canonicalize())
            && source.starts_with(&target)
        {
            let help = "choose another {out}";
            return Err(Error::path(path, "holds the model that is read", help));
        }
        OutputDir::create(path, force)
    }

    /// Does as [`OutputDir::create_from`] for the processes of `comm`: the first one writes, and all return its outcome. What
    /// the others write by [`OutputDir::writer`] and [`OutputDir::model_writer`] is discarded.
    ///
    /// # Errors
    /// Those of `create_from`; another process fails.
    pub fn create_on(
        comm: &Arc<dyn Communicator>,
        source: &Path,
        path: &Path,
        force: bool,
    ) -> Result<OutputDir> {
        let first = (comm.rank() == 0).then(|| OutputDir::create_from(source, path, force)).transpose();
        let comm = Arc::clone(comm);
        Ok(match agree(&*comm, first)? {
            Some(mut output) => {
                output.comm = comm;
                output
            }
            None => {
                let (target, temporary, name) = (path.to_path_buf(), PathBuf::new(), String::new());
                OutputDir { target, temporary, name, committed: true, sums: Sums::default(), comm }
            }
        })
    }

    /// Returns whether this process writes.
    fn writes(&self) -> bool {
        self.comm.rank() == 0
    }

    /// Starts the weights, as [`Writer::create`] does.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn writer(&self, infos: Vec<TensorInfo>) -> Result<Writer> {
        match self.writes() {
            true => Ok(Writer::create(&self.temporary, infos)?.with_sums(&self.sums)),
            false => Ok(Writer::discarding(infos)),
        }
    }

    /// Starts the weights of the model of `config`, as [`model_writer`] does.
    ///
    /// # Errors
    /// Those of [`model_writer`].
    pub fn model_writer(&self, config: &Config, infos: Vec<TensorInfo>) -> Result<Writer> {
        match self.writes() {
            true => {
                let writer = model_writer(config, &self.temporary, infos, DEFAULT_SHARD_BYTES)?;
                Ok(writer.with_sums(&self.sums))
            }
            false => Ok(Writer::discarding(infos)),
        }
    }

    /// Writes further files with `write`, which receives the temporary directory, and commits. The first process does so; all
    /// return its outcome.
    ///
    /// # Errors
    /// Those of `write` and [`OutputDir::commit`]; another process fails.
    pub fn commit_with(self, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let comm = Arc::clone(&self.comm);
        let outcome = match self.writes() {
            true => write(&self.temporary).and_then(|()| self.commit()),
            false => Ok(()),
        };
        agree(&*comm, outcome)
    }

    /// Returns the temporary directory to write to.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Writes the manifest and makes the directory appear under its name; what was there is deleted after.
    ///
    /// # Errors
    /// The file system refuses; what was there is then still there.
    pub fn commit(mut self) -> Result<()> {
        let target = &self.target;
        Manifest::write(&self.temporary, &self.sums)?;
        sync_dir(&self.temporary).map_err(Error::io(&self.temporary))?;
        let parent = parent(target);
        if !target.exists() {
            fs::rename(&self.temporary, target).map_err(Error::io(target))?;
            self.committed = true;
        } else if is_empty(target)? {
            // Filled, not replaced: it may be the working directory of a process.
            move_all(&self.temporary, target)?;
        } else {
            let old = parent.join(format!(".{}.old-{}", self.name, std::process::id()));
            remove_dir(&old).map_err(Error::io(&old))?;
            fs::rename(target, &old).map_err(Error::io(target))?;
            if let Err(cause) = fs::rename(&self.temporary, target) {
                fs::rename(&old, target).map_err(Error::io(&old))?;
                return Err(Error::io(target)(cause));
            }
            self.committed = true;
            sync_dir(parent).map_err(Error::io(parent))?;
            // The output is complete; what cannot be removed now is left for the next command.
            let _ = fs::remove_dir_all(&old);
        }
        sync_dir(parent).map_err(Error::io(parent))
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        if !self.committed {
            // A failure here cannot be reported.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Shares an outcome: the process that failed first keeps its error.
fn agree<T>(comm: &dyn Communicator, outcome: Result<T>) -> Result<T> {
    if comm.size() == 1 {
        return outcome;
    }
    let (told, own) = match outcome {
        Ok(value) => (Ok(value), None),
        Err(error) => (Err(error.to_string()), Some(error)),
    };
    match (comm::agree(comm, OUTPUT, told), own) {
        (Err(CommError::Reported { other, .. }), Some(error)) if other == comm.rank() => Err(error),
        (outcome, _) => Ok(outcome?),
    }
}

/// Moves all of `from` into `to`. The file that makes it a model comes last.
fn move_all(from: &Path, to: &Path) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(from).map_err(Error::io(from))? {
        names.push(entry.map_err(Error::io(from))?.file_name());
    }
    names.sort_by_key(|name| name == CONFIG_FILE);
    for name in names {
        let file = to.join(&name);
        fs::rename(from.join(&name), &file).map_err(Error::io(&file))?;
    }
    sync_dir(to).map_err(Error::io(to))
}

/// Completes the directory `target`, which was empty, if a process was killed while it filled it: the rest is in the temporary
/// directory of that process.
fn finish_fill(target: &Path) -> Result<()> {
    let (Some(name), dir) = (target.file_name().and_then(|name| name.to_str()), parent(target)) else {
        return Ok(());
    };
    if !target.is_dir() || target.join(CONFIG_FILE).exists() || is_empty(target)? {
        return Ok(());
    }
    for left in leftovers(dir).map_err(Error::io(dir))? {
        if left.of == name && !left.is_old && is_rest_of(&left.path, target)? {
            move_all(&left.path, target)?;
            return remove_dir(&left.path).map_err(Error::io(&left.path));
        }
    }
    Ok(())
}

/// Returns whether the temporary directory `rest` holds what is missing in `target`: the manifest, which is written before the first
/// file is moved, names all that is there.
fn is_rest_of(rest: &Path, target: &Path) -> Result<bool> {
    let has_manifest = |dir: &Path| dir.join(MANIFEST_FILE).exists();
    if !rest.join(CONFIG_FILE).is_file() || has_manifest(rest) == has_manifest(target) {
        return Ok(false);
    }
    // One that cannot be read is none of a complete output.
    let manifest = [rest, target].into_iter().find_map(|dir| Manifest::read(dir).ok().flatten());
    manifest.map_or(Ok(false), |manifest| manifest.names_all_of(target))
}

/// Returns whether there is nothing at `path`, or an empty directory.
fn is_empty(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(true),
        Err(cause) => Err(Error::io(path)(cause)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not() {
        let dir = tempfile::tempdir().expect("directory");
        // No process has the largest pid; process 1 is always there.
        let [dead, live] = [u32::MAX, 1].map(|pid| dir.path().join(format!(".out.tmp-{pid}")));
        fs::create_dir(&dead).expect("directory");
        fs::create_dir(&live).expect("directory");
        let out = OutputDir::create(&dir.path().join("out"), false).expect("output");
        assert!(!dead.exists() || !Path::new("/proc/self").exists());
        assert!(live.exists());
        out.commit().expect("commit");
        assert!(dir.path().join("out").is_dir());
    }

    #[test]
    fn a_directory_that_a_killed_process_was_filling_is_completed() {
        let dir = tempfile::tempdir().expect("directory");
        let (rest, target) = (dir.path().join(format!(".out.tmp-{}", u32::MAX)), dir.path().join("out"));
        if !Path::new("/proc/self").exists() {
            return;
        }
        let begin = || {
            fs::create_dir(&rest).expect("directory");
            for name in [CONFIG_FILE, "model.safetensors", "tokenizer.json"] {
                fs::write(rest.join(name), name).expect("file");
            }
            Manifest::write(&rest, &Sums::default()).expect("manifest");
        };
        begin();
        fs::create_dir(&target).expect("directory");
        for name in ["model.safetensors", MANIFEST_FILE] {
            fs::rename(rest.join(name), target.join(name)).expect("file");
        }
        // It is complete, so that it is not empty, and may be replaced.
        let refused = OutputDir::create(&target, false).expect_err("not empty").to_string();
        assert!(refused.contains("is not empty"), "{refused}");
        let manifest = Manifest::read(&target).expect("manifest").expect("manifest");
        assert!(manifest.verify(&target, &mut |_, _| ()).expect("files").holds());
        assert!(!rest.exists());
        drop(OutputDir::create(&target, true).expect("output"));

        // What others put into the directory is theirs.
        fs::remove_dir_all(&target).expect("directory");
        begin();
        fs::create_dir(&target).expect("directory");
        fs::write(target.join("notes.txt"), "mine").expect("file");
        OutputDir::create(&target, true).expect_err("not a model");
        assert_eq!(fs::read_dir(&target).expect("directory").count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn an_output_is_in_place_though_what_it_replaced_cannot_be_removed() {
        use std::os::unix::fs::PermissionsExt;

        let dir = tempfile::tempdir().expect("directory");
        let target = dir.path().join("out");
        let first = OutputDir::create(&target, false).expect("output");
        fs::write(first.path().join(CONFIG_FILE), "first").expect("file");
        fs::create_dir(first.path().join("held")).expect("directory");
        fs::write(first.path().join("held/file"), "").expect("file");
        first.commit().expect("commit");
        // Nobody but the superuser removes a file from this folder.
        let allow = |folder: &Path, mode| fs::set_permissions(folder, fs::Permissions::from_mode(mode));
        allow(&target.join("held"), 0o500).expect("permissions");
        let second = OutputDir::create(&target, true).expect("output");
        fs::write(second.path().join(CONFIG_FILE), "second").expect("file");
        second.commit().expect("commit");
        assert_eq!(fs::read(target.join(CONFIG_FILE)).expect("file"), b"second");
        let old = dir.path().join(format!(".out.old-{}", std::process::id()));
        if old.exists() {
            allow(&old.join("held"), 0o700).expect("permissions");
        }
        drop(OutputDir::create(&target, true).expect("output"));
        assert!(!old.exists() || !Path::new("/proc/self").exists());
    }

    #[cfg(unix)]
    #[test]
    fn an_empty_directory_is_filled_and_not_replaced() {
        use std::os::unix::fs::MetadataExt;

        use crate::files::write_synced;
        let dir = tempfile::tempdir().expect("directory");
        let target = dir.path().join("out");
        fs::create_dir(&target).expect("directory");
        let inode = fs::metadata(&target).expect("metadata").ino();
        let out = OutputDir::create(&target, false).expect("output");
        write_synced(&out.path().join(CONFIG_FILE), b"{}").expect("file");
        out.commit().expect("commit");
        assert_eq!(fs::metadata(&target).expect("metadata").ino(), inode);
        assert_eq!(fs::read(target.join(CONFIG_FILE)).expect("file"), b"{}");
        assert_eq!(
            fs::read_dir(dir.path()).expect("directory").count(),
            1,
            "the temporary directory is left"
        );
    }
}
