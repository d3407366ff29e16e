//! `dsmoe reproduce --dry-run`: the trainings of a reproduction, and their cost on this machine.

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use dsmoe_core::Device;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::init::preset;
use dsmoe_datasets::CorpusOptions;
use dsmoe_train::Zero;
use dsmoe_train::engine::Share;
use serde::Serialize;

use super::cost::Costs;
use super::jobs::Planned;
use super::limits;
use super::profile::{self, MethodSpec, Profile, Role, gated};
use super::text;
use crate::cli::reproduce::Reproduce;
use crate::estimate::{self, H100, flops_per_second, training_flops};
use crate::format::{self, Table};
use crate::gpu;
use crate::memory;
use crate::training::{device_plan, memory_plan};
use crate::ui::Ui;

/// FineWeb-edu, OpenWebMath, StarCoder and Cosmopedia.
const PAPER_SOURCES: usize = 4;
/// Bytes of a parameter in a checkpoint: the weight and two moments.
const CHECKPOINT_BYTES: u64 = 12;

#[derive(Debug, Serialize)]
struct Plan<'a> {
    profile: &'a Profile,
    model: String,
    dense_params: u64,
    budget_params: f64,
    rows: Vec<Row>,
    /// Trainings, including that of the dense model.
    stages: usize,
    tokens: u64,
    flops: f64,
    /// Speed of a product of the model's shape in the precision of the training.
    flops_per_second: f64,
    dtype: &'static str,
    hours: f64,
    /// Hours at the recorded rate of a GPU.
    hours_h100: f64,
    #[serde(skip)]
    hidden: usize,
    /// The device that trains.
    device: String,
    /// Memory of the largest training on that device, and all that there is.
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
    /// FLOPs of training and of measuring after it.
    flops: f64,
    hours: f64,
    hours_h100: f64,
    memory_bytes: u64,
}

pub(super) fn run(args: &Reproduce, profile: &Profile, jobs: &[Planned<'_>], ui: &mut Ui) -> Result<()> {
    let (dense, model) = dense(args, profile)?;
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("."));
    limits::check(profile, &dense, limits::Machine::of_plans(&out))
        .with_context(|| profile::place(&args.profile))?;
    let train = profile.train()?.resolve()?;
    let precision = train.dtype;
    if profile.world.is_none() {
        let missing = [
            (args.model.is_none(), "a checkpoint (--model)"),
            (!args.names_text(), "text (--data or --mixture)"),
        ];
        let missing: Vec<_> = missing.into_iter().filter(|(is, _)| *is).map(|(_, what)| what).collect();
        if !missing.is_empty() {
            ui.note(format_args!("the run will need {}", missing.join(" and ")));
        }
    }
    ui.note("measuring this machine");
    let speed = flops_per_second(&dense, precision);
    let costs = Costs { profile, sources: sources(args, profile)?, seq: train.seq };
    let counts = Accounting::of(&dense);
    let budget = profile.budget(&dense)?;
    let (mut rows, mut elastic) = (Vec::new(), HashSet::new());
    let mut disk_bytes = 4 * counts.total;
    if let (Some(config), None) = (profile.pretrain(), &args.model) {
        let config = config?.resolve()?;
        rows.push(row("dense model", &dense, 1.0, &config, costs.text(), (speed, args.device))?);
    }
    for Planned { job, parts, .. } in jobs {
        let planned = profile.plan_of(job.spec, &dense)?;
        let mut config =
            profile.train_of(job.spec, job.seed, profile.target_of(job.spec, &dense)?)?.resolve()?;
        // An elastic model is trained for its first row.
        let again = job.spec.role == Role::Elastic && !elastic.insert((&job.spec.of, job.seed));
        if job.spec.untrained || again {
            config.steps = Some(0);
        }
        // The routers of a method's default are known to its plan alone.
        let gated =
            profile.experts.is_some() && (planned.active_target.is_some() || job.spec.role.is_gated());
        let (shape, share) = if gated { shape(job.spec, &dense, profile)? } else { (dense.clone(), 1.0) };
        let counts = Accounting::of(&shape);
        let measured = costs.measuring(*job, parts);
        let mut row = row(&job.id(), &shape, share, &config, measured, (speed, args.device))?;
        (row.params_total, row.params_activated) = (planned.total, planned.activated);
        if !gated {
            // A smaller model computes less, and so do k of n experts.
            let computes = match planned.keeps_dense_compute {
                true => 1.0,
                false => (planned.activated - counts.norms as f64) / (counts.total - counts.norms) as f64,
            };
            row.flops *= computes;
            row.hours *= computes;
            row.hours_h100 *= computes;
        }
        if config.teacher_weight.is_some() {
            let flops = row.tokens as f64 * Accounting::of(&dense).mean_flops_per_token(0.0, config.seq);
            row.flops += flops;
            row.hours += flops / speed / 3600.0;
            row.hours_h100 += H100.hours(flops, false);
        }
        // The model before and after training.
        if !args.discard {
            disk_bytes += 2 * 4 * counts.total;
        }
        rows.push(row);
    }
    if rows.is_empty() {
        bail!("nothing to do: these outputs and this part have no method of the profile");
    }
    disk_bytes += CHECKPOINT_BYTES * counts.total;
    if args.discard {
        // One row, and what rows of several budgets share.
        disk_bytes += 4 * 4 * counts.total;
    }
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
        hours_h100: rows.iter().map(|row| row.hours_h100).sum(),
        hidden: dense.hidden,
        memory_bytes: rows.iter().map(|row| row.memory_bytes).max().unwrap_or(0),
        machine_memory_bytes: match args.device.is_gpu() {
            true => gpu::memory_of(args.device),
            false => memory::total(),
        },
        device: args.device.to_string(),
        disk_bytes,
        rows,
    };
    ui.result(&plan, show)
}

