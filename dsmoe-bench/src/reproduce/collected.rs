//! The files of a reproduction, read from one directory or from those of its parts.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};

use super::records::{BASE, RUNS, Run, SETUP, TIMINGS, Timing};
use super::setup::Setup;
use super::sound;
use crate::files::read_part;

/// All files of a reproduction.
pub(crate) struct Collected {
    pub(crate) setup: Setup,
    pub(crate) base: Run,
    /// In the order of the setup.
    pub(crate) runs: Vec<Run>,
    pub(crate) timings: BTreeMap<String, Timing>,
}

impl Collected {
    /// Reads the files of one reproduction, or of its parts. Parts share everything but their runs, which may be those of
    /// other methods, so that a table can grow by a row at a time.
    pub(crate) fn read(dirs: &[PathBuf]) -> Result<Collected> {
        let mut setup: Setup = read_part(&dirs[0].join(SETUP))?;
        for dir in &dirs[1..] {
            let mut other: Setup = read_part(&dir.join(SETUP))?;
            setup.add_runs(std::mem::take(&mut other.runs));
            other.runs.clone_from(&setup.runs);
            if other != setup {
                let (first, dir) = (dirs[0].display(), dir.display());
                bail!("{first} and {dir} are not parts of one reproduction: their {SETUP} differ");
            }
        }
        setup.check(&dirs[0].join(SETUP))?;
        let find = |id: &str| -> Result<Option<Run>> {
            let mut found: Option<(Run, &PathBuf)> = None;
            for dir in dirs {
                let path = dir.join(RUNS).join(format!("{id}.json"));
                if !path.is_file() {
                    continue;
                }
                let run: Run = read_part(&path)?;
                sound::check(&path, &run)?;
                sound::check_run(&path, id, &run)?;
                // Results may differ all the same: the last bits of a stage depend on the machine.
                match &found {
                    Some((other, place)) if other.key != run.key => {
                        let (place, dir) = (place.display(), dir.display());
                        bail!("{id}: {place} and {dir} have it with different settings")
                    }
                    Some(_) => {}
                    None => found = Some((run, dir)),
                }
            }
            Ok(found.map(|(run, _)| run))
        };
        let Some(base) = find(BASE)? else {
            bail!("{}: {RUNS}/{BASE}.json is missing; run the reproduction to its end", dirs[0].display());
        };
        let (mut runs, mut missing) = (Vec::new(), Vec::new());
        for id in &setup.runs {
            match find(id)? {
                Some(run) => runs.push(run),
                None => missing.push(id.as_str()),
            }
        }
        if !missing.is_empty() {
            bail!("not all parts are there: {} missing ({})", missing.len(), missing.join(", "));
        }
        let mut timings = BTreeMap::new();
        for id in setup.runs.iter().map(String::as_str).chain([BASE]) {
            for dir in dirs {
                let path = dir.join(TIMINGS).join(format!("{id}.json"));
                if path.is_file() {
                    let timing: Timing = read_part(&path)?;
                    sound::check(&path, &timing)?;
                    timings.entry(id.to_owned()).or_insert(timing);
                }
            }
        }
        Ok(Collected { setup, base, runs, timings })
    }
}
