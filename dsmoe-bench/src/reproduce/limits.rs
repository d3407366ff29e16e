//! Limits of the numbers of a profile: memory and disk that they ask for, before anything is made.

use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_core::config::Config;
use dsmoe_train::engine::Share;
use dsmoe_train::{TrainConfig, Zero};

use super::profile::Profile;
use crate::format;
use crate::memory;
use crate::training::memory_plan;

/// Memory of the largest machine that a plan may be for.
const LARGEST_MACHINE: u64 = 16 << 40;
/// Memory of a machine that plans are for at least, but for trainings.
const PLANNED_MACHINE: u64 = 256 << 30;
/// Memory of a machine that does not tell.
pub(super) const UNKNOWN_MACHINE: u64 = 64 << 30;
/// Bytes of an item of a probe with its row, both splits and all probes.
const ITEM_BYTES: u64 = 20 << 10;
/// Bytes of a row of the comparison for one seed.
const JOB_BYTES: u64 = 4 << 10;
/// Bytes of a window's losses.
const WINDOW_BYTES: u64 = 64;
/// Bytes of a merge and its pair while a tokenizer is trained.
const TOKEN_BYTES: u64 = 1 << 10;
/// Sources of a profile that names none.
const SOURCES: u64 = 4;
const MOST_THREADS: usize = 1024;
const MOST_SEEDS: u64 = 1024;
const MOST_ROWS: u64 = 1 << 13;
/// Most entries of a list: no report shows as many.
const MOST_LISTED: usize = 1000;
/// Milestones that a training may have however short it is: `--tokens` shortens those of a profile.
const FEW_MILESTONES: u64 = 100;
/// Most bootstrap resamples: beyond it intervals do not change any more.
pub(super) const MOST_RESAMPLES: usize = 1_000_000;

/// The memory and disk that a reproduction may use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    /// All memory.
    memory: u64,
    /// Memory that a training may take.
    training: u64,
    /// Free disk in the output directory.
    disk: Option<u64>,
}

impl Machine {
    /// Returns this machine, on whose disk `out` is or will be.
    pub(super) fn here(out: &Path) -> Machine {
        let memory = memory::total().unwrap_or(UNKNOWN_MACHINE);
        Machine { memory, training: memory, disk: memory::free_disk(out) }
    }

    /// Returns this machine for plans, which may be those of trainings on a larger one.
    pub(super) fn of_plans(out: &Path) -> Machine {
        let here = Machine::here(out);
        Machine { memory: here.memory.max(PLANNED_MACHINE), training: LARGEST_MACHINE, ..here }
    }
}

/// Refuses a number that asks for more than a part of the memory.
fn fits(name: &str, value: u64, each: u64, memory: u64) -> Result<()> {
    let most = memory / each.max(1);
    if value > most {
        let needed = value as f64 * each as f64;
        let [needed, memory] = [needed, memory as f64].map(|bytes| format::bytes(bytes as u64));
        bail!("{name} is {value}, which takes {needed} of memory; use at most {most}, for {memory}");
    }
    Ok(())
}

/// Checks the lengths of lists, before anything is made of their entries.
pub(super) fn check_lists(profile: &Profile) -> Result<()> {
    let measure = &profile.measure;
    let grid = measure.speed.as_ref();
    for (name, entries) in [
        ("budgets", profile.budgets.len()),
        ("outputs", profile.outputs.len()),
        ("source", profile.source.len()),
        ("held_out", profile.held_out.len()),
        ("milestones", profile.milestones.len()),
        ("curve", profile.curve.len()),
        ("measure.thresholds", measure.thresholds.len()),
        ("measure.tasks", measure.tasks.len()),
        ("measure.speed.threads", grid.map_or(0, |grid| grid.threads.len())),
        ("measure.speed.batches", grid.map_or(0, |grid| grid.batches.len())),
    ] {
        if entries > MOST_LISTED {
            bail!("{name} has {entries} entries; use at most {MOST_LISTED}");
        }
    }
    Ok(())
}

/// Checks the number of rows of a profile to which its budgets are not applied yet.
pub(super) fn check_rows(profile: &Profile) -> Result<()> {
    let (methods, budgets) = (profile.method.len(), profile.budgets.len().max(1));
    if (methods as u64).saturating_mul(budgets as u64) > MOST_ROWS {
        bail!("{methods} methods at {budgets} budgets are too many; use at most {MOST_ROWS} rows in all");
    }
    Ok(())
}

/// Checks the number of seeds, before rows are listed for each.
pub(super) fn check_seeds(profile: &Profile) -> Result<()> {
    if profile.seeds > MOST_SEEDS {
        bail!("seeds is {}; use at most {MOST_SEEDS}", profile.seeds);
    }
    let rows = profile.method.len();
    if rows as u64 * profile.seeds > MOST_ROWS {
        bail!("{rows} methods of {} seeds are too many; use at most {MOST_ROWS} in all", profile.seeds);
    }
    Ok(())
}

