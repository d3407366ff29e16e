//! Rotary position embedding; see [`crate::ops::rope`].

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};

static SOURCE: Source = Source { name: "rope", text: include_str!("rope.cu") };

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] =
    &[KernelSpec { source: &SOURCE, entries: &["turn"], defines: &[&[]], max_registers: 40 }];

/// Sizes of a rotation.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows.
    pub tokens: usize,
    /// Rows of a sequence; row r is at position `start + r % seq`.
    pub seq: usize,
    /// Position of a sequence's first row.
    pub start: usize,
    /// Heads that are rotated: the first of a row.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Length of a row.
    pub width: usize,
}

/// Rotates the first heads of the rows of `x` in place. `angles` `[positions, head_dim]` are cosines and sines.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit, or a position has no angles.
pub fn forward(gpu: &Gpu, x: ViewMut<'_, bf16>, angles: View<'_, f32>, dims: Dims) -> Result<()> {
    run(gpu, x, angles, None, dims, 1.0)
}

/// Rotates gradients back.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// As [`forward`].
pub fn backward(gpu: &Gpu, dx: ViewMut<'_, bf16>, angles: View<'_, f32>, dims: Dims) -> Result<()> {
    run(gpu, dx, angles, None, dims, -1.0)
}

/// [`forward`] with the positions of the rows, which must have angles, in memory.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn forward_at(
    gpu: &Gpu,
    x: ViewMut<'_, bf16>,
    angles: View<'_, f32>,
    positions: View<'_, u32>,
    dims: Dims,
) -> Result<()> {
    assert_eq!(positions.len(), dims.tokens, "cuda rope: positions");
    run(gpu, x, angles, Some(positions), dims, 1.0)
}

fn run(
    gpu: &Gpu,
    x: ViewMut<'_, bf16>,
    angles: View<'_, f32>,
    positions: Option<View<'_, u32>>,
    dims: Dims,
    sign: f32,
) -> Result<()> {
    let Dims { tokens, seq, start, heads, head_dim, width } = dims;
    let last = if positions.is_some() || tokens == 0 { 0 } else { start + seq.min(tokens) };
    assert!(
        x.len() == tokens * width
            && head_dim.is_multiple_of(2)
            && heads * head_dim <= width
            && angles.len() >= last * head_dim
            && (seq > 0 || tokens == 0),
        "cuda rope: {} values, {} angles for {dims:?}",
        x.len(),
        angles.len()
    );
    let kernel = gpu.kernel(&SOURCE, "turn", &[])?;
    let blocks = int("rope", (tokens * heads * head_dim / 2).div_ceil(256))? as u32;
    let size = |size| Ok::<_, crate::cuda::CudaError>(Arg::from(int("rope", size)?));
    let args = [
        Arg::from(&x),
        angles.into(),
        positions.into(),
        size(tokens)?,
        size(seq)?,
        size(start)?,
        size(heads)?,
        size(head_dim)?,
        size(width)?,
        sign.into(),
    ];
    // SAFETY: a thread per pair of the first heads of `tokens` rows; lengths were checked above, positions are the caller's
    // promise.
    unsafe { kernel.launch([blocks, 1, 1], 256, 0, &args) }
}
