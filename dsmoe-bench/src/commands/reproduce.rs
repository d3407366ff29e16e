//! `dsmoe reproduce`: the paper's comparison, from text to report.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::reproduce::{Reproduce, Sub};
use crate::reproduce::{self, merge, profile, speed, splice};
use crate::ui::Ui;

pub(crate) fn run(args: &Reproduce, ui: &mut Ui) -> Result<ExitCode> {
    match &args.command {
        Some(Sub::Speed(args)) => speed::run(args, ui)?,
        Some(Sub::Merge(args)) => merge::run(&args.parts, &args.out, args.force, ui)?,
        Some(Sub::Splice(args)) => splice::run(&args.files, args.check, ui)?,
        None => match &args.print_profile {
            Some(name) => ui.text(profile::text(name).unwrap_or_default())?,
            None => return reproduce::run(args, ui),
        },
    }
    Ok(ExitCode::SUCCESS)
}
