//! The error of this crate.

use std::io;
use std::path::{Path, PathBuf};

use dsmoe_datasets::Remedy;
use dsmoe_kernels::comm::CommError;

static THREADS: Remedy = Remedy::fixed("use fewer {threads}");
static NOT_EMPTY: Remedy =
    Remedy::fixed("choose another {out}, set {resume} to continue, or set {force} to start over");
static NOT_EMPTY_TO_RESUME: Remedy = Remedy::fixed("choose another {out}, or set {resume} to continue");
static ANOTHER_OUT: Remedy = Remedy::fixed("choose another {out}");
static WAIT: Remedy = Remedy::fixed("wait for it, or choose another {out}");
static CHECKPOINT: Remedy = Remedy::fixed(
    "delete this checkpoint to resume from an older one, or choose another {out} to start over",
);
static BROKEN_RESPONSES: Remedy = Remedy::fixed("delete the file, or choose another {out}");
static RESPONSES: Remedy = Remedy::fixed("choose another {out}, or delete the file");
static ALIKE: Remedy = Remedy::fixed(
    "start all processes with the same program, settings, files and value of DSMOE_ISA, on machines of one kind",
);
static SHARED: Remedy = Remedy::fixed("choose an {out} on a file system that all machines share");
static LR: Remedy = Remedy::fixed("use a smaller {lr} or look at the data");

/// An error of training or evaluation.
///
/// ```
/// use dsmoe_train::{Error, TrainConfig};
///
/// let config = TrainConfig { lr: -1.0, steps: Some(100), ..TrainConfig::default() };
/// match config.resolve() {
///     // A program may word the remedy in its own way, such as with the flags of its command line.
///     Err(Error::Field { field, found, .. }) => assert_eq!((field, &found[..]), ("lr", "-1")),
///     Err(error) => panic!("{error}"),
///     Ok(_) => panic!("a negative learning rate"),
/// }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model directory or a model operation.
    #[error(transparent)]
    Core(dsmoe_core::Error),
    /// Text, tokens or windows.
    #[error(transparent)]
    Data(#[from] dsmoe_datasets::Error),
    /// A router's setting.
    #[error(transparent)]
    Router(#[from] dsmoe_router::Error),
    /// Communication with the other processes of a run, or an error of one of them.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Processes of a run that would not compute the same.
    #[error("the processes differ in {name}: {table}; {}", ALIKE)]
    RanksDiffer {
        /// The name of the value that differs.
        name: String,
        /// Which ranks have which value.
        table: String,
    },
    /// A process sees another run directory than the first one.
    #[error("{0} is not the directory that rank 0 sees under this name; {help}", help = SHARED)]
    NotShared(PathBuf),
    /// The file system.
    #[error("{path}: {cause}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        #[source]
        cause: io::Error,
    },
    /// A configuration file that is not TOML, or not this table.
    #[error("{path}: {message}; see the keys in the documentation of TrainConfig")]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// The defect, with its line.
        message: String,
    },
    /// A setting that cannot be read.
    #[error("setting `{}`: {message}", on_one_line(setting))]
    Setting {
        /// The setting as it was given.
        setting: String,
        /// The defect, with the keys or values that are allowed.
        message: String,
    },
    /// A field outside its range, or two fields that exclude each other.
    #[error("{field} is {found}; use {allowed}")]
    Field {
        /// Key in the configuration.
        field: &'static str,
        /// The value found.
        found: String,
        /// The values that are allowed.
        allowed: Remedy,
    },
    /// The thread pool cannot be made.
    #[error("cannot start {threads} threads: {cause}; {}", THREADS)]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// The error of the thread pool.
        #[source]
        cause: rayon::ThreadPoolBuildError,
    },
    /// The output directory is not empty.
    #[error("{0} is not empty; {help}", help = NOT_EMPTY)]
    OutNotEmpty(PathBuf),
    /// The output directory of work that is resumed, but never started over in its place, is not empty.
    #[error("{0} is not empty; {help}", help = NOT_EMPTY_TO_RESUME)]
    OutToResume(PathBuf),
    /// The output directory is a file.
    #[error("{0} is a file; {help}", help = ANOTHER_OUT)]
    OutIsFile(PathBuf),
    /// Starting over would remove the model that is to be trained.
    #[error("{0} holds the model to train; {help}", help = ANOTHER_OUT)]
    OutHoldsSource(PathBuf),
    /// Another process is writing the run.
    #[error("{0} is in use by another run; {help}", help = WAIT)]
    Busy(PathBuf),
    /// A run is to be resumed or started over in a directory that is no run.
    #[error("{0} is not empty and holds no run; {help}", help = ANOTHER_OUT)]
    NotARun(PathBuf),
    /// The run directory was started with another model, text or setting.
    #[error("{path}: {field} was {saved} and is now {now}; {help}")]
    ResumeMismatch {
        /// state.json of the checkpoint.
        path: PathBuf,
        /// The setting or input that differs.
        field: String,
        /// Value in the checkpoint.
        saved: String,
        /// Value of this invocation.
        now: String,
        /// How to fix it.
        help: Remedy,
    },
    /// A checkpoint that cannot be used.
    #[error("{path}: {message}; {}", CHECKPOINT)]
    BadCheckpoint {
        /// The file or directory.
        path: PathBuf,
        /// The defect.
        message: String,
    },
    /// A document of a text that a model cannot score.
    #[error("document {document} of the text: {reason}")]
    Unscorable {
        /// Its number from 1.
        document: usize,
        /// The reason.
        reason: String,
    },
    /// A file of responses that cannot be read.
    #[error("{path}: line {line} is no response; {}", BROKEN_RESPONSES)]
    BadResponses {
        /// The file.
        path: PathBuf,
        /// Number of the line from 1.
        line: usize,
    },
    /// A file of responses of another model, or made with other settings.
    #[error("{0}: the responses of another model or of other settings; {help}", help = RESPONSES)]
    OtherResponses(PathBuf),
    /// A NaN or an infinity.
    #[error("step {step}: {place} is not finite; stopped, {intact}; {}", LR)]
    NonFinite {
        /// The step being taken, from 1.
        step: u64,
        /// The first such place: a layer of the forward pass, or the tensor whose gradient has it.
        place: String,
        /// The checkpoint that is left.
        intact: String,
    },
}

