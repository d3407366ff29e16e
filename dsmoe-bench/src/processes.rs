//! The processes that share a command: how they start, who prints, and how they end when one fails.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, Result};
use dsmoe_datasets::tasks::sha256;
use dsmoe_kernels::Isa;
use dsmoe_kernels::comm::{self, Alone, CommError, Communicator, Settings, What};

use crate::cli::processes::ProcessArgs;
use crate::ui::{Ui, stderr_line};

/// How long a process waits to be ended by the one whose error it has been told.
const TO_BE_ENDED: Duration = Duration::from_secs(10);

/// How long another process than the first one waits with an error of its own.
const OF_THE_FIRST: Duration = Duration::from_millis(500);

/// Connects the processes of a command that several can share, before it starts threads.
pub(crate) fn connect(args: Option<&ProcessArgs>) -> Result<Arc<dyn Communicator>> {
    let Some(args) = args else { return Ok(Arc::new(Alone)) };
    let settings = Settings {
        deadline: Duration::from_secs(args.deadline),
        last_words: |error| stderr_line(format_args!("dsmoe: error: {error}")),
    };
    let comm: Arc<dyn Communicator> = comm::start(args.dist.0, settings)?.into();
    if comm.size() > 1 {
        end_all_on_panic(Arc::downgrade(&comm));
    }
    Ok(comm)
}

/// Makes a panic of any thread end all processes: the others would wait for this one.
fn end_all_on_panic(comm: Weak<dyn Communicator>) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        if let Some(comm) = comm.upgrade() {
            let text = panic.payload().downcast_ref::<&str>().copied();
            let what = text.or_else(|| panic.payload().downcast_ref::<String>().map(String::as_str));
            let what = what.unwrap_or("a panic");
            stderr_line(format_args!("dsmoe: error: {}: {what}", name(&*comm)));
            comm.abort(101);
        }
    }));
}

/// The name of a process in messages.
fn name(comm: &dyn Communicator) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match host.trim() {
        "" => format!("rank {}", comm.rank()),
        host => format!("rank {} ({host})", comm.rank()),
    }
}

/// Returns the output of this process: the first one prints results and notes.
pub(crate) fn ui_of(comm: &dyn Communicator, ui: &Ui) -> Ui {
    let other = comm.rank() > 0;
    Ui { quiet: ui.quiet || other, muted: other, ..ui.clone() }
}

/// Returns the worker threads of this process, unless `asked` says: the cores of its machine are divided.
pub(crate) fn threads_of(comm: &dyn Communicator, asked: Option<u16>) -> usize {
    let shared = || std::thread::available_parallelism().map_or(1, |cores| cores.get() / comm.place().locals);
    match asked {
        Some(threads) => usize::from(threads),
        // All cores, as the pool counts them.
        None if comm.size() == 1 => 0,
        None => shared().max(1),
    }
}

/// Shares an outcome, as [`comm::agree`] does: the process that failed first keeps its error.
pub(crate) fn agree<T>(comm: &dyn Communicator, of: What, outcome: Result<T>) -> Result<T> {
    if comm.size() == 1 {
        return outcome;
    }
    let (told, own) = match outcome {
        Ok(value) => (Ok(value), None),
        Err(error) => (Err(format!("{error:#}")), Some(error)),
    };
    match (comm::agree(comm, of, told), own) {
        (Err(CommError::Reported { other, .. }), Some(error)) if other == comm.rank() => Err(error),
        (outcome, _) => Ok(outcome?),
    }
}

/// Checks that all processes were started with these arguments on the model in `model`, and have the same values of `more`.
pub(crate) fn check_alike(
    comm: &dyn Communicator,
    args: &dyn Debug,
    model: &Path,
    more: &[(&str, String)],
) -> Result<()> {
    if comm.size() == 1 {
        return Ok(());
    }
    let identity = agree(comm, What::of("the model"), dsmoe_train::identity_of(model).map_err(Into::into))?;
    let own = [
        ("the version", env!("CARGO_PKG_VERSION").to_owned()),
        ("the instruction set", Isa::current().name().to_owned()),
        ("the arguments", sha256(&format!("{args:?}"))[..12].to_owned()),
        ("the model", identity[..12].to_owned()),
    ];
    let values = own.iter().chain(more).map(|(name, value)| ((*name).to_owned(), value.clone()));
    Ok(dsmoe_train::check_alike(comm, &values.collect::<BTreeMap<_, _>>())?)
}

