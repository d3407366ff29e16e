//! The arguments of `dsmoe prune`.

use std::path::PathBuf;

use clap::Args;
use dsmoe_baselines::Asked;
use dsmoe_datasets::Bos;

use super::processes::ProcessArgs;
use super::values::{separator, words};

const CALIBRATION: &str = "Calibration text";

/// Calibration text and its form.
#[derive(Debug, Args)]
pub(crate) struct CalibrationArgs {
    /// Calibration text: files and folders as for `dsmoe train`, usually the text of the later training; the part that a
    /// training with default settings holds out is not read
    #[arg(help_heading = CALIBRATION, long, value_name = "PATH", num_args = 1..)]
    pub(crate) calib: Vec<PathBuf>,
    /// Separator of the documents in a text file; \n, \t, \r and \\ stand for a line end, a tab, a carriage return and a
    /// backslash [default: a text file is one document]
    #[arg(help_heading = CALIBRATION, long, value_name = "TEXT", allow_hyphen_values = true, value_parser = separator, requires = "calib")]
    pub(crate) doc_separator: Option<String>,
    /// Field of a JSON object or column of a Parquet file with the text; several, separated by commas, are joined by
    /// line ends [default: text]
    #[arg(help_heading = CALIBRATION, long, value_name = "NAME", requires = "calib")]
    pub(crate) text_column: Option<String>,
    /// Prepend a BOS token to each document; auto follows the tokenizer
    #[arg(help_heading = CALIBRATION, long, default_value = "auto", requires = "calib", value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Bos,
    /// Calibration sequences
    #[arg(help_heading = CALIBRATION, long, value_name = "N", default_value_t = 128, requires = "calib", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: u32,
    /// Tokens in a calibration sequence [default: 1024, or all positions of a smaller model]
    #[arg(help_heading = CALIBRATION, long, value_name = "TOKENS", requires = "calib")]
    pub(crate) seq: Option<usize>,
}

const EXAMPLES: &str = "\
Examples:
  dsmoe prune DENSE --method sparsegpt --budget 59% --calib corpus.jsonl.zst --out PRUNED
  dsmoe prune DENSE --method llama-moe --budget 735M --set construction=clustering --calib corpus.jsonl.zst --out MOE
  dsmoe prune DENSE --method llm-pruner-block --budget 59% --dry-run    # what it would make

`dsmoe methods` lists methods and their settings.
After an interruption hc-smoe, uncurl, seer-moe, thresholds, factorllm, and duo with start=important, continue with --resume.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Prune {
    /// Dense model, or a mixture of experts for the methods that change one: a Hugging Face directory or a GGUF file
    pub(crate) model: PathBuf,
    /// Method; `dsmoe methods` lists them
    #[arg(long, value_name = "NAME")]
    pub(crate) method: String,
    /// Parameters to activate, 735M or 3.93B, or a share of the model's, 0.59 or 59%; for the methods that change experts, parameters
    /// to hold, which held:59% says in words
    #[arg(long, value_name = "PARAMS|SHARE")]
    pub(crate) budget: Asked,
    /// Directory to write
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// A setting of the method, as in `dsmoe methods`
    #[arg(long = "set", value_name = "KEY=VALUE", allow_hyphen_values = true)]
    pub(crate) set: Vec<String>,
    /// Seed of the choice of calibration text and of the random parts of the method
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Continue an interrupted call with the same arguments from what it left in OUT.partial
    #[arg(long, requires = "out")]
    pub(crate) resume: bool,
    /// Print the plan and make nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) processes: ProcessArgs,
}
