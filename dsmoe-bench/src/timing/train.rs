//! `dsmoe bench train`: times whole optimiser steps of a dense and a DSMoE model.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::model::{Batch, StepArgs};
use dsmoe_core::{Device, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::comm::Alone;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::{RouterGradient, RouterGradientAt, RoutingStats, SparsityOver};
use dsmoe_train::TrainConfig;
use dsmoe_train::Zero;
use dsmoe_train::engine::{self, Engine, EngineOptions, StepResult};
use dsmoe_train::optim::{AdamW, Update, clip_scale};

use super::ceilings::Cost;
use super::checks::{check_memory, check_size};
use super::model::{Sizes, configs, describe, parameters, random_model, reach_share};
use super::output::Output;
use super::resident::Mark;
use super::row::{Row, bits};
use super::turns::medians;
use super::values::{f32_bytes, product, random_ids};
use crate::cli::bench::Train;

const DEFAULTS: [Sizes; 2] = [[128, 512, 4, 4, 4, 2048], [512, 1536, 8, 8, 8, 8192]];
pub(crate) const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];
/// Small enough to keep the gates unchanged.
const LEARNING_RATE: f64 = 1e-9;
/// The weight of the sparsity loss in the paper.
const SPARSITY_WEIGHT: f32 = 1.0;
/// The least length of a sample.
const SAMPLE_SECONDS: f64 = 0.1;
/// The largest K of the estimator `every:K`: a sample takes whole rounds of so many steps.
const MOST_STEPS: u64 = 64;

pub(crate) fn check(args: &Train) -> Result<()> {
    check_size("seq", args.seq)?;
    check_size("batch", args.batch)?;
    check_size("batch times --seq", args.batch.saturating_mul(args.seq))?;
    check_rules(args)?;
    for sizes in args.architecture.sizes(&DEFAULTS) {
        args.architecture.check(sizes)?;
        let [_, dsmoe] = configs(args.architecture.shape(), sizes, args.seq)?;
        let [hidden, intermediate, layers, ..] = sizes.map(|size| size as u128);
        let saved = (args.batch * args.seq) as u128 * layers * (8 * hidden + 2 * intermediate);
        // Models with gradients and moments, and what their forward passes keep.
        let models = 2 + args.router_gradient.len() as u128;
        check_memory(models * 4 * (4 * parameters(&dsmoe) + saved))?;
    }
    Ok(())
}

/// Refuses estimators that do not run on the device or take too many steps.
fn check_rules(args: &Train) -> Result<()> {
    if args.device.is_gpu() && args.router_gradient.iter().any(|rule| !rule.is_full()) {
        bail!("--router-gradient: the processor alone estimates the gradient; use --device cpu");
    }
    if let Some(rule) = args.router_gradient.iter().find(|&&rule| round_of(rule) > MOST_STEPS) {
        bail!("--router-gradient is {rule}; use at most every:{MOST_STEPS}");
    }
    Ok(())
}

/// Returns the steps of a round: in those of `every:K` each layer computes all pairs once.
fn round_of(rule: RouterGradient) -> u64 {
    if let RouterGradient::Every(k) = rule { k } else { 1 }
}

/// A model to time.
struct Contestant {
    name: &'static str,
    run: Run,
    /// Share of active pairs; none of a dense model.
    share: Option<f64>,
    bits: Option<String>,
    memory: Option<u64>,
    /// Steps of a sample.
    steps: u64,
}

pub(crate) fn run(args: &Train, output: &mut Output<'_>) -> Result<()> {
    let precisions = args.common.precisions_on(args.device, &PRECISIONS);
    output.each(&args.architecture.sizes(&DEFAULTS), precisions, |sizes, precision, output| {
        measure(args, sizes, precision, output)
    })
}

fn measure(args: &Train, sizes: Sizes, precision: Precision, output: &mut Output<'_>) -> Result<Vec<Row>> {
    let configs = configs(args.architecture.shape(), sizes, args.seq)?;
    let tokens = args.batch * args.seq;
    let ids = random_ids(tokens + 1, configs[0].vocab_size, Rng::new(0x7a, 0));

    let [dense, dsmoe] = configs;
    let of_dsmoe = |&rule: &RouterGradient| ("dsmoe", dsmoe.clone(), rule);
    let full = RouterGradient::Full;
    let models = [("dense", dense, full), of_dsmoe(&full)];
    let models = models.into_iter().chain(args.router_gradient.iter().map(of_dsmoe));
    let mut contestants = Vec::new();
    for (name, config, rule) in models {
        let mark = Mark::now();
        let mut run = Run::new(config, &ids, args.seq, precision, args.device)?;
        run.rule = rule;
        let share = run
            .model
            .config()
            .moe
            .is_some()
            .then(|| run.reach_share(args.architecture.active))
            .transpose()?;
        run.gradients()?;
        let bits = bits(&[&run.engine.grads()?]);
        let round = round_of(rule);
        run.take(round)?;
        let memory = mark.and_then(Mark::peak_since);
        let started = Instant::now();
        run.take(round)?;
        let seconds = started.elapsed().as_secs_f64() / round as f64;
        let steps = ((SAMPLE_SECONDS / seconds).clamp(1.0, 1000.0) as u64).next_multiple_of(round);
        contestants.push(Contestant { name, run, share, bits, memory, steps });
    }

    let times = medians(contestants.len(), usize::from(args.common.repeats), |i| -> Result<f64> {
        let Contestant { run, steps, .. } = &mut contestants[i];
        let started = Instant::now();
        run.take(*steps)?;
        Ok(started.elapsed().as_secs_f64() / *steps as f64)
    })?;
    let of_dense = cost(contestants[0].run.model.config(), (1.0, 1.0), tokens, args.seq).flops;
    let rows = contestants.into_iter().zip(&times).map(|(contestant, &seconds)| {
        let Contestant { name, run, share, bits, memory, .. } = contestant;
        let config = run.model.config();
        let mut row = Row::new("train", name, tokens, config.hidden, precision);
        describe(&mut row, config, share.map(|share| (args.architecture.active, share)));
        row.router_gradient = (run.rule != full).then(|| run.rule.to_string());
        (row.seq, row.batch) = (Some(args.seq), Some(args.batch));
        (row.bits, row.peak_memory_bytes) = (bits, memory);
        let cost = cost(config, (share.unwrap_or(1.0), run.rule.computed()), tokens, args.seq);
        row.measured_on(args.device, seconds, cost, precision, &mut output.ceilings);
        row.tokens_per_s = Some(tokens as f64 / seconds);
        row.against_dense(times[0], cost.flops / of_dense);
        row
    });
    Ok(rows.collect())
}

