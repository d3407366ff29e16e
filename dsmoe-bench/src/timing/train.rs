//! `dsmoe bench train`: whole optimiser steps of a dense and a DSMoE model.

use std::time::Instant;

use anyhow::Result;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
#[cfg(feature = "cuda")]
use dsmoe_core::model::cuda::CudaTrainer;
use dsmoe_core::model::{StepArgs, TrainWorkspace};
use dsmoe_core::{Device, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::{RoutingStats, SparsityOver};
use dsmoe_train::TrainConfig;
#[cfg(feature = "cuda")]
use dsmoe_train::optim::hyper;
use dsmoe_train::optim::{AdamW, clip_scale, grad_norms};

use super::ceilings::Cost;
use super::checks::{check_memory, check_size};
use super::model::{Sizes, describe, parameters, random_model, reach_share};
use super::output::Output;
use super::resident::Mark;
use super::row::{Row, bits};
use super::turns::medians;
use super::values::{f32_bytes, product};
use crate::cli::bench::Train;

const DEFAULTS: [Sizes; 2] = [[128, 512, 4, 4, 4, 2048], [512, 1536, 8, 8, 8, 8192]];
pub(crate) const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];
/// So small that the gates stay where they are.
const LEARNING_RATE: f64 = 1e-9;
/// Weight of the sparsity loss: the paper's.
const SPARSITY_WEIGHT: f32 = 1.0;
/// A sample takes this long at least.
const SAMPLE_SECONDS: f64 = 0.1;

pub(crate) fn check(args: &Train) -> Result<()> {
    check_size("seq", args.seq)?;
    check_size("batch", args.batch)?;
    check_size("batch times --seq", args.batch.saturating_mul(args.seq))?;
    for sizes in args.architecture.sizes(&DEFAULTS) {
        args.architecture.check(sizes)?;
        let [_, dsmoe] = args.architecture.configs(sizes, args.seq)?;
        let [hidden, intermediate, layers, ..] = sizes.map(|size| size as u128);
        let saved = (args.batch * args.seq) as u128 * layers * (8 * hidden + 2 * intermediate);
        // Two models with gradients and moments, and what their forward passes keep.
        check_memory(2 * 4 * (4 * parameters(&dsmoe) + saved))?;
    }
    Ok(())
}

pub(crate) fn run(args: &Train, output: &mut Output<'_>) -> Result<()> {
    for sizes in args.architecture.sizes(&DEFAULTS) {
        for &precision in args.common.precisions_on(args.device, &PRECISIONS) {
            let rows = measure(args, sizes, precision, output)?;
            output.extend(rows)?;
        }
    }
    Ok(())
}

