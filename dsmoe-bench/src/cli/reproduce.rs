//! The arguments of `dsmoe reproduce`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};
use dsmoe_core::Device;
use dsmoe_kernels::Precision;

use super::gates::GateArgs;
use super::values::{quantity, share, words};
use crate::reproduce::outputs::Output;
use crate::reproduce::profile;

const EXAMPLES: &str = "\
Everything is kept in --out: results.json, one JSON file for each method and seed under runs/, speeds under timings/, and \
the stages under cache/, named by a hash of their settings and inputs. An interrupted run continues with --resume; with \
changed settings it repeats only the stages that they affect.

Examples:
  dsmoe reproduce                                        # quick, in ./reproduce-quick
  dsmoe reproduce --print-profile quick > mine.toml; dsmoe reproduce --profile mine.toml --seeds 3 --out MINE
  dsmoe reproduce --profile paper-1b --model MODEL --mixture mixture.toml --task-data EVAL --dry-run
  dsmoe reproduce --profile smollm2-135m --model MODEL --data CORPORA --task-data EVAL --budgets 0.375 --out S135
  dsmoe reproduce --profile related-brief                # papers beside DSMoE and their claims
  dsmoe reproduce --profile related --methods lesa       # one of them, as it is recorded
  dsmoe reproduce --profile related-smollm2 --model MODEL --data CORPORA --out DEEP
  dsmoe reproduce --profile small --shard 1/4 --out S1   # and 2/4, 3/4, 4/4 elsewhere; then
  dsmoe reproduce merge S1 S2 S3 S4 --out ALL";

const ROWS: &str = "Rows and measurements";
const INPUTS: &str = "Model and text";
const WORK: &str = "Work";

/// The arguments of `dsmoe reproduce`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
#[command(
    override_usage = "dsmoe reproduce [OPTIONS]\n       dsmoe reproduce merge <DIR>... --out <DIR>\n       dsmoe reproduce splice <FILE>..."
)]
pub(crate) struct Reproduce {
    #[command(subcommand)]
    pub(crate) command: Option<Sub>,
    /// Profile: quick, small, smollm2-135m, paper-1b, paper-7b, related, related-brief and related-smollm2 (experiments on other
    /// papers), or a TOML file
    #[arg(long, value_name = "NAME|FILE", default_value = "quick")]
    pub(crate) profile: String,
    /// Print an embedded profile as TOML and stop
    #[arg(long, value_name = "NAME", value_parser = profile::names())]
    pub(crate) print_profile: Option<String>,
    /// Only these tables and figures, and the runs that they need
    #[arg(help_heading = ROWS, long, value_name = "OUTPUT,...", value_delimiter = ',', value_enum)]
    pub(crate) only: Vec<Output>,
    /// Only these methods or experiments of the profile
    #[arg(help_heading = ROWS, long, value_name = "NAME,...", value_delimiter = ',')]
    pub(crate) methods: Vec<String>,
    /// Only rows at these of the profile's budgets, shares of the FFNs, and dense ones
    #[arg(help_heading = ROWS, long, value_name = "SHARE_OF_FFNS,...", value_parser = share, value_delimiter = ',')]
    pub(crate) budgets: Vec<f64>,
    /// Tokens of the continued training, in place of the profile's number
    #[arg(help_heading = ROWS, long, value_name = "N", value_parser = quantity)]
    pub(crate) tokens: Option<u64>,
    /// Runs of each method, in place of the profile's number
    #[arg(help_heading = ROWS, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) seeds: Option<u64>,
    /// Directory of the results [default: reproduce-PROFILE]
    #[arg(help_heading = WORK, long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Directory of the stages [default: OUT/cache]; processes with one directory divide the work: each takes the next stage
    /// that no other one does
    #[arg(help_heading = WORK, long, value_name = "DIR")]
    pub(crate) stages: Option<PathBuf>,
    /// Remove the weights of models that are measured and that no other row needs; the results stay
    #[arg(help_heading = WORK, long)]
    pub(crate) discard: bool,
    /// Continue in an --out that is not empty
    #[arg(help_heading = WORK, long)]
    pub(crate) resume: bool,
    /// Print the plan (stages, tokens, memory, FLOPs, hours on this machine) and stop
    #[arg(help_heading = WORK, long)]
    pub(crate) dry_run: bool,
    /// Run the i-th of n parts; 0/n runs the stages that all parts need
    #[arg(help_heading = WORK, long, value_name = "I/N")]
    pub(crate) shard: Option<Shard>,
    /// Stop as if interrupted after this many training steps
    #[arg(help_heading = WORK, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) stop_after: Option<u64>,
    /// Dense model to start from, in place of one trained from random weights
    #[arg(help_heading = INPUTS, long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Text of a profile without [world]: as for `dsmoe train`; for a profile with [[source]] tables the folder of their files
    #[arg(help_heading = INPUTS, long, value_name = "PATH", num_args = 1.., conflicts_with = "mixture")]
    pub(crate) data: Vec<PathBuf>,
    /// The same as a file of sources
    #[arg(help_heading = INPUTS, long, value_name = "FILE")]
    pub(crate) mixture: Option<PathBuf>,
    /// Folder of token caches, for text larger than the memory
    #[arg(help_heading = INPUTS, long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// Device that trains and measures: cpu, or a GPU such as cuda:0, which needs dtype = "bf16" in the profile
    #[arg(help_heading = WORK, long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// Folder that holds a folder of files for each benchmark [default: the probes of the embedded world, if it is the text]
    #[arg(help_heading = INPUTS, long, value_name = "FOLDER")]
    pub(crate) task_data: Option<PathBuf>,
}

