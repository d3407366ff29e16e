//! Products of the active pairs (token, expert) of an FFN: what is not routed costs nothing, and nothing waits for the
//! routing. See [`crate::expert_ffn`] for the same on the processor.
//!
//! Values of pairs lie where those of all pairs would, `[T, intermediate]`; those of inactive ones are neither read nor
//! written.

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::router::Lists;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};

static SOURCE: Source = Source { name: "experts", text: include_str!("experts.cu") };

/// Bytes that a step of a tile takes in shared memory.
const STAGE_BYTES: u32 = (128 + 256) * 64 * 2;
/// Bytes there beside the steps: results on their way out, and what the start may be moved by.
const OTHER_BYTES: u32 = 8 * 16 * 272 + 1024;

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &["up", "project", "down", "input", "weights", "combine"],
    defines: &[&[("STAGES", 4), ("PLAIN", 0)], &[("STAGES", 2), ("PLAIN", 1)]],
    max_registers: 255,
}];

/// Sizes of an FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Tokens.
    pub tokens: usize,
    /// Width of the input.
    pub hidden: usize,
    /// Neurons of all experts together.
    pub intermediate: usize,
    /// Experts.
    pub num_experts: usize,
}

impl Dims {
    /// Whether these kernels take an FFN of such sizes: rows of an expert's weights and activations are whole groups of 8
    /// values. Not on devices with less than 131 KiB of shared memory for a block.
    pub fn fit(&self, gpu: &Gpu) -> bool {
        let Dims { hidden, intermediate, num_experts, .. } = *self;
        hidden.is_multiple_of(8) && intermediate.is_multiple_of(8 * num_experts.max(1)) && stages(gpu) >= 2
    }

    /// Values that [`down`] and [`backward_input`] work in.
    pub fn scratch(&self) -> usize {
        self.tokens * self.num_experts * self.hidden
    }

    fn check(&self, op: &str, lists: &Lists, pairs: &[usize], rows: &[usize], weights: &[usize]) {
        let Dims { tokens, hidden, intermediate, num_experts } = *self;
        assert!(
            num_experts > 0
                && hidden.is_multiple_of(8)
                && intermediate.is_multiple_of(8 * num_experts)
                && pairs.iter().all(|&len| len == tokens * intermediate)
                && rows.iter().all(|&len| len == tokens * hidden)
                && weights.iter().all(|&len| len == intermediate * hidden)
                && lists.offsets.len() == num_experts + 1
                && lists.token_offsets.len() > tokens
                && lists.tokens.len() >= tokens * num_experts
                && lists.slots.len() >= tokens * num_experts,
            "cuda experts::{op}: {pairs:?} values of pairs, {rows:?} of rows, {weights:?} weights for {self:?}"
        );
    }

    fn check_parts(&self, parts: &ViewMut<'_, bf16>) {
        let len = parts.len();
        assert!(len >= self.scratch(), "cuda experts: {len} values to work in for {self:?}");
    }

    fn args(&self) -> Result<[Arg; 3]> {
        let of = |size| Ok(Arg::from(int("experts", size)?));
        Ok([of(self.num_experts)?, of(self.intermediate / self.num_experts)?, of(self.hidden)?])
    }
}

/// Steps of a tile that shared memory has room for.
fn stages(gpu: &Gpu) -> u32 {
    (gpu.shared_memory().saturating_sub(OTHER_BYTES) / STAGE_BYTES).min(4)
}

