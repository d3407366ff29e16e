//! Products and FFNs of a few tokens: every weight is read once, and only that of experts that a token has active.

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};

static SOURCE: Source = Source { name: "few", text: include_str!("few.cu") };

/// Tokens at the most.
pub const FEW: usize = 8;
/// Neurons that one block of the down projection takes.
const NEURONS: usize = 32;

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &["few_f32", "few_bf16", "few_up", "few_down", "few_sum"],
    defines: &[
        &[("TOKENS", 1), ("ALIGNED", 1), ("NEURONS", NEURONS as i64)],
        &[("TOKENS", 8), ("ALIGNED", 1), ("NEURONS", NEURONS as i64)],
        &[("TOKENS", 3), ("ALIGNED", 0), ("NEURONS", NEURONS as i64)],
    ],
    max_registers: 128,
}];

fn defines(tokens: usize, width: usize) -> [(&'static str, i64); 3] {
    let aligned = width.is_multiple_of(8);
    [("TOKENS", tokens as i64), ("ALIGNED", i64::from(aligned)), ("NEURONS", NEURONS as i64)]
}

fn size(value: usize) -> Result<Arg> {
    Ok(int("few", value)?.into())
}

fn linear(
    gpu: &Gpu,
    entry: &'static str,
    y: (usize, Arg),
    x: View<'_, bf16>,
    w: View<'_, bf16>,
    tokens: usize,
) -> Result<()> {
    assert!((1..=FEW).contains(&tokens), "cuda few: {tokens} tokens");
    let (inputs, outputs) = (x.len() / tokens, y.0 / tokens);
    assert!(
        x.len() == tokens * inputs && y.0 == tokens * outputs && w.len() == inputs * outputs,
        "cuda few: {} inputs, {} outputs, {} weights for {tokens} tokens",
        x.len(),
        y.0,
        w.len()
    );
    let kernel = gpu.kernel(&SOURCE, entry, &defines(tokens, inputs))?;
    let blocks = int("few", outputs.div_ceil(8))? as u32;
    let args = [y.1, x.into(), w.into(), size(inputs)?, size(outputs)?];
    // SAFETY: a warp per output; lengths were checked above, and rows of a width of 8 values start at 16 bytes where their
    // matrix does, as all buffers do.
    unsafe { kernel.launch([blocks, 1, 1], 256, 0, &args) }
}

/// Sets `y` `[tokens, outputs]` to `x w^T`, for at most [`FEW`] tokens.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn linear_f32(
    gpu: &Gpu,
    y: ViewMut<'_, f32>,
    x: View<'_, bf16>,
    w: View<'_, bf16>,
    tokens: usize,
) -> Result<()> {
    linear(gpu, "few_f32", (y.len(), Arg::from(&y)), x, w, tokens)
}

/// [`linear_f32`] rounded to bf16.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn linear_bf16(
    gpu: &Gpu,
    y: ViewMut<'_, bf16>,
    x: View<'_, bf16>,
    w: View<'_, bf16>,
    tokens: usize,
) -> Result<()> {
    linear(gpu, "few_bf16", (y.len(), Arg::from(&y)), x, w, tokens)
}

/// The three matrices of an FFN, `[intermediate, hidden]` each: a neuron is a row.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// Gate projection.
    pub gate: View<'a, bf16>,
    /// Up projection.
    pub up: View<'a, bf16>,
    /// Down projection, transposed.
    pub down: View<'a, bf16>,
}

/// Sizes of an FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Tokens, at most [`FEW`].
    pub tokens: usize,
    /// Width of the input.
    pub hidden: usize,
    /// Neurons of all experts together.
    pub intermediate: usize,
    /// Experts; 1 for a dense FFN.
    pub num_experts: usize,
}

impl Dims {
    fn blocks(self) -> usize {
        (self.intermediate / self.num_experts).div_ceil(NEURONS)
    }

    /// Values of scratch that [`ffn`] needs.
    pub fn scratch(self) -> usize {
        self.tokens * (self.intermediate + self.num_experts * self.blocks() * self.hidden)
    }
}

/// Sets `y` `[tokens, hidden]` to the sum of the active experts' outputs times their coefficients, which are 1 where there
/// are none.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn ffn(
    gpu: &Gpu,
    y: ViewMut<'_, f32>,
    h: View<'_, bf16>,
    weights: Weights<'_>,
    coefficients: Option<View<'_, f32>>,
    dims: Dims,
    mut scratch: ViewMut<'_, f32>,
) -> Result<()> {
    let Dims { tokens, hidden, intermediate, num_experts: n } = dims;
    let matrices = [weights.gate.len(), weights.up.len(), weights.down.len()];
    assert!(
        (1..=FEW).contains(&tokens)
            && n > 0
            && intermediate.is_multiple_of(n)
            && matrices == [hidden * intermediate; 3]
            && y.len() == tokens * hidden
            && h.len() == y.len()
            && coefficients.is_none_or(|k| k.len() == tokens * n)
            && scratch.len() >= dims.scratch(),
        "cuda few::ffn: {} inputs, weights {matrices:?}, scratch {} for {dims:?}",
        h.len(),
        scratch.len()
    );
    let defines = defines(tokens, hidden);
    let pairs = tokens * intermediate;
    let [c, partials] = scratch.parts([0..pairs, pairs..dims.scratch()]);
    let up = gpu.kernel(&SOURCE, "few_up", &defines)?;
    let k = Arg::from(coefficients);
    let args = [
        Arg::from(&c),
        h.into(),
        weights.gate.into(),
        weights.up.into(),
        k,
        size(hidden)?,
        size(intermediate)?,
        size(n)?,
    ];
    let blocks = int("few", intermediate.div_ceil(8))? as u32;
    // SAFETY: a warp per neuron; lengths were checked above.
    unsafe { up.launch([blocks, 1, 1], 256, 0, &args) }?;
    let down = gpu.kernel(&SOURCE, "few_down", &defines)?;
    let args = [
        Arg::from(&partials),
        c.as_view().into(),
        weights.down.into(),
        k,
        size(hidden)?,
        size(intermediate)?,
        size(n)?,
        size(dims.blocks())?,
    ];
    let grid = [int("few", hidden.div_ceil(512))? as u32, int("few", n * dims.blocks())? as u32, 1];
    // SAFETY: a block per neurons of one expert and 512 columns; partial sums have room for each.
    unsafe { down.launch(grid, 128, 0, &args) }?;
    let sum = gpu.kernel(&SOURCE, "few_sum", &defines)?;
    let args = [Arg::from(&y), partials.as_view().into(), k, size(hidden)?, size(n)?, size(dims.blocks())?];
    // SAFETY: a block per 32 values of y reads the partial sums that were set above.
    unsafe { sum.launch([int("few", hidden.div_ceil(32))? as u32, tokens as u32, 1], 256, 0, &args) }
}
