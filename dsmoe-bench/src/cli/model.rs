//! The arguments of the commands that make, show and convert model directories.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use dsmoe_baselines::dsmoe::Routers;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::convert::PartitionSpec;
use dsmoe_core::export::ExportAs;
use dsmoe_core::gguf::GgufType;
use dsmoe_router::{GateValue, Rescale, ZeroActive};

use super::processes::ProcessArgs;
use super::prune::CalibrationArgs;
use super::values::{quantity, ratio, separator, share, words};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dsmoe inspect MODEL\n  dsmoe inspect RUN --mean-active 3 --json\n  dsmoe inspect model.gguf"
)]
pub(crate) struct Inspect {
    /// Model: a Hugging Face or DSMoE directory, or a GGUF file
    pub(crate) model: PathBuf,
    /// Mean number of active experts per token and layer, for the activated parameters [default: all experts]
    #[arg(long, value_name = "K")]
    pub(crate) mean_active: Option<f64>,
    /// Tokens that a token attends to, for the FLOPs [default: 1024, or all positions of a smaller model]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) context: Option<usize>,
}

const ABOUT_CONVERT: &str = "\
With --calib, the conversion makes DSMoE's best start, as `dsmoe prune --method dsmoe` does: experts of similar neurons \
(clusters), a core of them that always runs (--core), routers fitted to the text so that with the core they open \
--active-target of the experts (fitted), down_proj fitted to the experts that run (--ridge), and gates of 1 (binary). Without --calib it makes the paper's start: contiguous experts, random routers and sigmoid gates. An option \
that is given replaces its part of either start.

Examples:
  dsmoe convert DENSE --calib corpus.jsonl.zst --active-target 37.5% --out MOE
  dsmoe convert DENSE --calib small.txt --samples 16 --seq 512 --active-target 0.5 --out MOE
  dsmoe convert DENSE --experts 8 --out MOE                       # the paper's start
  dsmoe convert DENSE --as mixtral --experts 8 --out MIXTURE      # copies of the FFN";

const EXPERTS: &str = "Experts";
const ROUTERS: &str = "Routers and gates";

