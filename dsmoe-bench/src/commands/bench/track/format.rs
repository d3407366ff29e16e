//! The file of a record.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_kernels::Isa;
use serde::{Deserialize, Serialize};

use super::stats::Estimate;
use crate::commands::doctor::cpu_model;

const FORMAT: &str = "dsmoe-bench-record";
/// Goes up whenever a field or a benchmark changes its meaning.
const VERSION: u32 = 2;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) format: String,
    pub(super) version: u32,
    /// Seconds since 1970.
    pub(super) time: u64,
    pub(super) machine: Machine,
    pub(super) build: Build,
    pub(super) suites: Vec<String>,
    /// Part of a name that was asked for.
    pub(super) only: Option<String>,
    pub(super) notes: Vec<String>,
    pub(super) benchmarks: Vec<Benchmark>,
}

/// Where it was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Machine {
    pub(super) cpu: Option<String>,
    pub(super) arch: String,
    pub(super) cores: usize,
    pub(super) threads: usize,
    /// `L1d 32K` and so on, of the first core.
    pub(super) caches: Vec<String>,
    /// The tier of the kernels.
    pub(super) isa: String,
    /// Operating system and release.
    pub(super) system: String,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Build {
    pub(super) version: String,
    pub(super) revision: String,
    pub(super) rustc: String,
    pub(super) optimized: bool,
}

/// What a number is, and so how it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Seconds per call; compared by the ratio to the calibration kernel, if there is one.
    Time,
    /// Instructions per call; compared as they are.
    Instructions,
    /// Not to change, in either direction.
    Quality,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Benchmark {
    /// `suite/what/how`.
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) unit: String,
    /// In `unit`, with the 99 % interval of the median.
    pub(super) value: Estimate,
    /// Over the arithmetic of the calibration at the same moment.
    pub(super) ratio: Option<Estimate>,
    /// Over the exchange of data between threads at the same moment.
    pub(super) exchange_ratio: Option<Estimate>,
    /// Processes, or rounds of one.
    pub(super) repetitions: usize,
    /// Calls of each repetition, in the first process.
    pub(super) calls: u64,
    /// In `unit`, in the order they were taken: the median of each process, or each round of one.
    pub(super) samples: Vec<f64>,
    pub(super) ratio_samples: Vec<f64>,
    pub(super) exchange_samples: Vec<f64>,
}

impl Benchmark {
    /// A number that is the same every time.
    pub(super) fn exact(name: String, kind: Kind, unit: &str, value: f64) -> Benchmark {
        Benchmark {
            name,
            kind,
            unit: unit.to_owned(),
            value: Estimate::exact(value),
            ratio: None,
            exchange_ratio: None,
            repetitions: 1,
            calls: 1,
            samples: vec![value],
            ratio_samples: Vec::new(),
            exchange_samples: Vec::new(),
        }
    }
}

impl Record {
    /// An empty one of this machine and this build, now.
    pub(super) fn new(suites: Vec<String>, only: Option<String>) -> Record {
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

    pub(super) fn read(path: &Path) -> Result<Record> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Record::parse(&text).with_context(|| path.display().to_string())
    }

    pub(super) fn parse(text: &str) -> Result<Record> {
        /// What is looked at before the rest.
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
            for Estimate { median, low, high } in numbers {
                if !(0.0 < low && low <= median && median <= high && high.is_finite()) {
                    bail!("{}: {low} <= {median} <= {high} is no interval above 0; measure again", one.name);
                }
            }
        }
        Ok(record)
    }
}

impl Machine {
    fn this() -> Machine {
        let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let cache = |index: usize| {
            let field = |name| read(&format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}"));
            let kind = match field("type")?.as_str() {
                "Data" => "d",
                "Instruction" => "i",
                _ => "",
            };
            Some(format!("L{}{kind} {}", field("level")?, field("size")?))
        };
        Machine {
            cpu: cpu_model(),
            arch: std::env::consts::ARCH.to_owned(),
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            threads: rayon::current_num_threads(),
            caches: (0..8).map_while(cache).collect(),
            isa: Isa::current().name().to_owned(),
            system: format!(
                "{} {}",
                std::env::consts::OS,
                read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".to_owned())
            ),
        }
    }

    /// Whether times of the two mean the same.
    pub(super) fn same_hardware(&self, other: &Machine) -> bool {
        let key = |m: &Machine| (m.cpu.clone(), m.arch.clone(), m.cores, m.caches.clone());
        key(self) == key(other)
    }
}
