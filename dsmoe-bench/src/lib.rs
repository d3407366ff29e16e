#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod calibration;
mod cli;
mod commands;
mod evaluation;
mod files;
mod format;
mod gpu;
mod interrupts;
mod machine;
mod memory;
mod models;
mod mpi;
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

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

/// Runs the command line of this process and returns its exit status. Wrong usage ends the process.
pub fn run() -> ExitCode {
    run_from(std::env::args_os())
}

/// Runs a command line that begins with the name of the program, prints the result or a failure in one line, and returns
/// the exit status. Wrong usage ends the process. The first call determines the number of threads.
pub fn run_from<T: Into<OsString> + Clone>(args: impl IntoIterator<Item = T>) -> ExitCode {
    let cli = cli::Cli::parse_from(args);
    dsmoe_baselines::register();
    let mut ui = ui::Ui { json: cli.json, quiet: cli.quiet, muted: false };
    match commands::run(cli, &mut ui) {
        Ok(code) => code,
        Err(error) => ui.fail(&error),
    }
}
