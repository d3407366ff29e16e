//! The arguments of `dsmoe oracle`.

use std::path::PathBuf;

use clap::Args;
use dsmoe_datasets::Bos;
use dsmoe_kernels::Precision;
use dsmoe_train::oracle::{RouteContext, RouteKind};

use super::data::DataArgs;
use super::values::{quantity, words};

const EXAMPLES: &str = "\
Every token of the text gets its best route through the layers, found with its loss at hand: a bound of what a router of \
layers could gain. Beside it stands the same minimum over noisy copies of the model: it shows how much of the gain is the \
choice of the least of many numbers. An interrupted run with --out is continued by the same command.

Examples:
  dsmoe oracle MODEL --data heldout.txt --dry-run
  dsmoe oracle MODEL --data heldout.txt --limit-tokens 3k --seq 256 --out routes.json
  dsmoe oracle DUO --data heldout.txt --routes big-small --context dense --budget 6
  dsmoe oracle MOE --data heldout.txt --routes experts --exact 100 --beam 32 --no-control";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Oracle {
    /// Model: a Hugging Face or DSMoE directory, or a GGUF file
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Options of every layer: big-skip (its FFN or nothing, for every model), big-small (the two FFNs of a duo model),
    /// experts (none, or the k of the largest gates for every k)
    #[arg(long, value_name = "KIND", default_value = "big-skip",
        value_parser = words::<RouteKind>(&["big-skip", "big-small", "experts"]))]
    pub(crate) routes: RouteKind,
    /// Largest level, the number of layers that compute more (of experts, of the experts that run in all layers): the best routes
    /// are reported with every token within it, and with their mean within it [default: none]
    #[arg(long, value_name = "LEVEL")]
    pub(crate) budget: Option<f64>,
    /// Routes of the earlier tokens of a window: same (they take the one that is tried), dense (the default one), greedy
    /// (their own best ones)
    #[arg(long, value_name = "ROUTE", default_value = "same",
        value_parser = words::<RouteContext>(&["same", "dense", "greedy"]))]
    pub(crate) context: RouteContext,
    /// Tokens per window; the first token of each is context only [default: 256, or all positions of a smaller model]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) seq: Option<usize>,
    /// Largest number of tokens from the start of each source
    #[arg(long, value_name = "N", value_parser = quantity, default_value = "4k")]
    pub(crate) limit_tokens: u64,
    /// Measure all routes of a model that has no more than that, at most 65536; of others a search keeps the best beginnings
    #[arg(long, value_name = "ROUTES", default_value_t = 1024)]
    pub(crate) exact: u64,
    /// Beginnings of routes that a search keeps, shared among numbers of layers that compute more
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) beam: usize,
    /// Measure no noisy copies
    #[arg(long)]
    pub(crate) no_control: bool,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Prepend a BOS token to each text; auto follows the tokenizer [default: auto]
    #[arg(long, value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Option<Bos>,
    /// Precision of the weights
    #[arg(long, default_value = "f32", value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Precision,
    /// File to write: the report and the routes of all tokens, as JSON; FILE.partial holds what is done until then
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Replace the file if it exists
    #[arg(long)]
    pub(crate) force: bool,
    /// Print the plan and measure nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}