/// Returns the number of sources that models are measured on.
pub(super) fn sources(args: &Reproduce, profile: &Profile) -> Result<usize> {
    Ok(match &profile.world {
        Some(_) => 4,
        None if args.names_text() => text::find(args, profile, &CorpusOptions::default())?.measured(),
        None if !profile.held_out.is_empty() => profile.held_out.len(),
        None => PAPER_SOURCES,
    })
}

/// Returns the dense model from its directory or from the sizes of the profile.
pub(super) fn dense(args: &Reproduce, profile: &Profile) -> Result<(Config, String)> {
    if let Some(dir) = &args.model {
        return Ok((Config::load(dir)?, dir.display().to_string()));
    }
    let vocab = match (&profile.world, &profile.model.preset) {
        (Some(world), _) => world.vocab,
        (None, Some(name)) => preset(name)?.vocab_size,
        (None, None) => profile
            .model
            .vocab
            .with_context(|| format!("profile {}: name a checkpoint with --model DIR", profile.name))?,
    };
    let unnamed = if profile.world.is_some() { "of random weights" } else { "of the profile's sizes" };
    let name = profile.model.preset.as_deref().unwrap_or(unnamed);
    let dense = profile.architecture(vocab).with_context(|| profile::place(&args.profile))?;
    Ok((dense, name.to_owned()))
}

/// Returns the model of a gated row, and the share of its experts that is active in training.
fn shape(spec: &MethodSpec, dense: &Config, profile: &Profile) -> Result<(Config, f64)> {
    let experts = profile.experts_of(spec)?.unwrap_or_else(|| profile.default_experts());
    let share = match spec.role {
        // All experts are active in training.
        Role::WithoutThreshold => 1.0,
        _ => profile.active_of(spec, dense)?,
    };
    Ok((gated(dense, experts), share))
}

/// Plans a training of a model whose experts are active by `share`.
fn row(
    run: &str,
    config: &Config,
    share: f64,
    train: &dsmoe_train::TrainConfig,
    measured_tokens: f64,
    (speed, device): (f64, Device),
) -> Result<Row> {
    let (counts, gated) = (Accounting::of(config), config.moe.is_some());
    let steps = train.steps.unwrap_or(0);
    let tokens = steps * train.tokens_per_step();
    let active = share * counts.num_experts;
    let flops = tokens as f64
        * training_flops(&counts, gated, (share, train.router_gradient.computed()), train.seq)
        + measured_tokens * counts.mean_flops_per_token(active, train.seq);
    let alone =
        Share { processes: 1, lanes: train.lanes(), accumulate: train.accumulate, zero: Zero::Moments };
    let memory = match device.is_gpu() {
        true => device_plan(config, train, device)?,
        false => memory_plan(config, train, 0, (alone, false)),
    };
    Ok(Row {
        run: run.to_owned(),
        params_total: counts.total as f64,
        params_activated: counts.activated(active),
        steps,
        tokens,
        flops,
        hours: flops / speed / 3600.0,
        hours_h100: H100.hours(flops, gated),
        memory_bytes: memory.iter().map(|memory| memory.bytes).sum(),
    })
}

fn show(plan: &Plan<'_>) -> String {
    let mut table = Table::new([
        "training",
        "parameters",
        "activated",
        "steps",
        "tokens",
        "FLOPs",
        "here",
        "H100",
        "memory",
    ]);
    for row in &plan.rows {
        table.row([
            row.run.clone(),
            format::amount(row.params_total),
            format::amount(row.params_activated),
            format::count(row.steps),
            format::amount(row.tokens as f64),
            format!("{:.2e}", row.flops),
            estimate::duration(row.hours),
            estimate::duration(row.hours_h100),
            format::bytes(row.memory_bytes),
        ]);
    }
    let memory = match plan.machine_memory_bytes {
        Some(machine) if machine < plan.memory_bytes => {
            let of = if plan.device == Device::Cpu.to_string() { "this machine" } else { "the GPU" };
            format!(", more than the {} of {of}", format::bytes(machine))
        }
        Some(machine) => format!(" of {}", format::bytes(machine)),
        None => String::new(),
    };
    let (budget, share) = (format::count(plan.budget_params.round() as u64), 100.0 * plan.profile.active);
    let speed = format!(
        "{} FLOP/s in {}, measured on a product of the model's FFN",
        format::flops(plan.flops_per_second),
        plan.dtype
    );
    let fields = vec![
        ("profile", format!("{}: {}", plan.profile.name, plan.profile.about)),
        ("model", format!("{}, {} parameters", plan.model, format::count(plan.dense_params))),
        ("budget", format!("{budget} activated parameters ({share} % of the FFNs, and routers)")),
        ("trainings", format!("{}, {} tokens", plan.stages, format::amount(plan.tokens as f64))),
        ("arithmetic", format!("{:.3e} FLOPs, including measuring", plan.flops)),
        ("time", estimate::words(plan.hours, &speed, plan.hours_h100, (plan.hidden, plan.dense_params))),
        ("memory", format!("at most {}{memory}", format::bytes(plan.memory_bytes))),
        ("disk", format::bytes(plan.disk_bytes)),
    ];
    format!("{}\n{}", table.show(), format::fields(fields))
}
