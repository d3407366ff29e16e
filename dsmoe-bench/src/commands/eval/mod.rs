//! `dsmoe eval`: measures perplexity and active share on text, or scores benchmarks.

mod benchmarks;
mod perplexity;
mod results;

use std::process::ExitCode;

use anyhow::Result;
use dsmoe_kernels::comm::Communicator;

use crate::cli::eval::Eval;
use crate::ui::Ui;

pub(crate) fn run(args: &Eval, comm: &dyn Communicator, ui: &mut Ui) -> Result<ExitCode> {
    if args.tasks.is_empty() {
        perplexity::run(args, comm, ui)?;
        return Ok(ExitCode::SUCCESS);
    }
    benchmarks::run(args, comm, ui)
}
