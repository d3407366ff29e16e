//! Commands and loaded models for programs that run them in their own process, as the Python package does: the same settings,
//! reports and messages, without a terminal.

use std::ffi::OsString;
use std::sync::Arc;

use clap::{CommandFactory, FromArgMatches};

use crate::caller::{Call, unless_stopped};
use crate::cli::{Cli, Command};
use crate::commands;
use crate::ui::{Ui, wrong_usage};

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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use dsmoe_train::metrics::StepRecord;
    use serde_json::Value;

    use super::*;

    #[derive(Default)]
    struct Watching {
        stop: AtomicBool,
        steps: Mutex<Vec<u64>>,
        last: u64,
    }

    impl Caller for Watching {
        fn step(&self, record: &StepRecord) {
            self.steps.lock().unwrap().push(record.step);
            self.stop.store(record.step == self.last, Ordering::Relaxed);
        }

        fn stop(&self) -> &AtomicBool {
            &self.stop
        }
    }

    fn run(line: &str, caller: &Arc<Watching>) -> Result<Value, Failure> {
        let report = call(line.split(' ').map(OsString::from), caller.clone())?;
        Ok(serde_json::from_str(&report).unwrap())
    }

    #[test]
    fn a_program_runs_commands_and_stops_them() {
        let work = tempfile::tempdir().unwrap();
        let [world, start, out] =
            ["world", "start", "run"].map(|name| work.path().join(name).display().to_string());
        let free = Arc::new(Watching::default());
        run(&format!("data world --out {world} --bytes 100KB --vocab 300"), &free).unwrap();
        run(&format!("init --preset world --tokenizer {world}/tokenizer.json --out {start}"), &free).unwrap();

        let train = format!("train {start} --data {world}/text --steps 3 --batch 1 --seq 16 --out {out}");
        let caller = Arc::new(Watching { last: 2, ..Watching::default() });
        let report = run(&train, &caller).unwrap();
        assert_eq!((&report["step"], &report["finished"]), (&Value::from(2), &Value::from(false)));
        let report = run(&format!("{train} --resume"), &free).unwrap();
        assert_eq!(report["finished"], true);
        assert_eq!(
            (&caller.steps.lock().unwrap()[..], &free.steps.lock().unwrap()[..]),
            (&[1, 2][..], &[3][..])
        );

        let stopped = Arc::new(Watching { stop: AtomicBool::new(true), ..Watching::default() });
        let eval = format!("eval {start} --data {world}/text --seq 16");
        assert_eq!(run(&eval, &stopped).unwrap_err().kind, Kind::Stopped);
        assert!(run(&eval, &free).unwrap()["nll"].as_f64() > Some(0.0));
        assert_eq!(run(&format!("{eval} --no-such"), &free).unwrap_err().kind, Kind::Argument);
        let refused = run("man", &free).unwrap_err();
        assert!(
            refused.kind == Kind::Argument && refused.message.contains("process of its own"),
            "{refused}"
        );
    }
}
