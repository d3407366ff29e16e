//! RMS norm; see [`crate::ops::rms_norm`]. Its output is rounded to bf16, for products.

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};

static SOURCE: Source = Source { name: "rms_norm", text: include_str!("rms_norm.cu") };

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &["forward", "forward_sum", "restore", "backward", "sum_partials"],
    defines: &[
        &[("HIDDEN", 4096), ("THREADS", 512)],
        &[("HIDDEN", 8192), ("THREADS", 1024)],
        &[("HIDDEN", 128), ("THREADS", 32)],
        &[("HIDDEN", 67), ("THREADS", 32)],
    ],
    max_registers: 64,
}];

/// Blocks of the backward pass: each keeps a part of the weight's gradient.
const PARTS: usize = 512;

fn defines(hidden: usize) -> [(&'static str, i64); 2] {
    // About eight values a thread.
    let threads = hidden.div_ceil(8).next_multiple_of(32).clamp(32, 1024);
    [("HIDDEN", hidden as i64), ("THREADS", threads as i64)]
}

fn start(gpu: &Gpu, entry: &'static str, blocks: usize, hidden: usize, args: &[Arg]) -> Result<()> {
    let defines = defines(hidden);
    let kernel = gpu.kernel(&SOURCE, entry, &defines)?;
    // SAFETY: the callers checked that the buffers have `blocks` rows, or parts, of `hidden` values.
    unsafe { kernel.launch([int("rms_norm", blocks)? as u32, 1, 1], defines[1].1 as u32, 0, args) }
}

fn check(op: &str, rows: usize, hidden: usize, matrices: &[usize], weight: usize) {
    assert!(
        hidden > 0 && weight == hidden && matrices.iter().all(|&len| len == rows * hidden),
        "cuda rms_norm::{op}: {matrices:?} values, weight {weight}, for {rows} rows of {hidden}"
    );
}

/// Sets `h` to the rows of `x` normed, and `rstd`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn forward(
    gpu: &Gpu,
    h: ViewMut<'_, bf16>,
    rstd: ViewMut<'_, f32>,
    x: View<'_, f32>,
    weight: View<'_, f32>,
    eps: f32,
    hidden: usize,
) -> Result<()> {
    check("forward", rstd.len(), hidden, &[h.len(), x.len()], weight.len());
    start(
        gpu,
        "forward",
        rstd.len(),
        hidden,
        &[Arg::from(&h), Arg::from(&rstd), x.into(), weight.into(), eps.into()],
    )
}

/// Sets `out` to `x + y`, `h` to its rows normed, and `rstd`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs and sizes of one op")]
pub fn forward_sum(
    gpu: &Gpu,
    h: ViewMut<'_, bf16>,
    rstd: ViewMut<'_, f32>,
    out: ViewMut<'_, f32>,
    x: View<'_, f32>,
    y: View<'_, f32>,
    weight: View<'_, f32>,
    eps: f32,
    hidden: usize,
) -> Result<()> {
    check("forward_sum", rstd.len(), hidden, &[h.len(), out.len(), x.len(), y.len()], weight.len());
    let args =
        [Arg::from(&h), Arg::from(&rstd), Arg::from(&out), x.into(), y.into(), weight.into(), eps.into()];
    start(gpu, "forward_sum", rstd.len(), hidden, &args)
}

/// Sets `h` as [`forward`] did, from the `rstd` that it set.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn restore(
    gpu: &Gpu,
    h: ViewMut<'_, bf16>,
    x: View<'_, f32>,
    weight: View<'_, f32>,
    rstd: View<'_, f32>,
    hidden: usize,
) -> Result<()> {
    check("restore", rstd.len(), hidden, &[h.len(), x.len()], weight.len());
    start(gpu, "restore", rstd.len(), hidden, &[Arg::from(&h), x.into(), weight.into(), rstd.into()])
}

/// Values of scratch that the backward pass needs.
pub fn partials_len(tokens: usize, hidden: usize) -> usize {
    tokens.min(PARTS) * hidden
}

/// Sets `dx`, or adds to it with `add`, and adds to `dweight`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs and sizes of one op")]
pub fn backward(
    gpu: &Gpu,
    dx: ViewMut<'_, f32>,
    dweight: ViewMut<'_, f32>,
    dy: View<'_, f32>,
    x: View<'_, f32>,
    weight: View<'_, f32>,
    rstd: View<'_, f32>,
    hidden: usize,
    partials: ViewMut<'_, f32>,
    add: bool,
) -> Result<()> {
    let rows = rstd.len();
    check("backward", rows, hidden, &[dx.len(), dy.len(), x.len()], weight.len());
    check("backward", 1, hidden, &[dweight.len()], hidden);
    assert!(
        partials.len() >= partials_len(rows, hidden),
        "cuda rms_norm::backward: {} partials",
        partials.len()
    );
    let parts = rows.min(PARTS);
    let args = [
        Arg::from(&dx),
        Arg::from(&partials),
        dy.into(),
        x.into(),
        weight.into(),
        rstd.into(),
        int("rms_norm", rows)?.into(),
        i32::from(add).into(),
    ];
    start(gpu, "backward", parts, hidden, &args)?;
    sum_partials(gpu, dweight, partials.as_view(), parts, hidden)
}

/// Adds to `out` `[width]` the sum of the first `parts` rows of `partials`, in order.
pub(super) fn sum_partials(
    gpu: &Gpu,
    out: ViewMut<'_, f32>,
    partials: View<'_, f32>,
    parts: usize,
    width: usize,
) -> Result<()> {
    assert!(
        out.len() == width && partials.len() >= parts * width,
        "cuda sum_partials: {} of {width}",
        out.len()
    );
    let kernel = gpu.kernel(&SOURCE, "sum_partials", &defines(8))?;
    let grid = [int("sum_partials", width.div_ceil(128))? as u32, 1, 1];
    let sizes = [int("sum_partials", parts)?.into(), int("sum_partials", width)?.into()];
    // SAFETY: the lengths were checked above; a thread per value of `out`.
    unsafe { kernel.launch(grid, 128, 0, &[Arg::from(&out), partials.into(), sizes[0], sizes[1]]) }
}
