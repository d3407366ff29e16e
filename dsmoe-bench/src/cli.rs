//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use dsmoe_baselines::Budget;
use dsmoe_core::Device;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::convert::PartitionSpec;
use dsmoe_datasets::Bos;
use dsmoe_datasets::tasks::{MAX_NEW_TOKENS, Profile};
use dsmoe_kernels::Precision;
use dsmoe_router::{GateValue, Rescale, RouterInit, ZeroActive};
use dsmoe_train::TrainConfig;
use dsmoe_train::config::NearDuplicates;

use crate::commands::bench::args::Bench;
use crate::commands::data::args::Data;
use crate::commands::default_precision;
use crate::commands::export::Form;
use crate::commands::reproduce::args::Reproduce;

/// Router weights of a conversion that does not say otherwise: the paper's.
const DEFAULT_ROUTER_INIT: &str = "random";

/// Turn a Hugging Face LLaMA into a DSMoE model, train it, see what it costs and how good it is, and generate text.
#[derive(Debug, Parser)]
#[command(name = "dsmoe", version, propagate_version = true, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print the result as one JSON object on stdout
    #[arg(long, global = true, display_order = 100)]
    pub(crate) json: bool,
    /// No progress and no notes on stderr
    #[arg(long, short, global = true, display_order = 101)]
    pub(crate) quiet: bool,
    /// Worker threads; results do not depend on it [default: all cores]
    #[arg(long, global = true, value_name = "N", display_order = 102,
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

const AFTER_HELP: &str = "\
Results go to stdout, progress and errors to stderr.

Exit status: 0 done; 1 error; 2 wrong usage; 3 a result out of its tolerance; 130 interrupted.

