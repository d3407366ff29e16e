//! The arguments of `dsmoe generate`.

use std::path::PathBuf;

use clap::Args;
use dsmoe_core::Device;
use dsmoe_datasets::Bos;
use dsmoe_kernels::Precision;

use super::gates::GateArgs;
use super::values::{seconds, share_f32, template_arg, words};

const EXAMPLES: &str = "\
Examples:
  dsmoe generate RUN --prompt 'Once upon a time' --max-tokens 100
  dsmoe generate RUN --chat --prompt 'What is a list?' --temperature 0.7 --top-p 90%
  dsmoe generate RUN --active 25% --prompt-file story.txt   # fewer experts";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Generate {
    /// Model: a Hugging Face or DSMoE directory, or a GGUF file
    pub(crate) model: PathBuf,
    /// Text to continue
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "prompt_file",
        required_unless_present_any = ["prompt_file", "messages"]
    )]
    pub(crate) prompt: Option<String>,
    /// File with the text to continue; a final line end is removed
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Largest number of new tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// Sampling temperature; 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Sample among the N most likely tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Sample among the most likely tokens that together have this share of the probability; 1 for all
    #[arg(long, value_name = "SHARE_OF_PROBABILITY", value_parser = share_f32, default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Seed of the sampling
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) stop: Vec<String>,
    /// Continue after an end-of-text token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Recompute the whole text for every token, to check the cache
    #[arg(long)]
    pub(crate) no_kv_cache: bool,
    /// Process the prompt in chunks of this many tokens; 0 for one chunk
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub(crate) prefill_chunk: usize,
    #[command(flatten)]
    pub(crate) gates: GateArgs,
    /// Folder of `dsmoe plan train`, which chooses the share of the experts to run by the prompt and --deadline
    #[arg(long, value_name = "DIR", conflicts_with_all = ["threshold", "active"], requires = "deadline")]
    pub(crate) plan: Option<PathBuf>,
    /// Time until --max-tokens are to be there, in seconds or as 200ms
    #[arg(long, value_name = "SECONDS", value_parser = seconds, requires = "plan")]
    pub(crate) deadline: Option<f64>,
    /// Precision of the weights [default: bf16 for a model stored as bf16 or f16 and on a GPU, f32 for one stored as f32]
    #[arg(long, value_parser = words::<Precision>(&["f32", "bf16"]))]
    pub(crate) dtype: Option<Precision>,
    /// Device that computes: cpu, or a GPU such as cuda:0 (matrix products in bf16)
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// Prepend a BOS token to the prompt; auto follows the tokenizer. A chat template writes its own
    #[arg(long, default_value = "auto", conflicts_with = "chat", value_parser = words::<Bos>(&["auto", "always", "never"]))]
    pub(crate) bos: Bos,
    #[command(flatten)]
    pub(crate) chat: ChatArgs,
}

/// The arguments of a conversation.
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// Answer the prompt as a user's message, in the form of the model's chat template
    #[arg(long, help_heading = "Chat")]
    pub(crate) chat: bool,
    /// Message of the system before the conversation
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true, help_heading = "Chat")]
    pub(crate) system: Option<String>,
    /// JSON file with the conversation so far in place of a prompt: a list of objects with role and content
    #[arg(long, value_name = "FILE", requires = "chat", conflicts_with_all = ["prompt", "prompt_file"], help_heading = "Chat")]
    pub(crate) messages: Option<PathBuf>,
    /// Variable of the chat template with its value in JSON, such as enable_thinking=false; may be given several times
    #[arg(long, value_name = "NAME=JSON", requires = "chat", value_parser = template_arg, help_heading = "Chat")]
    pub(crate) template_arg: Vec<(String, serde_json::Value)>,
}
