//! The stages of a set of experiments, and `--dry-run`: their cost on this machine.

use anyhow::Result;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_kernels::Precision;
use serde::Serialize;

use super::super::cost::Costs;
use super::definition::Definition;
use super::experiment::Experiment;
use super::sketch::{Planned, Sketch};
use crate::estimate::{self, H100, flops_per_second};
use crate::format::{self, Table};
use crate::ui::Ui;

/// The dense model or an experiment, with a seed.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    name: String,
    seed: u64,
    #[serde(flatten)]
    pub(super) planned: Planned,
}

#[derive(Debug, Serialize)]
struct Plan<'a> {
    profile: &'a Definition,
    model: String,
    dense_params: u64,
    rows: Vec<Row>,
    stages: usize,
    /// Tokens of forward passes of the dense model that cost as much.
    tokens: f64,
    flops: f64,
    flops_per_second: f64,
    hours: f64,
    hours_h100: f64,
    #[serde(skip)]
    hidden: usize,
}

/// Counts the stages of experiments for all seeds. `given`: the dense model need not be trained.
pub(super) fn count(wanted: &[&Experiment], costs: Costs<'_>, seeds: u64, given: bool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for seed in 0..seeds {
        let mut sketch = Sketch::new(costs);
        if let (Some(config), false) = (costs.profile.pretrain(), given) {
            sketch.trainings(1, &config?)?;
            rows.push(Row { name: "dense model".to_owned(), seed, planned: sketch.take() });
        }
        for experiment in wanted {
            (experiment.plan)(&mut sketch)?;
            rows.push(Row { name: experiment.name.to_owned(), seed, planned: sketch.take() });
        }
    }
    Ok(rows)
}

/// Shows the plan of `rows`.
pub(super) fn show(
    rows: Vec<Row>,
    (profile, dense, model): (&Definition, &Config, String),
    ui: &mut Ui,
) -> Result<()> {
    ui.note("measuring this machine");
    let speed = flops_per_second(dense, Precision::F32);
    let counts = Accounting::of(dense);
    let tokens: f64 = rows.iter().map(|row| row.planned.tokens).sum();
    let seq = profile.profile(0).train()?.seq;
    let flops = tokens * counts.mean_flops_per_token(counts.num_experts, seq);
    let plan = Plan {
        profile,
        model,
        dense_params: counts.total,
        stages: rows.iter().map(|row| row.planned.stages).sum(),
        rows,
        tokens,
        flops,
        flops_per_second: speed,
        hours: flops / speed / 3600.0,
        hours_h100: H100.hours(flops, false),
        hidden: dense.hidden,
    };
    ui.result(&plan, table)
}

fn table(plan: &Plan<'_>) -> String {
    let mut table = Table::new(["experiment", "seed", "stages", "tokens"]);
    for Row { name, seed, planned } in &plan.rows {
        table.row([
            name.clone(),
            seed.to_string(),
            planned.stages.to_string(),
            format::amount(planned.tokens),
        ]);
    }
    let speed = format!(
        "{} FLOP/s throughout; models this small take several times as long",
        format::flops(plan.flops_per_second)
    );
    let fields = [
        ("profile", format!("{}: {}", plan.profile.name, plan.profile.about)),
        ("model", format!("{}, {} parameters", plan.model, format::count(plan.dense_params))),
        ("stages", plan.stages.to_string()),
        (
            "tokens",
            format!("{} of forward passes of the dense model, or as much work", format::amount(plan.tokens)),
        ),
        ("time", estimate::words(plan.hours, &speed, plan.hours_h100, (plan.hidden, plan.dense_params))),
    ];
    format!("{}\n{}", table.show(), format::fields(fields))
}
