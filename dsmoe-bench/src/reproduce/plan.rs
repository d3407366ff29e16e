//! `dsmoe reproduce --dry-run`: what would be done, and what it would take on this machine.

use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_baselines::Budget;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{Config, MoeConfig, PartitionKind};
use dsmoe_core::init::preset;
use dsmoe_datasets::CorpusOptions;
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::linear;
use dsmoe_router::RouterConfig;
use serde::Serialize;

use super::cost::Costs;
use super::jobs::Planned;
use super::options::Options;
use super::profile::{MethodSpec, Profile, Role};
use crate::format::{self, Table};
use crate::memory;
use crate::training::memory_plan;
use crate::ui::Ui;

/// The machine's speed is measured for about so long.
const TRIAL_SECONDS: f64 = 1.0;
/// Tokens of the product that it is measured on.
const TRIAL_TOKENS: usize = 512;
/// FineWeb-edu, OpenWebMath, StarCoder and Cosmopedia.
const PAPER_SOURCES: usize = 4;
/// A model with its optimiser's moments on the disk, beside the model itself: bytes of a parameter.
const CHECKPOINT_BYTES: u64 = 12;

#[derive(Debug, Serialize)]
struct Plan<'a> {
    profile: &'a Profile,
    model: String,
    dense_params: u64,
    budget_params: f64,
    rows: Vec<Row>,
    /// Trainings, that of the dense model included.
    stages: usize,
    tokens: u64,
    flops: f64,
    /// What a product of this model's shape reached here, in the precision of the training.
    flops_per_second: f64,
    dtype: &'static str,
    hours: f64,
    memory_bytes: u64,
    machine_memory_bytes: Option<u64>,
    disk_bytes: u64,
}

/// One training.
#[derive(Debug, Serialize)]
struct Row {
    run: String,
    params_total: f64,
    params_activated: f64,
    steps: u64,
    tokens: u64,
    /// Training, and measuring after it.
    flops: f64,
    hours: f64,
    memory_bytes: u64,
}

