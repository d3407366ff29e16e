//! The optimiser and the sums it needs; see [`crate::ops::adamw`].

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};
use crate::adamw::Hyper;

static SOURCE: Source = Source { name: "optim", text: include_str!("optim.cu") };

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &["adamw", "sum_squares", "sum", "add_partials"],
    defines: &[&[]],
    max_registers: 40,
}];

/// Values of scratch that a sum needs: parts that are added in order.
pub const PARTIALS: usize = 512;
/// Threads of a block.
const BLOCK: u32 = 256;

/// Updates `param`, its moments, and its rounded copy from `scale` (one value) times `grad`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// The lengths differ.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs and settings of one op")]
pub fn adamw(
    gpu: &Gpu,
    param: ViewMut<'_, f32>,
    rounded: ViewMut<'_, bf16>,
    m: ViewMut<'_, f32>,
    v: ViewMut<'_, f32>,
    grad: View<'_, f32>,
    scale: View<'_, f32>,
    hyper: &Hyper,
) -> Result<()> {
    let len = grad.len();
    assert!(
        [param.len(), rounded.len(), m.len(), v.len()] == [len; 4] && scale.len() == 1,
        "cuda adamw: {} parameters, {len} gradients",
        param.len()
    );
    let (lr, root) = hyper.corrections();
    let kernel = gpu.kernel(&SOURCE, "adamw", &[])?;
    let args = [
        Arg::from(&param),
        Arg::from(&rounded),
        Arg::from(&m),
        Arg::from(&v),
        grad.into(),
        scale.into(),
        Arg::I64(len as i64),
        ((1.0 - hyper.lr * hyper.weight_decay) as f32).into(),
        (lr as f32).into(),
        (hyper.beta1 as f32).into(),
        ((1.0 - hyper.beta1) as f32).into(),
        (hyper.beta2 as f32).into(),
        ((1.0 - hyper.beta2) as f32).into(),
        (root as f32).into(),
        (hyper.eps as f32).into(),
    ];
    let blocks = int("adamw", len.div_ceil(BLOCK as usize))? as u32;
    // SAFETY: a thread per value of buffers whose lengths were checked above.
    unsafe { kernel.launch([blocks, 1, 1], BLOCK, 0, &args) }
}

/// Adds to `out` (one value) the squares of `x`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn add_sum_of_squares(
    gpu: &Gpu,
    out: ViewMut<'_, f64>,
    x: View<'_, f32>,
    partials: ViewMut<'_, f64>,
) -> Result<()> {
    add(gpu, "sum_squares", out, x, partials)
}

/// Adds to `out` (one value) the values of `x`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn add_sum(gpu: &Gpu, out: ViewMut<'_, f64>, x: View<'_, f32>, partials: ViewMut<'_, f64>) -> Result<()> {
    add(gpu, "sum", out, x, partials)
}

fn add(
    gpu: &Gpu,
    entry: &'static str,
    out: ViewMut<'_, f64>,
    x: View<'_, f32>,
    partials: ViewMut<'_, f64>,
) -> Result<()> {
    assert!(out.len() == 1 && partials.len() >= PARTIALS, "cuda {entry}: {} partials", partials.len());
    let parts = x.len().div_ceil(BLOCK as usize).min(PARTIALS);
    let first = gpu.kernel(&SOURCE, entry, &[])?;
    let args = [Arg::from(&partials), x.into(), Arg::I64(x.len() as i64)];
    // SAFETY: a block per partial sum, for which there is room.
    unsafe { first.launch([int(entry, parts)? as u32, 1, 1], BLOCK, 0, &args) }?;
    let second = gpu.kernel(&SOURCE, "add_partials", &[])?;
    let args = [Arg::from(&out), partials.as_view().into(), int(entry, parts)?.into()];
    // SAFETY: one thread reads the partial sums that were set above.
    unsafe { second.launch([1, 1, 1], 1, 0, &args) }
}