/// Returns the status of a command. After an error of several processes the one that has it prints it with its rank, and ends
/// all.
pub(crate) fn ended(comm: &dyn Communicator, outcome: Result<ExitCode>, ui: &Ui) -> Result<ExitCode> {
    let error = match outcome {
        Err(error) if comm.size() > 1 => error,
        outcome => return outcome,
    };
    match of_comm(&error) {
        // The process that has the error ends this one.
        Some(CommError::Reported { .. }) => std::thread::sleep(TO_BE_ENDED),
        // Such a message names the rank.
        Some(_) => drop(Ui { muted: false, ..ui.clone() }.fail(&error)),
        None => {
            if comm.rank() > 0 {
                // An error that all have is that of the first process, which ends this one.
                std::thread::sleep(OF_THE_FIRST);
            }
            let named: Result<()> = Err(error).with_context(|| name(comm));
            if let Err(error) = named {
                Ui { muted: false, ..ui.clone() }.fail(&error);
            }
        }
    }
    comm.abort(1)
}

/// Returns the error of communication in a chain.
fn of_comm(error: &anyhow::Error) -> Option<&CommError> {
    error.chain().find_map(|cause| {
        if let Some(dsmoe_baselines::Error::Core(error)) = cause.downcast_ref() {
            return of_core(error);
        }
        match cause.downcast_ref() {
            Some(dsmoe_train::Error::Comm(error)) => Some(error),
            Some(dsmoe_train::Error::Core(error)) => of_core(error),
            _ => cause.downcast_ref().and_then(of_core).or_else(|| cause.downcast_ref()),
        }
    })
}

fn of_core(error: &dsmoe_core::Error) -> Option<&CommError> {
    match error {
        dsmoe_core::Error::Comm(error) => Some(error),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;
    use std::time::Instant;

    use clap::Parser;
    use dsmoe_kernels::testing::mpi_launchers;

    use super::*;

    /// Is set in the processes of the test of a panic.
    const PANICKING: &str = "DSMOE_TEST_PANIC";

    /// Is process by process the test of a panic: the others wait for the one that panics.
    fn panics() {
        #[derive(Debug, Parser)]
        struct Line {
            #[command(flatten)]
            processes: ProcessArgs,
        }
        let line = Line::parse_from(["test", "--deadline", "60"]);
        let comm = connect(Some(&line.processes)).unwrap();
        assert!(comm.rank() != 2, "a broken invariant");
        comm.barrier(What::of("the end")).unwrap();
    }

    #[test]
    fn a_panic_of_one_process_ends_all_with_its_rank() {
        if std::env::var_os(PANICKING).is_some() {
            return panics();
        }
        let this = std::env::current_exe().unwrap();
        for launcher in mpi_launchers("a_panic_of_one_process_ends_all_with_its_rank") {
            let mut command = launcher.command(4, &this);
            let name = "processes::tests::a_panic_of_one_process_ends_all_with_its_rank";
            command.args(["--exact", name, "--nocapture"]).env(PANICKING, "1").stdin(Stdio::null());
            let began = Instant::now();
            let output = command.output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(began.elapsed() < Duration::from_secs(10), "{}: {told}", launcher.name);
            assert!(!output.status.success(), "{}: {told}", launcher.name);
            let lines: Vec<&str> = told.lines().filter(|line| line.contains("dsmoe: error: ")).collect();
            let [line] = &lines[..] else { panic!("{}: {told}", launcher.name) };
            assert!(
                line.contains("rank 2 (") && line.contains("a broken invariant"),
                "{}: {line}",
                launcher.name
            );
        }
    }

    #[test]
    fn errors_of_communication_are_found_in_a_chain() {
        let reported = || CommError::Reported { other: 2, problem: "no space".to_owned() };
        for error in [
            anyhow::Error::new(dsmoe_train::Error::Comm(reported())),
            anyhow::Error::new(reported()).context("training"),
            anyhow::Error::new(dsmoe_baselines::Error::Core(dsmoe_core::Error::Comm(reported()))),
        ] {
            assert!(matches!(of_comm(&error), Some(CommError::Reported { other: 2, .. })), "{error:?}");
        }
        assert!(of_comm(&anyhow::anyhow!("no space")).is_none());
    }

    #[test]
    fn the_first_process_prints_and_cores_are_divided() {
        let ui = Ui { json: true, quiet: false, muted: false, color: clap::ColorChoice::Never, call: None };
        let printing = comm::threads::on_threads(2, |comm| {
            let ui = ui_of(comm, &ui);
            (ui.quiet, ui.muted, threads_of(comm, Some(3)), threads_of(comm, None))
        });
        let each = std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1));
        assert_eq!(printing, [(false, false, 3, each), (true, true, 3, each)]);
        assert_eq!((threads_of(&Alone, None), threads_of(&Alone, Some(2))), (0, 2));
    }
}
