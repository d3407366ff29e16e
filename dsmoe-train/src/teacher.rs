//! The teacher of a run: how it is loaded, and how a run recognises it when it resumes.

use std::path::{Path, PathBuf};

use dsmoe_core::Inference;
use dsmoe_core::checkpoint::open_model;
use dsmoe_core::config::Config;
use dsmoe_core::model::Teacher;
use dsmoe_datasets::files::hex;
use dsmoe_kernels::Precision;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Bytes of each tensor that the identity of a teacher covers.
const IDENTITY_BYTES: u64 = 4096;

/// The teacher of a run, as its state and its metrics name it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TeacherId {
    /// Its directory, as it was given.
    pub(crate) path: PathBuf,
    /// Hash of names, shapes, and first bytes of its tensors.
    pub(crate) sha256: String,
}

/// Loads the teacher in `dir` of models of `student`, whose sequences have `seq` tokens. Its weights are packed in bf16.
pub(crate) fn load(dir: &Path, weight: f64, student: &Config, seq: usize) -> Result<(Teacher, TeacherId)> {
    let config = Config::load(dir)?;
    let (of_teacher, of_student) = (config.vocab_size, student.vocab_size);
    if of_teacher != of_student {
        let found = format!("{} with vocab_size {of_teacher}", dir.display());
        let allowed = format!("a model with the vocabulary of the one to train, vocab_size {of_student}");
        return Err(Error::field("teacher", found, allowed));
    }
    if seq > config.max_position {
        let allowed = format!("at most the teacher's max_position_embeddings {}", config.max_position);
        return Err(Error::field("seq", seq, allowed));
    }
    let id = TeacherId { path: dir.to_path_buf(), sha256: identity(dir, &config)? };
    let teacher = Teacher::new(Inference::load(dir, Precision::Bf16)?, weight as f32, student)?;
    Ok((teacher, id))
}

/// Computes the hash of [`TeacherId`] for the model in `dir`.
pub(crate) fn identity_of(dir: &Path) -> Result<String> {
    identity(dir, &Config::load(dir)?)
}

/// Computes a hash that identifies the model in `dir`: names, types, shapes and the first values of every tensor.
fn identity(dir: &Path, config: &Config) -> Result<String> {
    let checkpoint = open_model(dir, config)?;
    let (mut hasher, mut bytes) = (Sha256::new(), Vec::new());
    for name in checkpoint.names() {
        let Some(view) = checkpoint.tensor(name) else { continue };
        hasher.update(format!("{name} {} {:?}\n", view.stored_as(), view.shape));
        let whole = view.len.min(IDENTITY_BYTES) / view.dtype.size() as u64 * view.dtype.size() as u64;
        bytes.resize(whole as usize, 0);
        checkpoint.read_at(view, 0, &mut bytes)?;
        hasher.update(&bytes);
    }
    Ok(hex(&hasher.finalize()))
}
