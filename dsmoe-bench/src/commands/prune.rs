//! `dsmoe prune`: a dense model made smaller by one of the methods that DSMoE is compared with.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_baselines::{Configured, Job, Made, SettingValues, method, read_settings};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_kernels::comm::Communicator;
use serde::Serialize;

use crate::calibration::{self, CalibrationReport, Stages};
use crate::cli::prune::Prune;
use crate::files::lossy;
use crate::format;
use crate::models::show_config_notices;
use crate::processes::check_alike;
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct Report<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a Path,
    #[serde(serialize_with = "lossy", skip_serializing_if = "Option::is_none")]
    out: Option<&'a Path>,
    method: &'static str,
    /// Activated parameters asked for.
    budget: f64,
    params_dense: u64,
    params_total: f64,
    params_activated: f64,
    /// Activated parameters over those asked for.
    reached: f64,
    reached_by: String,
    /// Quantities that follow from the budget.
    resolved: BTreeMap<String, String>,
    settings: SettingValues,
    #[serde(skip_serializing_if = "Option::is_none")]
    active_target: Option<f64>,
    seed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<CalibrationReport<'a>>,
    measured: BTreeMap<String, f64>,
    seconds: f64,
}

pub(crate) fn run(args: &Prune, comm: &Arc<dyn Communicator>, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let method = method(&args.method)?;
    let configured = method.configure(&read_settings(args.set.iter().map(String::as_str))?)?;
    let config = Config::load(&args.model)?;
    show_config_notices(&config, ui);
    let dense = Accounting::of(&config).total;
    let plan = configured.plan(&config, args.budget)?;
    let out = args.out.as_deref().filter(|_| !args.dry_run);
    let (plan, measured) = match out {
        Some(out) => {
            let made = make((args, &*configured), comm, out, &config, ui)?;
            (made.plan, made.measured)
        }
        None => (plan, Vec::new()),
    };
    let budget = args.budget.params(dense);
    let report = Report {
        model: &args.model,
        out,
        method: method.name(),
        budget,
        params_dense: dense,
        params_total: plan.total,
        params_activated: plan.activated,
        reached: plan.activated / budget,
        reached_by: plan.reached_by,
        resolved: plan.settings.into_iter().collect(),
        settings: configured.resolved(),
        active_target: plan.active_target,
        seed: args.seed,
        calibration: configured
            .needs_calibration()
            .then(|| CalibrationReport::new(&args.calibration, &config)),
        measured: measured.into_iter().collect(),
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, show)
}

fn make(
    (args, method): (&Prune, &dyn Configured),
    comm: &Arc<dyn Communicator>,
    out: &Path,
    config: &Config,
    ui: &Ui,
) -> Result<Made> {
    let calibration = match method.needs_calibration() {
        true if args.calibration.calib.is_empty() => {
            bail!("--method {} reads calibration text; name the training text with --calib PATH", args.method)
        }
        true => calibration::read_on(&**comm, &args.calibration, (&args.model, config), args.seed, ui)?,
        false => Vec::new(),
    };
    check_alike(
        &**comm,
        args,
        &args.model,
        &[("the calibration text", calibration::identity(&calibration))],
    )?;
    let job = Job {
        model: &args.model,
        out,
        force: args.force,
        budget: args.budget,
        calibration: &calibration,
        seed: args.seed,
        comm,
    };
    let mut stages = Stages::new(ui);
    let made = method.run(&job, &mut |at| stages.set(at.stage, at.done, at.total));
    stages.finish();
    Ok(made?)
}

fn show(report: &Report<'_>) -> String {
    let millions = |params: f64| format::count(params.round() as u64);
    let mut text = match report.out {
        Some(out) => format!("{}: {}", out.display(), report.method),
        None => format!("{}: {} would be", report.model.display(), report.method),
    };
    text += &format!(
        ", {}; {} parameters, {} of them activated ({} of the budget, {} of the dense model)\n",
        report.reached_by,
        millions(report.params_total),
        millions(report.params_activated),
        format::percent(report.reached),
        format::percent(report.params_activated / report.params_dense as f64),
    );
    for (name, value) in &report.resolved {
        text += &format!("  {name}: {value}\n");
    }
    for (name, value) in &report.measured {
        text += &format!("  {name}: {value:.6}\n");
    }
    if report.out.is_some() {
        text += &format!("  time: {}\n", format::duration(report.seconds));
    }
    text
}
