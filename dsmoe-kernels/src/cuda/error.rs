//! What can go wrong on a GPU.

use cudarc::driver::DriverError;

/// Result of GPU work.
pub type Result<T> = std::result::Result<T, CudaError>;

/// What can go wrong on a GPU. Every message is one line that ends with the mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no such device.
    #[error("cuda:{ordinal}: {problem}")]
    Device {
        /// The device asked for.
        ordinal: usize,
        /// What is missing, and what would do.
        problem: String,
    },
    /// A library of CUDA is not to be found.
    #[error("{library} is not to be found; {mend}")]
    Library {
        /// Its name.
        library: &'static str,
        /// What would do.
        mend: &'static str,
    },
    /// The device's memory does not suffice.
    #[error(
        "the GPU has no {wanted} bytes left ({free} of {total} are free); use a smaller batch, shorter sequences or a \
         smaller model"
    )]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes free.
        free: usize,
        /// Bytes in all.
        total: usize,
    },
    /// The driver refuses.
    #[error("CUDA's driver says {code} ({doing}); look at `dsmoe doctor` and the driver's log")]
    Driver {
        /// Its code, by name.
        code: String,
        /// What was being done.
        doing: &'static str,
    },
    /// A kernel that NVRTC does not take.
    #[error("kernel {name} does not compile for {arch}: {log}; report it with the version of NVRTC")]
    Compile {
        /// Its source.
        name: String,
        /// The architecture.
        arch: String,
        /// NVRTC's first error.
        log: String,
    },
    /// cuBLASLt refuses.
    #[error("cuBLASLt says {code} to a product {shape}; report it with the version of cuBLASLt")]
    Blas {
        /// Its code, by name.
        code: String,
        /// The product.
        shape: String,
    },
    /// A size that no kernel takes.
    #[error("{0}")]
    Size(String),
}

impl CudaError {
    pub(super) fn no_nvrtc() -> CudaError {
        CudaError::Library {
            library: "libnvrtc.so.13, CUDA's run-time compiler",
            mend: "pip install nvidia-cuda-nvrtc and set DSMOE_NVRTC_DIR to its lib folder",
        }
    }

    pub(super) fn no_cublaslt() -> CudaError {
        CudaError::Library {
            library: "libcublasLt.so.13, CUDA's matrix products",
            mend: "pip install nvidia-cublas and set DSMOE_CUDA_LIB_DIR to its lib folder",
        }
    }
}

/// For `map_err`: a driver error while `doing`. The error is not formatted, which may panic with another driver.
pub(super) fn driver(doing: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::Driver { code: format!("{:?}", error.0), doing }
}
