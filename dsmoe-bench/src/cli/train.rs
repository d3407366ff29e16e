//! The arguments of `dsmoe train`.

use std::path::PathBuf;

use clap::Args;
use dsmoe_core::Device;
use dsmoe_datasets::Bos;
use dsmoe_kernels::Precision;
use dsmoe_train::TrainConfig;
use dsmoe_train::config::{Hold, NearDuplicates};

use super::data::DataArgs;
use super::processes::ProcessArgs;
use super::values::{Active, active, quantity, share, words};

/// The keys of a run's TOML file.
fn train_keys() -> String {
    let keys = serde_json::to_value(TrainConfig::default());
    let keys =
        keys.ok().and_then(|keys| keys.as_object().map(|keys| keys.keys().cloned().collect::<Vec<_>>()));
    format!("Keys of --config and --set: {}.", keys.unwrap_or_default().join(", "))
}

const EXAMPLES: &str = "\
Examples:
  dsmoe train MOE --data corpus.jsonl.zst --tokens 100M --batch 8 --seq 256 --lr 3e-4 --out RUN
  dsmoe train MOE --data corpus.jsonl.zst --teacher DENSE --steps 1000 --out RUN     # learn the dense model's distribution
  dsmoe train MOE --mixture mixture.toml --tokens 10B --out RUN --dry-run            # hours and memory, nothing else
  dsmoe train MOE --data corpus.jsonl.zst --tokens 100M --out RUN --resume           # after an interruption";

const LENGTH: &str = "Length and batches";
const BUDGET: &str = "Active experts";
const TEACHER: &str = "Teacher";
const OPTIMISER: &str = "Optimiser";
const MACHINE: &str = "Machine";
const HELD_OUT: &str = "Text and evaluation";
const SAVING: &str = "Saving and resuming";

