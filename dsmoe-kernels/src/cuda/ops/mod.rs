//! Ops on a GPU. Each is a struct with its outputs, inputs and settings, whose `run` checks the sizes and queues kernels.
//! Sizes come from the shapes of the matrices. No op waits for the device.

pub mod attention;
pub mod cross_entropy;
pub mod decode;
pub mod elementwise;
pub mod embedding;
pub mod experts;
pub mod ffn;
pub mod gemv;
pub mod linear;
pub mod matmul;
pub mod optim;
pub mod rms_norm;
pub mod rope;
pub mod router;
#[cfg(test)]
mod tests;

pub(crate) use super::buf::{Matrix, optional};
pub(crate) use super::compile::Source;
pub(crate) use super::device::Gpu;
pub(crate) use super::error::Result;
#[cfg(test)]
pub(crate) use super::kernel::KernelSpec;
pub(crate) use super::kernel::{Arg, blocks, int, sizes};

/// All kernels, for the test that compiles them.
#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[
    attention::KERNELS,
    cross_entropy::KERNELS,
    decode::KERNELS,
    elementwise::KERNELS,
    embedding::KERNELS,
    experts::KERNELS,
    ffn::KERNELS,
    gemv::KERNELS,
    matmul::KERNELS,
    optim::KERNELS,
    rms_norm::KERNELS,
    rope::KERNELS,
    router::KERNELS,
];