#[cfg(test)]
thread_local! {
    /// Whether this thread uses the instructions of older devices on any.
    pub(crate) static PLAIN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// `args` are followed by what all kernels but `combine` end with.
fn start(gpu: &Gpu, entry: &'static str, args: &[Arg], lists: &Lists, dims: Dims) -> Result<()> {
    let [n, w, hidden] = dims.args()?;
    let (offsets, tokens) = (Arg::from(lists.offsets.view()), Arg::from(lists.tokens.view()));
    let args = [args, &[offsets, tokens, n, w, hidden]].concat();
    let stages = stages(gpu);
    // Tensor cores of Hopper read a step while the one before is still in use.
    let plain = stages < 3;
    #[cfg(test)]
    let plain = plain || PLAIN.get();
    let defines = [("STAGES", i64::from(stages)), ("PLAIN", i64::from(plain))];
    let kernel = gpu.kernel(&SOURCE, entry, &defines)?;
    let shared = stages * STAGE_BYTES + OTHER_BYTES;
    // SAFETY: the arguments are those of the kernel in experts.cu. The callers checked the lengths, and that rows are groups
    // of 8 values, so that all of them start at 16 bytes, as buffers do; lists name tokens and pairs of these sizes.
    unsafe { kernel.launch([gpu.multiprocessors(), 1, 1], 256, shared, &args) }
}

/// Sets `c` to `coefficient silu(x gate^T) (x up^T)`, and `projections` to the two products.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit, or [`Dims::fit`] says no.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs and sizes of one op")]
pub fn up(
    gpu: &Gpu,
    c: ViewMut<'_, bf16>,
    projections: Option<[ViewMut<'_, bf16>; 2]>,
    x: View<'_, bf16>,
    gate: View<'_, bf16>,
    up: View<'_, bf16>,
    coefficients: View<'_, f32>,
    lists: &Lists,
    dims: Dims,
) -> Result<()> {
    dims.check("up", lists, &[c.len()], &[x.len()], &[gate.len(), up.len()]);
    let fit = projections.iter().flatten().all(|a| a.len() == c.len());
    assert!(
        fit && coefficients.len() == dims.tokens * dims.num_experts,
        "cuda experts::up: {} coefficients for {dims:?}",
        coefficients.len()
    );
    let [a, b] = projections.as_ref().map_or([Arg::Ptr(0); 2], |both| both.each_ref().map(Arg::from));
    let args = [Arg::from(&c), a, b, x.into(), gate.into(), up.into(), coefficients.into()];
    start(gpu, "up", &args, lists, dims)
}

/// Sets `out`, values of pairs, to `x weight^T`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit, or [`Dims::fit`] says no.
pub fn project(
    gpu: &Gpu,
    out: ViewMut<'_, bf16>,
    x: View<'_, bf16>,
    weight: View<'_, bf16>,
    lists: &Lists,
    dims: Dims,
) -> Result<()> {
    dims.check("project", lists, &[out.len()], &[x.len()], &[weight.len()]);
    start(gpu, "project", &[Arg::from(&out), x.into(), weight.into()], lists, dims)
}

/// Sets `y` `[T, hidden]` to the sum over a token's experts of `c weight`, each rounded to bf16. `parts` is what is worked
/// in, of [`Dims::scratch`] values.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit, or [`Dims::fit`] says no.
pub fn down(
    gpu: &Gpu,
    y: ViewMut<'_, f32>,
    parts: ViewMut<'_, bf16>,
    c: View<'_, bf16>,
    weight: View<'_, bf16>,
    lists: &Lists,
    dims: Dims,
) -> Result<()> {
    dims.check("down", lists, &[c.len()], &[y.len()], &[weight.len()]);
    dims.check_parts(&parts);
    start(gpu, "down", &[Arg::from(&parts), c.into(), weight.into()], lists, dims)?;
    combine(gpu, y, parts, lists, dims)
}

/// Sets `dx` `[T, hidden]` to the sum over a token's experts of `da gate + db up`, each rounded to bf16; `parts` as for
/// [`down`].
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit, or [`Dims::fit`] says no.
pub fn backward_input(
    gpu: &Gpu,
    dx: ViewMut<'_, f32>,
    parts: ViewMut<'_, bf16>,
    [da, db]: [View<'_, bf16>; 2],
    [gate, up]: [View<'_, bf16>; 2],
    lists: &Lists,
    dims: Dims,
) -> Result<()> {
    dims.check("backward_input", lists, &[da.len(), db.len()], &[dx.len()], &[gate.len(), up.len()]);
    dims.check_parts(&parts);
    let args = [Arg::from(&parts), da.into(), db.into(), gate.into(), up.into()];
    start(gpu, "input", &args, lists, dims)?;
    combine(gpu, dx, parts, lists, dims)
}

fn combine(
    gpu: &Gpu,
    y: ViewMut<'_, f32>,
    parts: ViewMut<'_, bf16>,
    lists: &Lists,
    dims: Dims,
) -> Result<()> {
    let kernel = gpu.kernel(&SOURCE, "combine", &[("STAGES", 2), ("PLAIN", 1)])?;
    let args = [
        Arg::from(&y),
        Arg::from(&parts),
        lists.token_offsets.view().into(),
        lists.slots.view().into(),
        int("experts", dims.hidden)?.into(),
    ];
    let block = (dims.hidden / 8).next_multiple_of(32).clamp(32, 256) as u32;
    // SAFETY: a block per token; the lengths were checked by the callers and above, and slots are places of active pairs,
    // of which there are no more than `parts` has room for.
    unsafe { kernel.launch([int("experts", dims.tokens)? as u32, 1, 1], block, 0, &args) }
}

/// Adds to the gradients of the three projections, all `[intermediate, hidden]`: `da^T x`, `db^T x` and `c^T dy`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit, or [`Dims::fit`] says no.
pub fn backward_weights(
    gpu: &Gpu,
    [dgate, dup, ddown]: [ViewMut<'_, f32>; 3],
    [da, db, c]: [View<'_, bf16>; 3],
    x: View<'_, bf16>,
    dy: View<'_, bf16>,
    lists: &Lists,
    dims: Dims,
) -> Result<()> {
    let weights = [dgate.len(), dup.len(), ddown.len()];
    dims.check("backward_weights", lists, &[da.len(), db.len(), c.len()], &[x.len(), dy.len()], &weights);
    let args = [
        Arg::from(&dgate),
        Arg::from(&dup),
        Arg::from(&ddown),
        da.into(),
        db.into(),
        c.into(),
        x.into(),
        dy.into(),
    ];
    start(gpu, "weights", &args, lists, dims)
}
