//! `dsmoe bench record`: measures suites and writes a record.

use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::calibrate::Calibration;
use super::file::{Benchmark, Record};
use super::statistics::MedianEstimate;
use super::workloads::{Task, Workload, suites};
use super::{export, instructions, quality};
use crate::cli::bench::{Choice, Format, Record as Args, Suite};
use crate::cli::values::word;
use crate::files::{check_file, write};
use crate::timing::turns::ROOM;
use crate::ui::Ui;

/// The least length of a sample of a short task.
const SAMPLE_SECONDS: f64 = 0.01;
const MOST_CALLS: f64 = 100_000.0;

pub(crate) fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    args.out.as_deref().map_or(Ok(()), |out| check_file(out, args.force))?;
    let record = measure(args, ui)?;
    for note in &record.notes {
        ui.note(note);
    }
    let format = args.format.or((args.out.is_some() || ui.json).then_some(Format::Json));
    let text = match format {
        Some(format) => export::text(&record, format)?,
        None => export::table(&record),
    };
    match &args.out {
        Some(path) => {
            write(path, text)?;
            ui.note(format_args!("{}: {} benchmarks", path.display(), record.benchmarks.len()));
            Ok(())
        }
        None => ui.text(&text),
    }
}

fn measure(args: &Args, ui: &mut Ui) -> Result<Record> {
    let suites = suites(&args.choice);
    let mut record = Record::new(suites.iter().map(word).collect(), args.choice.only.clone());
    let is_timed = |suite: &Suite| !chosen(*suite, &args.choice).is_empty();
    let timed: Vec<Suite> = suites.iter().copied().filter(is_timed).collect();
    if args.processes == 1 {
        for &suite in &timed {
            ui.note(format_args!("measuring {}", word(&suite)));
            let chosen = chosen(suite, &args.choice);
            // On a thread of the pool, where handing work to the others is cheapest.
            record.benchmarks.extend(rayon::scope(|_| time(&chosen, usize::from(args.repeats)))?);
        }
    } else if !timed.is_empty() {
        let program = std::env::current_exe().context("finding this program")?;
        let choice = Choice { suite: timed, only: args.choice.only.clone() };
        let mut all = Vec::new();
        for process in 1..=args.processes {
            ui.note(format_args!("measuring, process {process} of {}", args.processes));
            all.push(in_process(&program, &choice, args.repeats)?);
        }
        record.benchmarks = merge(&all)?;
    }
    if suites.contains(&Suite::Quality) {
        let found = quality::measure(ui)?;
        record.benchmarks.extend(found.into_iter().filter(|one| args.choice.takes(&one.name)));
    }
    if args.instructions {
        match instructions::count(&args.choice)? {
            Ok(counts) => record.benchmarks.extend(counts),
            Err(why) => record.notes.push(format!("no instruction counts: {why}")),
        }
    }
    if record.benchmarks.is_empty() {
        let only = args.choice.only.as_deref().unwrap_or_default();
        bail!("no benchmark of these suites has {only:?} in its name; give another --only or --suite");
    }
    Ok(record)
}

/// Returns the benchmarks of a suite that are asked for.
fn chosen(suite: Suite, choice: &Choice) -> Vec<Workload> {
    suite.workloads().into_iter().filter(|one| choice.takes(&one.name)).collect()
}

/// Measures in a process of `program`.
pub(crate) fn in_process(program: &Path, choice: &Choice, repeats: u16) -> Result<Record> {
    let mut command = Command::new(program);
    command.args(["bench", "record", "--json", "--quiet", "--processes", "1"]).args(choice.words());
    command.args(["--repeats", &repeats.to_string()]);
    command.args(["--threads", &rayon::current_num_threads().to_string()]);
    let output = command.output().with_context(|| program.display().to_string())?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}: {}", program.display(), output.status, stderr.trim());
    }
    Record::parse(&String::from_utf8_lossy(&output.stdout)).with_context(|| program.display().to_string())
}

/// Merges the records of all processes: the samples are their medians.
fn merge(all: &[Record]) -> Result<Vec<Benchmark>> {
    let mut merged = Vec::new();
    for one in all.first().map_or(&[][..], |first| &first.benchmarks) {
        let same: Vec<&Benchmark> = all
            .iter()
            .map(|record| record.benchmarks.iter().find(|other| other.name == one.name))
            .collect::<Option<_>>()
            .with_context(|| format!("{} is not in every process's record", one.name))?;
        let medians = |estimate: &dyn Fn(&Benchmark) -> Option<MedianEstimate>| -> Vec<f64> {
            same.iter().filter_map(|one| estimate(one)).map(|found| found.median).collect()
        };
        let samples =
            [medians(&|one| Some(one.value)), medians(&|one| one.ratio), medians(&|one| one.exchange_ratio)];
        merged.push(Benchmark::timed(one.name.clone(), one.calls, samples));
    }
    Ok(merged)
}

/// A benchmark while it is measured.
struct Contestant {
    name: String,
    task: Task,
    calls: u64,
    /// Samples of the time and of its two ratios.
    samples: [Vec<f64>; 3],
}

/// Times `workloads` in turns, each sample between two calibrations.
fn time(workloads: &[Workload], rounds: usize) -> Result<Vec<Benchmark>> {
    let mut contestants = Vec::new();
    for workload in workloads {
        let mut task = (workload.build)().with_context(|| workload.name.clone())?;
        // The first calls size buffers and fill caches.
        seconds(&mut task, 1)?;
        let call = seconds(&mut task, 1)?.min(seconds(&mut task, 1)?);
        let calls = (SAMPLE_SECONDS / call).clamp(1.0, MOST_CALLS) as u64;
        let samples = [(); 3].map(|()| Vec::with_capacity(rounds.min(ROOM)));
        contestants.push(Contestant { name: workload.name.clone(), task, calls, samples });
    }
    let calibration = Calibration::new();
    let mut before = calibration.now();
    for _ in 0..rounds {
        for one in &mut contestants {
            let sample = seconds(&mut one.task, one.calls).with_context(|| one.name.clone())?;
            let after = calibration.now();
            let around = before.midpoint(after);
            let [samples, ratios, exchanges] = &mut one.samples;
            samples.push(sample);
            ratios.push(sample / around.arithmetic);
            exchanges.extend(around.exchange.map(|exchange| sample / exchange));
            before = after;
        }
    }
    let benchmark = |one: Contestant| Benchmark::timed(one.name, one.calls, one.samples);
    Ok(contestants.into_iter().map(benchmark).collect())
}

/// Returns the seconds per call.
fn seconds(task: &mut Task, calls: u64) -> Result<f64> {
    let started = Instant::now();
    let mut parts = None;
    for _ in 0..calls {
        if let Some(part) = black_box(&mut *task)()? {
            parts = Some(parts.unwrap_or(0.0) + part);
        }
    }
    // A clock may stand still for a moment.
    Ok(parts.unwrap_or_else(|| started.elapsed().as_secs_f64()).max(1e-9) / calls as f64)
}
