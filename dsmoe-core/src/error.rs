//! The error of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// What can be wrong with a model directory or a request. Every message is one line that ends with the mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refuses.
    #[error("{}: {cause}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// A file that is not JSON, or not the JSON it should be.
    #[error("{}: {message}; {mend}", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        message: String,
        /// What would do.
        mend: &'static str,
    },
    /// A field of a JSON file.
    #[error("{}: {field} {problem}; {mend}", .path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The key, dotted when nested.
        field: String,
        /// What is wrong with it.
        problem: String,
        /// What would do.
        mend: String,
    },
    /// A safetensors file whose header cannot be used.
    #[error("{}: header {problem}; {mend}", .path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What would do.
        mend: &'static str,
    },
    /// A tensor that is missing, surplus, or not what the configuration says.
    #[error("{}: tensor {tensor} {problem}; {mend}", .path.display())]
    Tensor {
        /// The file it is in, or the directory it should be in.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        problem: String,
        /// What would do.
        mend: String,
    },
    /// A file or directory that should not be, or not be there.
    #[error("{}: {problem}; {mend}", .path.display())]
    Path {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What would do.
        mend: &'static str,
    },
    /// The output directory holds something.
    #[error("{} is not empty; choose another --out or pass --force", .path.display())]
    OutputNotEmpty {
        /// The output directory.
        path: PathBuf,
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
        /// What is wrong.
        problem: String,
        /// What suffices.
        help: String,
    },
    /// An argument that is out of range; the text names it and the mend.
    #[error("{0}")]
    Argument(String),
    /// A GPU.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] dsmoe_kernels::cuda::CudaError),
    /// A router's configuration or initialisation.
    #[error(transparent)]
    Router(#[from] dsmoe_router::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err`: an [`Error::Io`] about `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { path, cause }
    }

    pub(crate) fn field(
        path: &Path,
        field: impl Into<String>,
        problem: impl Into<String>,
        mend: impl Into<String>,
    ) -> Error {
        Error::Field {
            path: path.to_path_buf(),
            field: field.into(),
            problem: problem.into(),
            mend: mend.into(),
        }
    }

    pub(crate) fn tensor(
        path: &Path,
        tensor: &str,
        problem: impl Into<String>,
        mend: impl Into<String>,
    ) -> Error {
        Error::Tensor {
            path: path.to_path_buf(),
            tensor: shown(tensor),
            problem: problem.into(),
            mend: mend.into(),
        }
    }
}

/// `text` from a file, fit for a one-line message.
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
