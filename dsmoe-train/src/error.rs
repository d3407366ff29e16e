//! The error of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong in training and evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model directory or a model operation.
    #[error(transparent)]
    Core(#[from] dsmoe_core::Error),
    /// Text, tokens or windows.
    #[error(transparent)]
    Data(#[from] dsmoe_datasets::Error),
    /// A router's setting.
    #[error(transparent)]
    Router(#[from] dsmoe_router::Error),
    /// The operating system.
    #[error("{path}: {cause}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// A configuration file that is not TOML, or not this table.
    #[error("{path}: {message}; see the keys in the documentation of TrainConfig")]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the line.
        message: String,
    },
    /// A `key=value` word that cannot be read.
    #[error("setting `{setting}`: {message}")]
    Setting {
        /// The word.
        setting: String,
        /// What is wrong and what would do.
        message: String,
    },
    /// A field outside its range, or two fields that exclude each other.
    #[error("{field} is {found}; use {allowed}")]
    Field {
        /// Key in the configuration.
        field: &'static str,
        /// The value found.
        found: String,
        /// What would do.
        allowed: String,
    },
    /// The thread pool cannot be made.
    #[error("cannot start {threads} threads: {message}; use a smaller --threads")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// What the system says.
        message: String,
    },
    /// The output directory has something in it.
    #[error(
        "{path} is not empty; choose another --out, continue with --resume, or pass --force to start over"
    )]
    OutNotEmpty {
        /// The output directory.
        path: PathBuf,
    },
    /// Starting over would remove the model that is to be trained.
    #[error("{path} holds the model to train; choose another --out")]
    OutHoldsSource {
        /// The output directory.
        path: PathBuf,
    },
    /// Another process is writing the run.
    #[error("{path} is in use by another run; wait for it, or choose another --out")]
    Busy {
        /// The output directory.
        path: PathBuf,
    },
    /// `--resume` or `--force` on a directory that is no run.
    #[error("{path} is not empty and holds no run; choose another --out")]
    NotARun {
        /// The output directory.
        path: PathBuf,
    },
    /// The run directory was started with something else.
    #[error("{path}: {field} was {saved} and is now {now}; {mend}")]
    ResumeMismatch {
        /// state.json of the checkpoint.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// Value in the checkpoint.
        saved: String,
        /// Value of this invocation.
        now: String,
        /// What would do.
        mend: &'static str,
    },
    /// A checkpoint that cannot be used.
    #[error(
        "{path}: {message}; delete this checkpoint to resume from an older one, or pass --force to start over"
    )]
    BadCheckpoint {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A document of a text that a model cannot score.
    #[error("document {document} of the text: {reason}")]
    Unscorable {
        /// Its number from 1.
        document: usize,
        /// What keeps it from being scored.
        reason: String,
    },
    /// A file of responses that cannot be read.
    #[error("{path}: line {line} is no response; delete the file, or choose another --out")]
    BadResponses {
        /// The file.
        path: PathBuf,
        /// Number of the line from 1.
        line: usize,
    },
    /// A file of responses of another model, or made in another way.
    #[error(
        "{path}: the responses of another model or of other settings; choose another --out, or delete the file"
    )]
    OtherResponses {
        /// The file.
        path: PathBuf,
    },
    /// A NaN or an infinity.
    #[error("step {step}: {place} is not finite; stopped, {intact}; use a smaller --lr or look at the data")]
    NonFinite {
        /// The step being taken, from 1.
        step: u64,
        /// Where it shows first: a layer of the forward pass, or the tensor whose gradient has it.
        place: String,
        /// Which checkpoint there is to go back to.
        intact: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err`: an [`Error::Io`] about `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { path, cause }
    }
}
