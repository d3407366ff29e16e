//! Hugging Face checkpoints: safetensors files, sharded or not, read and written without ever holding a model.

mod dtype;
mod header;
mod licences;
mod llama;
mod manifest;
mod names;
mod output;
mod reader;
mod stream;
mod weights;
mod writer;

pub use dtype::{Dtype, transpose};
pub(crate) use dtype::{check_finite, decode, encode, is_too_large, too_large};
pub use header::{Header, HeaderEntry};
pub use licences::{CARD_FILE, SOURCE_CARD_FILE};
pub(crate) use licences::{GENERATED, copy_file, has_licences, is_generated, read_card};
pub(crate) use llama::read_partitions;
pub use llama::{
    LlamaTensors, check_llama_tensors, in_stored_order, model_writer, norm_names, open_model, tensor_names,
};
pub use manifest::{FileSum, MANIFEST_FILE, Manifest, Sums, Verification};
pub use names::is_router;
pub(crate) use names::{
    EMBEDDING, LayerNorm, Renames, attention_name, ffn_name, is_ignored, partition_name, router_bias_name,
    router_name,
};
pub use output::OutputDir;
pub use reader::{Checkpoint, TensorView};
pub(crate) use stream::Meter;
pub use stream::{Change, Progress, TensorSource};
pub(crate) use weights::WeightReader;
pub use writer::{DEFAULT_SHARD_BYTES, TensorInfo, Writer};

/// Name of the configuration in a model directory.
pub const CONFIG_FILE: &str = "config.json";
/// The only weights file of an unsharded directory.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The table of a sharded directory: which tensor is in which file.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The files beside the weights that make a directory usable; copied when present.
const COMPANIONS: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "tokenizer.model",
    "chat_template.jinja",
];

/// Copies tokenizer and generation files, licences and the model card from one model directory to another, synced. The
/// card becomes the card of the source. A GGUF file has its tokenizer, its origin and its licence in the metadata.
///
/// # Errors
/// The file system refuses; the message names the file.
pub fn copy_companions(from: &std::path::Path, to: &std::path::Path) -> crate::Result<()> {
    if let Some(file) = crate::gguf::file_of(from)? {
        for (name, bytes) in crate::gguf::tokenizer_files(&file)? {
            let target = to.join(name);
            crate::files::write_synced(&target, &bytes).map_err(crate::Error::io(&target))?;
        }
        if let Some(card) = crate::gguf::source_card(&file)? {
            let target = to.join(SOURCE_CARD_FILE);
            crate::files::write_synced(&target, card.as_bytes()).map_err(crate::Error::io(&target))?;
        }
        return Ok(());
    }
    for name in COMPANIONS {
        copy_file(&from.join(name), &to.join(name))?;
    }
    licences::copy(from, to)
}
