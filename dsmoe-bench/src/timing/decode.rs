//! `dsmoe bench decode`: times decoding by a dense and a DSMoE model.

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::model::{Cache, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;

use super::ceilings::Cost;
use super::checks::{check_memory, check_positions};
use super::model::{Sizes, configs, describe, parameters, random_model, reach_share};
use super::output::Output;
use super::row::{Row, bits};
use super::turns::medians;
use super::values::{bytes_in, f32_bytes, product, random_ids};
use crate::cli::bench::Decode;
use crate::models::cache_bytes;

/// The sizes of LLaMA 3.2 1B.
const DEFAULT: [Sizes; 1] = [[2048, 8192, 16, 32, 8, 128_256]];
pub(crate) const PRECISIONS: [Precision; 1] = [Precision::Bf16];
/// Tokens on which the active share of a threshold is measured.
const TRIAL_TOKENS: usize = 32;

pub(crate) fn check(args: &Decode) -> Result<()> {
    check_positions(args.prompt, args.tokens)?;
    for sizes in args.architecture.sizes(&DEFAULT) {
        args.architecture.check(sizes)?;
        let [_, dsmoe] = configs(args.architecture.shape(), sizes, args.prompt + args.tokens + 1)?;
        for precision in args.common.precisions(&PRECISIONS) {
            // A model in f32 while it is packed, and two packed ones.
            let weights = parameters(&dsmoe) * (4 + 2 * precision.bytes() as u128);
            check_memory(weights + cache_bytes(&dsmoe, args.prompt + args.tokens))?;
        }
    }
    Ok(())
}

pub(crate) fn run(args: &Decode, output: &mut Output<'_>) -> Result<()> {
    let precisions = args.common.precisions_on(args.device, &PRECISIONS);
    output.each(&args.architecture.sizes(&DEFAULT), precisions, |sizes, precision, output| {
        measure(args, sizes, precision, output)
    })
}

fn measure(args: &Decode, sizes: Sizes, precision: Precision, output: &mut Output<'_>) -> Result<Vec<Row>> {
    let configs = configs(args.architecture.shape(), sizes, args.prompt + args.tokens + 1)?;
    let prompt = random_ids(args.prompt, configs[0].vocab_size, Rng::new(0x9a, 0));
    let [dense, dsmoe] =
        configs.map(|config| Inference::new_on(&random_model(config), precision, args.device));
    let (dense, mut dsmoe) = (dense?, dsmoe?);
    reach_share(args.architecture.active, |threshold| {
        dsmoe.set_threshold(threshold)?;
        active_share(&dsmoe, &prompt, TRIAL_TOKENS.min(args.tokens))
    })?;
    let active = active_share(&dsmoe, &prompt, args.tokens)?;

    let models = [&dense, &dsmoe];
    let times = medians(models.len(), usize::from(args.common.repeats), |model| {
        decode(models[model], &prompt, args.tokens)
    })?;
    let shares = [None, Some((args.architecture.active, active))];
    let rows = models.into_iter().zip(&times).zip(shares).zip(["dense", "dsmoe"]);
    // The positions in the cache, mean over the new tokens.
    let context = args.prompt as f64 + args.tokens as f64 / 2.0;
    let of_dense = cost(dense.config(), precision, Used::of_experts(1.0), context).bytes;
    rows.map(|(((model, &seconds), share), name)| {
        let config = model.config();
        let mut row = Row::new("decode", name, args.tokens, config.hidden, precision);
        describe(&mut row, config, share);
        let (mut cache, mut workspace) = (Cache::new(model, prompt.len()), Workspace::default());
        row.bits = bits(&[model.decode(&prompt, &mut cache, None, &mut workspace)?]);
        let cost = cost(config, precision, Used::of_experts(share.map_or(1.0, |share| share.1)), context);
        row.measured_on(args.device, seconds / args.tokens as f64, cost, precision, &mut output.ceilings);
        row.seconds = seconds;
        row.tokens_per_s = Some(args.tokens as f64 / seconds);
        row.against_dense(times[0], cost.bytes / of_dense);
        Ok(row)
    })
    .collect()
}

/// Returns the seconds for `tokens` tokens after the first.
pub(crate) fn decode(model: &Inference, prompt: &[u32], tokens: usize) -> Result<f64> {
    let options = GenerateOptions { max_tokens: tokens + 1, ..GenerateOptions::default() };
    let generation = generate(model, prompt, &options, |_| true)?;
    if generation.tokens.len() != tokens + 1 {
        bail!("decoding ended after {} of {tokens} tokens; use fewer --tokens", generation.tokens.len());
    }
    Ok(generation.decode_seconds.max(1e-9))
}

/// Returns the active share of the tokens after the prompt.
pub(crate) fn active_share(model: &Inference, prompt: &[u32], tokens: usize) -> Result<f64> {
    let shares = |max_tokens| -> Result<f64> {
        let options = GenerateOptions { max_tokens, ..GenerateOptions::default() };
        let generation = generate(model, prompt, &options, |_| true)?;
        let summary = generation.stats.map(|stats| stats.summary());
        Ok(summary.map_or(0.0, |summary| summary.active_ratio * summary.tokens as f64))
    };
    Ok((shares(tokens + 1)? - shares(1)?) / tokens as f64)
}

/// The shares of the weights that a token uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    pub(crate) attention: f64,
    pub(crate) ffn: f64,
}

impl Used {
    pub(crate) fn of_experts(active: f64) -> Used {
        Used { attention: 1.0, ffn: active }
    }
}

/// Returns the cost of a token: the weights that it uses, and the keys and values, are read once.
pub(crate) fn cost(config: &Config, precision: Precision, used: Used, context: f64) -> Cost {
    let counts = Accounting::of(config);
    let experts = counts.num_experts;
    let head = product(&[config.vocab_size, config.hidden]);
    let skipped = (1.0 - used.attention) * counts.attention as f64;
    let matrices = counts.attention as f64 - skipped + used.ffn * counts.ffn as f64 + head;
    let exact = (counts.router + counts.norms) as f64;
    let kv_heads = config.layers().map(|shape| shape.num_kv_heads).sum();
    let cached = 2.0 * context * product(&[kv_heads, config.head_dim]);
    Cost {
        flops: counts.flops_per_token(used.ffn * experts, context) - 2.0 * skipped,
        bytes: bytes_in(precision, matrices) + f32_bytes(exact + cached),
    }
}
