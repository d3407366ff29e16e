//! `dsmoe bench train`: times whole optimiser steps of a dense and a DSMoE model.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::model::{Batch, StepArgs};
use dsmoe_core::{Device, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::comm::Alone;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::{RoutingStats, SparsityOver};
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

pub(crate) fn check(args: &Train) -> Result<()> {
    check_size("seq", args.seq)?;
    check_size("batch", args.batch)?;
    check_size("batch times --seq", args.batch.saturating_mul(args.seq))?;
    for sizes in args.architecture.sizes(&DEFAULTS) {
        args.architecture.check(sizes)?;
        let [_, dsmoe] = configs(args.architecture.shape(), sizes, args.seq)?;
        let [hidden, intermediate, layers, ..] = sizes.map(|size| size as u128);
        let saved = (args.batch * args.seq) as u128 * layers * (8 * hidden + 2 * intermediate);
        // Two models with gradients and moments, and what their forward passes keep.
        check_memory(2 * 4 * (4 * parameters(&dsmoe) + saved))?;
    }
    Ok(())
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

    let mut contestants = Vec::new();
    for (name, config) in ["dense", "dsmoe"].into_iter().zip(configs) {
        let mark = Mark::now();
        let mut run = Run::new(config, &ids, args.seq, precision, args.device)?;
        let share = run
            .model
            .config()
            .moe
            .is_some()
            .then(|| run.reach_share(args.architecture.active))
            .transpose()?;
        run.gradients()?;
        let bits = bits(&[&run.engine.grads()?]);
        run.step()?;
        let memory = mark.and_then(Mark::peak_since);
        let started = Instant::now();
        run.step()?;
        let steps = (SAMPLE_SECONDS / started.elapsed().as_secs_f64()).clamp(1.0, 1000.0) as usize;
        contestants.push((name, run, share, bits, memory, steps));
    }

    let times = medians(contestants.len(), usize::from(args.common.repeats), |i| -> Result<f64> {
        let (_, run, .., steps) = &mut contestants[i];
        let started = Instant::now();
        for _ in 0..*steps {
            run.step()?;
        }
        Ok(started.elapsed().as_secs_f64() / *steps as f64)
    })?;
    let of_dense = cost(contestants[0].1.model.config(), 1.0, tokens, args.seq).flops;
    let rows = contestants.into_iter().zip(&times).map(|((name, run, share, bits, memory, _), &seconds)| {
        let config = run.model.config();
        let mut row = Row::new("train", name, tokens, config.hidden, precision);
        describe(&mut row, config, share.map(|share| (args.architecture.active, share)));
        (row.seq, row.batch) = (Some(args.seq), Some(args.batch));
        (row.bits, row.peak_memory_bytes) = (bits, memory);
        let cost = cost(config, share.unwrap_or(1.0), tokens, args.seq);
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
}

/// Returns the cost of a step: an inactive pair of token and expert takes a third of the products of an active one.
fn cost(config: &Config, active: f64, tokens: usize, seq: usize) -> Cost {
    let counts = Accounting::of(config);
    let head = product(&[config.vocab_size, config.hidden]);
    let always = (counts.attention + counts.router) as f64 + head;
    let ffns = counts.ffn as f64;
    let heads = config.layers().map(|shape| shape.num_heads).sum();
    // Scores and their use, forward and with the scores anew backward; a position sees half the sequence.
    let attention = 3.5 * 4.0 * product(&[heads, config.head_dim, seq]) / 2.0;
    let per_token = 6.0 * always + (2.0 + 4.0 * active) * ffns + attention;
    // Weights twice, gradients once, and AdamW: four read, three written.
    Cost { flops: tokens as f64 * per_token, bytes: f32_bytes(10.0 * counts.total as f64) }
}
