//! The records of one model: how it was made and trained, what was measured of it, and its speed.

use std::collections::BTreeMap;

use dsmoe_core::Device;
use dsmoe_kernels::Isa;
use serde::{Deserialize, Serialize};

use super::measure::{Difficulty, Means, SweepPoint, TaskScore, TextResult};
use super::profile::Role;
use crate::machine::cpu_model;

/// Version of the files in `runs/`.
pub(crate) const FORMAT_VERSION: u32 = 1;
/// Name of the dense model before continued training.
pub(crate) const BASE: &str = "base";

/// Folder of the files of all models in the directory of a reproduction.
pub(crate) const RUNS: &str = "runs";
/// Folder of their timings.
pub(crate) const TIMINGS: &str = "timings";
/// File of the settings.
pub(crate) const SETUP: &str = "setup.json";
/// File of the results.
pub(crate) const RESULTS: &str = "results.json";

/// A model as a method made it, before training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Made {
    pub(crate) params_total: f64,
    pub(crate) params_activated: f64,
    pub(crate) reached_by: String,
    /// Tokens of calibration text that were read.
    pub(crate) calibration_tokens: usize,
    pub(crate) settings: BTreeMap<String, String>,
    pub(crate) measured: BTreeMap<String, f64>,
    /// Activated parameters that the model may have, where they are not those of the profile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) budget: Option<f64>,
    /// The model computes as much as the dense one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) dense_compute: bool,
}

/// Perplexity after a part of the continued training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Milestone {
    /// Share of the training.
    pub(crate) share: f64,
    pub(crate) step: u64,
    pub(crate) tokens: u64,
    /// The share of the experts that an elastic model ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) serves: Option<f64>,
    #[serde(flatten)]
    pub(crate) means: Means,
}

/// A finished training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trained {
    pub(crate) steps: u64,
    pub(crate) tokens: u64,
    pub(crate) milestones: Vec<Milestone>,
}

/// A finished model with its measurements. It holds no times, so that it is the same bytes however often the work was
/// interrupted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) format_version: u32,
    pub(crate) method: String,
    pub(crate) role: Option<Role>,
    pub(crate) seed: u64,
    /// Hash of all settings and inputs of the trained model.
    pub(crate) key: String,
    pub(crate) machine: Machine,
    pub(crate) made: Option<Made>,
    pub(crate) trained: Option<Trained>,
    pub(crate) text: TextResult,
    pub(crate) tasks: Option<Vec<TaskScore>>,
    pub(crate) sweep: Option<Vec<SweepPoint>>,
    pub(crate) difficulty: Option<Difficulty>,
}

/// The properties of a machine that can change the last bits of numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) isa: String,
    pub(crate) os: String,
    /// `cpu`, or a GPU by its number.
    pub(crate) device: String,
}

impl Machine {
    pub(crate) fn here(device: Device) -> Machine {
        Machine {
            cpu: cpu_model().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            isa: Isa::current().name().to_owned(),
            os: std::env::consts::OS.to_owned(),
            device: device.to_string(),
        }
    }
}

/// Speed and memory of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Speed {
    pub(crate) prefill_tokens_per_s: f64,
    pub(crate) decode_tokens_per_s: f64,
    /// Peak of the resident memory while the model was loaded and used, without the program's own.
    pub(crate) peak_bytes: Option<u64>,
    pub(crate) weight_bytes: u64,
    pub(crate) threads: usize,
}

/// The speeds of one process on a number of threads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct GridSpeeds {
    pub(crate) prefill_tokens_per_s: f64,
    /// One entry for each batch size, in the order of the request.
    pub(crate) decode_tokens_per_s: Vec<f64>,
}

/// The median speed of a kind of work, beside the dense model's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct GridPoint {
    pub(crate) threads: usize,
    /// Texts that are decoded side by side; 0 is a prefill.
    pub(crate) batch: usize,
    pub(crate) tokens_per_s: f64,
    pub(crate) dense_tokens_per_s: f64,
    /// Speeds of the processes, the model's and the dense one's in turns.
    pub(crate) all: Vec<[f64; 2]>,
}

impl GridPoint {
    /// Takes the medians of the processes of a model and of the dense one.
    pub(crate) fn of(threads: usize, batches: &[usize], found: &[Vec<GridSpeeds>; 2]) -> Vec<GridPoint> {
        let point = |batch: usize, speed: &dyn Fn(&GridSpeeds) -> f64| {
            let [ours, dense] = [0, 1].map(|side: usize| found[side].iter().map(speed).collect::<Vec<f64>>());
            GridPoint {
                threads,
                batch,
                tokens_per_s: median(&ours),
                dense_tokens_per_s: median(&dense),
                all: ours.into_iter().zip(dense).map(|(a, b)| [a, b]).collect(),
            }
        };
        let prefill = point(0, &|speeds| speeds.prefill_tokens_per_s);
        let decode = batches.iter().enumerate();
        let decode = decode.map(|(at, &batch)| point(batch, &|speeds| speeds.decode_tokens_per_s[at]));
        [prefill].into_iter().chain(decode).collect()
    }

    /// Returns the speed as a multiple of the dense model's.
    pub(crate) fn gain(&self) -> f64 {
        self.tokens_per_s / self.dense_tokens_per_s
    }
}

/// Returns the middle value, of an even number the mean of the middle two.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
}

/// Speeds of one model on this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Timing {
    pub(crate) method: String,
    pub(crate) seed: u64,
    pub(crate) speed: Option<Speed>,
    /// Speeds beside those of the dense model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) grid: Vec<GridPoint>,
    /// Speed of the last invocation that trained the model.
    pub(crate) train_tokens_per_s: Option<f64>,
}
