//! The arguments of `dsmoe eval`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use dsmoe_core::Device;
use dsmoe_core::ffn::RouterBound;
use dsmoe_datasets::Bos;
use dsmoe_datasets::tasks::{MAX_NEW_TOKENS, Profile};
use dsmoe_kernels::Precision;

use super::data::DataArgs;
use super::gates::GateArgs;
use super::processes::ProcessArgs;
use super::values::{at_least_one, quantity, words};

const EVAL_EXAMPLES: &str = "\
Benchmarks are scored as in lm-evaluation-harness. FOLDER holds a folder for each benchmark with its files as they are \
distributed: Parquet or JSONL of the Hugging Face dataset, or the original files. With --out an interrupted run can be \
continued by the same command.

Examples:
  dsmoe eval MODEL --data heldout.txt
  dsmoe eval MODEL --data wiki.test.raw --perplexity window,rolling
  dsmoe eval MODEL --tasks hellaswag,piqa --task-data FOLDER --out RESULTS
  dsmoe eval MODEL --tasks all --task-data FOLDER --profile lm-eval-0.4.9 --limit 100 --json
  dsmoe eval MODEL --task my.toml       # a benchmark of your own: docs/tasks.md
  dsmoe eval MODEL --tasks world        # a model trained on the text of `dsmoe data world`";

const BENCHMARKS: &str = "Benchmarks";

