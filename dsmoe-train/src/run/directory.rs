//! The directory of a run: whether it may be used, and the checkpoint that a run resumes from.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::Model;
use dsmoe_core::checkpoint::MANIFEST_FILE;
use dsmoe_core::masks::MASKS_FILE;
use dsmoe_datasets::files::is_temporary;
use dsmoe_kernels::comm::{Communicator, What};

use super::options::RunOptions;
use crate::checkpoint::{self, State};
use crate::error::{Error, Result};
use crate::files;
use crate::metrics::METRICS_FILE;
use crate::optim::AdamW;
use crate::ranks::{SEEN_FILE, agree, by_first, from_first};

pub(super) const CONFIG_FILE: &str = "run.toml";
pub(super) const CHECKPOINTS: &str = "checkpoints";
pub(super) const FINAL_TEMPORARY: &str = ".final.tmp";
pub(super) const STOP_FILE: &str = "stop";

pub(super) fn remove_stop_file(out: &Path) -> Result<()> {
    let path = out.join(STOP_FILE);
    match fs::remove_file(&path) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&path)(cause)),
        _ => Ok(()),
    }
}

/// Returns whether a process that was killed while it wrote a file may have left one of this name.
fn is_left_by_a_write(name: &str) -> bool {
    // Older versions gave random names.
    let random = name.strip_prefix(".tmp");
    let is_random =
        random.is_some_and(|rest| rest.len() == 6 && rest.bytes().all(|b| b.is_ascii_alphanumeric()));
    is_random || is_temporary(name) || name == SEEN_FILE
}

fn remove_files(out: &Path, names: &[String]) -> Result<()> {
    let mut paths = names.iter().map(|name| out.join(name)).filter(|path| path.is_file());
    paths.try_for_each(|path| fs::remove_file(&path).map_err(Error::io(&path)))
}

/// The names in a run directory: what an interrupted write left, and all others.
struct Names {
    left: Vec<String>,
    names: Vec<String>,
}

/// Returns whether a run makes a file or a folder of this name.
fn ours(name: &str) -> bool {
    [METRICS_FILE, CHECKPOINTS, FINAL_TEMPORARY, STOP_FILE].contains(&name) || name.starts_with(CONFIG_FILE)
}

/// Checks that a run may use the directory of its output, without changing anything.
///
/// # Errors
/// The directory is not empty, holds no run, holds the model to train, or cannot be read.
pub fn check_out(options: &RunOptions) -> Result<()> {
    names_of_usable(options).map(drop)
}

fn names_of_usable(options: &RunOptions) -> Result<Names> {
    let out = &options.out;
    if out.is_file() {
        return Err(Error::OutIsFile(out.clone()));
    }
    let (left, names): (Vec<String>, Vec<String>) =
        files::names(out)?.into_iter().partition(|name| is_left_by_a_write(name));
    if options.resume {
        let is_run = names.is_empty() || names.iter().any(|name| ours(name));
        return if is_run { Ok(Names { left, names }) } else { Err(Error::NotARun(out.clone())) };
    }
    if !names.is_empty() && !options.force {
        return Err(Error::OutNotEmpty(out.clone()));
    }
    if let (Ok(source), Ok(inside)) = (options.source.canonicalize(), out.canonicalize())
        && source.starts_with(inside)
    {
        return Err(Error::OutHoldsSource(out.clone()));
    }
    if !names.is_empty() && !names.iter().any(|name| ours(name) || name == "config.json") {
        return Err(Error::NotARun(out.clone()));
    }
    Ok(Names { left, names })
}

/// Checks that the run directory may be used, and locks it.
pub(super) fn prepare_directory(options: &RunOptions) -> Result<Option<fs::File>> {
    let out = &options.out;
    let Names { left, names } = names_of_usable(options)?;
    if options.resume {
        let held = files::lock_dir(out)?;
        remove_stop_file(out)?;
        remove_files(out, &left)?;
        return Ok(held);
    }
    let starts = ["tokenizer", "chat_template.", "events.out.tfevents."];
    let model_file = |name: &str| {
        let names =
            ["config.json", MASKS_FILE, MANIFEST_FILE, "generation_config.json", "special_tokens_map.json"];
        names.contains(&name)
            || starts.iter().any(|start| name.starts_with(start))
            || name.starts_with("model")
                && [".safetensors", ".index.json"].iter().any(|end| name.ends_with(end))
    };
    let held = files::lock_dir(out)?;
    remove_files(out, &left)?;
    for name in names.iter().filter(|name| ours(name) || model_file(name)) {
        let path = out.join(name);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Error::io(&path))?;
    }
    Ok(held)
}

