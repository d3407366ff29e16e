//! `dsmoe reproduce`: the paper's comparison, from text to report.
//!
//! A profile of experiments on other papers goes to [`related`]. Any other [`profile::Profile`] defines the models. [`stages`] computes them, one stage after the other, and writes a
//! [`records::Run`] for each. [`analysis`] turns runs into [`results::Results`], and [`chapters`] turns these into a
//! report.

mod analysis;
mod cache;
mod chapters;
mod collected;
mod cost;
mod directions;
mod frontier;
mod inputs;
mod jobs;
mod limits;
pub(crate) mod measure;
mod measuring;
pub(crate) mod merge;
pub(crate) mod outputs;
mod overview;
mod paper;
mod plan;
pub(crate) mod profile;
mod publish;
mod records;
mod related;
mod results;
mod setup;
mod shipped;
mod sound;
pub(crate) mod speed;
pub(crate) mod splice;
mod stages;
mod statistics;
mod text;
mod training;
mod work;

pub(crate) use cache::RESULT;

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::cache::{Busy, Cache, IfBusy, Interrupted};
use self::collected::Collected;
use self::cost::Costs;
use self::inputs::{Inputs, load_tasks};
use self::jobs::{Planned, all_jobs};
use self::outputs::{Output, Part};
use self::profile::Profile;
use self::publish::finish;
use self::records::{BASE, RESULTS, RUNS, Run, SETUP, TIMINGS, Timing};
use self::related::Experiments;
use self::setup::Setup;
use self::stages::Stages;
use self::text::Text;
use self::work::Work;
use crate::cli::reproduce::Reproduce;
use crate::cli::resumable::NOT_EMPTY;
use crate::files::{check_folder, make_folder, read_part, write_part};
use crate::interrupts::{CONTINUE, INTERRUPTED, STOP, Unpolled, catch_interrupts};
use crate::ui::{Ui, stderr_line};

/// How long a process waits when others work on all models that are left.
const COME_BACK: Duration = Duration::from_millis(500);

/// Runs a reproduction, or prints its plan.
pub(crate) fn run(args: &Reproduce, ui: &mut Ui) -> Result<ExitCode> {
    if let Some(experiments) = Experiments::of(args)? {
        let profile = experiments.profile();
        check_text(args, &profile)?;
        if args.dry_run {
            args.out.as_deref().map_or(Ok(()), |out| check_folder(out, args.resume, NOT_EMPTY))?;
            let machine = limits::Machine::of_plans(Path::new("."));
            check_limits(args, &profile, machine)?;
            experiments.plan(args, ui)?;
            return Ok(ExitCode::SUCCESS);
        }
        return in_folder(args, &profile, |out| experiments.run(args, out, ui));
    }
    let mut profile = Profile::load(&args.profile)?;
    if let Some(seeds) = args.seeds {
        profile.seeds = seeds;
    }
    if let Some(tokens) = args.tokens {
        profile.train_on(tokens);
    }
    limits::check_seeds(&profile).with_context(|| profile::place(&args.profile))?;
    let outputs = if args.only.is_empty() { Output::of_profile(&profile)? } else { args.only.clone() };
    let jobs = all_jobs(&profile, args, &outputs)?.into_iter().enumerate();
    let mine = jobs.filter(|(number, _)| args.shard.is_none_or(|shard| shard.has(*number)));
    let jobs: Vec<Planned<'_>> = mine.map(|(_, planned)| planned).collect();
    check_text(args, &profile)?;
    if args.dry_run {
        // A default directory may hold the run that is planned.
        args.out.as_deref().map_or(Ok(()), |out| check_folder(out, args.resume, NOT_EMPTY))?;
        plan::run(args, &profile, &jobs, ui)?;
        return Ok(ExitCode::SUCCESS);
    }
    in_folder(args, &profile, |out| reproduce(args, &profile, &outputs, &jobs, out, ui))
}