Environment: DSMOE_ISA=scalar|avx2|avx512 narrows the instruction set; DSMOE_SHARED names the data folder that
`dsmoe doctor` looks into; DSMOE_CUDA_LIB_DIR names a folder of CUDA's libraries, such as nvidia/cu13/lib of PyTorch's
wheels, and DSMOE_CACHE_DIR one for compiled GPU kernels [default: dsmoe in the user's cache folder].";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compare DSMoE with the paper's baselines at one budget: every table and figure of the paper, in one report
    Reproduce(Box<Reproduce>),
    /// Show a model's configuration, layout, parameters and FLOPs; reads headers only
    Inspect(Inspect),
    /// Turn a dense LLaMA directory into a DSMoE directory
    Convert(Convert),
    /// Make a model that activates fewer parameters by one of the methods that DSMoE is compared with
    Prune(Prune),
    /// List these methods with their settings
    Methods,
    /// Write a DSMoE model as a plain LLaMA, or a model again in another precision
    Export(Export),
    /// Train a DSMoE or dense model on text
    Train(Box<Train>),
    /// Measure perplexity and the active share of experts on text, or score benchmarks
    Eval(Box<Eval>),
    /// Continue a prompt
    Generate(Generate),
    /// Make a model with random weights in Hugging Face layout
    Init(Init),
    /// Show CPU features, threads, memory, GPUs, and what CUDA and a data folder lack
    Doctor(Doctor),
    /// Generate text, train a tiny LLaMA, convert it, train it to a budget, and compare, in about two minutes
    Demo(Demo),
    /// Prepare, check, count and generate text for training; train a tokenizer
    Data(Data),
    /// Time kernels, FFNs, training and decoding against what the machine can do
    Bench(Bench),
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Dense LLaMA or DSMoE directory
    pub(crate) model: PathBuf,
    /// Active experts per token and layer, mean, to count activated parameters at [default: all experts]
    #[arg(long, value_name = "K")]
    pub(crate) mean_active: Option<f64>,
    /// Tokens a token attends to, to count FLOPs at [default: 1024, or all positions of a smaller model]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) context: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// Dense LLaMA directory
    pub(crate) model: PathBuf,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Experts to cut each FFN into; must divide intermediate_size
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) experts: u32,
    /// Which neurons form an expert: contiguous, random, or a JSON file {"layers": [[[neuron, ...], ...], ...]}
    #[arg(long, value_name = "contiguous|random|FILE", default_value = "contiguous")]
    pub(crate) partition: PartitionSpec,
    /// How router weights start: random (the paper), open (all experts active), centroid, or warm(K) (K experts open)
    #[arg(long, value_name = "random|open|centroid|warm(K)", default_value = DEFAULT_ROUTER_INIT)]
    pub(crate) router_init: RouterInit,
    /// An expert is active when its gate is above this, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    pub(crate) threshold: f32,
    /// What multiplies an active expert: its sigmoid gate (eq. 7), or 1
    #[arg(long, default_value = "sigmoid", value_parser = words::<GateValue>(&["sigmoid", "binary"]))]
    pub(crate) gate_value: GateValue,
    /// Rescale the sum of the experts by experts / active experts (eq. 8), or not
    #[arg(long, default_value = "none", value_parser = words::<Rescale>(&["none", "eq8"]))]
    pub(crate) rescale: Rescale,
    /// A token without an active expert skips the FFN, or takes the expert with the largest gate
    #[arg(long, default_value = "skip", value_parser = words::<ZeroActive>(&["skip", "force_argmax"]))]
    pub(crate) zero_active: ZeroActive,
    /// Train without the straight-through rule (eq. 10): inactive gates get no gradient of the language-model loss
    #[arg(long)]
    pub(crate) no_ste: bool,
    /// Seed of router weights and of a random partition
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Dense LLaMA directory
    pub(crate) model: PathBuf,
    /// How; `dsmoe methods` lists all
    #[arg(long, value_name = "NAME")]
    pub(crate) method: String,
    /// Parameters to activate, 735M or 3.93B, or a share of the dense model's, 0.59 or 59%
    #[arg(long, value_name = "PARAMS|SHARE")]
    pub(crate) budget: Budget,
    /// Directory to write
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub(crate) out: Option<PathBuf>,
    /// Calibration text: files and folders as for `dsmoe train`, the text that the model is to be trained on; what a run of
    /// default settings would hold out of it is not read
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) calib: Vec<String>,
    /// What stands between documents in a text file [default: a text file is one document]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) doc_separator: Option<String>,
    /// Field of a JSON object, or column of a Parquet file, that holds the text; several, with commas, are joined by
    /// line ends [default: text]
    #[arg(long, value_name = "NAME")]
    pub(crate) text_column: Option<String>,
    /// When a document gets a BOS token in front: auto asks the tokenizer
    #[arg(long, default_value = "auto", value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Bos,
    /// Calibration sequences
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: u32,
    /// Tokens of a calibration sequence [default: 1024, or all positions of a smaller model]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) seq: Option<usize>,
    /// A setting of the method, as in `dsmoe methods`
    #[arg(long = "set", value_name = "KEY=VALUE", allow_hyphen_values = true)]
    pub(crate) set: Vec<String>,
    /// Seed of the choice of calibration text and of everything random in the method
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Say what would be made, and make nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// DSMoE directory (or a dense one, as native)
    pub(crate) model: PathBuf,
    /// dense: a plain LlamaForCausalLM without routers, neurons in their original order; native: the model as it is;
    /// llama-moe: what method llama-moe made, as LlamaMoEForCausalLM
    #[arg(long = "as", value_name = "FORM", value_parser = words::<Form>(&["dense", "native", "llama-moe"]))]
    pub(crate) form: Form,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Precision of the weights [default: as they are]
    #[arg(long, value_parser = words::<Dtype>(&["f32", "bf16", "f16"]))]
    pub(crate) dtype: Option<Dtype>,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

/// Where text comes from.
#[derive(Debug, Args)]
pub(crate) struct DataArgs {
    /// Text files or folders: .txt .md .tex .jsonl .json, also .gz and .zst, and .parquet; as NAME=PATH:WEIGHT words,
    /// sources of a mixture
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present = "mixture")]
    pub(crate) data: Vec<String>,
    /// TOML file of [[source]] tables with name, data, weight, and optionally text_column and doc_separator
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    pub(crate) mixture: Option<PathBuf>,
    /// Folder of token caches: tokens are made there once and read from there, for text larger than the memory
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// What stands between documents in a text file [default: a text file is one document]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) doc_separator: Option<String>,
    /// Field of a JSON object, or column of a Parquet file, that holds the text; several, with commas, are joined by
    /// line ends [default: text]
    #[arg(long, value_name = "NAME")]
    pub(crate) text_column: Option<String>,
}

/// The keys of a run's TOML file.
fn train_keys() -> String {
    let keys = serde_json::to_value(TrainConfig::default());
    let keys =
        keys.ok().and_then(|keys| keys.as_object().map(|keys| keys.keys().cloned().collect::<Vec<_>>()));
    format!("Keys of --config and --set: {}.", keys.unwrap_or_default().join(", "))
}

