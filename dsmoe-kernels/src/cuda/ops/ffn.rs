//! The nonlinear part of a gated FFN, between its products; see [`crate::expert_ffn`].

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};

static SOURCE: Source = Source { name: "ffn", text: include_str!("ffn.cu") };

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] =
    &[KernelSpec { source: &SOURCE, entries: &["activate", "backward"], defines: &[&[]], max_registers: 64 }];

/// Experts that a dense FFN's backward pass is cut into: a warp takes each.
const SLICES: usize = 8;

/// Sizes of an FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Tokens.
    pub tokens: usize,
    /// Neurons of all experts together.
    pub intermediate: usize,
    /// Experts; 1 for a dense FFN.
    pub num_experts: usize,
}

impl Dims {
    fn check(&self, op: &str, lens: &[usize], pairs: Option<usize>) {
        let Dims { tokens, intermediate, num_experts } = *self;
        assert!(
            num_experts > 0
                && intermediate.is_multiple_of(num_experts)
                && lens.iter().all(|&len| len == tokens * intermediate)
                && pairs.is_none_or(|pairs| pairs == tokens * num_experts),
            "cuda ffn::{op}: {lens:?} values, {pairs:?} coefficients for {self:?}"
        );
    }
}

/// Sets `c` to `coefficient silu(a) b`, all `[tokens, intermediate]`; without coefficients they are 1.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn activate(
    gpu: &Gpu,
    c: ViewMut<'_, bf16>,
    a: View<'_, bf16>,
    b: View<'_, bf16>,
    coefficients: Option<View<'_, f32>>,
    dims: Dims,
) -> Result<()> {
    dims.check("activate", &[c.len(), a.len(), b.len()], coefficients.map(|k| k.len()));
    let kernel = gpu.kernel(&SOURCE, "activate", &[])?;
    let blocks = int("ffn", c.len().div_ceil(8 * 256))? as u32;
    let args = [
        Arg::from(&c),
        a.into(),
        b.into(),
        coefficients.into(),
        Arg::I64(dims.tokens as i64),
        int("ffn", dims.intermediate)?.into(),
        int("ffn", dims.num_experts)?.into(),
    ];
    // SAFETY: eight values per thread of buffers whose lengths were checked above; those start at 16 bytes, as buffers do.
    unsafe { kernel.launch([blocks, 1, 1], 256, 0, &args) }
}

/// Sets the gradients `da` and `db`, `c` as [`activate`] does, and where there are coefficients `dcoefficients`
/// `[tokens, num_experts]`: `sum over an expert of silu(a) b g`, of inactive pairs only with `all_pairs`. `g` is the
/// gradient of the output times the down projection.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs and sizes of one op")]
pub fn backward(
    gpu: &Gpu,
    da: ViewMut<'_, bf16>,
    db: ViewMut<'_, bf16>,
    c: ViewMut<'_, bf16>,
    dcoefficients: Option<ViewMut<'_, f32>>,
    g: View<'_, bf16>,
    a: View<'_, bf16>,
    b: View<'_, bf16>,
    coefficients: Option<View<'_, f32>>,
    all_pairs: bool,
    dims: Dims,
) -> Result<()> {
    let lens = [da.len(), db.len(), c.len(), g.len(), a.len(), b.len()];
    dims.check("backward", &lens, coefficients.map(|k| k.len()));
    dims.check("backward", &lens, dcoefficients.as_ref().map(|k| k.len()));
    assert!(
        dcoefficients.is_none() || coefficients.is_some(),
        "cuda ffn::backward: gradients of no coefficients"
    );
    let dense = coefficients.is_none();
    let slices = if dense && dims.intermediate.is_multiple_of(SLICES) { SLICES } else { dims.num_experts };
    let kernel = gpu.kernel(&SOURCE, "backward", &[])?;
    let args = [
        Arg::from(&da),
        Arg::from(&db),
        Arg::from(&c),
        dcoefficients.as_ref().map_or(Arg::Ptr(0), Arg::from),
        g.into(),
        a.into(),
        b.into(),
        coefficients.into(),
        int("ffn", dims.intermediate)?.into(),
        int("ffn", slices)?.into(),
        i32::from(all_pairs || dense).into(),
    ];
    // SAFETY: a block per token of buffers whose lengths were checked above.
    unsafe { kernel.launch([int("ffn", dims.tokens)? as u32, 1, 1], 256, 0, &args) }
}
