//! `dsmoe oracle`: for every token the best of many routes through the layers.

use std::path::{Path, PathBuf};

use anyhow::Result;
use dsmoe_core::{Device, Model};
use dsmoe_datasets::tasks::sha256;
use dsmoe_kernels::comm::Alone;
use dsmoe_train::identity_of;
use dsmoe_train::oracle::{
    self, AnyReport, OracleOptions, OraclePlan, OracleReport, RouteContext, TokenRoutes,
};
use serde::Serialize;

use crate::calibration::Stages;
use crate::cli::gates::GateArgs;
use crate::cli::oracle::Oracle;
use crate::files::{check_file, lossy, write_json};
use crate::format::{self, Table};
use crate::models::{load_inference, show_config_notices, tokenizer};
use crate::texts::{load_on, open, options};
use crate::ui::Ui;

/// The default window length.
const SEQ: usize = 256;

#[derive(Debug, Serialize)]
struct Planned<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a Path,
    tokens: usize,
    seq: usize,
    #[serde(flatten)]
    plan: OraclePlan,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a Path,
    #[serde(serialize_with = "lossy")]
    data: &'a [PathBuf],
    dtype: &'static str,
    seed: u64,
    #[serde(flatten)]
    found: &'a OracleReport,
}

/// The contents of the file of routes.
#[derive(Serialize)]
struct Routes<'a> {
    #[serde(flatten)]
    report: Report<'a>,
    tokens: &'a TokenRoutes,
}

pub(crate) fn run(args: &Oracle, ui: &mut Ui) -> Result<()> {
    args.out.as_deref().map_or(Ok(()), |out| check_file(out, args.force))?;
    let texts = open(&args.data, &options(&args.data))?;
    let mut model = load_inference(&args.model, args.dtype, Device::Cpu, GateArgs::default())?;
    show_config_notices(model.config(), ui);
    let tokenizer = tokenizer(&args.model, model.config(), ui)?;
    let bos = args.bos.unwrap_or_default();
    let sources = load_on(&Alone, &texts, (&tokenizer, bos), args.data.cache.as_deref(), ui)?;
    let limit = usize::try_from(args.limit_tokens).unwrap_or(usize::MAX);
    let mut ids = Vec::new();
    for source in &sources {
        let mut part = Vec::new();
        source.tokens.read(0..source.tokens.len().min(limit), &mut part)?;
        ids.extend_from_slice(&part);
    }
    let options = OracleOptions {
        kind: args.routes,
        seq: args.seq.unwrap_or(SEQ.min(model.config().max_position)),
        exact_up_to: args.exact,
        beam: args.beam,
        budget: args.budget,
        context: args.context,
        control: !args.no_control,
        precision: args.dtype,
        seed: args.seed,
    };
    let plan = oracle::plan(&model, ids.len(), &options)?;
    if args.dry_run {
        let planned = Planned { model: &args.model, tokens: ids.len(), seq: options.seq, plan };
        return ui.result(&planned, show_plan);
    }

    let state = args.out.as_ref().map(|out| PathBuf::from(format!("{}.partial", out.display())));
    let made_by = format!("{} {options:?} {}", identity_of(&args.model)?, sha256(&format!("{ids:?}")));
    let source = || Ok(Model::load(&args.model)?);
    let mut stages = Stages::new(ui);
    let work = oracle::Oracle {
        model: &mut model,
        source: &source,
        ids: &ids,
        options,
        state: state.as_deref(),
        made_by: &made_by,
    };
    let found = oracle::run(work, &mut |stage, done, all| stages.set(stage, done, all));
    stages.finish();
    let (found, tokens) = found?;
    let report = || Report {
        model: &args.model,
        data: &args.data.data,
        dtype: args.dtype.name(),
        seed: args.seed,
        found: &found,
    };
    if let Some(out) = &args.out {
        write_json(out, &Routes { report: report(), tokens: &tokens })?;
    }
    ui.result(&report(), show)
}

fn show_plan(planned: &Planned<'_>) -> String {
    let Planned { model, tokens, seq, plan } = planned;
    let routes = match plan.all_routes {
        Some(routes) => format::count(routes),
        None => format!("more than {}", format::count(oracle::MOST_ROUTES)),
    };
    let how = if plan.exact { "all are measured" } else { "a search measures some" };
    format!(
        "{}: {routes} routes through {} layers; {how}\n  {} tokens in windows of {seq}, {} predicted in a pass\n  \
        passes: at most {}\n",
        model.display(),
        plan.layers,
        format::count(*tokens as u64),
        format::count(plan.predicted as u64),
        format::count(plan.passes),
    )
}

fn show(report: &Report<'_>) -> String {
    let OracleReport { levels, any, budget, own_choice, context, .. } = report.found;
    let how = if report.found.exact { "all" } else { "found by a search" };
    let mut text = format!(
        "{}: {} routes ({how}), {} tokens, loss {:.4}\n",
        report.model.display(),
        format::count(report.found.measured),
        format::count(report.found.predicted as u64),
        report.found.default,
    );
    let mut table =
        Table::new(["level", "routes", "mean", "best route", "best", "oracle", "control", "beyond"]);
    let loss = |loss: f64| format!("{loss:.4}");
    for level in levels {
        table.row([
            level.level.to_string(),
            format::count(level.routes),
            loss(level.mean),
            level.best_route.clone(),
            loss(level.best),
            loss(level.oracle),
            format::or_dash(level.control.map(|control| control.oracle), loss),
            format::or_dash(level.beyond, loss),
        ]);
    }
    text += &table.show();
    let line = |what: &str, AnyReport { oracle, mean_level, control, beyond }: AnyReport| {
        let [control, beyond] = [control, beyond].map(|value| format::or_dash(value, loss));
        format!(
            "{what}: oracle {oracle:.4} at level {mean_level:.2} in the mean; control {control}; beyond {beyond}\n"
        )
    };
    text += &format!("\n{}", line("any route", *any));
    if let Some(budget) = budget {
        text += &line(&format!("every token up to level {}", budget.level), budget.each);
        text += &line(&format!("tokens up to level {} in the mean", budget.level), budget.mean);
    }
    if let Some(own) = own_choice {
        text += &format!(
            "rank correlation of a token's active experts with its loss {}, with what computation takes away {}\n",
            format::or_dash(own.with_loss, loss),
            format::or_dash(own.with_gain, loss),
        );
    }
    let earlier = match context {
        RouteContext::Same => "take the route that is tried",
        RouteContext::Dense => "take the default route",
        RouteContext::Greedy => "have taken their best routes",
    };
    text += &format!("\nearlier tokens of a window {earlier}\n");
    text + "control: as many noisy copies of the model, of the same mean loss; beyond: control less oracle.\n"
}