/// Loads the newest complete checkpoint and sets `state` to it. Returns `model` when there is none yet. Checkpoints
/// that a process cannot read are skipped by all, with a note.
pub(super) fn load_newest(
    options: &RunOptions,
    model: Model,
    state: &mut State,
    wished_warmup: Option<u64>,
    notes: &mut Vec<String>,
) -> Result<(Model, Option<AdamW>)> {
    let (out, comm) = (&options.out, &*options.comm);
    let of = What::of("a checkpoint");
    let (layout, masks, outline) = (model.layout().clone(), model.masks().cloned(), model.is_outline());
    let layers = model.config().num_layers;
    let mut start = Some(model);
    let mut newest_error = None;
    for path in checkpoints_of_first(comm, &out.join(CHECKPOINTS))? {
        let checked = checkpoint::check_files(&path, comm);
        let read = checked.and_then(|has| Ok((has, agree(comm, of, checkpoint::read_state(&path))?)));
        let loaded = match read {
            Ok((has_manifest, saved)) => {
                if !has_manifest {
                    let note = "has no checksums.json: its files are not checked for damage";
                    notes.push(format!("{} {note}", path.display()));
                }
                let mut now = state.clone();
                now.config.warmup_steps = wished_warmup.or(saved.config.warmup_steps);
                agree(comm, of, saved.check(&path, &now))?;
                agree(comm, of, saved.check_layers(&path, layers))?;
                // Two models at once may be more than the memory holds.
                start = None;
                agree(comm, of, checkpoint::load(&path, &layout, masks.as_ref(), outline, comm))
                    .map(|(model, optimizer)| (saved, now.config, model, optimizer))
            }
            Err(error) => Err(error),
        };
        match loaded {
            Ok((saved, config, model, optimizer)) => {
                let (then, steps) = (saved.config.steps.unwrap_or(0), config.steps.unwrap_or(0));
                notes.push(format!("resumed from {} at step {} of {steps}", path.display(), saved.step));
                if then != steps {
                    let note = "the learning rate follows the new end";
                    notes.push(format!("steps was {then} and is now {steps}: {note}"));
                }
                *state = State { config, ..saved };
                return Ok((model, Some(optimizer)));
            }
            Err(error) => {
                notes.push(format!("skipped a broken checkpoint: {error}"));
                newest_error.get_or_insert(error);
            }
        }
    }
    match (newest_error, start) {
        (None, Some(model)) => {
            notes.push(format!("{} has no checkpoint yet; starting from step 0", out.display()));
            Ok((model, None))
        }
        (error, _) => Err(error.unwrap_or(Error::NotARun(out.to_path_buf()))),
    }
}

/// Lists the checkpoints that the first process sees in `dir`, newest first: what others see may be older. One whose replacement
/// was cut short has its place again.
pub(super) fn checkpoints_of_first(comm: &dyn Communicator, dir: &Path) -> Result<Vec<PathBuf>> {
    let of = What::of("the list of checkpoints");
    let listed = by_first(comm, of, || checkpoint::put_back(dir).and_then(|()| checkpoint::list(dir)));
    let listed = listed?.unwrap_or_default();
    let steps: Vec<String> = listed.iter().map(|(step, _)| step.to_string()).collect();
    let steps = from_first(comm, of, &steps.join(" "))?;
    let steps = steps.split_whitespace().filter_map(|step| step.parse().ok());
    Ok(steps.map(|step| checkpoint::path_of(dir, step)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_write_left_is_no_part_of_a_run() {
        for name in [".run.toml.tmp-4711", ".metrics.jsonl.1.tmp-4711", ".tmpAb12Cd", SEEN_FILE] {
            assert!(is_left_by_a_write(name), "{name}");
        }
        for name in [CONFIG_FILE, FINAL_TEMPORARY, ".tmp", ".tmpAb12Cde", "run.tmp-4711"] {
            assert!(!is_left_by_a_write(name), "{name}");
        }
    }
}
