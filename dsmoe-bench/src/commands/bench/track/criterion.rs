//! What criterion measured, as a record.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::format::{Benchmark, Kind, Record};
use super::stats::Estimate;

/// `new/estimates.json` of a benchmark, as far as it is read. Times are in nanoseconds.
#[derive(Deserialize)]
struct Estimates {
    median: Median,
}

#[derive(Deserialize)]
struct Median {
    point_estimate: f64,
    confidence_interval: Interval,
}

#[derive(Deserialize)]
struct Interval {
    lower_bound: f64,
    upper_bound: f64,
}

/// `new/benchmark.json`.
#[derive(Deserialize)]
struct Identity {
    full_id: String,
}

/// `new/sample.json`.
#[derive(Deserialize)]
struct Sample {
    iters: Vec<f64>,
    times: Vec<f64>,
}

/// All benchmarks under criterion's folder. They have no calibration ratio, and the interval is criterion's own.
pub(super) fn read(dir: &Path) -> Result<Record> {
    let mut record = Record::new(vec!["criterion".to_owned()], None);
    record.notes.push("from criterion: its own intervals, and no calibration".to_owned());
    visit(dir, &mut record.benchmarks)?;
    if record.benchmarks.is_empty() {
        bail!("{}: no new/estimates.json below it; run cargo bench first", dir.display());
    }
    record.benchmarks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(record)
}

fn visit(dir: &Path, found: &mut Vec<Benchmark>) -> Result<()> {
    let new = dir.join("new");
    if new.join("estimates.json").is_file() {
        found.push(benchmark(&new)?);
    }
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry.with_context(|| dir.display().to_string())?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != "new" {
            visit(&entry.path(), found)?;
        }
    }
    Ok(())
}

fn benchmark(new: &Path) -> Result<Benchmark> {
    let Estimates { median } = json(&new.join("estimates.json"))?;
    let Identity { full_id } = json(&new.join("benchmark.json"))?;
    let Sample { iters, times } = json(&new.join("sample.json"))?;
    let seconds = |nanoseconds: f64| nanoseconds / 1e9;
    let samples: Vec<f64> = times.iter().zip(&iters).map(|(time, calls)| seconds(time / calls)).collect();
    Ok(Benchmark {
        name: format!("criterion/{full_id}"),
        kind: Kind::Time,
        unit: "s".to_owned(),
        value: Estimate {
            median: seconds(median.point_estimate),
            low: seconds(median.confidence_interval.lower_bound),
            high: seconds(median.confidence_interval.upper_bound),
        },
        ratio: None,
        exchange_ratio: None,
        repetitions: samples.len(),
        calls: iters.first().map_or(1, |&calls| calls as u64),
        samples,
        ratio_samples: Vec::new(),
        exchange_samples: Vec::new(),
    })
}

fn json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}
