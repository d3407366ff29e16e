//! The error of this crate.

use std::io;
use std::path::{Path, PathBuf};

use crate::remedy::Remedy;

/// An error about a model directory or a request. Every message is one line that ends with its remedy.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::{Config, Error};
///
/// match Config::load("no/such/model".as_ref()) {
///     // A program may word the remedy in its own way.
///     Err(Error::Path { path, help, .. }) => println!("{}: {}", path.display(), help.worded(str::to_owned)),
///     Err(error) => panic!("{error}"),
///     Ok(config) => panic!("a model of {} layers", config.num_layers),
/// }
/// // Every message is one line.
/// assert!(preset("no such").is_err_and(|error| !error.to_string().contains('\n')));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the file system.
    #[error("{}: {cause}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// A field of a JSON file.
    #[error("{}: {field} {problem}; {help}", .path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The key, dotted when nested.
        field: String,
        /// The defect.
        problem: String,
        /// The fix.
        help: Remedy,
    },
    /// A tensor that is missing, surplus, or not what the configuration says.
    #[error("{}: tensor {tensor} {problem}; {help}", .path.display())]
    Tensor {
        /// The file it is in, or the directory it should be in.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// The defect.
        problem: String,
        /// The fix.
        help: Remedy,
    },
    /// A file or directory that is missing, surplus or malformed.
    #[error("{}: {problem}; {help}", .path.display())]
    Path {
        /// The file or directory.
        path: PathBuf,
        /// The defect.
        problem: String,
        /// The fix.
        help: Remedy,
    },
    /// The output directory holds something.
    #[error("{} is not empty; {help}", .path.display())]
    OutputNotEmpty {
        /// The output directory.
        path: PathBuf,
        /// The fix.
        help: Remedy,
    },
    /// The FFN cannot be cut into that many equal experts.
    #[error(
        "{}intermediate_size {intermediate} is not divisible by {num_experts} experts; use one of {divisors}",
        .path.as_ref().map(|path| format!("{}: ", path.display())).unwrap_or_default()
    )]
    Indivisible {
        /// The configuration, when known.
        path: Option<PathBuf>,
        /// FFN width.
        intermediate: usize,
        /// Experts asked for.
        num_experts: usize,
        /// The numbers of experts that would do, up to 64.
        divisors: String,
    },
    /// Lists of neurons that are not a partition.
    #[error("partition: {0}; every neuron must be in exactly one expert, all experts of one size")]
    Partition(String),
    /// The calibration text does not suffice.
    #[error("calibration: {problem}; {help}")]
    Calibration {
        /// The problem.
        problem: String,
        /// The text that suffices.
        help: String,
    },
    /// An argument that is out of range.
    #[error("{problem}; {help}")]
    Argument {
        /// The argument and what is wrong with it.
        problem: String,
        /// The fix.
        help: Remedy,
    },
    /// An error of a GPU.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] dsmoe_kernels::cuda::CudaError),
    /// An error in a router's configuration or initialisation.
    #[error(transparent)]
    Router(#[from] dsmoe_router::Error),
    /// Another process failed, or does not take part.
    #[error(transparent)]
    Comm(#[from] dsmoe_kernels::comm::CommError),
}

/// Result of this crate.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::{Inference, Model, Result};
/// use dsmoe_kernels::Precision;
///
/// fn small(name: &str) -> Result<Inference> {
///     let config = preset(name)?;
///     Ok(Inference::new(&Model::new(config), Precision::Bf16))
/// }
/// assert_eq!(small("tiny")?.config().num_layers, 4);
/// assert!(small("minuscule").is_err());
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Makes an [`Error::Io`] about `path`; for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { path, cause }
    }

    /// Makes an [`Error::Argument`].
    pub fn argument(problem: impl Into<String>, help: impl Into<Remedy>) -> Error {
        Error::Argument { problem: problem.into(), help: help.into() }
    }

    /// Makes an [`Error::Path`].
    pub fn path(path: &Path, problem: impl Into<String>, help: impl Into<Remedy>) -> Error {
        Error::Path { path: path.to_path_buf(), problem: problem.into(), help: help.into() }
    }

    /// Makes an [`Error::Field`].
    pub fn field(
        path: &Path,
        field: impl Into<String>,
        problem: impl Into<String>,
        help: impl Into<Remedy>,
    ) -> Error {
        Error::Field {
            path: path.to_path_buf(),
            field: field.into(),
            problem: problem.into(),
            help: help.into(),
        }
    }

    pub(crate) fn tensor(
        path: &Path,
        tensor: &str,
        problem: impl Into<String>,
        help: impl Into<Remedy>,
    ) -> Error {
        Error::Tensor {
            path: path.to_path_buf(),
            tensor: shown(tensor),
            problem: problem.into(),
            help: help.into(),
        }
    }
}

impl Error {
    /// Returns the fix, where it is stored by itself.
    pub fn help(&self) -> Option<&Remedy> {
        match self {
            Error::Field { help, .. }
            | Error::Tensor { help, .. }
            | Error::Path { help, .. }
            | Error::OutputNotEmpty { help, .. }
            | Error::Argument { help, .. } => Some(help),
            _ => None,
        }
    }
}

/// Shortens and escapes `text` from a file for a one-line message.
pub(crate) fn shown(text: &str) -> String {
    const LONGEST: usize = 200;
    let mut line: String = text.chars().take(LONGEST).flat_map(escape_control).collect();
    if text.chars().nth(LONGEST).is_some() {
        line.push_str("...");
    }
    line
}

fn escape_control(c: char) -> impl Iterator<Item = char> {
    let control = c.is_control();
    c.escape_default().filter(move |_| control).chain((!control).then_some(c))
}