/// Does `work` in the directory of the results, which no other process may use meanwhile.
fn in_folder(
    args: &Reproduce,
    profile: &Profile,
    work: impl FnOnce(&Path) -> Result<()>,
) -> Result<ExitCode> {
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("reproduce-{}", profile.name)));
    let machine = limits::Machine::here(&out);
    check_limits(args, profile, machine)?;
    let _lock = open(&out, args.resume)?;
    catch_interrupts()?;
    let _unpolled = Unpolled::begin(CONTINUE);
    match work(&out) {
        Err(error) if error.is::<Interrupted>() => {
            stderr_line("dsmoe: stopped; run the same command with --resume to continue");
            let asked = STOP.load(Ordering::Relaxed);
            Ok(if asked { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
        }
        Err(error) => Err(error),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

/// Checks the sizes of a profile. One whose model is not known yet is refused by the stage that needs it.
fn check_limits(args: &Reproduce, profile: &Profile, machine: limits::Machine) -> Result<()> {
    match plan::dense(args, profile) {
        Ok((dense, _)) => {
            limits::check(profile, &dense, machine).with_context(|| profile::place(&args.profile))
        }
        Err(error) if profile.world.is_some() => Err(error),
        Err(_) => Ok(()),
    }
}

/// Reads the profile in the file `path` and checks its numbers, as a plan does.
#[cfg(test)]
pub(crate) fn check_profile(path: &Path) -> Result<()> {
    let place = path.display().to_string();
    let of_experiments = related::profile_of(&place)?;
    let profile = of_experiments.map_or_else(|| Profile::load(&place), Ok)?;
    limits::check_seeds(&profile)?;
    let dense = profile.architecture(profile.world.as_ref().map_or(32_000, |world| world.vocab));
    // A profile may leave the model to the user.
    let dense = dense.or_else(|_| profile::Profile::load("paper-1b")?.architecture(32_000))?;
    limits::check(&profile, &dense, limits::Machine::of_plans(Path::new(".")))
}

/// Makes the directory, or continues in it, and locks it for this process.
fn open(out: &Path, resume: bool) -> Result<Option<File>> {
    make_folder(out, resume, NOT_EMPTY)?;
    if !cfg!(unix) {
        return Ok(None);
    }
    let directory = File::open(out).with_context(|| out.display().to_string())?;
    match directory.try_lock() {
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("{} is in use by another process; wait for it, or choose another --out", out.display())
        }
        // Some network file systems have no locks.
        Ok(()) | Err(std::fs::TryLockError::Error(_)) => Ok(Some(directory)),
    }
}

fn reproduce(
    args: &Reproduce,
    profile: &Profile,
    outputs: &[Output],
    jobs: &[Planned<'_>],
    out: &Path,
    ui: &mut Ui,
) -> Result<()> {
    let started = Instant::now();
    let cache = Cache::new(args.stages.clone().unwrap_or_else(|| out.join("cache")));
    let text = text(args, profile, &cache, ui).context("stage text")?;
    let costs = Costs { profile, sources: text.held_out.len(), seq: profile.train()?.seq };
    let base_parts = base_parts(outputs);
    let (stages, cost) = total(costs, jobs, &base_parts, args.model.is_some())?;
    let needs_tasks =
        jobs.iter().flat_map(|job| &job.parts).chain(&base_parts).any(|part| *part == Part::Tasks);
    let tasks = match needs_tasks {
        true => load_tasks(profile, args.task_data.as_deref(), ui)?,
        false => Vec::new(),
    };
    let shown = &ui.clone();
    let mut stages = Stages {
        inputs: Inputs { profile, options: args, text: &text, tasks: &tasks, costs, ui: shown },
        work: Work::new(&cache, shown, stages, cost),
        steps_left: args.stop_after,
    };
    let mut base = stages.base()?;
    let runs = all_jobs(profile, args, outputs)?.iter().map(|planned| planned.job.id()).collect();
    let setup = Setup::new(profile, outputs, runs, &text, &base)?;
    forget_other_results(out, &setup)?;
    write_part(&out.join(SETUP), &setup)?;
    let save = |id: &str, (run, timing): (Run, Timing)| -> Result<()> {
        write_part(&out.join(RUNS).join(format!("{id}.json")), &run)?;
        write_part(&out.join(TIMINGS).join(format!("{id}.json")), &timing)
    };
    save(BASE, stages.run_base(&mut base, &base_parts)?)?;
    // A model that another process works on is come back to.
    stages.work.if_busy = IfBusy::Leave;
    let mut open: VecDeque<&Planned<'_>> = jobs.iter().collect();
    let mut left = 0;
    while let Some(planned) = open.pop_front() {
        match stages.run(planned.job, &mut base, &planned.parts) {
            Err(error) if error.is::<Busy>() => {
                open.push_back(planned);
                left += 1;
                if left >= open.len() {
                    std::thread::sleep(COME_BACK);
                    left = 0;
                }
            }
            done => {
                save(&planned.job.id(), done?)?;
                left = 0;
                if args.discard {
                    stages.discard(planned.job, open.iter().map(|later| later.job), &base)?;
                }
            }
        }
    }
    if args.shard.is_some() {
        ui.note(format_args!("{}: this part is done; combine all with dsmoe reproduce merge", out.display()));
        return Ok(());
    }
    let collected = Collected::read(&[out.to_path_buf()])?;
    finish(&collected, out, started.elapsed().as_secs_f64(), ui)
}

/// Removes the results of other settings, so that there are none until this run is done.
fn forget_other_results(out: &Path, setup: &Setup) -> Result<()> {
    let before: Option<Setup> = read_part(&out.join(SETUP)).ok();
    if before.as_ref() == Some(setup) {
        return Ok(());
    }
    forget_results(out)
}

/// Removes results and report.
fn forget_results(out: &Path) -> Result<()> {
    for name in [RESULTS, "report.md", "report.html"] {
        let path = out.join(name);
        if path.is_file() {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Lists the parts that are measured of the dense model itself.
fn base_parts(outputs: &[Output]) -> Vec<Part> {
    let all = [Output::Table2, Output::Speed, Output::Frontier].into_iter();
    let wanted = all.filter(|output| outputs.contains(output)).flat_map(Output::parts).copied();
    let mut parts: Vec<Part> = [Part::Text].into_iter().chain(wanted).collect();
    parts.sort();
    parts.dedup();
    parts
}

/// Refuses text for a profile that brings its own, and files that are missing.
fn check_text(args: &Reproduce, profile: &Profile) -> Result<()> {
    if profile.world.is_some() && args.names_text() {
        bail!(
            "profile {} trains on the embedded world; omit --data and --mixture, or remove [world] from a copy of the profile",
            profile.name
        );
    }
    let named = args.data.iter().map(|path| ("--data", path));
    let more = [("--mixture", &args.mixture), ("--task-data", &args.task_data)];
    let named = named.chain(more.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?))));
    for (flag, path) in named {
        // Words of a mixture have a name before their path, and tables of a profile take one folder.
        let is_word = flag == "--data" && (args.data.len() > 1 || path.to_string_lossy().contains('='));
        if !is_word && !path.exists() {
            bail!("{flag} {}: there is no such file or folder", path.display());
        }
    }
    Ok(())
}

fn text(args: &Reproduce, profile: &Profile, cache: &Cache, ui: &Ui) -> Result<Text> {
    match (&profile.world, args.names_text()) {
        (Some(world), _) => Text::of_world(world, profile, args.model.as_deref(), cache, ui),
        (None, _) if args.model.is_none() => {
            bail!("profile {} starts from a checkpoint; name one with --model DIR", profile.name)
        }
        (None, false) => bail!("profile {} needs text; name it with --data or --mixture", profile.name),
        (None, true) => Text::of_user(args, profile, ui),
    }
}

/// Counts all stages and their cost. `given`: the dense model need not be trained.
fn total(costs: Costs<'_>, jobs: &[Planned<'_>], base: &[Part], given: bool) -> Result<(usize, f64)> {
    let (mut stages, mut cost) = (base.len(), base.iter().map(|part| costs.part(*part, false)).sum::<f64>());
    if let (Some(config), false) = (costs.profile.pretrain(), given) {
        stages += 1;
        cost += costs.train(&config?)?;
    }
    for Planned { job, parts, .. } in jobs {
        let timed = parts.contains(&Part::Speed) && costs.profile.measure.speed.is_some();
        stages += 1 + usize::from(!job.spec.untrained) + usize::from(timed) + parts.len();
        cost += costs.make() + costs.measuring(*job, parts);
        if !job.spec.untrained {
            cost += costs.train(&costs.profile.train_of(job.spec, job.seed, None)?)?;
        }
    }
    Ok((stages, cost))
}
