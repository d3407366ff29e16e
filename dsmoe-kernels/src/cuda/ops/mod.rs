//! Ops on a GPU. Outputs come first, then inputs, then sizes; all are queued and none waits.

pub mod matmul;
#[cfg(test)]
mod tests;

pub(crate) use super::kernel::int;
pub(crate) use super::{Arg, Gpu, KernelSpec, Result, Source, View, ViewMut};

/// All kernels, for the test that compiles them.
pub fn all_kernels() -> Vec<&'static KernelSpec> {
    [matmul::KERNELS].into_iter().flatten().collect()
}
