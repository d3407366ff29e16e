//! One module per command: each parses its arguments, calls a library or another module of this crate, and prints the result.

mod bench;
mod chat;
mod completions;
mod continual;
mod convert;
mod data;
mod doctor;
mod eval;
mod export;
mod generate;
mod grow;
mod import;
mod init;
mod inspect;
mod methods;
mod oracle;
mod plan;
mod prune;
mod reconstruct;
mod reproduce;
mod sweep;
mod train;
mod verify;

use std::error::Error as _;
use std::process::ExitCode;
use std::sync::{Arc, Once};

use anyhow::{Context, Result};
use dsmoe_kernels::Isa;
use dsmoe_kernels::comm::{Alone, Communicator};

use crate::cli::{Cli, Command};
use crate::hub;
use crate::processes;
use crate::ui::Ui;

#[cfg(test)]
pub(crate) use self::{continual::check_file as read_tasks, plan::check_folder as read_plan};

/// Runs the command that `cli` names.
pub(crate) fn run(mut cli: Cli, ui: &mut Ui) -> Result<ExitCode> {
    Isa::from_env()?;
    let comm = processes::connect(cli.command.processes())?;
    let own = &mut processes::ui_of(&*comm, ui);
    let models = hub::find_models(&mut cli, comm.size(), own);
    let outcome = models.and_then(|()| run_on(&comm, cli, own));
    processes::ended(&*comm, outcome, ui)
}

/// Runs the command that `cli` names for a program that calls it in its own process: a single one, whatever has launched it.
pub(crate) fn run_called(mut cli: Cli, ui: &mut Ui) -> Result<ExitCode> {
    Isa::from_env()?;
    let comm: Arc<dyn Communicator> = Arc::new(Alone);
    hub::find_models(&mut cli, comm.size(), ui)?;
    run_on(&comm, cli, ui)
}

/// Starts the worker threads unless they run already, `threads` of them or for 0 one for each core; returns whether it did.
pub(crate) fn start_threads(threads: usize) -> Result<bool> {
    static POOL: Once = Once::new();
    let mut started = Ok(false);
    POOL.call_once(|| {
        // Commands run on these threads; see `on_worker`.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(8 << 20);
        started = match pool.build_global() {
            // An error without a cause: the program that calls commands has started the pool.
            Err(error) if error.source().is_none() => Ok(false),
            outcome => outcome.map(|()| true),
        };
    });
    started.context("cannot start the worker threads; use a smaller --threads")
}

/// Runs the command on the processes of `comm`.
fn run_on(comm: &Arc<dyn Communicator>, cli: Cli, ui: &mut Ui) -> Result<ExitCode> {
    start_threads(processes::threads_of(&**comm, cli.threads))?;
    match &cli.command {
        Command::Inspect(args) => inspect::run(args, ui)?,
        Command::Convert(args) => convert::run(args, comm, ui)?,
        Command::Prune(args) => prune::run(args, comm, ui)?,
        Command::Grow(args) => grow::run(args, ui)?,
        Command::Reconstruct(args) => return reconstruct::run(args, ui),
        Command::Methods => methods::run(ui)?,
        Command::Export(args) => export::run(args, ui)?,
        Command::Import(args) => import::run(args, ui)?,
        Command::Train(args) => return train::run(args, cli.threads, comm, ui),
        Command::Continual(args) => return on_worker(|| continual::run(args, ui)),
        Command::Eval(args) => return on_worker(|| eval::run(args, &**comm, ui)),
        Command::Oracle(args) => on_worker(|| oracle::run(args, ui))?,
        Command::Sweep(args) => return on_worker(|| sweep::run(args, ui)),
        Command::Plan(args) => return on_worker(|| plan::run(args, ui)),
        Command::Generate(args) => on_worker(|| generate::run(args, ui))?,
        Command::Init(args) => init::run(args, ui)?,
        Command::Doctor(args) => doctor::run(args, ui)?,
        Command::Bench(args) => return on_worker(|| bench::run(args, ui)),
        Command::Completions(args) => completions::script(args, ui)?,
        Command::Man(args) => completions::manual(args, ui)?,
        Command::Verify(args) => return verify::run(args, ui),
        Command::Data(args) => return data::run(args, ui),
        Command::Reproduce(args) => return reproduce::run(args, ui),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs `work` on a thread of the pool: every parallel op of a thread outside would wake the pool and sleep until it is
/// done, which costs more than a small op.
fn on_worker<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}
