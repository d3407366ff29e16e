//! The arguments of `dsmoe plan`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use dsmoe_datasets::Bos;
use dsmoe_kernels::Precision;

use super::data::DataArgs;
use super::resumable::Resumable;
use super::values::{at_least_one, seconds, share, words};

const ABOUT: &str = "\
After MEMTL (arXiv 2309.00907), whose users share a server: here the requests to a DSMoE model that stores thresholds by budget are the \
users, and a request's budget is what makes its load adjustable. Radio and energy of the paper have no counterpart, but for `plan \
offload`, the paper's own problem.

Examples:
  dsmoe plan profile RUN --data stories=a.txt code=b.txt --out PLAN    # what each budget costs many requests
  dsmoe plan train PLAN --heads 4
  dsmoe plan eval PLAN                                                 # is it of use, also on text of another kind?
  dsmoe plan choose PLAN --prompt 'Once upon a time' --deadline 0.2
  dsmoe generate RUN --plan PLAN --deadline 0.2 --prompt 'Once upon a time'";

#[derive(Debug, Args)]
#[command(after_help = ABOUT)]
pub(crate) struct Plan {
    #[command(subcommand)]
    pub(crate) command: PlanCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PlanCommand {
    /// Measure on text what every budget of a model costs a request, in loss and in time
    Profile(PlanProfile),
    /// Train the heads that predict it from a prompt
    Train(PlanTrain),
    /// Compare budgets by request with one budget for all, and placements with the optimum
    Eval(PlanEval),
    /// Choose budget and device of requests
    Choose(PlanChoose),
    /// Imitate the optimum of the paper's own problem
    Offload(PlanOffload),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dsmoe plan profile RUN --data stories=a.txt code=b.txt --requests 60 --out PLAN"
)]
pub(crate) struct PlanProfile {
    /// DSMoE model that stores thresholds by budget
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Shares of the experts to choose among [default: all that the model stores]
    #[arg(long, value_name = "SHARE_OF_EXPERTS,...", value_parser = share, value_delimiter = ',')]
    pub(crate) active: Vec<f64>,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub(crate) prompt: usize,
    /// Tokens behind the prompt whose loss counts
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = at_least_one)]
    pub(crate) continuation: usize,
    /// Requests of every source
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one)]
    pub(crate) requests: usize,
    /// Prepend a BOS token to each text; auto follows the tokenizer
    #[arg(long, default_value = "auto", value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Bos,
    /// Precision of the weights
    #[arg(long, default_value = "f32", value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Precision,
    /// Measurements of each time, of which the median counts; 0 leaves times out
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) repeats: usize,
    #[command(flatten)]
    pub(crate) work: Resumable,
}

impl Plan {
    /// Returns the models that the command reads by a path which may be a name on the Hugging Face Hub.
    pub(super) fn models(&mut self) -> Vec<&mut PathBuf> {
        match &mut self.command {
            PlanCommand::Profile(args) => vec![&mut args.model],
            _ => Vec::new(),
        }
    }
}

/// The arguments of the networks.
#[derive(Clone, Debug, Args)]
pub(crate) struct HeadArgs {
    /// Heads of the network, each of a bootstrap sample of its own
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) heads: u16,
    /// Passes over all requests, of the backbone and of every head
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) epochs: u32,
    /// Seed of the network
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dsmoe plan train PLAN --heads 4")]
pub(crate) struct PlanTrain {
    /// Folder of `dsmoe plan profile`
    pub(crate) plan: PathBuf,
    #[command(flatten)]
    pub(crate) heads: HeadArgs,
    /// Print the plan and compute nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// The arguments of a server.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServerArgs {
    /// A server that requests share: tokens a second of prompts and of new text, when one request has it alone, and seconds until
    /// it starts. Its speed is the same at every budget
    #[arg(long, value_name = "PREFILL,DECODE,START", value_delimiter = ',', num_args = 1)]
    pub(crate) server: Vec<f64>,
    /// Price of a nat of extra loss against a request that takes as long as its deadline
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(crate) mu: f64,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dsmoe plan eval PLAN\n  dsmoe plan eval PLAN --scenes 30 --server 400000,60000,0.0002"
)]
pub(crate) struct PlanEval {
    /// Folder of `dsmoe plan profile`
    pub(crate) plan: PathBuf,
    #[command(flatten)]
    pub(crate) heads: HeadArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    /// Mean share of the experts at which budgets by request are compared with one for all [default: the middle one]
    #[arg(long, value_name = "SHARE_OF_EXPERTS", value_parser = share)]
    pub(crate) active: Option<f64>,
    /// Sets of waiting requests that are placed; 0 leaves placements out
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) scenes: usize,
    /// Print the plan and compute nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dsmoe plan choose PLAN --prompt 'Once upon a time' --deadline 200ms\n  dsmoe plan choose PLAN --requests waiting.jsonl"
)]
pub(crate) struct PlanChoose {
    /// Folder of `dsmoe plan train`
    pub(crate) plan: PathBuf,
    /// The prompt of one request
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, required_unless_present = "requests")]
    pub(crate) prompt: Option<String>,
    /// Tokens that the request wants
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    pub(crate) max_tokens: usize,
    /// Time until the request is to be done, in seconds or as 200ms
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "1")]
    pub(crate) deadline: f64,
    /// JSONL file of requests that wait together: {"prompt": .., "max_tokens": .., "deadline": .., "weight": ..}
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "max_tokens", "deadline"])]
    pub(crate) requests: Option<PathBuf>,
    /// Deviations of the heads that are added to their mean: where heads disagree, the budget is larger
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(crate) kappa: f64,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dsmoe plan offload --users 3 --samples 20000")]
pub(crate) struct PlanOffload {
    /// Users who wait together
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=12))]
    pub(crate) users: u16,
    /// Sets of users; the half with smaller inputs is learnt
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(4..=1_000_000))]
    pub(crate) samples: u32,
    #[command(flatten)]
    pub(crate) heads: HeadArgs,
    /// Print the plan and compute nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}
