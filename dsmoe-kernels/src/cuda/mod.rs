//! Kernels for NVIDIA GPUs (feature `cuda`).
//!
//! Nothing of CUDA is needed to build. A program looks for the driver, NVRTC and cuBLASLt when it first uses a device
//! ([`detect`] says what is there); kernels are CUDA C++ in this crate, compiled by NVRTC for the device and the model's
//! shapes and kept as CUBIN files (`DSMOE_CACHE_DIR`, or `dsmoe` in the user's cache folder). `DSMOE_CUDA_LIB_DIR` names
//! a folder of CUDA's libraries, such as `nvidia/cu13/lib` of PyTorch's wheels; `DSMOE_NVRTC_DIR` one of NVRTC alone.
//!
//! A [`Gpu`] has one stream: ops are queued in the order of the calls and nothing waits but copies to the host. Results
//! are the same bits every time: no sum's order is left to chance. The residual stream, norms, routers, softmax and
//! parameter gradients are f32; operands of matrix products are bf16. As on the processor, activation gradients are set
//! and parameter gradients added to.

mod blas;
mod buf;
mod compile;
mod detect;
mod device;
mod error;
mod kernel;
pub mod ops;

pub use buf::{Element, GpuBuf, View, ViewMut};
pub use compile::{Compiled, compile, nvrtc_version};
pub use detect::{Detection, DeviceInfo, Libraries, cublaslt_version, detect, driver_version, libraries};
pub use device::{Gpu, Recorded};
pub use error::{CudaError, Result};
#[cfg(test)]
pub(crate) use kernel::KernelSpec;
pub(crate) use kernel::{Arg, Source};
