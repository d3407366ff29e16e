//! Ops on a GPU. Outputs come first, then inputs, then sizes; all are queued and none waits.

pub mod attention;
pub mod cross_entropy;
pub mod elementwise;
pub mod embedding;
pub mod experts;
pub mod few;
pub mod ffn;
pub mod matmul;
pub mod optim;
pub mod rms_norm;
pub mod rope;
pub mod router;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use super::KernelSpec;
pub(crate) use super::kernel::int;
pub(crate) use super::{Arg, Gpu, Result, Source, View, ViewMut};

/// All kernels, for the test that compiles them.
#[cfg(test)]
pub(crate) fn all_kernels() -> impl Iterator<Item = &'static KernelSpec> {
    let all = [
        attention::KERNELS,
        cross_entropy::KERNELS,
        elementwise::KERNELS,
        embedding::KERNELS,
        experts::KERNELS,
        few::KERNELS,
        ffn::KERNELS,
        matmul::KERNELS,
        optim::KERNELS,
        rms_norm::KERNELS,
        rope::KERNELS,
        router::KERNELS,
    ];
    all.into_iter().flatten()
}
