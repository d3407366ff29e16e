//! `dsmoe convert`: cuts the FFNs of a dense model into experts.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_baselines::dsmoe::Routers;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::convert::{Calibration, ConvertOptions, PartitionSpec, RouterStart, convert};
use dsmoe_router::{GateValue, RouterConfig, RouterInit};
use serde::Serialize;

use crate::calibration::{self, Stages};
use crate::cli::model::Convert;
use crate::files::lossy;
use crate::format;
use crate::ui::Ui;

/// Experts per layer by default.
const DEFAULT_EXPERTS: usize = 8;

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
    params_total: u64,
    params_router: u64,
    bytes: u64,
    seconds: f64,
}

pub(crate) fn run(args: &Convert, ui: &mut Ui) -> Result<()> {
    let calibrated = !args.calibration.calib.is_empty();
    let routers = args.router_init.unwrap_or(match calibrated {
        true => Routers::Calibrated,
        false => Routers::Untrained(RouterInit::Random),
    });
    let partition = args.partition.clone().unwrap_or(match calibrated {
        true => PartitionSpec::Clusters,
        false => PartitionSpec::Contiguous,
    });
    if let Some(share) = args.active_target.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
        bail!("--active-target {share} is not a share; use a number above 0 and up to 1");
    }
    let start = match (routers, calibrated, args.active_target) {
        (Routers::Untrained(init), false, _) => RouterStart::Init(init),
        (Routers::Untrained(init), true, _) => bail!(
            "--router-init {init} does not read --calib; leave one of them out, or use --router-init calibrated"
        ),
        (Routers::Calibrated, false, _) => {
            bail!("--router-init calibrated needs text; name it with --calib PATH")
        }
        (Routers::Calibrated, true, None) => {
            bail!(
                "--calib needs the share of experts that the routers open; give --active-target, such as 0.375"
            )
        }
        (Routers::Calibrated, true, Some(active)) => {
            let config = Config::load(&args.model)?;
            let sequences = calibration::read(&args.calibration, &args.model, &config, args.seed, ui)?;
            RouterStart::Calibrated(Calibration { sequences, active })
        }
    };
    let num_experts = args.experts.map_or(DEFAULT_EXPERTS, |experts| experts as usize);
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
    let started = Instant::now();
    let mut stages = Stages::new(ui);
    let done = convert(&args.model, &args.out, &options, &mut |at| stages.set(at.stage, at.done, at.total));
    stages.finish();
    let done = done?;
    let config = Config::load(&args.out)?;
    config.notices().iter().for_each(|notice| ui.note(notice));
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