#[derive(Debug, Args)]
#[command(after_help = train_keys())]
pub(crate) struct Train {
    /// Model directory to start from, DSMoE or dense, with its tokenizer.json
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Run directory: metrics, checkpoints, and at the end the trained model
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Optimiser steps of the whole run
    #[arg(long, value_name = "N", conflicts_with = "tokens")]
    pub(crate) steps: Option<u64>,
    /// Tokens of the whole run, rounded up to whole steps; 5M, 10B and the like are understood
    #[arg(long, value_name = "N", value_parser = quantity)]
    pub(crate) tokens: Option<u64>,
    /// Sequences per micro-batch [default: 32]
    #[arg(long, value_name = "N")]
    pub(crate) batch: Option<usize>,
    /// Tokens per sequence [default: 1024]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) seq: Option<usize>,
    /// Micro-batches per optimiser step [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) accumulate: Option<usize>,
    /// Peak learning rate [default: 2e-5]
    #[arg(long, value_name = "X")]
    pub(crate) lr: Option<f64>,
    /// Steps of linear warm-up [default: a tenth of the steps, at most 100]
    #[arg(long, value_name = "N")]
    pub(crate) warmup_steps: Option<u64>,
    /// Learning rate of routers over that of the rest [default: 1]
    #[arg(long, value_name = "X")]
    pub(crate) router_lr_scale: Option<f64>,
    /// Constant weight of the sparsity loss [default: 1]
    #[arg(long, value_name = "WEIGHT", conflicts_with = "active_target")]
    pub(crate) sparsity: Option<f64>,
    /// Share of experts to be active, mean over tokens and layers, held by a controller; 0.375 is 3 of 8
    #[arg(long, value_name = "SHARE")]
    pub(crate) active_target: Option<f64>,
    /// TOML file with any of the settings; flags override it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// One setting by its key in the TOML file, such as weight_decay=0; overrides flags too
    #[arg(long = "set", value_name = "KEY=VALUE", allow_hyphen_values = true)]
    pub(crate) set: Vec<String>,
    /// What matrix products round their operands to; weights, gradients and sums stay f32 [default: f32, bf16 on a GPU]
    #[arg(long, value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Option<Precision>,
    /// Where to compute: cpu, or a GPU as cuda:0 (products in bf16 there)
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// Seed of the order of the text [default: 0]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// When a document gets a BOS token in front: auto asks the tokenizer [default: auto]
    #[arg(long, value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Option<Bos>,
    /// Share of the text of every source held out for evaluation [default: 0.02]
    #[arg(long, value_name = "SHARE")]
    pub(crate) valid_fraction: Option<f64>,
    /// Windows of every source held out at most [default: 5000]
    #[arg(long, value_name = "N")]
    pub(crate) valid_samples: Option<u64>,
    /// Text that is held out and trained on too, up to case, punctuation and small changes: drop it from one side, or
    /// keep it [default: drop for a mixture, keep for one source]
    #[arg(long, value_parser = words::<NearDuplicates>(&["keep", "drop"]))]
    pub(crate) near_duplicates: Option<NearDuplicates>,
    /// Steps between evaluations of the held-out text [default: at the end only]
    #[arg(long, value_name = "N")]
    pub(crate) eval_every: Option<u64>,
    /// Steps between checkpoints [default: at the end only]
    #[arg(long, value_name = "N")]
    pub(crate) save_every: Option<u64>,
    /// Checkpoints to keep [default: 2]
    #[arg(long, value_name = "N")]
    pub(crate) keep: Option<usize>,
    /// Continue the run in --out from its newest checkpoint
    #[arg(long, conflicts_with = "force")]
    pub(crate) resume: bool,
    /// Discard the run in --out and start over
    #[arg(long)]
    pub(crate) force: bool,
    /// Save a checkpoint and stop after this many steps of this invocation
    #[arg(long, value_name = "N")]
    pub(crate) stop_after: Option<u64>,
    /// Show the plan - steps, tokens, parameters, memory - and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
}

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

/// A number of which 0 makes no sense.
fn at_least_one(text: &str) -> Result<usize, String> {
    match quantity(text)? {
        0 => Err("use at least 1".into()),
        count => usize::try_from(count).map_err(|cause| cause.to_string()),
    }
}

