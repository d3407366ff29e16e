//! `dsmoe plan`: budgets and devices of requests, chosen by a network with several heads.

mod choose;
mod eval;
mod offload;
mod placing;
mod profile;
mod train;

pub(super) use self::choose::{Chosen, for_prompt};
#[cfg(test)]
pub(crate) use self::profile::check_folder;

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::plan::{Plan, PlanCommand};
use crate::ui::Ui;

pub(crate) fn run(args: &Plan, ui: &mut Ui) -> Result<ExitCode> {
    match &args.command {
        PlanCommand::Profile(args) => return profile::run(args, ui),
        PlanCommand::Train(args) => train::run(args, ui)?,
        PlanCommand::Eval(args) => eval::run(args, ui)?,
        PlanCommand::Choose(args) => choose::run(args, ui)?,
        PlanCommand::Offload(args) => offload::run(args, ui)?,
    }
    Ok(ExitCode::SUCCESS)
}
