//! Routers: logits, gates, routing lists and statistics, and the straight-through rule backwards. All in f32, as on the
//! processor: a router that is rounded would move tokens between experts.

#[cfg(test)]
use super::KernelSpec;
use super::rms_norm::sum_partials;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};
use crate::cuda::GpuBuf;

static SOURCE: Source = Source { name: "router", text: include_str!("router.cu") };

/// Tokens that one warp counts for one expert; whole warps.
const CHUNK: usize = 64;
const DEFINES: &[(&str, i64)] = &[("CHUNK", CHUNK as i64)];
/// Parts that gradients of the weights are summed in.
const PARTS: usize = 64;

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &[
        "logits",
        "route",
        "count",
        "scan",
        "scan_tokens",
        "fill",
        "stats",
        "backward",
        "backward_weights",
        "backward_input",
    ],
    defines: &[DEFINES],
    max_registers: 64,
}];

/// The input of a router: a row of the residual stream with its norm, so that no rounding stands between.
#[derive(Clone, Copy, Debug)]
pub struct Normed<'a> {
    /// `[T, hidden]`
    pub x: View<'a, f32>,
    /// `[T]`
    pub rstd: View<'a, f32>,
    /// `[hidden]`
    pub weight: View<'a, f32>,
}

/// Settings of gates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gates {
    /// Experts (n).
    pub num_experts: usize,
    /// A gate is active when its logit is strictly above.
    pub threshold_logit: f64,
    /// The value of an active gate is 1, not its sigmoid.
    pub binary: bool,
    /// Values are multiplied by n over the number of active experts.
    pub rescale: bool,
    /// A token without an active expert takes the one with the largest logit.
    pub force_argmax: bool,
    /// Gradients of inactive gates are as if they were active.
    pub ste: bool,
}

/// The sparsity loss in a gradient.
#[derive(Clone, Copy, Debug)]
pub struct Sparsity<'a> {
    /// What every gate that counts adds: one value, on the device, as it changes from step to step.
    pub weight: View<'a, f32>,
    /// Whether all gates count, or active ones only.
    pub all: bool,
}

/// Gates of a batch of tokens.
#[derive(Debug)]
pub struct Routed {
    /// Sigmoids of the logits, `[T, n]`.
    pub gates: GpuBuf<f32>,
    /// What experts' outputs are multiplied by, 0 for inactive ones, `[T, n]`.
    pub coefficients: GpuBuf<f32>,
    /// 1 for active pairs, `[T, n]`.
    pub mask: GpuBuf<u8>,
    /// Active experts of every token, `[T]`.
    pub active: GpuBuf<u32>,
    tokens: usize,
    num_experts: usize,
}

impl Routed {
    /// Room for `tokens` tokens.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    pub fn with_room(gpu: &Gpu, tokens: usize, num_experts: usize) -> Result<Routed> {
        let pairs = tokens * num_experts;
        Ok(Routed {
            gates: gpu.zeros(pairs)?,
            coefficients: gpu.zeros(pairs)?,
            mask: gpu.zeros(pairs)?,
            active: gpu.zeros(tokens)?,
            tokens,
            num_experts,
        })
    }

    /// Sets the routing to one that the host decided: `mask` of 0 and 1, and `coefficients`, `[T, n]` each. All gates are 0.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ or are no multiple of the experts, or there is no room for as many tokens.
    pub fn set(&mut self, mask: &[u8], coefficients: &[f32]) -> Result<()> {
        let n = self.num_experts;
        let tokens = mask.len() / n.max(1);
        assert!(
            mask.len() == tokens * n && coefficients.len() == mask.len() && tokens <= self.room(),
            "cuda router::Routed::set: mask {}, coefficients {} of {n} experts, room for {}",
            mask.len(),
            coefficients.len(),
            self.room()
        );
        self.tokens = tokens;
        let active = mask.chunks_exact(n.max(1)).map(|row| row.iter().map(|&on| u32::from(on != 0)).sum());
        self.gates.slice_mut(0..mask.len()).fill_zero()?;
        self.mask.slice_mut(0..mask.len()).upload_from(mask)?;
        self.coefficients.slice_mut(0..mask.len()).upload_from(coefficients)?;
        self.active.slice_mut(0..tokens).upload_from(&active.collect::<Vec<u32>>())
    }

    /// Tokens there is room for.
    pub fn room(&self) -> usize {
        self.active.len()
    }

    /// The tokens that were routed.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Coefficients of the tokens that were routed.
    pub fn coefficients(&self) -> View<'_, f32> {
        self.coefficients.slice(0..self.tokens * self.num_experts)
    }
}

/// Active pairs, by expert and by token; see [`crate::expert_ffn::Routes`].
#[derive(Debug)]
pub struct Lists {
    /// `[n + 1]`
    pub offsets: GpuBuf<u32>,
    /// Tokens by expert; as many as the last offset.
    pub tokens: GpuBuf<u32>,
    /// `[T + 1]`
    pub token_offsets: GpuBuf<u32>,
    /// Places in `tokens` by token.
    pub slots: GpuBuf<u32>,
    chunks: GpuBuf<u32>,
}