impl Eval {
    /// Precision of the weights.
    pub(crate) fn precision(&self) -> Precision {
        self.dtype.unwrap_or(default_precision(self.device, Precision::F32))
    }
}

#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// Model directory, DSMoE or dense, with its tokenizer.json
    pub(crate) model: PathBuf,
    /// Text to continue
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "prompt_file",
        required_unless_present = "prompt_file"
    )]
    pub(crate) prompt: Option<String>,
    /// File with the text to continue; its line end at the very end is left out
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// New tokens at the most
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// 0 takes the most likely token every time; higher is more varied
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Sample among this many most likely tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Sample among the most likely tokens that hold this share of the probability; 1 for all
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Seed of the sampling
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) stop: Vec<String>,
    /// Go on after an end-of-text token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Run the whole text anew for every token, to check the cache
    #[arg(long)]
    pub(crate) no_kv_cache: bool,
    /// Feed the prompt in pieces of this many tokens; 0 for all at once
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub(crate) prefill_chunk: usize,
    /// Use this threshold of the gates, 0 to 1, in place of the model's
    #[arg(long, value_name = "SHARE")]
    pub(crate) threshold: Option<f32>,
    /// Precision of the weights [default: bf16 for a model stored as bf16 or f16 and on a GPU, f32 for one stored as f32]
    #[arg(long, value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Option<Precision>,
    /// Where to compute: cpu, or a GPU as cuda:0 (products in bf16 there)
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// Whether the prompt gets a BOS token in front: auto asks the tokenizer [default: always, if the model has one]
    #[arg(long, value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Option<Bos>,
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Architecture by name; see --list
    #[arg(long, value_name = "NAME", conflicts_with = "config", required_unless_present_any = ["config", "list"])]
    pub(crate) preset: Option<String>,
    /// Architecture by a config.json
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Directory to write
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    pub(crate) out: Option<PathBuf>,
    /// Precision of the weights
    #[arg(long, default_value = "f32", value_parser = words::<Dtype>(&["bf16", "f32"]))]
    pub(crate) dtype: Dtype,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// A tokenizer.json to copy into the directory
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Largest file of weights, such as 500MB or 5GB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = quantity)]
    pub(crate) max_shard_size: u64,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
    /// List the presets and stop
    #[arg(long)]
    pub(crate) list: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Data folder to look into [default: $DSMOE_SHARED, or ../shared]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Keep text, models and runs in this directory [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Seed of the text, the weights and the order of training
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Training steps of the dense model, and again of the DSMoE model
    #[arg(long, value_name = "N", default_value_t = crate::commands::demo::STEPS,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) steps: u64,
}

/// A parser of the enum whose words these are.
pub(crate) fn words<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: FromStr + Clone + Send + Sync + 'static,
    T::Err: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    PossibleValuesParser::new(words).try_map(|word| word.parse::<T>())
}

/// A whole number with an optional decimal suffix: `1000`, `1_000`, `1.5M`, `10B`, `500MB`, `5GB`.
pub(crate) fn quantity(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not an amount; write 1000, 500MB, 1.5M or 10B");
    let plain = text.replace('_', "");
    let split = plain.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(plain.len());
    let (number, suffix) = plain.split_at(split);
    let scale = match suffix.to_ascii_uppercase().as_str() {
        "" => 1u64,
        "K" | "KB" => 1000,
        "M" | "MB" => 1_000_000,
        "B" | "G" | "GB" => 1_000_000_000,
        "T" | "TB" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).ok_or_else(wrong);
    }
    let value = number.parse::<f64>().map_err(|_| wrong())? * scale as f64;
    // Whole numbers up to 2^53 are exact.
    if value.is_finite() && value >= 0.0 && value.fract() == 0.0 && value < 9e15 {
        Ok(value as u64)
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn amounts_take_suffixes() {
        let good = ["7", "1_000", "1.5M", "10B", "500MB", "5gb"].map(|text| quantity(text).unwrap());
        assert_eq!(good, [7, 1000, 1_500_000, 10_000_000_000, 500_000_000, 5_000_000_000]);
        for bad in ["", "x", "-1", "1.5", "3parsecs", "nan", "1e40", "99999999999TB", "inf"] {
            assert!(quantity(bad).is_err(), "{bad}");
        }
    }
}
