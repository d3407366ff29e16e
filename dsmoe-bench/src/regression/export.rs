//! Records in the formats of other tools and as tables.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::file::{Benchmark, Kind, Record};
use super::statistics::MedianEstimate;
use crate::cli::bench::Format;
use crate::cli::values::word;
use crate::format::{self, Table};

pub(crate) fn text(record: &Record, format: Format) -> Result<String> {
    Ok(match format {
        Format::Json => serde_json::to_string(record)? + "\n",
        Format::Bmf => serde_json::to_string_pretty(&bmf(record))? + "\n",
        Format::Gha => serde_json::to_string_pretty(&gha(record))? + "\n",
        Format::Csv => csv(record),
        Format::Md => markdown(record),
    })
}

/// Writes the measures of Bencher, with latency in nanoseconds.
fn bmf(record: &Record) -> Value {
    let measure = |MedianEstimate { median, low, high }: MedianEstimate, scale: f64| json!({ "value": scale * median, "lower_value": scale * low, "upper_value": scale * high });
    let mut all = Map::new();
    for one in &record.benchmarks {
        let measures = match one.kind {
            Kind::Time => {
                let mut measures = json!({ "latency": measure(one.value, 1e9) });
                if let Some(ratio) = one.ratio {
                    measures["calibrated-latency"] = measure(ratio, 1.0);
                }
                measures
            }
            Kind::Instructions => json!({ "instructions": measure(one.value, 1.0) }),
            Kind::Quality => json!({ one.unit.as_str(): measure(one.value, 1.0) }),
        };
        all.insert(one.name.clone(), measures);
    }
    Value::Object(all)
}

/// Writes one number per benchmark for github-action-benchmark: the calibrated one where there is a calibration.
fn gha(record: &Record) -> Value {
    let entry = |one: &Benchmark| {
        let (MedianEstimate { median, low, high }, unit) =
            one.ratio.map_or((one.value, one.unit.as_str()), |ratio| (ratio, "calibration kernels"));
        json!({
            "name": one.name,
            "unit": unit,
            "value": median,
            "range": format!("{:.3e}", (high - low) / 2.0),
            "extra": format!("{} {}, revision {}", one.value.median, one.unit, record.build.revision),
        })
    };
    record.benchmarks.iter().map(entry).collect()
}

fn csv(record: &Record) -> String {
    let mut out = "name,kind,unit,median,low,high,ratio,ratio_low,ratio_high,repetitions,calls\n".to_owned();
    for one in &record.benchmarks {
        let quoted = format!("\"{}\"", one.name.replace('"', "\"\""));
        let ratio = one.ratio.map_or_else(
            || ",,".to_owned(),
            |ratio| format!("{},{},{}", ratio.median, ratio.low, ratio.high),
        );
        let _ = writeln!(
            out,
            "{quoted},{},{},{},{},{},{ratio},{},{}",
            word(&one.kind),
            one.unit,
            one.value.median,
            one.value.low,
            one.value.high,
            one.repetitions,
            one.calls
        );
    }
    out
}

const HEADER: [&str; 5] = ["benchmark", "median", "99 % interval", "of calibration", "99 % interval"];

fn cells(one: &Benchmark) -> [String; 5] {
    let show = |value: f64| amount(value, one.kind, &one.unit);
    let range = |low: String, high: String| if low == high { low } else { format!("{low} to {high}") };
    [
        one.name.clone(),
        show(one.value.median),
        range(show(one.value.low), show(one.value.high)),
        format::or_dash(one.ratio, |ratio| format!("{:.4}", ratio.median)),
        format::or_dash(one.ratio, |ratio| range(format!("{:.4}", ratio.low), format!("{:.4}", ratio.high))),
    ]
}

/// Formats a number of a benchmark with its unit.
pub(crate) fn amount(value: f64, kind: Kind, unit: &str) -> String {
    match kind {
        Kind::Time => crate::timing::row::time(value),
        Kind::Instructions => format::count(value as u64),
        Kind::Quality if unit == "active_share" => format::percent(value),
        Kind::Quality => format!("{value:.4}"),
    }
}

/// Describes the machine and the build in one line.
pub(crate) fn origin(record: &Record) -> String {
    let (machine, build) = (&record.machine, &record.build);
    let (cpu, isa) = (machine.cpu.as_deref().unwrap_or("unknown CPU"), &machine.isa);
    let (threads, cores) = (machine.threads, machine.cores);
    format!("{cpu}, {isa}, {threads} of {cores} threads; revision {}, {}", build.revision, build.rustc)
}

fn markdown(record: &Record) -> String {
    let line = |cells: [&str; 5]| format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    let mut out = format!("{}\n\n{}{}", origin(record), line(HEADER), line(["---"; 5]));
    for one in &record.benchmarks {
        out += &line(cells(one).each_ref().map(String::as_str));
    }
    out
}

pub(crate) fn table(record: &Record) -> String {
    let mut table = Table::new(HEADER);
    record.benchmarks.iter().for_each(|one| table.row(cells(one)));
    format!("{}\n{}", table.show(), origin(record))
}
