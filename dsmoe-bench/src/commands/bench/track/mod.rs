//! Records of benchmarks, and whether a later one is worse.
//!
//! Times are compared as ratios to a calibration that shares no code with what is measured and runs right before
//! and after every sample: a clock that changes, or other work on the machine, falls on both.

mod calibrate;
pub(super) mod compare;
mod criterion;
mod export;
pub(super) mod format;
pub(super) mod history;
pub(super) mod instructions;
mod quality;
pub(super) mod record;
mod stats;
mod workloads;
