//! `dsmoe convert`: cuts the FFNs of a dense model into experts, or copies them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_baselines::dsmoe::Routers;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::open_model;
use dsmoe_core::config::Config;
use dsmoe_core::convert::start::{self, Start, StartSettings, default_width};
use dsmoe_core::convert::{
    Calibration, ConvertOptions, ConvertProgress, PartitionSpec, RouterStart, UpcycleOptions, convert_on,
    upcycle,
};
use dsmoe_kernels::comm::Communicator;
use dsmoe_router::{GateValue, RouterConfig, RouterInit};
use serde::Serialize;

use crate::calibration::{self, Stages};
use crate::cli::model::Convert;
use crate::files::{check_output, lossy};
use crate::format;
use crate::models::show_config_notices;
use crate::processes::check_alike;
use crate::ui::Ui;

/// Experts per layer by default.
const DEFAULT_EXPERTS: usize = 8;
/// Experts of a mixture that every token runs by default.
const DEFAULT_TOP_K: usize = 2;
/// The form with gated experts.
const DSMOE: &str = "dsmoe";

#[derive(Debug, Serialize)]
struct Report {
    #[serde(serialize_with = "lossy")]
    model: PathBuf,
    #[serde(serialize_with = "lossy")]
    out: PathBuf,
    experts: usize,
    expert_width: usize,
    partition: String,
    router_init: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    active_target: Option<f64>,
    /// The share of experts that ran on calibration text that they were not fitted to.
    #[serde(skip_serializing_if = "Option::is_none")]
    calibrated_active: Option<f64>,
    params_total: u64,
    params_router: u64,
    bytes: u64,
    seconds: f64,
}

/// The result of making a mixture.
#[derive(Debug, Serialize)]
struct Upcycled {
    #[serde(serialize_with = "lossy")]
    model: PathBuf,
    #[serde(serialize_with = "lossy")]
    out: PathBuf,
    family: String,
    experts: usize,
    top_k: usize,
    expert_width: usize,
    params_total: u64,
    params_activated: f64,
    params_router: u64,
    bytes: u64,
    seconds: f64,
}

/// Makes a mixture whose experts are copies of the FFN.
fn mixture(args: &Convert, ui: &mut Ui) -> Result<()> {
    if let Some(option) = args.of_gates() {
        bail!("{option} is of gated experts; leave it or --as {} out", args.form);
    }
    let options = UpcycleOptions {
        family: args.form.clone(),
        num_experts: args.experts.map_or(DEFAULT_EXPERTS, |experts| experts as usize),
        top_k: args.top_k.map_or(DEFAULT_TOP_K, |k| k as usize),
        seed: args.seed,
        force: args.force,
    };
    let started = Instant::now();
    let mut stages = Stages::new(ui);
    let mut shown = |at: ConvertProgress| stages.set(at.stage, at.done, at.total);
    let done = upcycle(&args.model, &args.out, &options, &mut shown);
    stages.finish();
    let done = done?;
    show_config_notices(&Config::load(&args.model)?, ui);
    let report = Upcycled {
        model: args.model.clone(),
        out: args.out.clone(),
        family: options.family,
        experts: options.num_experts,
        top_k: options.top_k,
        expert_width: done.expert_width,
        params_total: done.total,
        params_activated: done.activated,
        params_router: done.router_params,
        bytes: done.bytes,
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, |report| {
        format!(
            "{}: {} with {} experts of width {} per layer, {} of them for each token, {} parameters ({} activated), {}",
            report.out.display(),
            report.family,
            report.experts,
            report.expert_width,
            report.top_k,
            format::count(report.params_total),
            format::count(report.params_activated as u64),
            format::bytes(report.bytes),
        )
    })
}