fn measure(args: &Train, sizes: Sizes, precision: Precision, output: &mut Output<'_>) -> Result<Vec<Row>> {
    let configs = args.architecture.configs(sizes, args.seq)?;
    let tokens = args.batch * args.seq;
    let mut rng = Rng::new(0x7a, 0);
    let ids: Vec<u32> = (0..=tokens).map(|_| rng.below(configs[0].vocab_size as u64) as u32).collect();

    let mut contestants = Vec::new();
    for (name, config) in ["dense", "dsmoe"].into_iter().zip(configs) {
        let mark = Mark::now();
        let mut run = Run::new(config, &ids, args.seq, precision, args.device)?;
        let share = if run.model.config().moe.is_some() {
            reach_share(args.architecture.active, |threshold| {
                run.set_threshold(threshold)?;
                run.active_ratio()
            })?;
            Some(run.active_ratio()?)
        } else {
            None
        };
        run.gradients()?;
        let bits = run.bits()?;
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
    let rows = contestants.into_iter().zip(&times).map(|((name, run, share, bits, memory, _), &seconds)| {
        let config = run.model.config();
        let mut row = Row::new("train", name, tokens, config.hidden, precision);
        describe(&mut row, config, share.map(|share| (args.architecture.active, share)));
        (row.seq, row.batch) = (Some(args.seq), Some(args.batch));
        (row.bits, row.peak_memory_bytes) = (bits, memory);
        let cost = cost(config, share.unwrap_or(1.0), tokens, args.seq);
        row.measured_on(args.device, seconds, cost, precision, &mut output.ceilings);
        row.tokens_per_s = Some(tokens as f64 / seconds);
        row.against_dense(times[0]);
        row
    });
    Ok(rows.collect())
}

/// A model with all that training needs.
pub(crate) struct Run {
    pub(crate) model: Model,
    engine: Engine,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    seq: usize,
    config: TrainConfig,
    active_ratio: f64,
    steps: u64,
}

/// Who computes.
enum Engine {
    Cpu {
        grads: Buf,
        optimizer: AdamW,
        workspace: Box<TrainWorkspace>,
    },
    #[cfg(feature = "cuda")]
    Cuda {
        trainer: Box<CudaTrainer>,
        norm: f64,
    },
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
        let engine = match device {
            Device::Cpu => Engine::Cpu {
                grads: Buf::zeros(model.layout().len()),
                optimizer: AdamW::new(model.layout()),
                workspace: Box::new(TrainWorkspace::new(&model, tokens, precision)),
            },
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                let AdamW { m, v } = AdamW::new(model.layout());
                Engine::Cuda {
                    trainer: Box::new(CudaTrainer::new(ordinal, &model, &m, &v, tokens, seq)?),
                    norm: 0.0,
                }
            }
        };
        Ok(Run {
            engine,
            inputs: ids[..tokens].to_vec(),
            targets: ids[1..].to_vec(),
            seq,
            config: TrainConfig::default(),
            active_ratio: 0.0,
            steps: 0,
            model,
        })
    }

    pub(crate) fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        self.model.set_threshold(threshold)?;
        match &mut self.engine {
            Engine::Cpu { .. } => {}
            #[cfg(feature = "cuda")]
            Engine::Cuda { trainer, .. } => trainer.set_threshold(threshold)?,
        }
        Ok(())
    }

    /// Forward and backward.
    fn gradients(&mut self) -> Result<()> {
        let args = StepArgs {
            loss_scale: 1.0 / self.inputs.len() as f32,
            sparsity_weight: SPARSITY_WEIGHT,
            sparsity_over: SparsityOver::Active,
            balance_scale: 1.0,
            seed: self.steps,
        };
        let Run { model, engine, inputs, targets, seq, active_ratio, .. } = self;
        match engine {
            Engine::Cpu { grads, workspace, .. } => {
                grads.clear();
                model.train_step(grads, inputs, targets, *seq, &args, workspace)?;
                *active_ratio = workspace.stats().map_or(0.0, RoutingStats::active_ratio);
            }
            #[cfg(feature = "cuda")]
            Engine::Cuda { trainer, norm } => {
                let mut stats = model.new_stats();
                trainer.begin()?;
                trainer.micro_batch(inputs, targets, *seq, &args)?;
                *norm = trainer.finish(stats.as_mut())?.squares.sqrt();
                *active_ratio = stats.map_or(0.0, |stats| stats.active_ratio());
            }
        }
        Ok(())
    }

    /// The bits of the gradients.
    fn bits(&self) -> Result<Option<String>> {
        Ok(match &self.engine {
            Engine::Cpu { grads, .. } => bits(&[grads]),
            #[cfg(feature = "cuda")]
            Engine::Cuda { trainer, .. } => bits(&[&trainer.download_grads()?]),
        })
    }

    /// The share of experts that a step runs.
    pub(crate) fn active_ratio(&mut self) -> Result<f64> {
        self.gradients()?;
        Ok(self.active_ratio)
    }

    /// A whole step, as `dsmoe train` takes it.
    pub(crate) fn step(&mut self) -> Result<()> {
        self.gradients()?;
        self.steps += 1;
        let Run { model, engine, config, steps, .. } = self;
        match engine {
            Engine::Cpu { grads, optimizer, .. } => {
                let layout = model.layout().clone();
                let scale = clip_scale(grad_norms(&layout, grads).all, config.clip);
                optimizer.step(model.params_mut(), grads, &layout, config, LEARNING_RATE, scale, *steps);
            }
            #[cfg(feature = "cuda")]
            Engine::Cuda { trainer, norm } => {
                let scale = clip_scale(*norm, config.clip);
                trainer.update(scale, |decay, router| hyper(config, LEARNING_RATE, *steps, decay, router))?;
            }
        }
        Ok(())
    }
}

/// What a step has to do: of every inactive pair of token and expert a third of the products.
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
