//! The arguments of `dsmoe eval`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use dsmoe_core::Device;
use dsmoe_datasets::Bos;
use dsmoe_datasets::tasks::{MAX_NEW_TOKENS, Profile};
use dsmoe_kernels::Precision;

use super::data::DataArgs;
use super::values::{at_least_one, quantity, words};

const EVAL_EXAMPLES: &str = "\
Benchmarks are scored as lm-evaluation-harness scores them. FOLDER has a folder for each, with the files as they are
distributed: Parquet or JSONL of the Hugging Face dataset, or the original ones. With --out an interrupted run goes on
where it was.

  dsmoe eval MODEL --data heldout.txt
  dsmoe eval MODEL --data wiki.test.raw --perplexity window,rolling
  dsmoe eval MODEL --tasks hellaswag,piqa --task-data FOLDER --out RESULTS
  dsmoe eval MODEL --tasks all --task-data FOLDER --profile lm-eval-0.4.9 --limit 100 --json
  dsmoe eval MODEL --tasks world    (the probes of a model trained on what `dsmoe data world` writes; no files needed)";

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
    /// Model directory, DSMoE or dense, with its tokenizer.json
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// How perplexity is measured: stream (documents one after the other, every token scored), window (documents joined
    /// by blank lines, whole windows of --seq only, as SparseGPT and others do), rolling (by word and byte of each
    /// document, as lm-evaluation-harness does); the three do not compare
    #[arg(long, value_name = "HOW,...", value_delimiter = ',', default_value = "stream", conflicts_with = "tasks",
        value_parser = words::<Perplexity>(&["stream", "window", "rolling"]))]
    pub(crate) perplexity: Vec<Perplexity>,
    /// Tokens per window; the first of each is context only [default: 1024, or all positions of a smaller model; with
    /// --perplexity window 2048]
    #[arg(long, value_name = "TOKENS", conflicts_with = "tasks")]
    pub(crate) seq: Option<usize>,
    /// Tokens between the starts of windows; below --seq they overlap and each token is scored once [default: --seq]
    #[arg(long, value_name = "TOKENS", conflicts_with = "tasks")]
    pub(crate) stride: Option<usize>,
    /// When a text gets a BOS token in front: auto asks the tokenizer [default: always, if the model has one; with --tasks
    /// what the profile does]
    #[arg(long, value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Option<Bos>,
    /// Use this threshold of the gates, 0 to 1, in place of the model's
    #[arg(long, value_name = "SHARE")]
    pub(crate) threshold: Option<f32>,
    /// Precision of the weights: bf16 takes half the memory and less time, and rounds what products multiply [default:
    /// f32, bf16 on a GPU]
    #[arg(long, value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Option<Precision>,
    /// Where to compute: cpu, or a GPU as cuda:0 (products in bf16 there)
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// Use no more than this many tokens from the start of every source
    #[arg(long, value_name = "N", value_parser = quantity, conflicts_with = "tasks")]
    pub(crate) limit_tokens: Option<u64>,
    /// Benchmarks: hellaswag, lambada_openai, lambada_standard, piqa, social_iqa, storycloze_2016, winogrande, gsm8k,
    /// nq_open, triviaqa, webqs, wikitext, or all there are files of; world for the ten probes of the embedded world
    #[arg(long, value_name = "TASK,...", value_delimiter = ',', help_heading = "Benchmarks",
        value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) tasks: Vec<String>,
    /// Folder with a folder of files for each benchmark
    #[arg(long, value_name = "FOLDER", conflicts_with = "data", help_heading = "Benchmarks")]
    pub(crate) task_data: Option<PathBuf>,
    /// A file to score, in place of those in the folder
    #[arg(long, value_name = "TASK=FILE", conflicts_with = "data", help_heading = "Benchmarks")]
    pub(crate) task_file: Vec<TaskFile>,
    /// A file to draw the examples in prompts from, in place of those in the folder
    #[arg(long, value_name = "TASK=FILE", conflicts_with = "data", help_heading = "Benchmarks")]
    pub(crate) shots_file: Vec<TaskFile>,
    /// Release of lm-evaluation-harness whose prompts and scores to follow; dsmoe is 0.4.12 with WebQuestions mended
    #[arg(long, value_name = "NAME", default_value = "dsmoe", conflicts_with = "data", help_heading = "Benchmarks",
        value_parser = words::<Profile>(&PROFILES))]
    pub(crate) profile: Profile,
    /// Score the first N documents of each benchmark only
    #[arg(long, value_name = "N", conflicts_with = "data", help_heading = "Benchmarks", value_parser = at_least_one)]
    pub(crate) limit: Option<usize>,
    /// Which world `--tasks world` asks about
    #[arg(
        long,
        value_name = "SEED",
        default_value_t = 0,
        conflicts_with = "data",
        help_heading = "Benchmarks"
    )]
    pub(crate) world_seed: u64,
    /// New tokens of a generated answer at the most; scores compare with the harness's at its 256
    #[arg(long, value_name = "N", default_value_t = MAX_NEW_TOKENS, conflicts_with = "data",
        help_heading = "Benchmarks", value_parser = at_least_one)]
    pub(crate) max_new_tokens: usize,
    /// Write results and samples to DIR/<model>/, and keep answers there until all are done, to go on after an
    /// interrupt
    #[arg(long, value_name = "DIR", conflicts_with = "data", help_heading = "Benchmarks")]
    pub(crate) out: Option<PathBuf>,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Perplexity {
    Stream,
    Window,
    Rolling,
}

impl FromStr for Perplexity {
    type Err = String;

    fn from_str(word: &str) -> Result<Perplexity, String> {
        match word {
            "stream" => Ok(Perplexity::Stream),
            "window" => Ok(Perplexity::Window),
            "rolling" => Ok(Perplexity::Rolling),
            _ => Err(format!("`{word}` is not stream, window or rolling")),
        }
    }
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
