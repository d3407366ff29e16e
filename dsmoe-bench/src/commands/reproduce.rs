//! `dsmoe reproduce`: the paper's comparison, from text to report.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::reproduce::{Reproduce, Sub};
use crate::reproduce::options::{Options, TextSource};
use crate::reproduce::{self, merge, profile, speed, splice};
use crate::ui::Ui;

pub(crate) fn run(args: &Reproduce, ui: &mut Ui) -> Result<ExitCode> {
    match &args.command {
        Some(Sub::Speed(args)) => {
            speed::run(&args.model, &args.ids, args.decode, args.threshold, args.device, ui)?;
        }
        Some(Sub::Merge(args)) => merge::run(&args.parts, &args.out, args.force, ui)?,
        Some(Sub::Splice(args)) => splice::run(&args.files, args.check, ui)?,
        None => match &args.print_profile {
            Some(name) => ui.text(profile::text(name).unwrap_or_default())?,
            None => return reproduce::run(&options(args), ui),
        },
    }
    Ok(ExitCode::SUCCESS)
}

fn options(args: &Reproduce) -> Options {
    let words = (!args.data.is_empty()).then(|| TextSource::Words(args.data.clone()));
    Options {
        profile: args.profile.clone(),
        only: args.only.clone(),
        methods: args.methods.clone(),
        seeds: args.seeds,
        out: args.out.clone(),
        stages: args.stages.clone(),
        resume: args.resume,
        dry_run: args.dry_run,
        shard: args.shard,
        stop_after: args.stop_after,
        model: args.model.clone(),
        text: args.mixture.clone().map(TextSource::Mixture).or(words),
        token_cache: args.cache.clone(),
        device: args.device,
        task_data: args.task_data.clone(),
    }
}
