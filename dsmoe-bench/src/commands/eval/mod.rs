//! `dsmoe eval`: measures perplexity and active share on text, or scores benchmarks.

mod benchmarks;
mod perplexity;
mod results;

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::eval::Eval;
use crate::ui::Ui;

pub(crate) fn run(args: &Eval, ui: &mut Ui) -> Result<ExitCode> {
    if args.tasks.is_empty() {
        perplexity::run(args, ui)?;
        return Ok(ExitCode::SUCCESS);
    }
    benchmarks::run(args, ui)
}
