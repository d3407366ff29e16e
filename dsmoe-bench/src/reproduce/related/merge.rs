//! Experiments of one profile that several processes ran, as one set.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value as Json;

use super::super::records::{FORMAT_VERSION, RUNS, SETUP};
use super::outcome::{Found, Outcome, Setup};
use super::{ALL, Experiment, Run, finish};
use crate::files::{make_folder, read_part, write_part};
use crate::ui::Ui;

/// Reports whether the results in `dir` are those of experiments.
pub(crate) fn has_experiments(dir: &Path) -> Result<bool> {
    let setup: Json = read_part(&dir.join(SETUP))?;
    Ok(setup["profile"].get("experiments").is_some())
}

/// Merges the experiments in `parts` into `out`. All numbers are those of `runs/`; verdicts and reasons are made anew.
pub(crate) fn merge(parts: &[PathBuf], out: &Path, force: bool, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let (setup, wanted) = common(parts)?;
    let mut experiments = Vec::new();
    let mut runs = Vec::new();
    for experiment in wanted {
        let of_seeds = (0..setup.profile.seeds).map(|seed| find(parts, experiment.name, seed));
        let of_seeds = of_seeds.collect::<Result<Vec<Run>>>()?;
        let values: Vec<_> = of_seeds.iter().map(|run| run.values.clone()).collect();
        experiments.push(Found::recorded(experiment, &values)?);
        runs.extend(of_seeds);
    }
    make_folder(out, force, "choose another --out, or pass --force")?;
    for run in &runs {
        write_part(&out.join(RUNS).join(run.file()), run)?;
    }
    write_part(&out.join(SETUP), &setup)?;
    let outcome = Outcome { format_version: FORMAT_VERSION, setup, experiments };
    finish(&outcome, out, started.elapsed().as_secs_f64(), ui)
}

/// Returns the setup of all parts, which differ in their experiments alone, and the experiments of all.
fn common(parts: &[PathBuf]) -> Result<(Setup, Vec<&'static Experiment>)> {
    let mut setup: Setup = read_part(&parts[0].join(SETUP))?;
    if setup.profile.seeds == 0 {
        bail!("{}: seeds is 0; run the experiments again", parts[0].join(SETUP).display());
    }
    let mut names = std::mem::take(&mut setup.profile.experiments);
    for part in &parts[1..] {
        let mut other: Setup = read_part(&part.join(SETUP))?;
        names.append(&mut other.profile.experiments);
        if other != setup {
            let (first, part) = (parts[0].display(), part.display());
            bail!(
                "{first} and {part} are not parts of one set of experiments: their {SETUP} differ in more than the experiments"
            );
        }
    }
    let wanted: Vec<&Experiment> =
        ALL.iter().filter(|one| names.iter().any(|name| name == one.name)).collect();
    if let Some(unknown) = names.iter().find(|name| !wanted.iter().any(|one| one.name == **name)) {
        bail!("{}: there is no experiment {unknown:?} in this program", parts[0].join(SETUP).display());
    }
    setup.profile.experiments = wanted.iter().map(|one| one.name.to_owned()).collect();
    Ok((setup, wanted))
}

/// Returns the numbers of an experiment and seed from the parts that have them.
fn find(parts: &[PathBuf], name: &str, seed: u64) -> Result<Run> {
    let mut found: Option<(Run, &PathBuf)> = None;
    for part in parts {
        let path = part.join(RUNS).join(format!("{name}-s{seed}.json"));
        if !path.is_file() {
            continue;
        }
        let run: Run = read_part(&path)?;
        if run.experiment != name || run.seed != seed {
            bail!("{}: it has {} of seed {}; name it after them", path.display(), run.experiment, run.seed);
        }
        match &found {
            Some((other, place)) if other.values != run.values => {
                let (place, part) = (place.display(), part.display());
                bail!("{name} of seed {seed}: {place} and {part} have other numbers; leave one out");
            }
            Some(_) => {}
            None => found = Some((run, part)),
        }
    }
    let place = || format!("{RUNS}/{name}-s{seed}.json is in no part; run the experiment to its end");
    Ok(found.with_context(place)?.0)
}
