//! `dsmoe bench record|compare|history`: records of benchmarks, and the detection of regressions between them.
//!
//! Times are compared as ratios to a calibration that shares no code with the benchmarks and runs before and after every
//! sample, so that a changing clock and other work on the machine affect both.

mod calibrate;
pub(crate) mod compare;
mod export;
pub(crate) mod file;
pub(crate) mod history;
pub(crate) mod instructions;
mod quality;
pub(crate) mod record;
mod statistics;
mod workloads;