#[derive(Debug, Args)]
#[command(after_help = EVAL_EXAMPLES)]
#[command(
    override_usage = "dsmoe eval [OPTIONS] <MODEL> --data <PATH>...\n       dsmoe eval [OPTIONS] <MODEL> --tasks <TASK,...> --task-data <FOLDER>"
)]
#[command(mut_arg("data", |data| data.required_unless_present_any(["mixture", "tasks"]).conflicts_with("tasks")))]
#[command(mut_arg("mixture", |mixture| mixture.conflicts_with_all(["data", "tasks"])))]
#[command(mut_arg("cache", |cache| cache.conflicts_with("tasks")))]
#[command(mut_arg("doc_separator", |separator| separator.conflicts_with("tasks")))]
#[command(mut_arg("text_column", |column| column.conflicts_with("tasks")))]
pub(crate) struct Eval {
    /// Model: a Hugging Face or DSMoE directory, or a GGUF file
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Convention of the perplexity: stream (documents one after the other, every token scored), window (documents joined
    /// by blank lines, whole windows of --seq only, as in SparseGPT), rolling (by word and byte of each document, as in
    /// lm-evaluation-harness); their values cannot be compared with each other
    #[arg(
        long,
        value_name = "HOW,...",
        value_delimiter = ',',
        default_value = "stream",
        conflicts_with = "tasks",
        value_enum
    )]
    pub(crate) perplexity: Vec<Perplexity>,
    /// Tokens per window; the first token of each is context only [default: 1024, or all positions of a smaller model; with
    /// --perplexity window 2048]
    #[arg(long, value_name = "TOKENS", conflicts_with = "tasks")]
    pub(crate) seq: Option<usize>,
    /// Tokens between the starts of windows; below --seq they overlap and each token is scored once [default: --seq]
    #[arg(long, value_name = "TOKENS", conflicts_with = "tasks")]
    pub(crate) stride: Option<usize>,
    /// Prepend a BOS token to each text; auto follows the tokenizer [default: auto; with --tasks as in
    /// the profile]
    #[arg(long, value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Option<Bos>,
    #[command(flatten)]
    pub(crate) gates: GateArgs,
    /// Router that stands in for the model's, with as many experts for every token: oracle (the largest outputs, computed
    /// from all experts) or random; bounds of what a router can be worth
    #[arg(long, value_parser = words::<RouterBound>(&["oracle", "random"]))]
    pub(crate) router: Option<RouterBound>,
    /// Dense model whose distributions of the next token are compared with the model's on the same text: divergence, and how
    /// often both find the same token likeliest
    #[arg(long, value_name = "MODEL", conflicts_with = "tasks")]
    pub(crate) against: Option<PathBuf>,
    /// Precision of the weights: bf16 takes half the memory and less time, and rounds the operands of products [default:
    /// f32, bf16 on a GPU]
    #[arg(long, value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Option<Precision>,
    /// Device that computes: cpu, or a GPU such as cuda:0 (matrix products in bf16)
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// Largest number of tokens from the start of each source
    #[arg(long, value_name = "N", value_parser = quantity, conflicts_with = "tasks")]
    pub(crate) limit_tokens: Option<u64>,
    /// Benchmarks: hellaswag, lambada_openai, lambada_standard, piqa, social_iqa, storycloze_2016, winogrande, gsm8k,
    /// nq_open, triviaqa, webqs, wikitext, arc_challenge, arc_easy, boolq, c4, mmlu, openbookqa; a file that ends in .toml: the
    /// task that it defines; all: those with files; world: the ten probes of the embedded world
    #[arg(long, visible_alias = "task", value_name = "TASK,...", value_delimiter = ',', help_heading = BENCHMARKS,
        value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) tasks: Vec<String>,
    /// Folder that holds a folder of files for each benchmark
    #[arg(long, value_name = "FOLDER", conflicts_with = "data", help_heading = BENCHMARKS)]
    pub(crate) task_data: Option<PathBuf>,
    /// File to score, in place of those in the folder
    #[arg(long, value_name = "TASK=FILE", conflicts_with = "data", help_heading = BENCHMARKS)]
    pub(crate) task_file: Vec<TaskFile>,
    /// File with the examples in prompts, in place of those in the folder
    #[arg(long, value_name = "TASK=FILE", conflicts_with = "data", help_heading = BENCHMARKS)]
    pub(crate) shots_file: Vec<TaskFile>,
    /// Examples before each question, from the training split of the benchmark [default: the benchmark's own number: 5 for
    /// gsm8k, nq_open, triviaqa and webqs, else 0]
    #[arg(long, value_name = "N", conflicts_with = "data", requires = "tasks", help_heading = BENCHMARKS)]
    pub(crate) shots: Option<usize>,
    /// Release of lm-evaluation-harness whose prompts and scores to follow; dsmoe is 0.4.12 with WebQuestions corrected
    #[arg(long, value_name = "NAME", default_value = "dsmoe", conflicts_with = "data", help_heading = BENCHMARKS,
        value_parser = words::<Profile>(&PROFILES))]
    pub(crate) profile: Profile,
    /// Exit with status 3 if a benchmark was left out, or a document could not be scored
    #[arg(long, conflicts_with = "data", requires = "tasks", help_heading = BENCHMARKS)]
    pub(crate) strict: bool,
    /// Score only the first N documents of each benchmark
    #[arg(long, value_name = "N", conflicts_with = "data", help_heading = BENCHMARKS, value_parser = at_least_one)]
    pub(crate) limit: Option<usize>,
    /// Seed of the world that `--tasks world` asks about
    #[arg(long, value_name = "SEED", default_value_t = 0, conflicts_with = "data", help_heading = BENCHMARKS)]
    pub(crate) world_seed: u64,
    /// Largest number of new tokens of a generated answer; the harness uses 256
    #[arg(long, value_name = "N", default_value_t = MAX_NEW_TOKENS, conflicts_with = "data",
        help_heading = BENCHMARKS, value_parser = at_least_one)]
    pub(crate) max_new_tokens: usize,
    /// Write results and samples to DIR/<model>/, and keep the answers there until all are done, so that an interrupted
    /// run can be continued
    #[arg(long, value_name = "DIR", conflicts_with = "data", help_heading = BENCHMARKS)]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) processes: ProcessArgs,
}

/// The names of all profiles.
const PROFILES: [&str; Profile::ALL.len()] = {
    let mut names = [""; Profile::ALL.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = Profile::ALL[i].name();
        i += 1;
    }
    names
};

/// A convention of measuring perplexity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Perplexity {
    Stream,
    Window,
    Rolling,
}

/// A benchmark's file.
#[derive(Clone, Debug)]
pub(crate) struct TaskFile {
    pub(crate) task: String,
    pub(crate) path: PathBuf,
}

impl FromStr for TaskFile {
    type Err = String;

    fn from_str(text: &str) -> Result<TaskFile, String> {
        match text.split_once('=') {
            Some((task, path)) if !task.is_empty() && !path.is_empty() => {
                Ok(TaskFile { task: task.to_owned(), path: path.into() })
            }
            _ => Err(format!("`{text}` is not TASK=FILE; write piqa=valid.jsonl")),
        }
    }
}

impl Eval {
    /// The precision of the weights: f32, or bf16 on a GPU, unless `--dtype` says otherwise.
    pub(crate) fn precision(&self) -> Precision {
        self.dtype.unwrap_or(if self.device.is_gpu() { Precision::Bf16 } else { Precision::F32 })
    }
}