/// Refuses numbers of experts that do not divide the FFNs of `dense`.
fn check_experts(profile: &Profile, dense: &Config) -> Result<()> {
    let Some(all) = profile.experts else { return Ok(()) };
    let of_rows = profile.method.iter().map(|spec| profile.experts_of(spec)).collect::<Result<Vec<_>>>()?;
    for experts in of_rows.into_iter().flatten().chain([all]) {
        let odd = dense.layers().map(|layer| layer.intermediate).find(|width| !width.is_multiple_of(experts));
        if let Some(width) = odd {
            bail!(
                "experts is {experts}, which does not divide the {width} neurons of an FFN of the model; change it in \
                 a copy of the profile (--print-profile {})",
                profile.name
            );
        }
    }
    Ok(())
}

/// Checks every size of `profile`, whose dense model is `dense`.
pub(super) fn check(profile: &Profile, dense: &Config, machine: Machine) -> Result<()> {
    // Profiles of experiments come here alone.
    check_lists(profile)?;
    check_seeds(profile)?;
    check_experts(profile, dense)?;
    let Machine { memory, training, disk } = machine;
    let train = profile.train()?.resolve()?;
    let (seq, measure) = (train.seq as u64, &profile.measure);
    let layers = dense.num_layers as u64;
    // Hidden states of a layer, in and out, of the dense and of the changed model; FFNs take a part of the tokens at a time.
    let stream = 4 * 4 * dense.hidden as u64;
    let state = 2 * stream + 4 * 3 * dense.intermediate as u64;
    let cache = 8 * layers * dense.hidden as u64;
    let sources = (profile.held_out.len().max(profile.source.len()) as u64).max(SOURCES);
    let window = sources * (4 * (seq + 1) + WINDOW_BYTES);
    // A quarter for each: several are held at a time.
    let part = memory / 4;
    let rows = profile.method.len() as u64;
    for (name, value, each) in [
        ("seeds", profile.seeds, rows * JOB_BYTES),
        ("calibration.samples", profile.calibration.samples as u64, seq * (4 + stream)),
        ("measure.windows", measure.windows as u64, window),
        ("measure.sweep_windows", measure.sweep_windows as u64, window),
        ("measure.agreement_windows", measure.agreement_windows as u64, window),
        ("measure.items", measure.items as u64, ITEM_BYTES),
        ("measure.resamples", measure.resamples as u64, 8),
        ("measure.prefill", measure.prefill as u64, state + cache),
        ("measure.decode", measure.decode as u64, cache),
    ] {
        fits(name, value, each, part)?;
    }
    if let Some(grid) = &measure.speed {
        let most = |list: &[usize]| list.iter().copied().max().unwrap_or(0);
        let texts = most(&grid.batches) as u64;
        fits("measure.speed.batches", texts, (cache * measure.decode as u64).max(state), part)?;
        for (name, value) in
            [("measure.speed.threads", most(&grid.threads)), ("measure.speed.processes", grid.processes)]
        {
            if value > MOST_THREADS {
                bail!("{name} is {value}; use at most {MOST_THREADS}");
            }
        }
    }
    if let Some(world) = &profile.world {
        fits("world.vocab", world.vocab as u64, TOKEN_BYTES, part)?;
        // Ids take as much memory as text does, and the disk holds the text.
        fits("world.bytes", world.bytes, 1, memory / 2)?;
        if let Some(free) = disk.filter(|free| world.bytes > free / 2) {
            let [asked, free] = [world.bytes, free].map(format::bytes);
            bail!("world.bytes is {asked} and the disk has {free} free; use at most half of that");
        }
    }
    check_trainings(profile, dense, training)
}

