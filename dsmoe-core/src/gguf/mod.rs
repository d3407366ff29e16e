//! GGUF files: a model in one file, with its configuration and its tokenizer.
//!
//! A file is read as the Hugging Face directory that it was made from: [`Config::load`](crate::Config::load) takes its
//! metadata, [`Checkpoint::open`](crate::checkpoint::Checkpoint::open) its tensors, decoded as they are asked for, and
//! [`tokenizer_files`] its tokenizer.

mod arch;
mod blocks;
mod card;
mod config;
mod container;
mod export;
mod keys;
mod names;
mod pre;
mod rope;
mod tensors;
mod tokenizer;
mod types;
mod value;
mod vocab;
mod write;

use std::path::{Path, PathBuf};

pub(crate) use card::{name_in_card, source_card};
pub(crate) use config::config_json;
pub use container::{Container, TensorPlace};
pub use export::{GgufReport, GgufType, export_gguf};
pub(crate) use tensors::{Encoded, GgufTensor, tensors};
pub use tokenizer::tokenizer_files;
pub use types::{Layout, TensorType};
pub use value::Value;

use crate::error::{Error, Result};

/// Returns the GGUF file that `model` names: a file, or the only GGUF file in a directory without config.json. For a
/// model that was split it is the first part.
///
/// # Errors
/// A directory without config.json holds several, or cannot be read.
pub fn file_of(model: &Path) -> Result<Option<PathBuf>> {
    if model.is_file() {
        return Ok(Some(first_part(model)));
    }
    if !model.is_dir() || model.join(crate::checkpoint::CONFIG_FILE).exists() {
        return Ok(None);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(model).map_err(Error::io(model))? {
        let path = entry.map_err(Error::io(model))?.path();
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if is_gguf && path.is_file() && first_part(&path) == path {
            found.push(path);
        }
    }
    match found.len() {
        0 | 1 => Ok(found.pop()),
        n => Err(Error::path(model, format!("holds {n} GGUF files and no config.json"), "name one of them")),
    }
}

/// Returns the first part of the split model that the file is a part of; the file itself if it is none.
fn first_part(path: &Path) -> PathBuf {
    let name = path.file_name().and_then(|name| name.to_str());
    let first = name
        .and_then(container::split_prefix)
        .map(|(prefix, _, parts)| path.with_file_name(format!("{prefix}-00001-of-{parts:05}.gguf")));
    first.filter(|first| first.is_file()).unwrap_or_else(|| path.to_path_buf())
}