#[derive(Debug, Args)]
#[command(after_help = ABOUT_CONVERT)]
pub(crate) struct Convert {
    /// Dense model: a Hugging Face directory or a GGUF file
    pub(crate) model: PathBuf,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// dsmoe: experts that are parts of the FFN, behind sigmoid gates; mixtral, qwen3_moe or olmoe: a mixture of that family
    /// whose experts are copies of the FFN, with the outputs of the dense model
    #[arg(long = "as", value_name = "FORM", default_value = "dsmoe",
        value_parser = ["dsmoe", "mixtral", "qwen3_moe", "olmoe"])]
    pub(crate) form: String,
    /// Experts that every token runs, of a mixture [default: 2]
    #[arg(help_heading = EXPERTS, long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) top_k: Option<u32>,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Share of experts to be active, mean over tokens and layers; it is stored with the model, and `dsmoe train` reaches
    /// it; 0.375 is 3 of 8
    #[arg(help_heading = ROUTERS, long, value_name = "SHARE_OF_EXPERTS", value_parser = share)]
    pub(crate) active_target: Option<f64>,
    /// Experts in each FFN; they must divide intermediate_size, but for copies [default: of 16 neurons with --calib, else 8]
    #[arg(help_heading = EXPERTS, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) experts: Option<u32>,
    /// Assignment of neurons to experts: contiguous, random, clusters (of similar neurons), or a JSON file
    /// {"layers": [[[neuron, ...], ...], ...]} [default: clusters with --calib, else contiguous]
    #[arg(help_heading = EXPERTS, long, value_name = "contiguous|random|clusters|FILE")]
    pub(crate) partition: Option<PartitionSpec>,
    /// Initial router weights: random (the paper), open (all experts active), centroid, warm(K) (K experts open),
    /// calibrated (fitted to --calib, all else as it was) or fitted (with --core, --ridge and --budgets) [default: fitted
    /// with --calib, else random]
    #[arg(help_heading = ROUTERS, long, value_name = "random|open|centroid|warm(K)|calibrated|fitted")]
    pub(crate) router_init: Option<Routers>,
    /// Share of the active experts that always run, the core [default: 0.5]
    #[arg(help_heading = EXPERTS, long, value_name = "SHARE_OF_ACTIVE", value_parser = share, requires = "calib")]
    pub(crate) core: Option<f64>,
    /// Ridge of the least squares of down_proj, a share of the mean of the diagonal at 16,384 tokens of text; 0 leaves
    /// down_proj as it is [default: 0.1]
    #[arg(help_heading = EXPERTS, long, value_name = "SHARE_OF_MEAN", value_parser = ratio, requires = "calib")]
    pub(crate) ridge: Option<f64>,
    /// Shares of experts that thresholds are stored for, beside --active-target; --active of other commands chooses among
    /// them [default: those of 0.25,0.375,0.5,0.75,1 above the core's]
    #[arg(help_heading = ROUTERS, long, value_name = "SHARE_OF_EXPERTS,...", value_parser = share, value_delimiter = ',', requires = "calib")]
    pub(crate) budgets: Option<Vec<f64>>,
    /// Threshold above which a gate activates its expert, 0 to 1
    #[arg(help_heading = ROUTERS, long, value_name = "GATE", default_value_t = 0.5)]
    pub(crate) threshold: f32,
    /// Factor of an active expert: its sigmoid gate (eq. 7), or 1 [default: binary with --calib, else sigmoid]
    #[arg(help_heading = ROUTERS, long, value_parser = words::<GateValue>(&["sigmoid", "binary"]))]
    pub(crate) gate_value: Option<GateValue>,
    /// Rescale the sum of the experts by experts / active experts (eq. 8), or not at all
    #[arg(help_heading = ROUTERS, long, default_value = "none", value_parser = words::<Rescale>(&["none", "eq8"]))]
    pub(crate) rescale: Rescale,
    /// A token without an active expert skips the FFN, or uses the expert with the largest gate
    #[arg(help_heading = ROUTERS, long, default_value = "skip", value_parser = words::<ZeroActive>(&["skip", "force_argmax"]))]
    pub(crate) zero_active: ZeroActive,
    /// Train without the straight-through estimator (eq. 10): inactive gates get no gradient of the language-model loss
    #[arg(help_heading = ROUTERS, long)]
    pub(crate) no_ste: bool,
    /// Seed of the router weights and of a random partition
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) processes: ProcessArgs,
}

impl Convert {
    /// Returns the first option that is of gated experts alone and not as it is by default.
    pub(crate) fn of_gates(&self) -> Option<&'static str> {
        let given = [
            ("--calib", !self.calibration.calib.is_empty()),
            ("--active-target", self.active_target.is_some()),
            ("--partition", self.partition.is_some()),
            ("--router-init", self.router_init.is_some()),
            ("--threshold", self.threshold != 0.5),
            ("--gate-value", self.gate_value.is_some()),
            ("--rescale", self.rescale != Rescale::None),
            ("--zero-active", self.zero_active != ZeroActive::Skip),
            ("--no-ste", self.no_ste),
        ];
        given.iter().find(|(_, is_given)| *is_given).map(|(name, _)| *name)
    }
}

const ABOUT_EXPORT: &str = "\
hf is the form for Python: transformers loads it with trust_remote_code=True, experts and gates included. dense leaves the \
gates out, which is exact for a model that was neither fitted to text nor trained (the result is the dense model that it was \
made from) and for gates that are 1 for every expert and token; for other models it is refused. --fold mean approximates \
them: the mean factor of every expert on the text of --data goes into its weights, and the perplexity on that text before \
and after is printed.

Examples:
  dsmoe export RUN --as hf --out HF                                # for transformers, PEFT, lm_eval
  dsmoe export DENSE --as gguf --dtype q8_0 --out model.gguf       # for llama.cpp
  dsmoe export RUN --as dense --fold mean --data text.txt --out D  # without gates, approximately";

