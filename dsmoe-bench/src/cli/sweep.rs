//! The arguments of `dsmoe sweep`.

use std::path::PathBuf;

use clap::Args;
use dsmoe_datasets::Bos;
use dsmoe_kernels::Precision;

use super::data::DataArgs;
use super::values::{at_least_one, quantity, share, words};

const EXAMPLES: &str = "\
Examples:
  dsmoe sweep RUN --data heldout.txt
  dsmoe sweep RUN --mixture heldout.toml --against DENSE --tasks hellaswag,piqa --task-data EVAL --limit 200 --out SWEEP";

/// The arguments of `dsmoe sweep`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Sweep {
    /// DSMoE model that stores thresholds by budget
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Shares of the experts to run [default: all that the model stores]
    #[arg(long, value_name = "SHARE_OF_EXPERTS,...", value_parser = share, value_delimiter = ',')]
    pub(crate) active: Vec<f64>,
    /// Dense model to compare with: its loss, its distributions of the next token, its tasks and its time
    #[arg(long, value_name = "MODEL")]
    pub(crate) against: Option<PathBuf>,
    /// Tokens per window; the first token of each is context only [default: 1024, or all positions of a smaller model]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) seq: Option<usize>,
    /// Largest number of tokens from the start of each source
    #[arg(long, value_name = "N", value_parser = quantity)]
    pub(crate) limit_tokens: Option<u64>,
    /// Prepend a BOS token to each text; auto follows the tokenizer
    #[arg(long, default_value = "auto", value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Bos,
    /// Precision of the weights
    #[arg(long, default_value = "bf16", value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Precision,
    /// Benchmarks to score, as for `dsmoe eval`
    #[arg(long, value_name = "TASK,...", value_delimiter = ',', requires = "task_data")]
    pub(crate) tasks: Vec<String>,
    /// Folder that holds a folder of files for each benchmark
    #[arg(long, value_name = "FOLDER")]
    pub(crate) task_data: Option<PathBuf>,
    /// Score only the first N documents of each benchmark
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) limit: Option<usize>,
    /// Tokens of the text that are read at once to time a prefill
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    pub(crate) prefill: usize,
    /// Tokens that are decoded to time decoding
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    pub(crate) decode: usize,
    /// Texts that are decoded side by side
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub(crate) batch: usize,
    /// Measurements of each time, of which the median counts; 0 leaves times out
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) repeats: usize,
    /// Folder of the report (HTML, Markdown, SVG, CSV, JSON) and of the finished points
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Continue in an --out that is not empty, without the points that are done
    #[arg(long, requires = "out")]
    pub(crate) resume: bool,
}
