//! `dsmoe bench record`: measures suites and writes what came out.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::super::args::{Choice, Format, Record as Args, Suite};
use super::format::{Benchmark, Kind, Record};
use super::stats::Estimate;
use super::workloads::{Task, Workload};
use super::{criterion, export, instructions, quality};
use crate::ui::Ui;

/// A sample of a short task is this long at least.
const SAMPLE_SECONDS: f64 = 0.01;
const MOST_CALLS: f64 = 100_000.0;
/// Length of the calibration kernel: a few milliseconds.
const CALIBRATION_PASSES: usize = 3000;
const CALIBRATION_VALUES: usize = 4096;

pub(crate) fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let record = match &args.from_criterion {
        Some(dir) => criterion::read(dir)?,
        None => measure(args, ui)?,
    };
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
            std::fs::write(path, text).with_context(|| path.display().to_string())?;
            ui.note(format_args!("{}: {} benchmarks", path.display(), record.benchmarks.len()));
            Ok(())
        }
        None => ui.text(&text),
    }
}

fn measure(args: &Args, ui: &mut Ui) -> Result<Record> {
    let suites = suites(&args.choice);
    let mut record =
        Record::new(suites.iter().map(|suite| suite.name().to_owned()).collect(), args.choice.only.clone());
    for &suite in &suites {
        let chosen: Vec<&Workload> =
            suite.workloads().iter().filter(|one| args.choice.takes(one.name)).collect();
        if !chosen.is_empty() {
            ui.note(format_args!("measuring {}", suite.name()));
            // On a thread of the pool, where handing work to the others is cheapest.
            let timed = rayon::scope(|_| time(&chosen, usize::from(args.repeats)))?;
            record.benchmarks.extend(timed);
        }
        if suite == Suite::Quality {
            let found = quality::measure(ui)?;
            record.benchmarks.extend(found.into_iter().filter(|one| args.choice.takes(&one.name)));
        }
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

/// The suites asked for, each once, in the order of their definition.
pub(super) fn suites(choice: &Choice) -> Vec<Suite> {
    use clap::ValueEnum;
    Suite::value_variants().iter().copied().filter(|suite| choice.suite.contains(suite)).collect()
}

/// A benchmark while it is measured.
struct Contestant {
    name: &'static str,
    task: Task,
    calls: u64,
    samples: Vec<f64>,
    ratios: Vec<f64>,
}

/// Times `workloads` in turns, each sample between two of the calibration kernel.
fn time(workloads: &[&Workload], rounds: usize) -> Result<Vec<Benchmark>> {
    let mut contestants = Vec::new();
    for workload in workloads {
        let mut task = (workload.build)().with_context(|| workload.name)?;
        // The first calls size buffers and fill caches.
        seconds(&mut task, 1)?;
        let call = seconds(&mut task, 1)?.min(seconds(&mut task, 1)?);
        let calls = (SAMPLE_SECONDS / call).clamp(1.0, MOST_CALLS) as u64;
        contestants.push(Contestant {
            name: workload.name,
            task,
            calls,
            samples: Vec::with_capacity(rounds),
            ratios: Vec::with_capacity(rounds),
        });
    }
    let mut before = calibration();
    for _ in 0..rounds {
        for one in &mut contestants {
            let sample = seconds(&mut one.task, one.calls).with_context(|| one.name)?;
            let after = calibration();
            one.samples.push(sample);
            one.ratios.push(sample / f64::midpoint(before, after));
            before = after;
        }
    }
    let benchmark = |one: Contestant| Benchmark {
        name: one.name.to_owned(),
        kind: Kind::Time,
        unit: "s".to_owned(),
        value: Estimate::of(&one.samples),
        ratio: Some(Estimate::of(&one.ratios)),
        repetitions: rounds,
        calls: one.calls,
        samples: one.samples,
        ratio_samples: one.ratios,
    };
    Ok(contestants.into_iter().map(benchmark).collect())
}

/// Seconds per call.
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

/// Seconds that the calibration kernel takes on all threads of the pool: multiplications and additions on data in the
/// first cache, in no code that the crates below use.
fn calibration() -> f64 {
    let started = Instant::now();
    rayon::broadcast(|_| {
        let values = black_box([1e-3f32; CALIBRATION_VALUES]);
        let mut sums = [0.0f32; 32];
        for _ in 0..CALIBRATION_PASSES {
            for part in values.chunks_exact(sums.len()) {
                for (sum, value) in sums.iter_mut().zip(part) {
                    *sum = *sum * 0.999 + value;
                }
            }
        }
        black_box(sums);
    });
    started.elapsed().as_secs_f64().max(1e-9)
}
