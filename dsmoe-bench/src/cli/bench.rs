//! The command line of `dsmoe bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use dsmoe_core::Device;
use dsmoe_kernels::Precision;
use dsmoe_router::RouterGradient;

use super::values;
use crate::regression::file::Kind;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dsmoe bench kernels\n  dsmoe bench record --out before.json")]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(crate) work: Work,
}

impl Bench {
    /// Returns the models that the command reads by a path which may be a name on the Hugging Face Hub.
    pub(super) fn models(&mut self) -> Vec<&mut PathBuf> {
        match &mut self.work {
            Work::Decode(args) => args.model.iter_mut().chain(&mut args.dense).collect(),
            _ => Vec::new(),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Work {
    /// Matrix products x [tokens, hidden] times w [intermediate, hidden] and their gradients; by default also every other op
    Kernels(Kernels),
    /// One FFN, dense and in experts
    Ffn(Ffn),
    /// Whole training steps, dense and DSMoE
    Train(Train),
    /// Decoding with random weights, dense and DSMoE, or by a model beside a dense one
    Decode(Decode),
    /// Measure suites of small fixed benchmarks and write a record, to be compared with other records
    Record(Record),
    /// Compare two records, or two builds that take turns; exit status 3 if the second is worse
    Compare(Compare),
    /// Write an HTML file with the trend of every benchmark over many records
    History(History),
    /// Call every benchmark once between two marks; `record --instructions` runs this under valgrind
    Once(Once),
}

/// The shares, suites and kinds by default.
const SHARES: &str = "0.125,0.375,0.625,1";
const SUITES: &str = "kernels,ffn,train,decode";
const KINDS: &str = "time,instructions,quality";
/// The precisions that are measured by default.
pub(crate) const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// The arguments of every measurement.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Precisions of the operands of matrix products: f32, bf16 or both [default: both; decode: bf16]
    #[arg(long, value_name = "DTYPE,...", value_delimiter = ',')]
    pub(crate) dtype: Vec<Precision>,
    /// Rounds in which all contestants take their turn; the median is reported
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) repeats: u16,
}

impl Common {
    /// Returns the precisions asked for, or else `default`.
    pub(crate) fn precisions<'a>(&'a self, default: &'a [Precision]) -> &'a [Precision] {
        if self.dtype.is_empty() { default } else { &self.dtype }
    }

    /// Returns the precisions for `device`: [`Common::precisions`], and by default bf16 alone on a GPU.
    pub(crate) fn precisions_on<'a>(&'a self, device: Device, default: &'a [Precision]) -> &'a [Precision] {
        self.precisions(if device.is_gpu() { &[Precision::Bf16] } else { default })
    }
}

const KERNELS_EXAMPLES: &str = "\
Examples:
  dsmoe bench kernels
  dsmoe bench kernels --tokens 512 --dtype bf16";

#[derive(Debug, Args)]
#[command(after_help = KERNELS_EXAMPLES)]
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

/// The assignment of tokens to experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Routes {
    /// A random share --active of all pairs
    Random,
    /// All tokens to the first expert
    OneExpert,
    /// No token to any expert
    None,
}

const FFN_EXAMPLES: &str = "\
Examples:
  dsmoe bench ffn --experts 8 --active 25%,37.5%
  dsmoe bench ffn --hidden 576 --intermediate 1536 --experts 96 --core 50%";

