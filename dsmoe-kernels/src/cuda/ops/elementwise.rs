//! Values one by one.

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};

static SOURCE: Source = Source { name: "elementwise", text: include_str!("elementwise.cu") };

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &["cast", "add", "keep", "rows"],
    defines: &[&[]],
    max_registers: 40,
}];

/// Threads of a block.
const BLOCK: u32 = 256;

fn each(gpu: &Gpu, entry: &'static str, len: usize, per_thread: usize, pointers: [Arg; 2]) -> Result<()> {
    let kernel = gpu.kernel(&SOURCE, entry, &[])?;
    let blocks = int(entry, len.div_ceil(per_thread * BLOCK as usize))? as u32;
    let [a, b] = pointers;
    // SAFETY: the kernels of elementwise.cu take two pointers and the number of values, which the callers checked.
    unsafe { kernel.launch([blocks, 1, 1], BLOCK, 0, &[a, b, Arg::I64(len as i64)]) }
}

/// Sets `out` to `x` rounded.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// The lengths differ.
pub fn cast(gpu: &Gpu, out: ViewMut<'_, bf16>, x: View<'_, f32>) -> Result<()> {
    assert_eq!(out.len(), x.len(), "cuda cast");
    each(gpu, "cast", x.len(), 4, [Arg::from(&out), x.into()])
}

/// Adds `x` to `y`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// The lengths differ.
pub fn add(gpu: &Gpu, y: ViewMut<'_, f32>, x: View<'_, f32>) -> Result<()> {
    assert_eq!(y.len(), x.len(), "cuda add");
    each(gpu, "add", x.len(), 1, [Arg::from(&y), x.into()])
}

/// Sets to 0 what `mask` does not keep.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// The lengths differ.
pub fn keep(gpu: &Gpu, x: ViewMut<'_, f32>, mask: View<'_, u8>) -> Result<()> {
    assert_eq!(x.len(), mask.len(), "cuda keep");
    each(gpu, "keep", mask.len(), 1, [Arg::from(&x), mask.into()])
}

/// Sets row i of `out` `[picked.len(), width]` to row `picked[i]` of `x`. What is picked must be rows of `x`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn rows(
    gpu: &Gpu,
    out: ViewMut<'_, bf16>,
    x: View<'_, bf16>,
    picked: View<'_, u32>,
    width: usize,
) -> Result<()> {
    assert!(out.len() == picked.len() * width && x.len().is_multiple_of(width.max(1)), "cuda rows");
    let kernel = gpu.kernel(&SOURCE, "rows", &[])?;
    let grid = [int("rows", picked.len())? as u32, 1, 1];
    // SAFETY: lengths were checked above; the numbers of rows are the caller's promise.
    unsafe {
        kernel.launch(grid, BLOCK, 0, &[Arg::from(&out), x.into(), picked.into(), int("rows", width)?.into()])
    }
}