#[derive(Debug, Args)]
#[command(after_help = ABOUT_EXPORT)]
pub(crate) struct Export {
    /// Model: a Hugging Face or DSMoE directory, or a GGUF file
    pub(crate) model: PathBuf,
    /// hf: the model for transformers, with its code; dense: a plain dense model without routers, with the neurons in
    /// their original order; native: the model unchanged; llama-moe: a model of the method llama-moe as
    /// LlamaMoEForCausalLM; gguf: a dense model as one file for llama.cpp
    #[arg(long = "as", value_name = "FORM", value_parser = words::<Form>(&["dense", "native", "hf", "llama-moe", "gguf"]))]
    pub(crate) form: Form,
    /// Directory to write; with gguf, the file
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Precision of the weights; q8_0 is for gguf alone [default: unchanged]
    #[arg(long, value_parser = words::<GgufType>(&["f32", "bf16", "f16", "q8_0"]))]
    pub(crate) dtype: Option<GgufType>,
    #[command(flatten)]
    pub(crate) folding: FoldArgs,
    /// Share of the experts that the copy runs, for a model that stores thresholds by budget [default: the model's]
    #[arg(long, value_name = "SHARE_OF_EXPERTS", value_parser = share)]
    pub(crate) active: Option<f64>,
    /// Replace the output if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

const IMPORT_EXAMPLES: &str = "\
Examples:
  dsmoe import model.gguf --out MODEL
  dsmoe import model-00001-of-00003.gguf --dtype f32 --out MODEL";

#[derive(Debug, Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub(crate) struct Import {
    /// GGUF file, or any part of a split one
    pub(crate) model: PathBuf,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Precision of the weights; f32 keeps the values of quantised ones exactly
    #[arg(long, default_value = "bf16", value_parser = words::<Dtype>(&["f32", "bf16", "f16"]))]
    pub(crate) dtype: Dtype,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

/// Folding of gates into the weights of a dense export, and the text for it.
#[derive(Debug, Args)]
pub(crate) struct FoldArgs {
    /// With --as dense: fold the mean factors of the experts on the text of --data into their weights
    #[arg(long, value_name = "mean", requires = "data", value_parser = words::<Fold>(&["mean"]))]
    pub(crate) fold: Option<Fold>,
    /// Text files or folders for --fold
    #[arg(long, value_name = "PATH", num_args = 1.., requires = "fold")]
    pub(crate) data: Vec<PathBuf>,
    /// Separator of the documents in a text file; \n, \t, \r and \\ stand for a line end, a tab, a carriage return and a
    /// backslash [default: a text file is one document]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = separator, requires = "fold")]
    pub(crate) doc_separator: Option<String>,
    /// Field of a JSON object or column of a Parquet file with the text; several, separated by commas, are joined by
    /// line ends [default: text]
    #[arg(long, value_name = "NAME", requires = "fold")]
    pub(crate) text_column: Option<String>,
}

/// The value of every gate that is folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fold {
    Mean,
}

impl FromStr for Fold {
    type Err = String;

    fn from_str(word: &str) -> Result<Fold, String> {
        if word == "mean" { Ok(Fold::Mean) } else { Err(format!("`{word}` is not mean")) }
    }
}

const INIT_EXAMPLES: &str = "\
Examples:
  dsmoe init --list
  dsmoe init --preset llama-3.2-1b --dtype bf16 --out MODEL
  dsmoe init --config config.json --tokenizer tokenizer.json --out MODEL";

#[derive(Debug, Args)]
#[command(after_help = INIT_EXAMPLES)]
pub(crate) struct Init {
    /// Architecture by name; --list shows them
    #[arg(long, value_name = "NAME", conflicts_with = "config", required_unless_present_any = ["config", "list"])]
    pub(crate) preset: Option<String>,
    /// Architecture from a config.json
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
    /// Largest size of a file of weights, such as 500MB or 5GB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = quantity)]
    pub(crate) max_shard_size: u64,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
    /// List the presets and stop
    #[arg(long)]
    pub(crate) list: bool,
}

/// The form of an exported model.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    Core(ExportAs),
    LlamaMoe,
    Gguf,
}

impl FromStr for Form {
    type Err = dsmoe_core::Error;

    fn from_str(name: &str) -> Result<Form, dsmoe_core::Error> {
        match name {
            "llama-moe" => Ok(Form::LlamaMoe),
            "gguf" => Ok(Form::Gguf),
            name => name.parse().map(Form::Core),
        }
    }
}
