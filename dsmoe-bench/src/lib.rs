#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod calibration;
mod cli;
mod commands;
mod evaluation;
mod format;
mod gpu;
mod interrupts;
mod machine;
mod memory;
mod models;
mod progress;
mod regression;
mod report;
mod reproduce;
mod texts;
mod timing;
mod training;
mod ui;

use std::process::ExitCode;

use clap::Parser;

/// Parses the command line of this process, does what it says, and reports a failure in one line.
pub fn run() -> ExitCode {
    let cli = cli::Cli::parse();
    dsmoe_baselines::register();
    let mut ui = ui::Ui::new(cli.json, cli.quiet);
    match commands::run(cli, &mut ui) {
        Ok(code) => code,
        Err(error) => ui.fail(&error),
    }
}
