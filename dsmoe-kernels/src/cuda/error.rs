//! Errors of GPU work.

use cudarc::driver::DriverError;

/// Result of GPU work.
pub type Result<T> = std::result::Result<T, CudaError>;

/// An error of GPU work. Every message is one line that ends with help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The device cannot be used.
    #[error("cuda:{ordinal}: {problem}")]
    Device {
        /// The device asked for.
        ordinal: usize,
        /// The cause, and help.
        problem: String,
    },
    /// A library of CUDA is not found.
    #[error("{library} is not found; {help}")]
    Library {
        /// Its name.
        library: &'static str,
        /// How to get it.
        help: &'static str,
    },
    /// The device's memory does not suffice.
    #[error(
        "the GPU cannot allocate {wanted} bytes ({free} of {total} are free); use a smaller batch, shorter sequences or \
         a smaller model"
    )]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes free.
        free: usize,
        /// Bytes in all.
        total: usize,
    },
    /// The driver fails.
    #[error("the CUDA driver returned {code} ({doing}); see `dsmoe doctor` and the driver's log")]
    Driver {
        /// Its code, by name.
        code: String,
        /// The operation that failed.
        doing: &'static str,
    },
    /// NVRTC refuses a kernel.
    #[error("kernel {name} does not compile for {arch}: {log}; report it with your version of NVRTC")]
    Compile {
        /// Its source.
        name: String,
        /// The architecture.
        arch: String,
        /// NVRTC's first error.
        log: String,
    },
    /// cuBLASLt fails.
    #[error("cuBLASLt returned {code} for the product {shape}; report it with your version of cuBLASLt")]
    Blas {
        /// Its code, by name.
        code: String,
        /// The product.
        shape: String,
    },
    /// An environment variable has a value that means nothing.
    #[error("{variable} is {asked:?}; set it to one of {values}")]
    Setting {
        /// The variable.
        variable: &'static str,
        /// Its value.
        asked: String,
        /// The values that it may have.
        values: String,
    },
    /// A size is one that no kernel takes.
    #[error("{0}")]
    Size(String),
}

impl CudaError {
    pub(super) fn no_nvrtc() -> CudaError {
        CudaError::Library {
            library: "libnvrtc.so.13, CUDA's run-time compiler",
            help: "pip install nvidia-cuda-nvrtc and set DSMOE_NVRTC_DIR to its lib folder",
        }
    }

    pub(super) fn no_cublaslt() -> CudaError {
        CudaError::Library {
            library: "libcublasLt.so.13, CUDA's matrix products",
            help: "pip install nvidia-cublas and set DSMOE_CUDA_LIB_DIR to its lib folder",
        }
    }
}

/// Converts a driver error while `doing`, for `map_err`. It does not format the error, which may panic with other drivers.
pub(super) fn driver(doing: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::Driver { code: format!("{:?}", error.0), doing }
}
