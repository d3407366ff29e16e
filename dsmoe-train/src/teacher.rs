//! The teacher of a run: how it is loaded, and how a run recognises it when it resumes.

use std::path::{Path, PathBuf};

use dsmoe_core::Inference;
use dsmoe_core::checkpoint::open_model;
use dsmoe_core::config::Config;
use dsmoe_core::model::{Teacher, TopRows};
use dsmoe_datasets::files::hex;
use dsmoe_kernels::Precision;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::teacher_cache::{TeacherCache, round};

/// Bytes of each tensor that the identity of a teacher covers.
const IDENTITY_BYTES: u64 = 4096;
/// Bytes of a tensor that are read at a time; a multiple of all element sizes.
const HASHED_AT_ONCE: usize = 1 << 20;

/// The teacher of a run, as its state and its metrics name it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TeacherId {
    /// Its directory, as it was given.
    pub(crate) path: PathBuf,
    /// Hash of names, shapes, and first bytes of its tensors.
    pub(crate) sha256: String,
}

/// The targets that a run takes from its teacher, for [`Engine::set_teacher`](crate::engine::Engine::set_teacher).
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{Batch, StepArgs, Teacher};
/// use dsmoe_core::{Device, Inference, Model};
/// use dsmoe_kernels::Precision;
/// use dsmoe_kernels::comm::alone;
/// use dsmoe_train::Zero;
/// use dsmoe_train::engine::{Engine, EngineOptions, Lessons, new};
/// use dsmoe_train::optim::AdamW;
///
/// let model = Model::new(preset("tiny")?);
/// let teacher = Teacher::new(Inference::new(&model, Precision::F32), 1.0, model.config())?;
/// let (zero, precision, device) = (Zero::Moments, Precision::F32, Device::Cpu);
/// let options = EngineOptions {
///     tokens: 4,
///     seq: 4,
///     lanes: 1,
///     accumulate: 1,
///     zero,
///     precision,
///     device,
///     recompute: false,
/// };
/// let mut engine: Box<dyn Engine> = new(&model, AdamW::new(model.layout()), options, alone().clone())?;
/// engine.set_teacher(Lessons::of(teacher, Some(8)))?;
/// engine.begin(1, 1)?;
/// let batch = Batch { inputs: &[1, 5, 9, 2], targets: &[5, 9, 2, 7], seq: 4 };
/// engine.micro_batch(&model, batch, &StepArgs { loss_scale: 0.25, ..StepArgs::default() })?;
/// // A model agrees with itself.
/// assert!(engine.end(&model, 1, false)?.divergence.abs() < 1e-3);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Debug)]
pub struct Lessons {
    pub(crate) teacher: Teacher,
    pub(crate) of: LessonsOf,
}

/// The distributions that are learned.
#[derive(Debug)]
pub(crate) enum LessonsOf {
    /// Those of all tokens.
    All,
    /// Those of the most likely tokens.
    Top {
        /// Their number.
        top: usize,
        /// Holds the rows of sequences of earlier steps and runs.
        cache: Option<Box<TeacherCache>>,
        /// The rows of the micro-batch at work.
        rows: TopRows,
    },
}

impl Lessons {
    /// Makes the lessons of `teacher`: its distributions over all tokens, or over its `top` most likely ones and the rest as one.
    /// Micro-batches fail where `top` is 0 or larger than the vocabulary.
    pub fn of(teacher: Teacher, top: Option<usize>) -> Lessons {
        Lessons::new(teacher, top, None)
    }

    /// Makes the lessons of `teacher`: of all tokens, or of its `top` most likely ones.
    pub(crate) fn new(teacher: Teacher, top: Option<usize>, cache: Option<TeacherCache>) -> Lessons {
        let of = match top {
            None => LessonsOf::All,
            Some(top) => LessonsOf::Top { top, cache: cache.map(Box::new), rows: TopRows::default() },
        };
        Lessons { teacher, of }
    }

    /// Returns what the cache has to say to the user since the last call.
    pub(crate) fn notes(&mut self) -> Vec<String> {
        match &mut self.of {
            LessonsOf::Top { cache: Some(cache), .. } => cache.notes(),
            _ => Vec::new(),
        }
    }
}

/// Sets `rows` to those of sequences of `seq` tokens, from `cache` or from `teacher`: the same values either way.
pub(crate) fn learn(
    teacher: &mut Teacher,
    cache: Option<&mut TeacherCache>,
    (inputs, seq): (&[u32], usize),
    top: usize,
    rows: &mut TopRows,
) -> Result<()> {
    let Some(cache) = cache else {
        teacher.most_likely(inputs, seq, top, rows)?;
        round(rows);
        return Ok(());
    };
    cache.rows(inputs, rows, &mut |missing, rows| Ok(teacher.most_likely(missing, seq, top, rows)?))
}

/// Loads the teacher in `dir` of models of `student`, whose sequences have `seq` tokens. Its weights are packed in bf16.
pub(crate) fn load(dir: &Path, weight: f64, student: &Config, seq: usize) -> Result<(Teacher, TeacherId)> {
    let config = check_teacher(dir, student, seq)?;
    let id = TeacherId { path: dir.to_path_buf(), sha256: identity(dir, &config)? };
    let teacher = Teacher::new(Inference::load(dir, Precision::Bf16)?, weight as f32, student)?;
    Ok((teacher, id))
}

/// Reads the configuration of the model in `dir`, and checks that it can teach models of `student` with sequences of `seq` tokens.
///
/// # Errors
/// The vocabularies differ, the teacher has fewer positions, or there is no model.
pub fn check_teacher(dir: &Path, student: &Config, seq: usize) -> Result<Config> {
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
    Ok(config)
}

/// Computes a hash of names, types, shapes and the first values of all tensors of the model in `dir`.
///
/// # Errors
/// The model cannot be read.
pub fn identity_of(dir: &Path) -> Result<String> {
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

/// Computes the hash under which a cache keeps what the model in `dir` says: of its settings and of all of its weights.
pub(crate) fn contents_of(dir: &Path) -> Result<String> {
    let config = Config::load(dir)?;
    let checkpoint = open_model(dir, &config)?;
    let mut hasher = Sha256::new();
    hasher.update(format!("{config:?}\n"));
    let mut bytes = vec![0; HASHED_AT_ONCE];
    for name in checkpoint.names() {
        let Some(view) = checkpoint.tensor(name) else { continue };
        hasher.update(format!("{name} {} {:?}\n", view.stored_as(), view.shape));
        let mut at = 0;
        while at < view.len {
            let len = (view.len - at).min(HASHED_AT_ONCE as u64);
            checkpoint.read_at(view, at, &mut bytes[..len as usize])?;
            hasher.update(&bytes[..len as usize]);
            at += len;
        }
    }
    Ok(hex(&hasher.finalize()))
}