#[derive(Debug, Args)]
#[command(after_help = FFN_EXAMPLES)]
pub(crate) struct Ffn {
    /// Rows of x; one or several numbers
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,64,512,4096")]
    pub(crate) tokens: Vec<usize>,
    /// Columns of x
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub(crate) hidden: usize,
    /// Neurons of all experts together
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub(crate) intermediate: usize,
    /// Numbers of experts; each must divide --intermediate
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "8,16,32")]
    pub(crate) experts: Vec<usize>,
    /// Shares of active pairs of a token and an expert, 0 to 1
    #[arg(long, value_name = "SHARE_OF_PAIRS,...", value_delimiter = ',', value_parser = values::share, default_value = SHARES, allow_negative_numbers = true)]
    pub(crate) active: Vec<f64>,
    /// The part of every active share that is a core, experts that run for every token: 0 to 1
    #[arg(long, value_name = "SHARE_OF_ACTIVE", value_parser = values::share, default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) core: f64,
    /// Assignment of tokens to experts; --active and --core apply to random routing only
    #[arg(long, value_enum, default_value = "random")]
    pub(crate) routing: Routes,
    /// Time the forward and backward pass of training, with unpacked weights
    #[arg(long)]
    pub(crate) backward: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// The sizes of a LLaMA.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct Architecture {
    /// Width of the model
    #[arg(long, value_name = "N")]
    pub(crate) hidden: Option<usize>,
    /// Width of the FFN
    #[arg(long, value_name = "N")]
    pub(crate) intermediate: Option<usize>,
    /// Decoder layers
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<usize>,
    /// Query heads
    #[arg(long, value_name = "N")]
    pub(crate) heads: Option<usize>,
    /// Key and value heads [default: --heads, or those of the default shape]
    #[arg(long, value_name = "N")]
    pub(crate) kv_heads: Option<usize>,
    /// Vocabulary
    #[arg(long, value_name = "N")]
    pub(crate) vocab: Option<usize>,
    /// Experts in each layer; must divide --intermediate
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) experts: usize,
    /// Share of active pairs of a token and an expert, 0 to 1
    #[arg(long, value_name = "SHARE_OF_PAIRS", value_parser = values::share, default_value_t = 0.375, allow_negative_numbers = true)]
    pub(crate) active: f64,
    /// The part of --active that is a core, experts that run for every token: 0 to 1
    #[arg(long, value_name = "SHARE_OF_ACTIVE", value_parser = values::share, default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) core: f64,
}

const TRAIN_EXAMPLES: &str = "\
Examples:
  dsmoe bench train --hidden 512 --intermediate 1536 --layers 8
  dsmoe bench train --experts 32 --active 25%
  dsmoe bench train --router-gradient every:4,sample:12.5%";

#[derive(Debug, Args)]
#[command(after_help = TRAIN_EXAMPLES)]
pub(crate) struct Train {
    #[command(flatten)]
    pub(crate) architecture: Architecture,
    /// Tokens per sequence
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub(crate) seq: usize,
    /// Sequences per step
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) batch: usize,
    /// Estimators of the routers' gradient, separated by commas, to time beside the full one; as the setting router_gradient
    /// of train
    #[arg(long, value_name = "RULE", value_delimiter = ',')]
    pub(crate) router_gradient: Vec<RouterGradient>,
    /// Device that computes: cpu, or a GPU such as cuda:0 (in bf16)
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    #[command(flatten)]
    pub(crate) common: Common,
}

const DECODE_EXAMPLES: &str = "\
Examples:
  dsmoe bench decode --active 37.5% --dtype bf16
  dsmoe bench decode --hidden 2048 --intermediate 8192 --layers 16
  dsmoe bench decode THRESHOLDS --tokens 64
  dsmoe bench decode PRUNED --dense MODEL --dtype f32";

#[derive(Debug, Args)]
#[command(after_help = DECODE_EXAMPLES)]
pub(crate) struct Decode {
    /// Model to time in place of random weights
    #[arg(conflicts_with_all = ["hidden", "intermediate", "layers", "heads", "kv_heads", "vocab", "experts", "active", "core"])]
    pub(crate) model: Option<PathBuf>,
    /// Dense model beside MODEL [default: where MODEL has thresholds, its weights without them]
    #[arg(long, value_name = "MODEL", requires = "model")]
    pub(crate) dense: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) architecture: Architecture,
    /// Tokens of the prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    pub(crate) prompt: usize,
    /// New tokens per round
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) tokens: usize,
    /// Device that computes: cpu, or a GPU such as cuda:0 (in bf16)
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// A set of benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Every op
    Kernels,
    /// One FFN, dense and with 3 of 8 experts active, forward and backward
    Ffn,
    /// Whole training steps of a small model
    Train,
    /// Decoding with a small model
    Decode,
    /// Conversion of a small model on disk
    Convert,
    /// Perplexity and active share after a short training with fixed seeds; bit-identical on one machine
    Quality,
}

/// The format of a written record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The whole record; `compare` and `history` read it
    Json,
    /// Bencher Metric Format
    Bmf,
    /// github-action-benchmark, customSmallerIsBetter
    Gha,
    /// One line per benchmark
    Csv,
    /// A table
    Md,
}

