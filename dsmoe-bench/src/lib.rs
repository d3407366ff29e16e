//! The `dsmoe` command as a library, and the way into the crates that it is made of.
//!
//! | crate | has |
//! |---|---|
//! | [`dsmoe_bench`](crate) | the command: [`Cli`], to which a program adds methods, FFNs, formats and benchmarks, and [`embed`] |
//! | [`dsmoe_baselines`] | methods that make sparse models of dense ones |
//! | [`dsmoe_train`] | training, evaluation, answers to benchmarks |
//! | [`dsmoe_datasets`] | text, tokenizers, windows, benchmark tasks |
//! | [`dsmoe_core`] | models: directories, conversion, passes for training and inference, generation |
//! | [`dsmoe_router`] | gates, thresholds, the straight-through rule, sparsity losses |
//! | [`dsmoe_kernels`] | ops on slices for each instruction set, GPU kernels, processes |
//!
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod calibration;
mod caller;
mod cli;
mod commands;
mod continuation;
pub mod embed;
mod estimate;
mod evaluation;
mod extension;
mod failure;
mod files;
mod format;
mod gpu;
#[cfg(test)]
mod hostile;
mod hub;
mod interrupts;
mod loaded;
mod machine;
mod memory;
mod models;
mod mpi;
mod planning;
mod processes;
mod progress;
mod regression;
mod remedies;
mod report;
mod reproduce;
mod texts;
mod timing;
mod training;
mod ui;
mod version;

pub use extension::Cli;

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the command line of this process and returns its exit status.
pub fn run() -> ExitCode {
    Cli::new().run()
}

/// Runs a command line that begins with the name of the program, prints the result or a failure in one line, and returns
/// the exit status. The first call determines the number of threads.
pub fn run_from<T: Into<OsString> + Clone>(args: impl IntoIterator<Item = T>) -> ExitCode {
    Cli::new().run_from(args)
}

/// The examples of the README of the repository are tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