/// Checks that every training fits.
fn check_trainings(profile: &Profile, dense: &Config, memory: u64) -> Result<()> {
    let fits = |what: &str, config: &TrainConfig| -> Result<()> {
        let share =
            Share { processes: 1, lanes: config.lanes(), accumulate: config.accumulate, zero: Zero::Moments };
        let uses = memory_plan(dense, config, 0, (share, false));
        let needed = uses.iter().fold(0u64, |sum, one| sum.saturating_add(one.bytes));
        memory::check(what, needed, Some(memory), "use a smaller batch, seq or model")
    };
    if let Some(config) = profile.pretrain() {
        fits("[pretrain]", &config?.resolve()?)?;
    }
    fits("[train]", &profile.train()?.resolve()?)?;
    for spec in &profile.method {
        let of = || format!("method {:?}", spec.name);
        let config = profile.train_of(spec, 0, None)?.resolve().with_context(of)?;
        fits(&of(), &config)?;
        let (stones, steps) = (profile.milestones_of(spec).len() as u64, config.steps.unwrap_or(0));
        let most = steps.saturating_add(1).max(FEW_MILESTONES);
        if stones > most {
            bail!("{}: milestones and curve have {stones} shares of {steps} steps; use at most {most}", of());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(change: impl FnOnce(&mut Profile), machine: Machine) -> Result<()> {
        let mut profile = Profile::load("quick").unwrap();
        change(&mut profile);
        let dense = profile.architecture(1536).unwrap();
        check(&profile, &dense, machine)
    }

    fn machine() -> Machine {
        Machine { memory: 8 << 30, training: 8 << 30, disk: Some(8 << 30) }
    }

    #[test]
    fn every_number_of_a_profile_has_a_limit() {
        checked(|_| (), machine()).unwrap();
        let huge = 1_000_000_000_000usize;
        type Edit = Box<dyn Fn(&mut Profile)>;
        let cases: Vec<(&str, Edit)> = vec![
            ("seeds", Box::new(move |p| p.seeds = huge as u64)),
            ("calibration.samples", Box::new(move |p| p.calibration.samples = huge)),
            ("measure.windows", Box::new(move |p| p.measure.windows = huge)),
            ("measure.sweep_windows", Box::new(move |p| p.measure.sweep_windows = huge)),
            ("measure.agreement_windows", Box::new(move |p| p.measure.agreement_windows = huge)),
            ("measure.items", Box::new(move |p| p.measure.items = huge)),
            ("measure.resamples", Box::new(move |p| p.measure.resamples = huge)),
            ("measure.prefill", Box::new(move |p| p.measure.prefill = huge)),
            ("measure.decode", Box::new(move |p| p.measure.decode = huge)),
            ("world.bytes", Box::new(move |p| p.world.as_mut().unwrap().bytes = huge as u64)),
            ("world.vocab", Box::new(move |p| p.world.as_mut().unwrap().vocab = huge)),
        ];
        for (name, edit) in cases {
            let error = checked(&*edit, machine()).unwrap_err().to_string();
            assert!(error.starts_with(name) && error.contains("use at most"), "{name}: {error}");
            // The greatest numbers do not overflow.
            let error = checked(
                |profile| {
                    profile.measure.windows = usize::MAX;
                    edit(profile);
                },
                machine(),
            );
            assert!(error.is_err(), "{name}");
        }
    }

    #[test]
    fn lists_and_rows_have_limits() {
        let profile = Profile::load("quick").unwrap();
        let methods = profile.method.len();
        let shares = |count: usize| (1..=count).map(|i| i as f64 / count as f64).collect::<Vec<_>>();
        type List = fn(&mut Profile) -> &mut Vec<f64>;
        let lists: [(&str, List); 4] = [
            ("budgets", |profile| &mut profile.budgets),
            ("milestones", |profile| &mut profile.milestones),
            ("curve", |profile| &mut profile.curve),
            ("measure.thresholds", |profile| &mut profile.measure.thresholds),
        ];
        for (name, list) in lists {
            let mut changed = profile.clone();
            *list(&mut changed) = shares(MOST_LISTED);
            check_lists(&changed).unwrap();
            *list(&mut changed) = shares(MOST_LISTED + 1);
            let error = check_lists(&changed).unwrap_err().to_string();
            assert_eq!(error, format!("{name} has 1001 entries; use at most 1000"));
        }
        let most = MOST_ROWS as usize / methods;
        let at = |budgets| check_rows(&Profile { budgets: shares(budgets), ..profile.clone() });
        at(most).unwrap();
        let error = at(most + 1).unwrap_err().to_string();
        assert!(error.contains("budgets are too many; use at most 8192 rows"), "{error}");
        let error = checked(|profile| profile.seeds = 2000, machine()).unwrap_err().to_string();
        assert_eq!(error, "seeds is 2000; use at most 1024");
        // The shortest training of the profile has 110 steps.
        checked(|profile| profile.milestones = shares(90), machine()).unwrap();
        let error = checked(|profile| profile.milestones = shares(500), machine()).unwrap_err().to_string();
        assert!(error.contains("shares of 110 steps; use at most 111"), "{error}");
    }

    #[test]
    fn experts_divide_the_ffns_of_the_model() {
        let error = checked(|profile| profile.experts = Some(7), machine()).unwrap_err().to_string();
        assert!(error.contains("experts is 7, which does not divide"), "{error}");
        assert!(error.contains("--print-profile quick"), "{error}");
    }

    #[test]
    fn text_fits_the_disk_and_trainings_fit_the_memory() {
        let bytes = |bytes| move |profile: &mut Profile| profile.world.as_mut().unwrap().bytes = bytes;
        let full = Machine { disk: Some(1 << 20), ..machine() };
        let error = checked(bytes(6_000_000), full).unwrap_err().to_string();
        assert!(error.contains("world.bytes") && error.contains("free"), "{error}");
        checked(bytes(6_000_000), Machine { disk: None, ..machine() }).unwrap();
        let small = Machine { training: 1 << 20, ..machine() };
        let error = checked(|_| (), small).unwrap_err().to_string();
        assert!(error.starts_with("[pretrain] needs") && error.contains("smaller batch"), "{error}");
    }
}
