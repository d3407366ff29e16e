//! Models and tokenizers of directories, loaded with the checks that every command makes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::config::Config;
use dsmoe_core::{Device, Inference, Model, gguf};
use dsmoe_datasets::{Tokenizer, TokenizerFiles};
use dsmoe_kernels::Precision;

use crate::cli::gates::GateArgs;
use crate::files::check_values;
use crate::memory;
use crate::ui::Ui;

/// Reads the tokenizer's files of the model in `dir`, or of a GGUF file.
pub(crate) fn tokenizer_files(dir: &Path) -> Result<TokenizerFiles> {
    match gguf::file_of(dir)? {
        Some(file) => {
            let files = gguf::tokenizer_files(&file)?.map(|(name, bytes)| (name.to_owned(), bytes));
            Ok(TokenizerFiles::named(file, files))
        }
        None => {
            let files = TokenizerFiles::read(dir)?;
            check_values(&files.path, &files.tokenizer, memory::total())?;
            Ok(files)
        }
    }
}

/// Shows what a user should know about a model's configuration.
pub(crate) fn show_config_notices(config: &Config, ui: &Ui) {
    config.notices().iter().for_each(|notice| ui.note(format_args!("note: {notice}")));
}

/// Loads the tokenizer of the model in `dir`, and shows its notices.
pub(crate) fn tokenizer(dir: &Path, config: &Config, ui: &Ui) -> Result<Tokenizer> {
    tokenizer_of(&tokenizer_files(dir)?, config, ui)
}

/// Makes the tokenizer of these files, and shows its notices.
pub(crate) fn tokenizer_of(files: &TokenizerFiles, config: &Config, ui: &Ui) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(files, config.bos_token_id, config.vocab_size)?;
    if let Some(total) = memory::total() {
        tokenizer = tokenizer.with_memory(total);
    }
    for notice in tokenizer.notices() {
        ui.note(format_args!("note: {notice}"));
    }
    Ok(tokenizer)
}

/// Returns the precision that `device` computes in by default: that of the stored weights, and bf16 on a GPU, which has no
/// other.
pub(crate) fn default_precision(device: Device, stored: Precision) -> Precision {
    if device.is_gpu() { Precision::Bf16 } else { stored }
}

/// Loads a model for training.
pub(crate) fn load_model(dir: &Path) -> Result<Model> {
    check_memory(dir, Precision::F32)?;
    Ok(Model::load(dir)?)
}

/// Loads a model for inference, with other gates open if that is asked for.
pub(crate) fn load_inference(
    dir: &Path,
    precision: Precision,
    device: Device,
    gates: GateArgs,
) -> Result<Inference> {
    if !device.is_gpu() {
        check_memory(dir, precision)?;
    }
    let mut model = Inference::load_on(dir, precision, device)?;
    if let Some(threshold) = gates.threshold {
        model.set_threshold(threshold)?;
    }
    if let Some(active) = gates.active {
        model.set_active(active)?;
    }
    Ok(model)
}

/// Returns the bytes of a model's weight files, headers included.
pub(crate) fn file_bytes(checkpoint: &Checkpoint) -> Result<u64> {
    let mut bytes = 0;
    for file in checkpoint.files() {
        bytes += fs::metadata(file).with_context(|| file.display().to_string())?.len();
    }
    Ok(bytes)
}

/// Returns the bytes of the keys and values of so many positions.
pub(crate) fn cache_bytes(config: &Config, positions: usize) -> u128 {
    let kv_heads: usize = config.layers().map(|shape| shape.num_kv_heads).sum();
    2 * size_of::<f32>() as u128 * kv_heads as u128 * config.head_dim as u128 * positions as u128
}

/// Refuses a model whose weights do not fit into memory.
fn check_memory(dir: &Path, precision: Precision) -> Result<()> {
    let params = Accounting::of(&Config::load(dir)?).total;
    let what = format!("{}: the model in {precision}", dir.display());
    let needed = precision.bytes() as u64 * params;
    memory::check(&what, needed, memory::total(), "use a machine with more, or a smaller model")
}