#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", train_keys()))]
pub(crate) struct Train {
    /// Model to start from: a Hugging Face or DSMoE directory, or a GGUF file
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Run directory: metrics, checkpoints and finally the trained model
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Optimiser steps of the whole run
    #[arg(help_heading = LENGTH, long, value_name = "N", conflicts_with = "tokens")]
    pub(crate) steps: Option<u64>,
    /// Tokens of the whole run, rounded up to whole steps; accepts suffixes such as 5M and 10B
    #[arg(help_heading = LENGTH, long, value_name = "N", value_parser = quantity)]
    pub(crate) tokens: Option<u64>,
    /// Sequences per micro-batch [default: 32]
    #[arg(help_heading = LENGTH, long, value_name = "N")]
    pub(crate) batch: Option<usize>,
    /// Tokens per sequence [default: 1024, or all positions of a smaller model]
    #[arg(help_heading = LENGTH, long, value_name = "TOKENS")]
    pub(crate) seq: Option<usize>,
    /// Micro-batches per lane of an optimiser step [default: 1]
    #[arg(help_heading = LENGTH, long, value_name = "N")]
    pub(crate) accumulate: Option<usize>,
    /// Lanes of an optimiser step, each of --accumulate micro-batches, whose gradients are added along a binary tree. The
    /// result does not depend on the number of processes that share the lanes [default: the number of processes, on --resume
    /// that of the run]
    #[arg(help_heading = LENGTH, long, value_name = "N")]
    pub(crate) lanes: Option<usize>,
    /// Peak learning rate [default: 2e-5]
    #[arg(help_heading = OPTIMISER, long, value_name = "X")]
    pub(crate) lr: Option<f64>,
    /// Steps of linear warm-up [default: a tenth of the steps, at most 100]
    #[arg(help_heading = OPTIMISER, long, value_name = "N")]
    pub(crate) warmup_steps: Option<u64>,
    /// Ratio of the routers' learning rate to that of the other parameters [default: 1]
    #[arg(help_heading = OPTIMISER, long, value_name = "X")]
    pub(crate) router_lr_scale: Option<f64>,
    /// Constant weight of the sparsity loss [default: 1]
    #[arg(help_heading = BUDGET, long, value_name = "WEIGHT", conflicts_with = "active_target")]
    pub(crate) sparsity: Option<f64>,
    /// Share of active experts, mean over tokens and layers, that a controller holds; 0.375 is 3 of 8. A range such as
    /// 0.25..1.0 draws a share for every micro-batch and lets every layer deviate from it: the model then stores
    /// thresholds for all of them
    #[arg(help_heading = BUDGET, long, value_name = "SHARE_OF_EXPERTS|LOW..HIGH", value_parser = active)]
    pub(crate) active_target: Option<Active>,
    /// How a share is held: threshold moves the gates' thresholds, loss adjusts the weight of the sparsity loss, squared adds the
    /// squared distance from the share to the loss, for the routers of duo (--set hold_weight=WEIGHT) [default: loss, for a range
    /// threshold]
    #[arg(help_heading = BUDGET, long, value_parser = words::<Hold>(&["threshold", "loss", "squared"]))]
    pub(crate) hold: Option<Hold>,
    /// Weight of a loss that pushes gates away from their threshold [default: 0]
    #[arg(help_heading = BUDGET, long, value_name = "WEIGHT")]
    pub(crate) separability: Option<f64>,
    /// Weight of the entropy of gates, under which they decide; mixtures train without their balance loss then [default: 0]
    #[arg(help_heading = BUDGET, long, value_name = "WEIGHT")]
    pub(crate) gate_entropy: Option<f64>,
    /// Experts of a token that the run ends with, of a mixture whose tokens run more: the coefficients of the others fade out in
    /// the first half of the steps (--set top_k_anneal=SHARE)
    #[arg(help_heading = BUDGET, long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Model directory or GGUF file with the same vocabulary, usually the dense model: the run learns its distribution of
    /// the next token too (KL divergence at temperature 1). Computed in bf16 beside the model
    #[arg(help_heading = TEACHER, long, value_name = "DIR")]
    pub(crate) teacher: Option<PathBuf>,
    /// Weight of the divergence from the teacher, 0 to 1; the text's loss has the rest [default: 0.9]
    #[arg(help_heading = TEACHER, long, value_name = "SHARE_OF_LOSS", value_parser = share, requires = "teacher")]
    pub(crate) teacher_weight: Option<f64>,
    /// Directory that keeps the most likely tokens of the teacher (64, or --set teacher_top=N) for every sequence, so that
    /// later epochs and other runs do not compute them; all other tokens count as one in the divergence
    #[arg(help_heading = TEACHER, long, value_name = "DIR", requires = "teacher")]
    pub(crate) teacher_cache: Option<PathBuf>,
    /// TOML file with settings; flags override it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// One setting by its key in the TOML file, such as weight_decay=0; overrides flags
    #[arg(long = "set", value_name = "KEY=VALUE", allow_hyphen_values = true)]
    pub(crate) set: Vec<String>,
    /// Precision of the operands of matrix products; weights, gradients and sums are f32 [default: f32, bf16 on a GPU]
    #[arg(help_heading = MACHINE, long, value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Option<Precision>,
    /// Device that computes: cpu, or a GPU such as cuda:0 (matrix products in bf16)
    #[arg(help_heading = MACHINE, long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// State that is divided among processes (ZeRO stage): 1 the moments of the optimiser, 2 gradients too, 3 parameters too.
    /// The numbers are the same
    #[arg(long, value_name = "STAGE", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=3))]
    pub(crate) zero: u8,
    /// Keep the inputs of layers alone and run their forward pass again in the backward pass: less memory, about a third more
    /// work, the same numbers. On a CPU
    #[arg(long)]
    pub(crate) recompute: bool,
    #[command(flatten)]
    pub(crate) processes: ProcessArgs,
    /// Seed of the order of the text [default: 0]
    #[arg(help_heading = OPTIMISER, long)]
    pub(crate) seed: Option<u64>,
    /// Prepend a BOS token to each document; auto follows the tokenizer [default: auto]
    #[arg(help_heading = HELD_OUT, long, value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Option<Bos>,
    /// Share of the text of each source that is held out for evaluation [default: 0.02]
    #[arg(help_heading = HELD_OUT, long, value_name = "SHARE_OF_TEXT", value_parser = share)]
    pub(crate) valid_fraction: Option<f64>,
    /// Largest number of held-out windows of each source [default: 5000]
    #[arg(help_heading = HELD_OUT, long, value_name = "N")]
    pub(crate) valid_samples: Option<u64>,
    /// Text that is in both the training and the held-out part, up to case, punctuation and small changes: drop it from
    /// one of them, or keep it [default: drop for a mixture, keep for one source]
    #[arg(help_heading = HELD_OUT, long, value_parser = words::<NearDuplicates>(&["keep", "drop"]))]
    pub(crate) near_duplicates: Option<NearDuplicates>,
    /// Steps between evaluations of the held-out text [default: at the end only]
    #[arg(help_heading = HELD_OUT, long, value_name = "N")]
    pub(crate) eval_every: Option<u64>,
    /// Steps between checkpoints [default: at the end only]
    #[arg(help_heading = SAVING, long, value_name = "N")]
    pub(crate) save_every: Option<u64>,
    /// Checkpoints to keep [default: 2]
    #[arg(help_heading = SAVING, long, value_name = "N")]
    pub(crate) keep: Option<usize>,
    /// Continue the run in --out from its newest checkpoint
    #[arg(help_heading = SAVING, long, conflicts_with = "force")]
    pub(crate) resume: bool,
    /// Discard the run in --out and start over
    #[arg(help_heading = SAVING, long)]
    pub(crate) force: bool,
    /// Save a checkpoint and stop after this many steps of this invocation
    #[arg(help_heading = SAVING, long, value_name = "N")]
    pub(crate) stop_after: Option<u64>,
    /// Print the plan (steps, tokens, parameters, memory) and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Processes that the plan of --dry-run is for, without starting them [default: those that there are]
    #[arg(long, value_name = "N", requires = "dry_run", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    pub(crate) plan_for: Option<usize>,
}
