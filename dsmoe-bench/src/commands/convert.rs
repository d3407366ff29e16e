//! `dsmoe convert`: cuts the FFNs of a dense LLaMA into experts.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_router::RouterConfig;
use serde::Serialize;

use crate::cli::model::Convert;
use crate::format;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct Report {
    model: PathBuf,
    out: PathBuf,
    experts: usize,
    expert_width: usize,
    partition: String,
    router_init: String,
    params_total: u64,
    params_router: u64,
    bytes: u64,
    seconds: f64,
}

pub(crate) fn run(args: &Convert, ui: &mut Ui) -> Result<()> {
    let num_experts = args.experts as usize;
    let router = RouterConfig {
        num_experts,
        threshold: args.threshold,
        gate_value: args.gate_value,
        rescale: args.rescale,
        zero_active: args.zero_active,
        ste: !args.no_ste,
    };
    let options = ConvertOptions {
        router,
        partition: args.partition.clone(),
        router_init: args.router_init,
        routers: None,
        seed: args.seed,
        force: args.force,
    };
    let started = Instant::now();
    let mut progress = Progress::new(ui, "converting", Unit::Bytes, 0);
    let done =
        convert(&args.model, &args.out, &options, &mut |at| progress.set(at.done_bytes, at.total_bytes, ""));
    progress.finish();
    let done = done?;
    let report = Report {
        model: args.model.clone(),
        out: args.out.clone(),
        experts: num_experts,
        expert_width: done.expert_width,
        partition: args.partition.to_string(),
        router_init: args.router_init.to_string(),
        params_total: Accounting::of(&Config::load(&args.out)?).total,
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
