//! Commands and loaded models for programs that run them in their own process, as the Python package does: the same settings,
//! reports and messages, without a terminal.

use std::ffi::OsString;
use std::sync::Arc;

use clap::{CommandFactory, FromArgMatches};

use crate::caller::{Call, unless_stopped};
use crate::cli::{Cli, Command};
use crate::ui::{Ui, wrong_usage};
use crate::commands;

pub use crate::caller::Caller;
pub use crate::failure::{Failure, Kind};
pub use crate::loaded::{Gates, LoadOptions, Loaded, Prompt};

/// Starts the worker threads of this process, `threads` of them or one for each core, unless they run already. Returns whether
/// it did.
///
/// # Errors
/// The system starts no such number of threads.
pub fn start_threads(threads: Option<u16>) -> Result<bool, Failure> {
    commands::start_threads(threads.map_or(0, usize::from)).map_err(|error| Failure::of(&error))
}

/// Runs a command line, without the name of the program, in this process and returns its report as a JSON object: that of
/// the option for JSON. A command that prints text alone, or takes over the process, is refused.
///
/// # Errors
/// Those of the command; the caller stopped it.
pub fn call(words: impl IntoIterator<Item = OsString>, caller: Arc<dyn Caller>) -> Result<String, Failure> {
    let line = std::iter::once(OsString::from("dsmoe")).chain(words);
    let parsed = Cli::command().try_get_matches_from(line);
    let cli = parsed.and_then(|found| Cli::from_arg_matches(&found));
    let cli = cli.map_err(|error| Failure::argument(wrong_usage(&error)))?;
    if let Some(name) = only_for_terminals(&cli.command) {
        return Err(Failure::argument(format!("dsmoe {name} runs in a process of its own; use the command")));
    }
    dsmoe_baselines::register();
    let call = Call::new(caller);
    let mut ui = Ui::of_call(call.clone());
    let outcome = unless_stopped(|| commands::run_called(cli, &mut ui));
    match (outcome, call.take_result()) {
        (Some(Err(error)), _) => Err(Failure::of(&error)),
        (Some(Ok(_)), Some(result)) => Ok(result),
        _ => Err(Failure::stopped()),
    }
}

/// Returns the names of the options of a command, such as `convert` or `data world`, without those that all commands have;
/// none if there is no such command.
pub fn options(command: &str) -> Option<Vec<String>> {
    let mut found = Cli::command();
    for word in command.split_whitespace() {
        found = found.find_subcommand(word)?.clone();
    }
    Some(found.get_arguments().filter_map(|arg| arg.get_long()).map(str::to_owned).collect())
}

/// Returns the name of a command that handles signals or the terminal itself.
fn only_for_terminals(command: &Command) -> Option<&'static str> {
    match command {
        Command::Reproduce(_) => Some("reproduce"),
        Command::Sweep(_) => Some("sweep"),
        Command::Plan(_) => Some("plan"),
        Command::Completions(_) => Some("completions"),
        Command::Man(_) => Some("man"),
        Command::Bench(_) => Some("bench"),
        _ => None,
    }
}
