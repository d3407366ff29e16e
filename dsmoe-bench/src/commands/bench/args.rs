//! The command line of `dsmoe bench`.

use clap::{Args, Subcommand, ValueEnum};
use dsmoe_kernels::Precision;

#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(crate) work: Work,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Work {
    /// Matrix products: x [tokens, hidden] times w [intermediate, hidden], and their gradients; every op by default
    Kernels(Kernels),
    /// One FFN, dense and cut into experts
    Ffn(Ffn),
}

/// What every kind of work has.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// What matrix products round their operands to: f32, bf16 [default: both]
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16", hide_default_value = true)]
    pub(crate) dtype: Vec<Precision>,
    /// Rounds in which all contestants take their turn; the median counts
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) repeats: u16,
}

#[derive(Debug, Args)]
pub(crate) struct Kernels {
    /// Rows of x
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<usize>,
    /// Columns of x
    #[arg(long, value_name = "N")]
    pub(crate) hidden: Option<usize>,
    /// Rows of w
    #[arg(long, value_name = "N")]
    pub(crate) intermediate: Option<usize>,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Which experts get which tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Routes {
    /// The active share of all pairs, drawn at random
    Random,
    /// All tokens go to the first expert
    OneExpert,
    /// No token goes anywhere
    None,
}

#[derive(Debug, Args)]
pub(crate) struct Ffn {
    /// Rows of x, one or several numbers
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,64,512,4096")]
    pub(crate) tokens: Vec<usize>,
    /// Columns of x
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub(crate) hidden: usize,
    /// Neurons of all experts together
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub(crate) intermediate: usize,
    /// Experts, one or several numbers; each divides --intermediate
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "8,16,32")]
    pub(crate) experts: Vec<usize>,
    /// Share of active pairs of a token and an expert, one or several of 0 to 1
    #[arg(long, value_name = "SHARE,...", value_delimiter = ',', default_value = "0.125,0.375,0.625,1")]
    pub(crate) active: Vec<f64>,
    /// Which experts get which tokens; --active is about random routing alone
    #[arg(long, value_enum, default_value = "random")]
    pub(crate) routing: Routes,
    /// Training: forward and backward, over weights as the optimiser keeps them
    #[arg(long)]
    pub(crate) backward: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}
