//! The arguments that name text, and those of `dsmoe data`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use dsmoe_datasets::Bos;
use dsmoe_datasets::world::ITEMS;

use super::values::{quantity, separator, words};

/// The heading of options that name text.
const TEXT: &str = "Text";

/// The arguments that name text.
#[derive(Debug, Args)]
pub(crate) struct DataArgs {
    /// Text files or folders: .txt .md .tex .jsonl .json, also as .gz, .zst, .bz2 and .xz, and .parquet; NAME=PATH:WEIGHT
    /// words name the sources of a mixture
    #[arg(help_heading = TEXT, long, value_name = "PATH", num_args = 1.., required_unless_present = "mixture")]
    pub(crate) data: Vec<PathBuf>,
    /// TOML file of [[source]] tables with name, data, weight, and optionally text_column, doc_separator, language,
    /// document_chars, part and part_seed
    #[arg(help_heading = TEXT, long, value_name = "FILE", conflicts_with = "data")]
    pub(crate) mixture: Option<PathBuf>,
    /// Folder of token caches: text is tokenized into it once and read from it, also text larger than the memory
    #[arg(help_heading = TEXT, long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// Separator of the documents in a text file; \n, \t, \r and \\ stand for a line end, a tab, a carriage return and a
    /// backslash [default: a text file is one document]
    #[arg(help_heading = TEXT, long, value_name = "TEXT", allow_hyphen_values = true, value_parser = separator)]
    pub(crate) doc_separator: Option<String>,
    /// Field of a JSON object or column of a Parquet file with the text; several, separated by commas, are joined by
    /// line ends [default: text]
    #[arg(help_heading = TEXT, long, value_name = "NAME")]
    pub(crate) text_column: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  dsmoe data list --folder corpora
  dsmoe data prepare --data corpus.jsonl.zst --model MODEL --cache TOKENS";

const WORLD_EXAMPLE: &str = "\
Examples, a model of the world that is trained from random weights:
  dsmoe data world --out WORLD
  dsmoe init --preset world --tokenizer WORLD/tokenizer.json --out START
  dsmoe train START --data WORLD/text --out RUN --steps 1200 --batch 8 --seq 256 --lr 4e-3 --bos always
  dsmoe eval RUN --tasks world";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Data {
    #[command(subcommand)]
    pub(crate) command: DataCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Show the public datasets of the paper and the commands that download them; downloads nothing
    List(List),
    /// Tokenize text into token caches; continues an interrupted run
    Prepare(Prepare),
    /// Verify folders against their SHA-256 manifests, or write the manifests; verify token caches
    Verify(Verify),
    /// Count documents, bytes and tokens of every source
    Stats(Stats),
    /// Train a byte-level BPE tokenizer on text
    Tokenizer(TrainTokenizer),
    /// Write the embedded world: text in four domains, a tokenizer, and ten probes of a model trained on the text
    World(World),
}

const LIST_EXAMPLES: &str = "\
Examples:
  dsmoe data list --folder corpora";

#[derive(Debug, Args)]
#[command(after_help = LIST_EXAMPLES)]
pub(crate) struct List {
    /// Folder that the commands download into
    #[arg(long, value_name = "DIR", default_value = "data")]
    pub(crate) folder: String,
}

const PREPARE_EXAMPLES: &str = "\
Examples:
  dsmoe data prepare --mixture mixture.toml --model MODEL --cache TOKENS
  dsmoe data prepare --data books/ web.jsonl.zst --model MODEL --cache TOKENS";

#[derive(Debug, Args)]
#[command(after_help = PREPARE_EXAMPLES)]
pub(crate) struct Prepare {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Model directory with the tokenizer.json to use
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Prepend a BOS token to each document; auto follows the tokenizer
    #[arg(long, default_value = "auto", value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Bos,
}

const VERIFY_EXAMPLES: &str = "\
Examples:
  dsmoe data verify corpora --write
  dsmoe data verify corpora TOKENS/*.tokens";

#[derive(Debug, Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub(crate) struct Verify {
    /// Folders with a manifest, and token caches (*.tokens)
    #[arg(required = true)]
    pub(crate) paths: Vec<PathBuf>,
    /// Write the manifests of the files in the folders
    #[arg(long)]
    pub(crate) write: bool,
}

const STATS_EXAMPLES: &str = "\
Examples:
  dsmoe data stats --data corpus.jsonl.zst
  dsmoe data stats --mixture mixture.toml --model MODEL --json";

#[derive(Debug, Args)]
#[command(after_help = STATS_EXAMPLES)]
pub(crate) struct Stats {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Model directory with a tokenizer.json, to count tokens too
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Prepend a BOS token to each document; auto follows the tokenizer
    #[arg(long, default_value = "auto", value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Bos,
}

const TRAIN_TOKENIZER_EXAMPLES: &str = "\
Examples:
  dsmoe data tokenizer --data corpus.jsonl.zst --vocab 32000 --out TOKENIZER";

#[derive(Debug, Args)]
#[command(after_help = TRAIN_TOKENIZER_EXAMPLES)]
pub(crate) struct TrainTokenizer {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Tokens of the vocabulary, at least 258
    #[arg(long, value_name = "N")]
    pub(crate) vocab: usize,
    /// Directory to write tokenizer.json and its companions into, or a .json file for that file alone
    #[arg(long, value_name = "PATH")]
    pub(crate) out: PathBuf,
    /// Replace files that exist
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = WORLD_EXAMPLE)]
pub(crate) struct World {
    /// Folder to write: text/, probes/, tokenizer.json
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: PathBuf,
    /// Seed of the world
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Approximate bytes of text
    #[arg(long, value_name = "N", default_value = "16MB", value_parser = quantity)]
    pub(crate) bytes: u64,
    /// Largest vocabulary of the tokenizer; the preset `world` has 1536
    #[arg(long, value_name = "N", default_value_t = 1536, value_parser = clap::value_parser!(u32).range(258..=65536))]
    pub(crate) vocab: u32,
    /// Largest number of items of each probe
    #[arg(long, value_name = "N", default_value_t = ITEMS as u32,
        value_parser = clap::value_parser!(u32).range(6..=100_000))]
    pub(crate) items: u32,
    /// Write into a folder that is not empty
    #[arg(long)]
    pub(crate) force: bool,
}
