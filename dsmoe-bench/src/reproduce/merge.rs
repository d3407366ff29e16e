//! `dsmoe reproduce merge`: combines the parts of a reproduction.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::cache::write_json;
use super::collected::Collected;
use super::publish::finish;
use super::records::{BASE, RUNS, SETUP, TIMINGS};

use crate::ui::Ui;

/// Merges the parts in `parts` into `out`.
pub(crate) fn run(parts: &[PathBuf], out: &Path, force: bool, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let mut entries = std::fs::read_dir(out).with_context(|| out.display().to_string())?;
    if entries.next().is_some() && !force {
        bail!("{} is not empty; choose another --out, or pass --force", out.display());
    }
    let collected = Collected::read(parts)?;
    write_json(&out.join(SETUP), &collected.setup)?;
    for (id, run) in
        collected.setup.runs.iter().map(String::as_str).zip(&collected.runs).chain([(BASE, &collected.base)])
    {
        write_json(&out.join(RUNS).join(format!("{id}.json")), run)?;
    }
    for (id, timing) in &collected.timings {
        write_json(&out.join(TIMINGS).join(format!("{id}.json")), timing)?;
    }
    finish(&collected, out, started.elapsed().as_secs_f64(), ui)
}