impl Reproduce {
    /// Reports whether text in place of the embedded world's is named.
    pub(crate) fn names_text(&self) -> bool {
        self.mixture.is_some() || !self.data.is_empty()
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Sub {
    /// Merge the parts of a reproduction: shards, runs of some methods each, or experiments of one profile that ran apart
    Merge(Merge),
    /// Fill the blocks `<!-- reproduce DIR -->` of Markdown files with the table and figure of the record in DIR
    Splice(Splice),
    /// Measure the speed and memory of one model in a separate process
    #[command(hide = true)]
    Speed(Speed),
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dsmoe reproduce merge S1 S2 S3 S4 --out ALL")]
pub(crate) struct Merge {
    /// Directories of the parts
    #[arg(required = true, value_name = "DIR")]
    pub(crate) parts: Vec<PathBuf>,
    /// Directory of the merged results
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Replace existing results
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dsmoe reproduce splice README.md docs/results.md\n  dsmoe reproduce splice --check README.md"
)]
pub(crate) struct Splice {
    /// Markdown files
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Change nothing; fail if something would change
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Speed {
    pub(crate) model: PathBuf,
    #[arg(long)]
    pub(crate) threshold: Option<f32>,
    /// JSON list of token ids
    #[arg(long)]
    pub(crate) ids: PathBuf,
    #[arg(long)]
    pub(crate) decode: usize,
    /// Texts that are decoded side by side, in place of one text without a given continuation
    #[arg(long, value_delimiter = ',')]
    pub(crate) batches: Vec<usize>,
    #[arg(long, value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Option<Precision>,
    #[arg(long)]
    pub(crate) active: Option<f64>,
    #[arg(long, default_value_t)]
    pub(crate) device: Device,
}

impl Speed {
    pub(crate) fn gates(&self) -> GateArgs {
        GateArgs { threshold: self.threshold, active: self.active }
    }
}

/// One of several parts of a reproduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    /// Counts from 1; 0 is the work that all parts need.
    pub(crate) index: usize,
    pub(crate) of: usize,
}

impl Shard {
    /// Reports whether job number `job` belongs to this part.
    pub(crate) fn has(self, job: usize) -> bool {
        self.index > 0 && job % self.of == self.index - 1
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Shard, Self::Err> {
        let wrong = || format!("`{text}` is not a part; write 1/4 for the first of four");
        let (index, of) = text.split_once('/').ok_or_else(wrong)?;
        let (index, of) = (index.parse().map_err(|_| wrong())?, of.parse().map_err(|_| wrong())?);
        if of == 0 || index > of {
            return Err(wrong());
        }
        Ok(Shard { index, of })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_jobs_once() {
        let parts: Vec<Shard> = (1..=3).map(|i| format!("{i}/3").parse().unwrap()).collect();
        assert!((0..20).all(|job| parts.iter().filter(|part| part.has(job)).count() == 1));
        assert!(!(0..20).any(|job| "0/3".parse::<Shard>().unwrap().has(job)));
        for bad in ["", "1", "4/3", "1/0", "a/b", "-1/2"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }
}
