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
mod failure;
mod files;
mod format;
mod gpu;
mod hub;
mod interrupts;
mod loaded;
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

use clap::{ColorChoice, CommandFactory, FromArgMatches};

/// Runs the command line of this process and returns its exit status.
pub fn run() -> ExitCode {
    run_from(std::env::args_os())
}

/// Runs a command line that begins with the name of the program, prints the result or a failure in one line, and returns
/// the exit status. The first call determines the number of threads.
pub fn run_from<T: Into<OsString> + Clone>(args: impl IntoIterator<Item = T>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let color = color_of(&args);
    let parsed = cli::Cli::command().color(color).try_get_matches_from(&args);
    let cli = match parsed.and_then(|found| cli::Cli::from_arg_matches(&found)) {
        Ok(cli) => cli,
        Err(error) => return ui::usage(&error, args.iter().any(|arg| arg == "--json"), color),
    };
    dsmoe_baselines::register();
    let mut ui = ui::Ui { json: cli.json, quiet: cli.quiet, muted: false, color: cli.color, call: None };
    match commands::run(cli, &mut ui) {
        Ok(code) => code,
        Err(error) => ui.fail(&error),
    }
}

/// Returns the value of `--color` before the line is parsed, since errors of parsing have colours too.
fn color_of(args: &[OsString]) -> ColorChoice {
    let words = || args.iter().filter_map(|arg| arg.to_str());
    let value = words()
        .find_map(|word| word.strip_prefix("--color="))
        .or_else(|| words().skip_while(|word| *word != "--color").nth(1));
    value.and_then(|value| value.parse().ok()).unwrap_or(ColorChoice::Auto)
}

/// The examples of the README of the repository are tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
