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
}

/// Perplexity after a part of the continued training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Milestone {
    /// Share of the training.
    pub(crate) share: f64,
    pub(crate) step: u64,
    pub(crate) tokens: u64,
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

/// Speeds of one model on this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Timing {
    pub(crate) method: String,
    pub(crate) seed: u64,
    pub(crate) speed: Option<Speed>,
    /// Speed of the last invocation that trained the model.
    pub(crate) train_tokens_per_s: Option<f64>,
}