/// Communication is one error, wherever it is made.
impl From<dsmoe_core::Error> for Error {
    fn from(error: dsmoe_core::Error) -> Error {
        match error {
            dsmoe_core::Error::Comm(error) => Error::Comm(error),
            error => Error::Core(error),
        }
    }
}

/// Result of this crate.
///
/// ```
/// use dsmoe_train::{Result, TrainConfig};
///
/// fn settings(words: &[&str]) -> Result<TrainConfig> {
///     let mut config = TrainConfig::default();
///     words.iter().try_for_each(|word| config.set(word))?;
///     config.resolve()
/// }
/// assert_eq!(settings(&["steps=500", "lr=1e-4"])?.warmup_steps, Some(50));
/// assert!(settings(&["steps=500", "batch=0"]).is_err());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Makes an [`Error::Io`] about `path`, for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { path, cause }
    }

    /// Makes an [`Error::BadCheckpoint`].
    pub(crate) fn checkpoint(path: &Path, message: impl Into<String>) -> Error {
        Error::BadCheckpoint { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn field(field: &'static str, found: impl ToString, allowed: impl Into<Remedy>) -> Error {
        Error::Field { field, found: found.to_string(), allowed: allowed.into() }
    }

    /// Returns the remedy with which the message ends, where it names settings.
    pub fn help(&self) -> Option<&Remedy> {
        match self {
            Error::Data(error) => error.help(),
            Error::Field { allowed: help, .. } | Error::ResumeMismatch { help, .. } => Some(help),
            Error::Threads { .. } => Some(&THREADS),
            Error::RanksDiffer { .. } => Some(&ALIKE),
            Error::NotShared(_) => Some(&SHARED),
            Error::OutNotEmpty(_) => Some(&NOT_EMPTY),
            Error::OutToResume(_) => Some(&NOT_EMPTY_TO_RESUME),
            Error::OutIsFile(_) | Error::OutHoldsSource(_) | Error::NotARun(_) => Some(&ANOTHER_OUT),
            Error::Busy(_) => Some(&WAIT),
            Error::BadCheckpoint { .. } => Some(&CHECKPOINT),
            Error::BadResponses { .. } => Some(&BROKEN_RESPONSES),
            Error::OtherResponses(_) => Some(&RESPONSES),
            Error::NonFinite { .. } => Some(&LR),
            _ => None,
        }
    }

    /// Returns the setting with whose name the message begins, if it is about one.
    pub fn setting(&self) -> Option<&'static str> {
        if let Error::Data(error) = self { error.setting() } else { None }
    }
}

/// Returns a setting as part of a message; a string of TOML may have several lines.
fn on_one_line(setting: &str) -> String {
    setting.split_whitespace().collect::<Vec<_>>().join(" ")
}
