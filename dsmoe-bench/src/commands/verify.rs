//! `dsmoe verify`: compares files with the hashes that were written with them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use dsmoe_core::checkpoint::{CONFIG_FILE, MANIFEST_FILE, Manifest};
use dsmoe_datasets::manifest::{self, MANIFEST};
use dsmoe_datasets::token_cache::TokenFile;
use serde::Serialize;

use crate::cli::verify::Verify;
use crate::files::lossy;
use crate::format;
use crate::progress::{Progress, Unit};
use crate::reproduce::RESULT;
use crate::ui::Ui;

/// The exit status for a file that is not what was written.
const OUT_OF_TOLERANCE: u8 = 3;
/// The ending of a token cache, and of a file of a teacher cache.
const CACHES: [&str; 2] = ["tokens", "rows"];

/// A directory with a manifest, or a file with hashes of its own.
#[derive(Debug, Serialize)]
struct Checked {
    #[serde(serialize_with = "lossy")]
    path: PathBuf,
    /// Files that are what was written.
    good: usize,
    missing: Vec<String>,
    changed: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct Report {
    holds: bool,
    checked: Vec<Checked>,
    /// Models without a manifest.
    unchecked: Vec<String>,
}

pub(crate) fn run(args: &Verify, ui: &mut Ui) -> Result<ExitCode> {
    let mut report = Report::default();
    for path in &args.paths {
        let before = report.checked.len() + report.unchecked.len();
        for place in places(path)? {
            check(&place, &mut report, ui)?;
        }
        if report.checked.len() + report.unchecked.len() == before {
            let what = format!("there is no {MANIFEST_FILE}, no {MANIFEST} and no cache in it");
            bail!("{}: {what}; name a model, a run, a checkpoint or a cache of dsmoe", path.display());
        }
    }
    report.holds = report.checked.iter().all(|one| one.missing.is_empty() && one.changed.is_empty());
    ui.result(&report, show)?;
    Ok(if report.holds { ExitCode::SUCCESS } else { ExitCode::from(OUT_OF_TOLERANCE) })
}

/// Lists `path` and, if it is a folder, all folders and cache files in it. Links to folders are not followed.
fn places(path: &Path) -> Result<Vec<PathBuf>> {
    let read = |path: &Path| -> Result<Vec<PathBuf>> {
        let at = || path.display().to_string();
        let mut inside = Vec::new();
        for entry in path.read_dir().with_context(at)? {
            let entry = entry.with_context(at)?;
            let kind = entry.file_type().with_context(at)?;
            if kind.is_dir() || is_cache(&entry.path()) {
                inside.push(entry.path());
            }
        }
        inside.sort();
        Ok(inside)
    };
    let kind = path.metadata().with_context(|| path.display().to_string())?;
    let (mut found, mut left) = (Vec::new(), vec![path.to_path_buf()]);
    while let Some(place) = left.pop() {
        if kind.is_dir() && place.is_dir() {
            left.extend(read(&place)?.into_iter().rev());
        }
        found.push(place);
    }
    Ok(found)
}

fn is_cache(path: &Path) -> bool {
    path.extension().is_some_and(|end| CACHES.iter().any(|cache| end == *cache))
}

fn check(place: &Path, report: &mut Report, ui: &mut Ui) -> Result<()> {
    let title = format!("hashing {}", place.display());
    if place.is_file() {
        let whole = Progress::during(ui, title, Unit::Bytes, |_| file_is_whole(place))?;
        let changed = if whole { Vec::new() } else { vec![name_of(place)] };
        let path = place.to_path_buf();
        report.checked.push(Checked { path, good: usize::from(whole), missing: Vec::new(), changed });
        return Ok(());
    }
    if let Some(lost) = [MANIFEST_FILE, MANIFEST].into_iter().find(|name| leads_nowhere(&place.join(name))) {
        let path = place.to_path_buf();
        report.checked.push(Checked { path, good: 0, missing: Vec::new(), changed: vec![lost.to_owned()] });
    } else if let Some(manifest) = Manifest::read(place)? {
        let found = Progress::during(ui, title, Unit::Bytes, |show| manifest.verify(place, show))?;
        let (path, good) = (place.to_path_buf(), found.good);
        let missing = found.missing.into_iter().filter(|name| !may_be_gone(place, name)).collect();
        report.checked.push(Checked { path, good, missing, changed: found.changed });
    } else if place.join(MANIFEST).is_file() {
        let found = Progress::during(ui, title, Unit::Bytes, |show| manifest::verify(place, show))?;
        let (path, good) = (place.to_path_buf(), found.good);
        report.checked.push(Checked { path, good, missing: found.missing, changed: found.changed });
    } else if place.join(CONFIG_FILE).is_file() {
        report.unchecked.push(place.display().to_string());
    }
    Ok(())
}

/// Tells whether `path` is a link to a file that is not there, or to itself. A manifest behind such a link was there once.
fn leads_nowhere(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok() && fs::metadata(path).is_err()
}

/// Tells whether a stage of a reproduction does without a file once it is done: checkpoints of its training, and weights of a model
/// that was discarded when it had been measured.
fn may_be_gone(place: &Path, name: &str) -> bool {
    let is_stage = |path: &Path| path.join(RESULT).is_file();
    let of_stage = is_stage(place) || place.parent().is_some_and(is_stage);
    of_stage && (name.split('/').any(|part| part == "checkpoints") || name.ends_with(".safetensors"))
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Returns whether a file with hashes of its own is whole.
fn file_is_whole(path: &Path) -> Result<bool> {
    if path.extension().is_some_and(|end| end == CACHES[0]) {
        return match TokenFile::open(path) {
            Ok(_) => Ok(true),
            Err(dsmoe_datasets::Error::Cache { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        };
    }
    dsmoe_train::is_whole(path).with_context(|| path.display().to_string())
}

fn show(report: &Report) -> String {
    let mut out = String::new();
    for Checked { path, good, missing, changed } in &report.checked {
        let place = path.display();
        for (what, names) in [("missing", missing), ("changed", changed)] {
            out.extend(names.iter().map(|name| format!("{place}: {what}: {name}\n")));
        }
        let holds = missing.is_empty() && changed.is_empty();
        let state = if holds { "as it was written" } else { "DAMAGED or edited" };
        out += &format!("{place}: {state}; {} files good\n", format::count(*good as u64));
    }
    for place in &report.unchecked {
        out += &format!("{place}: not checked; it has no {MANIFEST_FILE}\n");
    }
    out
}
