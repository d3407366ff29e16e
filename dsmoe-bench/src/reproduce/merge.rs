//! `dsmoe reproduce merge`: combines the parts of a reproduction, or of a set of experiments.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;

use super::collected::Collected;
use super::publish::finish;
use super::records::{BASE, RUNS, SETUP, TIMINGS};
use super::related;
use crate::files::{check_folder, make_folder, write_part};
use crate::ui::Ui;

/// Merges the parts in `parts` into `out`.
pub(crate) fn run(parts: &[PathBuf], out: &Path, force: bool, ui: &mut Ui) -> Result<()> {
    if related::has_experiments(&parts[0])? {
        return related::merge(parts, out, force, ui);
    }
    let started = Instant::now();
    let remedy = "choose another --out, or pass --force";
    check_folder(out, force, remedy)?;
    let collected = Collected::read(parts)?;
    make_folder(out, force, remedy)?;
    write_part(&out.join(SETUP), &collected.setup)?;
    let runs = collected.setup.runs.iter().map(String::as_str).zip(&collected.runs);
    for (id, run) in runs.chain([(BASE, &collected.base)]) {
        write_part(&out.join(RUNS).join(format!("{id}.json")), run)?;
    }
    for (id, timing) in &collected.timings {
        write_part(&out.join(TIMINGS).join(format!("{id}.json")), timing)?;
    }
    finish(&collected, out, started.elapsed().as_secs_f64(), ui)
}
