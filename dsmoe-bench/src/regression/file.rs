//! The file format of a record.

use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_datasets::files::open_regular;
use serde::{Deserialize, Serialize};

use super::statistics::MedianEstimate;
use crate::files;
use crate::machine::Machine;

const FORMAT: &str = "dsmoe-bench-record";
/// Increases whenever a field or a benchmark changes its meaning.
const VERSION: u32 = 2;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) format: String,
    pub(crate) version: u32,
    /// Seconds since 1970.
    pub(crate) time: u64,
    pub(crate) machine: Machine,
    pub(crate) build: Build,
    pub(crate) suites: Vec<String>,
    /// The part of the names that `--only` asked for.
    pub(crate) only: Option<String>,
    pub(crate) notes: Vec<String>,
    pub(crate) benchmarks: Vec<Benchmark>,
}

/// The build that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Build {
    pub(crate) version: String,
    pub(crate) revision: String,
    pub(crate) rustc: String,
    pub(crate) optimized: bool,
}

/// The kind of a number, which determines how it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Seconds per call; compared by the ratio to the calibration kernel, if there is one.
    Time,
    /// Instructions per call; compared as they are.
    Instructions,
    /// A number that must not change in either direction.
    Quality,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Benchmark {
    /// `suite/what/how`.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) unit: String,
    /// The median in `unit` with its 99 % interval.
    pub(crate) value: MedianEstimate,
    /// The ratio to the arithmetic of the calibration at the same moment.
    pub(crate) ratio: Option<MedianEstimate>,
    /// The ratio to the exchange of data between threads at the same moment.
    pub(crate) exchange_ratio: Option<MedianEstimate>,
    /// The number of processes, or of rounds of one process.
    pub(crate) repetitions: usize,
    /// Calls in each repetition of the first process.
    pub(crate) calls: u64,
    /// The samples in `unit` in their order: the median of each process, or each round of one process.
    pub(crate) samples: Vec<f64>,
    pub(crate) ratio_samples: Vec<f64>,
    pub(crate) exchange_samples: Vec<f64>,
}

impl Benchmark {
    /// Makes the benchmark of a number that is the same every time.
    pub(crate) fn exact(name: impl Into<String>, kind: Kind, unit: &str, value: f64) -> Benchmark {
        let timed = Benchmark::timed(name.into(), 1, [vec![value], Vec::new(), Vec::new()]);
        Benchmark { kind, unit: unit.to_owned(), ..timed }
    }

    /// Makes the benchmark of a time from samples of it and, where there are any, of both of its ratios.
    pub(crate) fn timed(name: String, calls: u64, samples: [Vec<f64>; 3]) -> Benchmark {
        let [samples, ratio_samples, exchange_samples] = samples;
        let estimate = |samples: &[f64]| (!samples.is_empty()).then(|| MedianEstimate::of(samples));
        Benchmark {
            name,
            kind: Kind::Time,
            unit: "s".to_owned(),
            value: MedianEstimate::of(&samples),
            ratio: estimate(&ratio_samples),
            exchange_ratio: estimate(&exchange_samples),
            repetitions: samples.len(),
            calls,
            samples,
            ratio_samples,
            exchange_samples,
        }
    }
}

impl Record {
    /// Makes an empty record of this machine and this build at this time.
    pub(crate) fn new(suites: Vec<String>, only: Option<String>) -> Record {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Record {
            format: FORMAT.to_owned(),
            version: VERSION,
            time: now.map_or(0, |now| now.as_secs()),
            machine: Machine::this(),
            build: Build {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                revision: env!("DSMOE_REVISION").to_owned(),
                rustc: env!("DSMOE_RUSTC").to_owned(),
                optimized: !cfg!(debug_assertions),
            },
            suites,
            only,
            notes: Vec::new(),
            benchmarks: Vec::new(),
        }
    }

    /// Reads a record that the command line names.
    pub(crate) fn read(path: &Path) -> Result<Record> {
        Record::parse(&files::read_json_text(path)?).with_context(|| path.display().to_string())
    }

    /// Reads a record in a folder, which is no pipe and no device.
    pub(crate) fn read_inside(path: &Path) -> Result<Record> {
        open_regular(path).with_context(|| path.display().to_string())?;
        Record::read(path)
    }

    pub(crate) fn parse(text: &str) -> Result<Record> {
        /// The fields that are checked before the rest.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head =
            serde_json::from_str(text).context("not a record; make one with dsmoe bench record")?;
        if head.format != FORMAT {
            bail!("format is {:?}, not {FORMAT:?}; make a record with dsmoe bench record", head.format);
        }
        if head.version != VERSION {
            bail!("version is {}, and this dsmoe reads {VERSION}; measure again with this one", head.version);
        }
        let record: Record = serde_json::from_str(text)?;
        for one in &record.benchmarks {
            let numbers = [Some(one.value), one.ratio, one.exchange_ratio].into_iter().flatten();
            for MedianEstimate { median, low, high } in numbers {
                if !(0.0 < low && low <= median && median <= high && high.is_finite()) {
                    bail!("{}: {low} <= {median} <= {high} is no interval above 0; measure again", one.name);
                }
            }
        }
        Ok(record)
    }
}