impl Lists {
    /// Room for any routing of `tokens` tokens.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    pub fn with_room(gpu: &Gpu, tokens: usize, num_experts: usize) -> Result<Lists> {
        let pairs = tokens * num_experts;
        Ok(Lists {
            offsets: gpu.zeros(num_experts + 1)?,
            tokens: gpu.zeros(pairs)?,
            token_offsets: gpu.zeros(tokens + 1)?,
            slots: gpu.zeros(pairs)?,
            chunks: gpu.zeros(tokens.div_ceil(CHUNK) * num_experts)?,
        })
    }
}

fn start(gpu: &Gpu, entry: &'static str, grid: [usize; 2], block: u32, args: &[Arg]) -> Result<()> {
    let kernel = gpu.kernel(&SOURCE, entry, DEFINES)?;
    let grid = [int("router", grid[0])? as u32, int("router", grid[1])? as u32, 1];
    // SAFETY: the callers checked that the buffers have the values that the kernel's sizes say.
    unsafe { kernel.launch(grid, block, 0, args) }
}

fn sizes<const N: usize>(sizes: [usize; N]) -> Result<[Arg; N]> {
    let mut args = [Arg::I32(0); N];
    for (arg, size) in args.iter_mut().zip(sizes) {
        *arg = int("router", size)?.into();
    }
    Ok(args)
}

/// Sets `z` `[T, n]` to the logits of a router `[n, hidden]`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn logits(
    gpu: &Gpu,
    z: ViewMut<'_, f32>,
    normed: Normed<'_>,
    router: View<'_, f32>,
    bias: Option<View<'_, f32>>,
    hidden: usize,
) -> Result<()> {
    let (tokens, n) = (normed.rstd.len(), router.len() / hidden);
    assert!(
        z.len() == tokens * n
            && router.len() == n * hidden
            && normed.x.len() == tokens * hidden
            && normed.weight.len() == hidden
            && bias.is_none_or(|bias| bias.len() == n),
        "cuda router::logits: {} logits for {tokens} tokens, {} router values of {hidden}",
        z.len(),
        router.len()
    );
    let [n, d] = sizes([n, hidden])?;
    let Normed { x, rstd, weight } = normed;
    let args = [Arg::from(&z), x.into(), rstd.into(), weight.into(), router.into(), bias.into(), n, d];
    start(gpu, "logits", [tokens, 1], 256, &args)
}

/// Sets gates, mask and coefficients from the logits `z` `[T, n]`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// There is no room for as many tokens.
pub fn route(gpu: &Gpu, routed: &mut Routed, z: View<'_, f32>, gates: &Gates) -> Result<()> {
    let n = gates.num_experts;
    let tokens = z.len() / n.max(1);
    assert!(
        n == routed.num_experts && z.len() == tokens * n && tokens <= routed.room(),
        "cuda router::route: {} logits of {n} experts, room for {}",
        z.len(),
        routed.room()
    );
    routed.tokens = tokens;
    let [t, n] = sizes([tokens, n])?;
    let args = [
        Arg::from(&routed.gates.view_mut()),
        Arg::from(&routed.coefficients.view_mut()),
        Arg::from(&routed.mask.view_mut()),
        Arg::from(&routed.active.view_mut()),
        z.into(),
        t,
        n,
        gates.threshold_logit.into(),
        i32::from(gates.binary).into(),
        i32::from(gates.rescale).into(),
        i32::from(gates.force_argmax).into(),
    ];
    start(gpu, "route", [tokens.div_ceil(4), 1], 128, &args)
}

/// Sets the lists of the pairs that are active: a counting sort that keeps the tokens' order.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// There is no room for as many tokens.
pub fn lists(gpu: &Gpu, lists: &mut Lists, routed: &Routed) -> Result<()> {
    let (tokens, n) = (routed.tokens, routed.num_experts);
    let parts = tokens.div_ceil(CHUNK);
    assert!(
        lists.offsets.len() == n + 1 && lists.token_offsets.len() > tokens && lists.chunks.len() >= parts * n,
        "cuda router::lists: no room for {tokens} tokens and {n} experts"
    );
    let [t, e] = sizes([tokens, n])?;
    let Lists { offsets, tokens: list, token_offsets, slots, chunks } = lists;
    let (mask, active) = (Arg::from(routed.mask.view()), Arg::from(routed.active.view()));
    let offsets = Arg::from(&offsets.view_mut());
    let chunks = Arg::from(&chunks.view_mut());
    let token_offsets = Arg::from(&token_offsets.view_mut());
    let pieces = (parts * n).div_ceil(8);
    start(gpu, "count", [pieces, 1], 256, &[offsets, chunks, mask, t, e])?;
    start(gpu, "scan", [1, 1], 1024, &[offsets, chunks, t, e])?;
    start(gpu, "scan_tokens", [1, 1], 1024, &[token_offsets, active, t])?;
    let list = Arg::from(&list.view_mut());
    let slots = Arg::from(&slots.view_mut());
    start(gpu, "fill", [pieces, 1], 256, &[list, slots, chunks, token_offsets, mask, t, e])
}