pub(super) fn run(args: &Options, profile: &Profile, jobs: &[Planned<'_>], ui: &mut Ui) -> Result<()> {
    let (dense, model) = dense(args, profile)?;
    let train = profile.train()?.resolve()?;
    let precision = train.dtype;
    ui.note("measuring this machine");
    let speed = flops_per_second(&dense, precision);
    let sources = match &profile.world {
        Some(_) => 4,
        None => match &args.text {
            Some(data) => data.open(&CorpusOptions::default())?.len(),
            None => PAPER_SOURCES,
        },
    };
    let costs = Costs { profile, sources, seq: train.seq };
    let counts = Accounting::of(&dense);
    let budget = profile.budget(&dense);
    let mut rows = Vec::new();
    let mut disk_bytes = 4 * counts.total;
    if let (Some(config), None) = (profile.pretrain(), &args.model) {
        let config = config?.resolve()?;
        rows.push(row("dense model", &dense, &counts, 1.0, &config, costs.text(), speed)?);
    }
    for (_, job, parts) in jobs {
        let config = profile.train_of(job.spec, job.seed)?.resolve()?;
        let (shape, share) = shape(job.spec, &dense, profile);
        let counts = Accounting::of(&shape);
        let measured = costs.measuring(*job, parts);
        let mut row = row(&job.id(), &shape, &counts, share, &config, measured, speed)?;
        let planned = profile.configured(job.spec)?.plan(&dense, Budget::Params(budget.round()))?;
        (row.params_total, row.params_activated) = (planned.total, planned.activated);
        if !job.spec.is_dsmoe() {
            // A smaller model computes less, and so do k of n experts; zeros in a matrix are multiplied like others.
            let computes = match planned.keeps_dense_compute {
                true => 1.0,
                false => (planned.activated - counts.norms as f64) / (counts.total - counts.norms) as f64,
            };
            row.flops *= computes;
            row.hours *= computes;
        }
        // What was made, and what was trained of it.
        disk_bytes += 2 * 4 * counts.total;
        rows.push(row);
    }
    if rows.is_empty() {
        bail!("nothing to do: no method of the profile is in these outputs and this part");
    }
    disk_bytes += CHECKPOINT_BYTES * counts.total;
    let plan = Plan {
        profile,
        model,
        dense_params: counts.total,
        budget_params: budget,
        stages: rows.len(),
        tokens: rows.iter().map(|row| row.tokens).sum(),
        flops: rows.iter().map(|row| row.flops).sum(),
        flops_per_second: speed,
        dtype: precision.name(),
        hours: rows.iter().map(|row| row.hours).sum(),
        memory_bytes: rows.iter().map(|row| row.memory_bytes).max().unwrap_or(0),
        machine_memory_bytes: memory::total(),
        disk_bytes,
        rows,
    };
    ui.result(&plan, show)
}

/// The dense model, from its directory or from the profile's sizes.
fn dense(args: &Options, profile: &Profile) -> Result<(Config, String)> {
    if let Some(dir) = &args.model {
        return Ok((Config::load(dir)?, dir.display().to_string()));
    }
    let vocab = match (&profile.world, &profile.model.preset) {
        (Some(world), _) => world.vocab,
        (None, Some(name)) => preset(name)?.vocab_size,
        (None, None) => bail!("profile {}: name a checkpoint with --model DIR", profile.name),
    };
    let name = profile.model.preset.as_deref().unwrap_or("of random weights");
    Ok((profile.architecture(vocab)?, name.to_owned()))
}

/// What a method trains, and the share of its FFN that training computes for inactive parts too.
fn shape(spec: &MethodSpec, dense: &Config, profile: &Profile) -> (Config, f64) {
    let mut config = dense.clone();
    if spec.is_dsmoe() {
        config.moe = Some(MoeConfig {
            router: RouterConfig::new(profile.experts),
            partition: PartitionKind::Contiguous,
            router_bias: false,
            active_target: None,
        });
    }
    let share = match spec.role {
        // All its experts run in training.
        Role::WithoutThreshold => 1.0,
        _ => profile.active,
    };
    (config, share)
}

/// FLOPs of a training token: three passes of everything, but of a gated FFN's nine products three are of all experts and
/// six of the active ones; a fixed number of experts runs those alone; masks save nothing.
fn training_flops(counts: &Accounting, gated: bool, share: f64, seq: usize) -> f64 {
    let experts = counts.num_experts as f64;
    let context = seq as f64 / 2.0;
    let all = counts.flops_per_token(experts, context);
    if !gated {
        return 3.0 * all;
    }
    let none = counts.flops_per_token(0.0, context);
    3.0 * none + (all - none) * (1.0 + 2.0 * share)
}

fn row(
    run: &str,
    config: &Config,
    counts: &Accounting,
    share: f64,
    train: &dsmoe_train::TrainConfig,
    measured_tokens: f64,
    speed: f64,
) -> Result<Row> {
    let gated = config.moe.is_some();
    let steps = train.steps.unwrap_or(0);
    let tokens = steps * train.tokens_per_step();
    let active = share * counts.num_experts as f64;
    let context = train.seq as f64 / 2.0;
    let flops = tokens as f64 * training_flops(counts, gated, share, train.seq)
        + measured_tokens * counts.flops_per_token(active, context);
    let memory = memory_plan(config, train, counts.total, 0);
    Ok(Row {
        run: run.to_owned(),
        params_total: counts.total as f64,
        params_activated: counts.activated(active),
        steps,
        tokens,
        flops,
        hours: flops / speed / 3600.0,
        memory_bytes: memory.iter().map(|memory| memory.bytes).sum(),
    })
}

/// What a product of the shape of this model's FFN reaches on this machine.
fn flops_per_second(config: &Config, precision: Precision) -> f64 {
    let dims =
        linear::Dims { rows: TRIAL_TOKENS, inputs: config.hidden, outputs: config.intermediate, precision };
    let (x, w) = (Buf::zeros(dims.rows * dims.inputs), Buf::zeros(dims.inputs * dims.outputs));
    let mut y = Buf::zeros(dims.rows * dims.outputs);
    let flops = 2.0 * (dims.rows * dims.inputs * dims.outputs) as f64;
    let (began, mut best) = (Instant::now(), 0.0f64);
    while began.elapsed().as_secs_f64() < TRIAL_SECONDS || best == 0.0 {
        let started = Instant::now();
        linear::Forward { y: &mut y, x: &x, w: &w, dims }.run();
        best = best.max(flops / started.elapsed().as_secs_f64().max(1e-9));
    }
    best
}

fn show(plan: &Plan<'_>) -> String {
    let mut table =
        Table::new(["training", "parameters", "activated", "steps", "tokens", "FLOPs", "hours", "memory"]);
    let hours = |hours: f64| if hours < 10.0 { format!("{hours:.2}") } else { format!("{hours:.0}") };
    for row in &plan.rows {
        table.row([
            row.run.clone(),
            format::amount(row.params_total),
            format::amount(row.params_activated),
            format::count(row.steps),
            format::amount(row.tokens as f64),
            format!("{:.2e}", row.flops),
            hours(row.hours),
            format::bytes(row.memory_bytes),
        ]);
    }
    let memory = match plan.machine_memory_bytes {
        Some(machine) if machine < plan.memory_bytes => format!(
            "{} at the most, and this machine has {}: too little",
            format::bytes(plan.memory_bytes),
            format::bytes(machine)
        ),
        Some(machine) => {
            format!("{} at the most, of {}", format::bytes(plan.memory_bytes), format::bytes(machine))
        }
        None => format!("{} at the most", format::bytes(plan.memory_bytes)),
    };
    let fields = vec![
        ("profile", format!("{}: {}", plan.profile.name, plan.profile.about)),
        ("model", format!("{}, {} parameters", plan.model, format::count(plan.dense_params))),
        (
            "budget",
            format!(
                "{} activated parameters ({} of {} experts)",
                format::count(plan.budget_params.round() as u64),
                plan.profile.active * plan.profile.experts as f64,
                plan.profile.experts
            ),
        ),
        ("trainings", format!("{}, {} tokens", plan.stages, format::amount(plan.tokens as f64))),
        ("arithmetic", format!("{:.3e} FLOPs, measuring included", plan.flops)),
        (
            "time",
            format!(
                "{} hours at the {} FLOP/s that this machine reaches in {} on a product of this model's FFN",
                hours(plan.hours),
                format::flops(plan.flops_per_second),
                plan.dtype
            ),
        ),
        ("memory", memory),
        ("disk", format::bytes(plan.disk_bytes)),
    ];
    format!("{}\n{}", table.show(), format::fields(fields))
}