/// A model with the engine that trains it on one micro-batch.
pub(crate) struct Run {
    pub(crate) model: Model,
    engine: Box<dyn Engine>,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    seq: usize,
    config: TrainConfig,
    /// The estimator of the routers' gradient.
    rule: RouterGradient,
    steps: u64,
}

impl Run {
    /// Predicts each of `ids` from those before it.
    pub(crate) fn new(
        config: Config,
        ids: &[u32],
        seq: usize,
        precision: Precision,
        device: Device,
    ) -> Result<Run> {
        let model = random_model(config);
        let tokens = ids.len() - 1;
        let options = EngineOptions {
            tokens,
            seq,
            lanes: 1,
            accumulate: 1,
            zero: Zero::Moments,
            precision,
            device,
            recompute: false,
        };
        Ok(Run {
            engine: engine::new(&model, AdamW::new(model.layout()), options, Arc::new(Alone))?,
            inputs: ids[..tokens].to_vec(),
            targets: ids[1..].to_vec(),
            seq,
            config: TrainConfig::default(),
            rule: RouterGradient::Full,
            steps: 0,
            model,
        })
    }

    /// Runs forward and backward.
    fn gradients(&mut self) -> Result<StepResult> {
        let args = StepArgs {
            loss_scale: 1.0 / self.inputs.len() as f32,
            sparsity_weight: SPARSITY_WEIGHT,
            sparsity_over: SparsityOver::Active,
            router_gradient: RouterGradientAt { rule: self.rule, seed: 0, index: self.steps },
            seed: self.steps,
            ..StepArgs::default()
        };
        let batch = Batch { inputs: &self.inputs, targets: &self.targets, seq: self.seq };
        self.engine.begin(self.steps + 1, 1)?;
        self.engine.micro_batch(&self.model, batch, &args)?;
        self.engine.end_lane()?;
        Ok(self.engine.finish(&self.model, self.steps + 1, false)?)
    }

    /// Returns the share of active experts of a step.
    fn active_ratio(&mut self) -> Result<f64> {
        self.gradients()?;
        Ok(self.engine.stats().map_or(0.0, RoutingStats::active_ratio))
    }

    /// Moves the threshold until about that share of experts is active, and returns the share.
    pub(crate) fn reach_share(&mut self, wanted: f64) -> Result<f64> {
        reach_share(wanted, |threshold| {
            self.engine.set_threshold(&mut self.model, threshold)?;
            self.active_ratio()
        })?;
        self.active_ratio()
    }

    /// Takes a whole step, as `dsmoe train` does.
    pub(crate) fn step(&mut self) -> Result<()> {
        let scale = clip_scale(self.gradients()?.norms.all, self.config.clip);
        self.steps += 1;
        let update = Update { config: &self.config, lr: LEARNING_RATE, scale, step: self.steps };
        Ok(self.engine.update(&mut self.model, &update)?)
    }

    /// Takes several steps.
    fn take(&mut self, steps: u64) -> Result<()> {
        (0..steps).try_for_each(|_| self.step())
    }
}

/// Returns the cost of a step: an inactive pair of token and expert takes a third of the products of an active one, if the routers'
/// gradient reads it. `active` is the share of active pairs, `inactive` that of the others which are read.
fn cost(config: &Config, (active, inactive): (f64, f64), tokens: usize, seq: usize) -> Cost {
    let counts = Accounting::of(config);
    let head = product(&[config.vocab_size, config.hidden]);
    let always = (counts.attention + counts.router) as f64 + head;
    let ffns = counts.ffn as f64;
    let heads = config.layers().map(|shape| shape.num_heads).sum();
    // Scores and their use, forward and with the scores anew backward; a position sees half the sequence.
    let attention = 3.5 * 4.0 * product(&[heads, config.head_dim, seq]) / 2.0;
    let ffn_products = 2.0 + 4.0 * active - 2.0 * (1.0 - inactive) * (1.0 - active);
    let per_token = 6.0 * always + ffn_products * ffns + attention;
    // Weights twice, gradients once, and AdamW: four read, three written.
    Cost { flops: tokens as f64 * per_token, bytes: f32_bytes(10.0 * counts.total as f64) }
}
