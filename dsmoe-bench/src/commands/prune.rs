//! `dsmoe prune`: a model made smaller by one of the methods that DSMoE is compared with, or a mixture with fewer experts.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_baselines::{
    Budget, Configured, Counts, Job, Made, Partial, SettingValues, Source, method, read_settings,
};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, open_model};
use dsmoe_core::config::Config;
use dsmoe_kernels::comm::Communicator;
use dsmoe_train::identity_of;
use serde::Serialize;

use crate::calibration::{self, CalibrationReport, Stages};
use crate::cli::prune::Prune;
use crate::files::{check_output, lossy};
use crate::format;
use crate::models::{file_bytes, show_config_notices};
use crate::processes::check_alike;
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct Report<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a Path,
    #[serde(serialize_with = "lossy", skip_serializing_if = "Option::is_none")]
    out: Option<&'a Path>,
    method: &'static str,
    /// The parameters that the budget counts.
    counts: Counts,
    /// Parameters asked for.
    budget: f64,
    /// All parameters of a dense source.
    #[serde(skip_serializing_if = "Option::is_none")]
    params_dense: Option<u64>,
    /// All parameters of a source with experts, and those of it that a token uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    source_held: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_activated: Option<f64>,
    params_total: f64,
    params_activated: f64,
    /// Bytes of the weight files, headers included, of the result and of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_bytes: Option<u64>,
    /// Parameters that are counted over those asked for.
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
    /// The notices of the plan, which were printed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notices: Vec<String>,
    seconds: f64,
}

pub(crate) fn run(args: &Prune, comm: &Arc<dyn Communicator>, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let method = method(&args.method)?;
    let configured = method.configure(&read_settings(args.set.iter().map(String::as_str))?)?;
    let config = Config::load(&args.model)?;
    show_config_notices(&config, ui);
    let source = Accounting::of(&config);
    let asked = args.budget.of(method)?;
    let plan = configured.plan(&config, asked)?;
    plan.notices.iter().for_each(|notice| ui.note(format_args!("note: {notice}")));
    if args.resume && !configured.continues() {
        bail!("--resume: --method {} does not continue with these settings; leave it out", args.method);
    }
    if args.resume && comm.size() > 1 {
        bail!("--resume: several processes do not continue a method; leave it out, or use one process");
    }
    let out = args.out.as_deref().filter(|_| !args.dry_run);
    let (plan, measured) = match out {
        Some(out) => {
            let made = make((args, &*configured, asked), comm, out, &config, ui)?;
            (made.plan, made.measured)
        }
        None => {
            // What a run refuses before its work is refused in a plan too.
            args.out.as_deref().map_or(Ok(()), |out| check_output(&args.model, out, args.force))?;
            calibration::check_text(&args.calibration)?;
            (plan, Vec::new())
        }
    };
    // The process that writes the result sees it.
    let written = out.filter(|_| comm.rank() == 0);
    let stored = |model: &Path| file_bytes(&Checkpoint::open(model)?);
    let budget = asked.params(source.total);
    let (counts, is_dense) = (method.counts(), method.source() == Source::Dense);
    let counted = match counts {
        Counts::Activated => plan.activated,
        Counts::Held => plan.total,
    };
    let report = Report {
        model: &args.model,
        out,
        method: method.name(),
        counts,
        budget,
        params_dense: is_dense.then_some(source.total),
        source_held: (!is_dense).then_some(source.total),
        source_activated: (!is_dense).then(|| source.activated(source.num_experts)),
        params_total: plan.total,
        params_activated: plan.activated,
        bytes: written.map(stored).transpose()?,
        source_bytes: written.map(|_| stored(&args.model)).transpose()?,
        reached: counted / budget,
        reached_by: plan.reached_by,
        resolved: plan.settings.into_iter().collect(),
        settings: configured.resolved(),
        active_target: plan.active_target,
        seed: args.seed,
        calibration: configured
            .needs_calibration()
            .then(|| CalibrationReport::new(&args.calibration, &config)),
        measured: measured.into_iter().collect(),
        notices: plan.notices,
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, show)
}

fn make(
    (args, method, budget): (&Prune, &dyn Configured, Budget),
    comm: &Arc<dyn Communicator>,
    out: &Path,
    config: &Config,
    ui: &Ui,
) -> Result<Made> {
    check_output(&args.model, out, args.force)?;
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
    // Some methods leave tensors out that others read.
    open_model(&args.model, config)?.check_finite()?;
    let partial = match method.continues() && comm.size() == 1 {
        true => Some(partial((args, method, budget), out, &calibration)?),
        false => None,
    };
    let job = Job {
        model: &args.model,
        out,
        force: args.force,
        budget,
        calibration: &calibration,
        seed: args.seed,
        comm,
        partial: partial.as_ref().unwrap_or(Partial::none()),
    };
    let mut stages = Stages::new(ui);
    let made = method.run(&job, &mut |at| stages.set(at.stage, at.done, at.total));
    stages.finish();
    let made = made?;
    partial.map_or(Ok(()), Partial::remove)?;
    Ok(made)
}

/// Returns the parts of the work that an interruption leaves.
fn partial(
    (args, method, budget): (&Prune, &dyn Configured, Budget),
    out: &Path,
    calibration: &[Vec<u32>],
) -> Result<Partial> {
    let made_by = format!(
        "prune {} {} {} {budget:?} {} {}",
        args.method,
        serde_json::to_string(&method.resolved())?,
        identity_of(&args.model)?,
        calibration::identity(calibration),
        args.seed,
    );
    Ok(Partial::open(out, made_by, args.resume)?)
}

fn show(report: &Report<'_>) -> String {
    let millions = |params: f64| format::count(params.round() as u64);
    let mut text = match report.out {
        Some(out) => format!("{}: {}", out.display(), report.method),
        None => format!("{}: {} would be", report.model.display(), report.method),
    };
    let [total, activated] = [report.params_total, report.params_activated].map(millions);
    let of_budget = format::percent(report.reached);
    text += &match (report.source_held, report.params_dense) {
        (Some(_), _) if report.counts == Counts::Activated => format!(
            ", {}; {total} parameters held, {activated} of them activated ({of_budget} of the budget)\n",
            report.reached_by,
        ),
        (Some(held), _) => format!(
            ", {}; {total} parameters held ({of_budget} of the budget, {} of {} held before), {activated} of them activated\n",
            report.reached_by,
            format::percent(report.params_total / held as f64),
            format::count(held),
        ),
        (None, dense) => format!(
            ", {}; {total} parameters, {activated} of them activated ({of_budget} of the budget, {} of the dense model)\n",
            report.reached_by,
            format::percent(report.params_activated / dense.unwrap_or(1) as f64),
        ),
    };
    if let (Some(now), Some(before)) = (report.bytes, report.source_bytes) {
        text += &format!("  weights on disk: {}, {} before\n", format::bytes(now), format::bytes(before));
    }
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
