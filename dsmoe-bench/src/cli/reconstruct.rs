//! The arguments of `dsmoe reconstruct`.

use std::path::PathBuf;

use clap::Args;
use dsmoe_kernels::Precision;

use super::prune::CalibrationArgs;
use super::values::{at_least_one, share, words};

const ABOUT: &str = "\
Layer by layer, the FFN of the model (neurons, router and what stands beside them) is trained to give what the dense FFN \
gives on the same text, while the model's own hidden states go through the layers. Binary gates keep the share of each \
layer and budget by their thresholds. The errors printed are those of sequences that no step reads, relative to the dense \
output; a smaller local error need not be a smaller perplexity: measure that by `dsmoe eval`.

Examples:
  dsmoe reconstruct MOE --teacher DENSE --calib corpus.jsonl.zst --out NEW
  dsmoe reconstruct MOE --teacher DENSE --calib corpus.jsonl.zst --out NEW --resume";

#[derive(Debug, Args)]
#[command(after_help = ABOUT)]
pub(crate) struct Reconstruct {
    /// DSMoE directory that was converted and not trained
    pub(crate) model: PathBuf,
    /// Dense model that it was made from: a directory or a GGUF file
    #[arg(long, value_name = "DIR")]
    pub(crate) teacher: PathBuf,
    /// Directory to write; it also keeps the finished layers of an interrupted run
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Optimiser steps of each layer
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub(crate) steps: u64,
    /// Tokens of a step
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = at_least_one)]
    pub(crate) batch: usize,
    /// Peak learning rate
    #[arg(long, value_name = "X", default_value_t = 5e-4)]
    pub(crate) lr: f64,
    /// Ratio of the routers' learning rate to that of the other parameters
    #[arg(long, value_name = "X", default_value_t = 3.0)]
    pub(crate) router_lr_scale: f64,
    /// Part of the distance between the dense and the own hidden states that each layer is to close as well, 0 to 1
    #[arg(long, value_name = "SHARE_OF_DISTANCE", value_parser = share, default_value_t = 0.0)]
    pub(crate) drift: f64,
    /// Precision of the operands of matrix products
    #[arg(long, default_value = "f32", value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Precision,
    /// Seed of the choice of text and of the order of its tokens
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Continue in --out after its last finished layer
    #[arg(long)]
    pub(crate) resume: bool,
}
