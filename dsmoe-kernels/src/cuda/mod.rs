//! Kernels for NVIDIA GPUs (feature `cuda`).
//!
//! Nothing of CUDA is needed to build. A program looks for the driver, NVRTC and cuBLASLt when it first uses a device;
//! [`detect`] reports what it finds. Kernels are CUDA C++ in this crate. NVRTC compiles them for the device and the model's
//! shapes, and their CUBIN files are cached in `DSMOE_CACHE_DIR`, or in `dsmoe` in the user's cache folder.
//! `DSMOE_CUDA_LIB_DIR` names a folder of CUDA's libraries, such as `nvidia/cu13/lib` of PyTorch's wheels, and
//! `DSMOE_NVRTC_DIR` one of NVRTC alone. `DSMOE_EXPERT_KERNELS` chooses the kernels of experts; see
//! [`ops::choice::ExpertKernels`].
//!
//! A [`Gpu`] has one stream: ops are queued in the order of the calls, and only copies to the host wait. Results are
//! deterministic, as every sum has a fixed order. The residual stream, norms, routers, softmax and parameter gradients are
//! f32; operands of matrix products are bf16. As on the CPU, activation gradients are set and parameter gradients are added
//! to.

mod blas;
mod buf;
mod compile;
mod detect;
mod device;
mod error;
mod expert_kernels;
mod graph;
mod kernel;
mod nccl;
pub mod ops;
mod stream;
mod tensor_map;

pub use buf::{Element, Float, GpuBuf, Matrix, Part, View, ViewMut};
pub use compile::{Compiled, compile, nvrtc_version};
pub use detect::{Detection, DeviceInfo, Libraries, cublaslt_version, detect, driver_version, libraries};
pub use device::Gpu;
pub use error::{CudaError, Result};
pub use graph::Recorded;
pub use nccl::{Nccl, NcclLibrary, find_nccl};
