//! Ops on a GPU. Each is a struct with its outputs, inputs and settings, whose `run` checks the sizes and queues kernels.
//! Sizes come from the shapes of the matrices. No op waits for the device.

pub mod attention;
pub mod choice;
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
pub mod products;
pub mod rms_norm;
pub mod rope;
pub mod router;
pub mod slot_ffn;
pub mod slots;
#[cfg(test)]
mod tests;
pub mod tree;

pub(crate) use super::buf::{Matrix, optional};
pub(crate) use super::compile::{Define, Source};
pub(crate) use super::device::Gpu;
pub(crate) use super::error::Result;
pub(crate) use super::kernel::{Arg, Grid};