/// Adds the tokens of every expert and of every number of active experts to `counts` `[2 n + 1]`, the sums of the gates of
/// active and of all experts to `sums` `[2]`, and the active experts of every token to `of_tokens` `[T]`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn stats(
    gpu: &Gpu,
    counts: ViewMut<'_, u64>,
    sums: ViewMut<'_, f64>,
    of_tokens: Option<ViewMut<'_, u32>>,
    routed: &Routed,
) -> Result<()> {
    let (tokens, n) = (routed.tokens, routed.num_experts);
    let fit = of_tokens.as_ref().is_none_or(|all| all.len() >= tokens);
    assert!(
        fit && counts.len() == 2 * n + 1 && sums.len() == 2,
        "cuda router::stats: {} counts",
        counts.len()
    );
    let [t, e] = sizes([tokens, n])?;
    let args = [
        Arg::from(&counts),
        Arg::from(&sums),
        of_tokens.as_ref().map_or(Arg::Ptr(0), Arg::from),
        routed.gates.view().into(),
        routed.mask.view().into(),
        routed.active.view().into(),
        t,
        e,
    ];
    let block = (tokens * n).next_multiple_of(32).clamp(32, 1024) as u32;
    start(gpu, "stats", [1, 1], block, &args)
}

/// Sets `dz` `[T, n]` to the gradient of the logits.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn backward(
    gpu: &Gpu,
    dz: ViewMut<'_, f32>,
    dcoefficients: View<'_, f32>,
    routed: &Routed,
    sparsity: Sparsity<'_>,
    gates: &Gates,
) -> Result<()> {
    let (tokens, n) = (routed.tokens, routed.num_experts);
    assert!(
        dz.len() == tokens * n
            && dcoefficients.len() == dz.len()
            && gates.num_experts == n
            && sparsity.weight.len() == 1,
        "cuda router::backward: {} gradients of {tokens} tokens, {n} experts",
        dz.len()
    );
    let [t, e] = sizes([tokens, n])?;
    let args = [
        Arg::from(&dz),
        dcoefficients.into(),
        routed.gates.view().into(),
        routed.mask.view().into(),
        routed.active.view().into(),
        t,
        e,
        sparsity.weight.into(),
        i32::from(sparsity.all).into(),
        i32::from(gates.binary).into(),
        i32::from(gates.rescale).into(),
        i32::from(gates.ste).into(),
    ];
    start(gpu, "backward", [tokens.div_ceil(128), 1], 128, &args)
}

/// Values of scratch that [`backward_weights`] needs.
pub fn partials_len(hidden: usize, num_experts: usize) -> usize {
    PARTS * num_experts * (hidden + 1)
}

/// Adds to the gradients of a router's weight and bias.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn backward_weights(
    gpu: &Gpu,
    drouter: ViewMut<'_, f32>,
    dbias: Option<ViewMut<'_, f32>>,
    dz: View<'_, f32>,
    normed: Normed<'_>,
    hidden: usize,
    mut partials: ViewMut<'_, f32>,
) -> Result<()> {
    let tokens = normed.rstd.len();
    let n = drouter.len() / hidden;
    assert!(
        drouter.len() == n * hidden
            && dz.len() == tokens * n
            && normed.x.len() == tokens * hidden
            && normed.weight.len() == hidden
            && partials.len() >= partials_len(hidden, n),
        "cuda router::backward_weights: {} values, {} gradients of {tokens} tokens",
        drouter.len(),
        dz.len()
    );
    let [of_weights, of_bias] =
        partials.parts([0..PARTS * n * hidden, PARTS * n * hidden..PARTS * n * (hidden + 1)]);
    let [t, e, d] = sizes([tokens, n, hidden])?;
    let Normed { x, rstd, weight } = normed;
    let args = [
        Arg::from(&of_weights),
        Arg::from(&of_bias),
        dz.into(),
        x.into(),
        rstd.into(),
        weight.into(),
        t,
        e,
        d,
    ];
    start(gpu, "backward_weights", [hidden.div_ceil(128), PARTS], 128, &args)?;
    sum_partials(gpu, drouter, of_weights.as_view(), PARTS, n * hidden)?;
    match dbias {
        Some(dbias) => sum_partials(gpu, dbias, of_bias.as_view(), PARTS, n),
        None => Ok(()),
    }
}

/// Adds `dz W` to `dh` `[T, hidden]`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn backward_input_add(
    gpu: &Gpu,
    dh: ViewMut<'_, f32>,
    dz: View<'_, f32>,
    router: View<'_, f32>,
    hidden: usize,
) -> Result<()> {
    let n = router.len() / hidden;
    let tokens = dh.len() / hidden;
    assert!(
        router.len() == n * hidden && dh.len() == tokens * hidden && dz.len() == tokens * n,
        "cuda router::backward_input_add: {} values, {} gradients",
        dh.len(),
        dz.len()
    );
    let [t, e, d] = sizes([tokens, n, hidden])?;
    let args = [Arg::from(&dh), dz.into(), router.into(), t, e, d];
    start(gpu, "backward_input", [hidden.div_ceil(128), tokens.min(65535)], 128, &args)
}