/// The choice of benchmarks.
#[derive(Clone, Debug, Args)]
pub(crate) struct Choice {
    /// Suites to measure
    #[arg(long, value_name = "SUITE,...", value_delimiter = ',', value_enum, default_value = SUITES)]
    pub(crate) suite: Vec<Suite>,
    /// Measure only benchmarks whose names contain this text
    #[arg(long, value_name = "TEXT")]
    pub(crate) only: Option<String>,
}

const RECORD_EXAMPLES: &str = "\
Examples:
  dsmoe bench record --out before.json
  dsmoe bench record --suite kernels --only rms_norm";

#[derive(Debug, Args)]
#[command(after_help = RECORD_EXAMPLES)]
pub(crate) struct Record {
    #[command(flatten)]
    pub(crate) choice: Choice,
    /// File to write [default: stdout]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Replace the file
    #[arg(long, requires = "out")]
    pub(crate) force: bool,
    /// Format of the output [default: json with --out, otherwise a table]
    #[arg(long, value_enum)]
    pub(crate) format: Option<Format>,
    /// Processes that measure one after the other, since the placement of memory differs between processes; a 99 %
    /// interval needs 8
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) processes: u16,
    /// Rounds of each process, in which every benchmark and the calibration take their turn; a 99 % interval from one
    /// process needs 8
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u16).range(8..=1000))]
    pub(crate) repeats: u16,
    /// Also count instructions with valgrind (suites kernels and ffn; tier avx2 or neon, or that of DSMOE_ISA)
    #[arg(long)]
    pub(crate) instructions: bool,
}

const COMPARE_EXAMPLES: &str = "\
Examples:
  dsmoe bench compare before.json after.json
  dsmoe bench compare --run ./base ./head --rounds 12 --fail-above 3%";

#[derive(Debug, Args)]
#[command(after_help = COMPARE_EXAMPLES)]
pub(crate) struct Compare {
    /// Two records, before and after
    #[arg(value_name = "RECORD", num_args = 2, required_unless_present = "run", conflicts_with = "run")]
    pub(crate) records: Vec<PathBuf>,
    /// Two builds of dsmoe, before and after, that take turns: A B, B A, ...
    #[arg(long, value_names = ["BIN_A", "BIN_B"], num_args = 2)]
    pub(crate) run: Vec<PathBuf>,
    /// Rounds of --run; a 99 % interval needs 8
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(8..=1000))]
    pub(crate) rounds: u16,
    /// Repeats of each measurement of --run
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(8..=1000))]
    pub(crate) repeats: u16,
    #[command(flatten)]
    pub(crate) choice: Choice,
    /// Kinds of benchmarks that can fail the comparison; instruction counts do not depend on the load, times do
    #[arg(long, value_name = "KIND,...", value_delimiter = ',', value_enum, default_value = KINDS)]
    pub(crate) fail_on: Vec<Kind>,
    /// Largest growth that does not count as a failure, such as 3%
    #[arg(long, value_name = "GROWTH", default_value = "3%", value_parser = growth)]
    pub(crate) fail_above: f64,
    /// Largest change of a perplexity or an active share, in either direction, that does not count as a failure
    #[arg(long, value_name = "CHANGE", default_value = "0%", value_parser = growth)]
    pub(crate) quality_tolerance: f64,
}

const HISTORY_EXAMPLES: &str = "\
Examples:
  dsmoe bench history records/ --out history.html";

#[derive(Debug, Args)]
#[command(after_help = HISTORY_EXAMPLES)]
pub(crate) struct History {
    /// Records, or folders of them
    #[arg(value_name = "FILE|DIR", required = true)]
    pub(crate) records: Vec<PathBuf>,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Replace the file
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dsmoe bench once --suite kernels --only rms_norm")]
pub(crate) struct Once {
    #[command(flatten)]
    pub(crate) choice: Choice,
}

/// A share that is not negative. One above 1 needs the sign of percent, since `3` is rarely meant as 300 %.
fn growth(text: &str) -> Result<f64, String> {
    let growth = values::ratio(text).ok().filter(|share| *share >= 0.0);
    match growth.ok_or("give a share such as 3% or 0.03")? {
        large if large > 1.0 && !text.trim_end().ends_with('%') => {
            Err(format!("`{text}` is {} %; write {text}% or {}", 100.0 * large, large / 100.0))
        }
        growth => Ok(growth),
    }
}