pub(crate) fn run(args: &Convert, comm: &Arc<dyn Communicator>, ui: &mut Ui) -> Result<()> {
    if args.form != DSMOE {
        if comm.size() > 1 {
            bail!("--as {} copies weights, which one process does; start a single one", args.form);
        }
        return mixture(args, ui);
    }
    if args.top_k.is_some() {
        bail!("--top-k is of a mixture; add --as mixtral, or leave it out");
    }
    let calibrated = !args.calibration.calib.is_empty();
    let routers = args.router_init.unwrap_or(match calibrated {
        true => Routers::Fitted,
        false => Routers::Untrained(RouterInit::Random),
    });
    let of_start = args.core.is_some() || args.ridge.is_some() || args.budgets.is_some();
    if of_start && routers != Routers::Fitted {
        bail!(
            "--core, --ridge and --budgets are of --router-init fitted; leave them or --router-init {routers} out"
        );
    }
    if routers == Routers::Fitted && args.partition.is_some() {
        bail!(
            "--router-init fitted chooses the experts; leave --partition out, or use --router-init calibrated"
        );
    }
    let partition = args.partition.clone().unwrap_or(match calibrated {
        true => PartitionSpec::Clusters,
        false => PartitionSpec::Contiguous,
    });
    if let Some(share) = args.active_target.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
        bail!("--active-target {share} is not a share; write one above 0 and up to 1, such as 0.4 or 40%");
    }
    let start = match (routers, calibrated, args.active_target) {
        (Routers::Untrained(init), false, _) => RouterStart::Init(init),
        (Routers::Untrained(init), true, _) => bail!(
            "--router-init {init} does not read --calib; leave one of them out, or use --router-init fitted"
        ),
        (Routers::Calibrated | Routers::Fitted, false, _) => {
            bail!("--router-init {routers} needs text; name it with --calib PATH")
        }
        (Routers::Calibrated | Routers::Fitted, true, None) => {
            bail!(
                "--calib needs the share of experts that the routers open; give --active-target, such as 0.375"
            )
        }
        (Routers::Calibrated | Routers::Fitted, true, Some(active)) => {
            let config = Config::load(&args.model)?;
            check_output(&args.model, &args.out, args.force)?;
            let (calibration, model) = (&args.calibration, (&*args.model, &config));
            let sequences = calibration::read_on(&**comm, calibration, model, args.seed, ui)?;
            RouterStart::Calibrated(Calibration { sequences, active })
        }
    };
    let num_experts = match (args.experts, routers) {
        (Some(experts), _) => experts as usize,
        (None, Routers::Fitted) => {
            let config = Config::load(&args.model)?;
            config.intermediate / default_width(config.layers().map(|shape| shape.intermediate))
        }
        (None, _) => DEFAULT_EXPERTS,
    };
    let router = RouterConfig {
        num_experts,
        threshold: args.threshold,
        gate_value: args.gate_value.unwrap_or(match calibrated {
            true => GateValue::Binary,
            false => GateValue::Sigmoid,
        }),
        rescale: args.rescale,
        zero_active: args.zero_active,
        ste: !args.no_ste,
    };
    let options = ConvertOptions {
        router,
        partition,
        routers: start,
        active_target: args.active_target,
        seed: args.seed,
        force: args.force,
    };
    let text = match &options.routers {
        RouterStart::Calibrated(text) => calibration::identity(&text.sequences),
        _ => String::new(),
    };
    check_alike(&**comm, args, &args.model, &[("the calibration text", text)])?;
    let started = Instant::now();
    let mut stages = Stages::new(ui);
    let mut shown = |at: ConvertProgress| stages.set(at.stage, at.done, at.total);
    let done = match &options.routers {
        RouterStart::Calibrated(text) if routers == Routers::Fitted => {
            let fit = fitted(args, &options, text);
            // The layers' stream does not read the final norm and the head.
            open_model(&args.model, &Config::load(&args.model)?)?.check_finite()?;
            start::start_on(comm, &args.model, &args.out, &fit, &mut shown)
                .map(|done| (done.report, Some(done.active)))
        }
        _ => convert_on(comm, &args.model, &args.out, &options, &mut shown).map(|done| (done, None)),
    };
    stages.finish();
    let (done, calibrated_active) = done?;
    show_config_notices(&Config::load(&args.model)?, ui);
    let config = Config::load(&args.out)?;
    if config.architecture.norms_after() {
        ui.note(format_args!(
            "a norm follows the FFN in {}: it undoes common factors of the active experts, such as those of --rescale",
            config.family().model_type
        ));
    }
    let report = Report {
        model: args.model.clone(),
        out: args.out.clone(),
        experts: num_experts,
        expert_width: done.expert_width,
        partition: options.partition.to_string(),
        router_init: routers.to_string(),
        active_target: args.active_target,
        calibrated_active,
        params_total: Accounting::of(&config).total,
        params_router: done.router_params,
        bytes: done.bytes,
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, |report| {
        format!(
            "{}: {} experts of width {} per layer ({} partition, router init {}), {} parameters ({} in routers), {} in {} \
             ({}/s)",
            report.out.display(),
            report.experts,
            report.expert_width,
            report.partition,
            report.router_init,
            format::count(report.params_total),
            format::count(report.params_router),
            format::bytes(report.bytes),
            format::duration(report.seconds),
            format::bytes((report.bytes as f64 / report.seconds.max(1e-9)) as u64)
        )
    })
}

/// Returns the fitted start that the arguments describe.
fn fitted(args: &Convert, options: &ConvertOptions, text: &Calibration) -> Start {
    let mut settings = StartSettings::default();
    settings.core = args.core.unwrap_or(settings.core);
    settings.least_squares = match args.ridge {
        Some(ridge) => Some(ridge).filter(|ridge| *ridge != 0.0),
        None => settings.least_squares,
    };
    settings.budgets = args.budgets.clone();
    Start {
        sequences: text.sequences.clone(),
        active: text.active,
        router: options.router.clone(),
        settings,
        seed: args.seed,
        force: args.force,
    }
}
