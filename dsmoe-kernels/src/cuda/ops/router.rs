//! Routers: logits, gates, routing lists and statistics, and the backward pass with the straight-through rule. All are f32,
//! as on the CPU: rounding a router would move tokens between experts.

use super::rms_norm::{offset_args, sum_partials};
use super::{Arg, Define, Gpu, Grid, Matrix, Result, Source, optional, slots};
use crate::cuda::kernel::Call;
use crate::cuda::{GpuBuf, View};

pub(super) static SOURCE: Source = Source { name: "router", text: include_str!("router.cu") };

/// Tokens that one warp counts for one expert; whole warps.
const CHUNK: usize = 64;

/// Tokens of a block that reads a router's weights once for all of them.
const TILE: usize = 8;

/// Tokens from which on blocks take several at a time: fewer of them would leave most of the device idle.
const MANY: usize = 512;

pub(super) fn defines(offset: bool) -> [Define; 4] {
    let tokens = slots::TOKENS as i64;
    let sizes = [("CHUNK", CHUNK as i64), ("TILE_TOKENS", TILE as i64), ("GROUP_TOKENS", tokens)];
    let [chunk, tile, group] = sizes;
    [chunk, tile, group, ("OFFSET", i64::from(offset))]
}

/// Makes a call of a kernel, with the offset of the norm's weight where it takes one.
pub(super) fn start_call(entry: &'static str, grid: Grid, mut args: Vec<Arg>, offset: Option<f32>) -> Call {
    args.extend(offset.map(offset_args).into_iter().flatten());
    let defines = defines(offset.is_some_and(|offset| offset != 0.0)).to_vec();
    Call { source: &SOURCE, entry, defines, grid, args }
}

/// Parts that a weight's gradient is summed in.
const PARTS: usize = 64;

/// The input of a router: rows of the residual stream with their norm, so that the router sees no rounded values.
#[derive(Clone, Copy, Debug)]
pub struct Normed<'a> {
    /// `[T, hidden]`
    pub x: &'a Matrix<f32>,
    /// `[T]`
    pub rstd: &'a Matrix<f32>,
    /// `[hidden]`
    pub weight: &'a Matrix<f32>,
    /// Added to the weight.
    pub offset: f32,
}

/// Settings of gates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gates {
    /// Experts that have a gate (n).
    pub num_experts: usize,
    /// The value of an active gate is 1, not its sigmoid.
    pub binary: bool,
    /// Values are multiplied by n over the number of active experts.
    pub rescale: bool,
    /// A token without an active expert takes the one with the largest logit.
    pub force_argmax: bool,
    /// Inactive gates get the gradients of active ones.
    pub ste: bool,
}

/// The gradient of the sparsity loss.
#[derive(Clone, Copy, Debug)]
pub struct Sparsity<'a> {
    /// The amount that every gate that counts adds: one value. It is on the device, as it changes from step to step.
    pub weight: &'a Matrix<f32>,
    /// Multiplies the amount.
    pub factor: f32,
    /// The gates that count.
    pub over: Over,
}

/// The gates that a sparsity loss counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Active ones.
    Active,
    /// All.
    All,
    /// All, with a further amount of its own at which, but for the first amount, the gradients of logits sum to 0.
    Held,
}

/// The routing of a batch of tokens. Its memory serves any number of experts up to the one it was made for.
#[derive(Debug)]
pub struct Routed {
    /// Sigmoids of the logits, `[T, n]`.
    pub gates: GpuBuf<f32>,
    /// Factors of the experts' outputs, 0 for inactive experts, `[T, n]`.
    pub coefficients: GpuBuf<f32>,
    /// 1 for active pairs, `[T, n]`.
    pub mask: GpuBuf<u8>,
    /// Active experts of every token, `[T]`.
    pub active: GpuBuf<u32>,
    tokens: usize,
    num_experts: usize,
}

impl Routed {
    /// Allocates room for `tokens` tokens.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    pub fn with_room(gpu: &Gpu, tokens: usize, num_experts: usize) -> Result<Routed> {
        Ok(Routed {
            gates: gpu.zero_rows(tokens, num_experts)?,
            coefficients: gpu.zero_rows(tokens, num_experts)?,
            mask: gpu.zero_rows(tokens, num_experts)?,
            active: gpu.zeros(tokens)?,
            tokens,
            num_experts,
        })
    }

    /// Sets the routing to a decision of the host among `num_experts` experts: `mask` of 0 and 1, and `coefficients`,
    /// `[T, n]` each. It sets the gates to 0.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ or are no multiple of the experts, or there is no room for as many tokens or pairs.
    pub fn set(&mut self, num_experts: usize, mask: &[u8], coefficients: &[f32]) -> Result<()> {
        let n = num_experts;
        let tokens = mask.len() / n.max(1);
        let (lens, room) = ([mask.len(), coefficients.len()], self.room());
        let fit = lens == [tokens * n; 2] && tokens <= room && tokens * n <= self.mask.len();
        assert!(
            fit,
            "cuda router::Routed::set: mask and coefficients {lens:?} of {n} experts, room for {room}"
        );
        (self.tokens, self.num_experts) = (tokens, n);
        let active = mask.chunks_exact(n.max(1)).map(|row| row.iter().map(|&on| u32::from(on != 0)).sum());
        self.gates.shaped_mut(tokens, n).fill_zero()?;
        self.mask.shaped_mut(tokens, n).upload_from(mask)?;
        self.coefficients.shaped_mut(tokens, n).upload_from(coefficients)?;
        self.active.part_mut(0..tokens).upload_from(&active.collect::<Vec<u32>>())
    }

    /// Returns the number of tokens that there is room for.
    pub fn room(&self) -> usize {
        self.active.len()
    }

    /// Returns the number of tokens that are routed.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Returns the number of experts that have a gate.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Makes room for the routing of a batch.
    ///
    /// # Panics
    /// There is no room for as many tokens or pairs.
    pub(super) fn resize(&mut self, tokens: usize, num_experts: usize) {
        let (room, pairs) = (self.room(), self.mask.len());
        let fit = tokens <= room && tokens * num_experts <= pairs;
        assert!(fit, "cuda router: {tokens} tokens, {num_experts} experts, room for {room}, {pairs} pairs");
        (self.tokens, self.num_experts) = (tokens, num_experts);
    }

    pub(super) fn places(&self) -> slots::Pairs {
        slots::Pairs {
            gates: self.gates.ptr(),
            coefficients: self.coefficients.ptr(),
            mask: self.mask.ptr(),
            active: self.active.ptr(),
        }
    }

    /// Returns the coefficients of the tokens that are routed, `[T, n]`.
    pub fn coefficients(&self) -> View<'_, f32> {
        self.coefficients.shaped(self.tokens, self.num_experts)
    }
}

/// Active pairs, by expert and by token; see [`crate::expert_ffn::Routes`]. Its memory serves any number of experts up to the
/// one it was made for.
#[derive(Debug)]
pub struct Lists {
    /// `[n + 1]`
    pub offsets: GpuBuf<u32>,
    /// Tokens by expert; the last offset is their number.
    pub tokens: GpuBuf<u32>,
    /// `[T + 1]`
    pub token_offsets: GpuBuf<u32>,
    /// Places in `tokens` by token.
    pub slots: GpuBuf<u32>,
    chunks: GpuBuf<u32>,
    num_experts: usize,
}

impl Lists {
    /// Allocates room for any routing of `tokens` tokens.
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
            num_experts,
        })
    }

    /// Returns the number of experts of the last routing.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }
}

fn start(gpu: &Gpu, entry: &'static str, grid: Grid, args: &[Arg]) -> Result<()> {
    // SAFETY: the callers checked that the buffers have the values that the kernel's sizes say.
    unsafe { SOURCE.launch(gpu, entry, &defines(false), grid, args) }
}

/// Queues a kernel that takes the offset of the norm's weight.
fn start_normed(gpu: &Gpu, entry: &'static str, grid: Grid, args: &[Arg], offset: f32) -> Result<()> {
    let args = [args, &offset_args(offset)].concat();
    // SAFETY: as above.
    unsafe { SOURCE.launch(gpu, entry, &defines(offset != 0.0), grid, &args) }
}

/// Sets `z` to the logits of a router.
#[derive(Debug)]
pub struct Logits<'a> {
    /// `[T, n]`
    pub z: &'a mut Matrix<f32>,
    /// The input.
    pub normed: Normed<'a>,
    /// `[n, hidden]`
    pub router: &'a Matrix<f32>,
    /// `[n]`
    pub bias: Option<&'a Matrix<f32>>,
}

impl Logits<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Logits { z, normed: Normed { x, rstd, weight, offset }, router, bias } = self;
        let (tokens, hidden) = (rstd.len(), weight.len());
        let n = router.len() / hidden;
        let lens = [z.len(), router.len(), x.len(), bias.map_or(n, Matrix::len)];
        assert_eq!(
            lens,
            [tokens * n, n * hidden, tokens * hidden, n],
            "cuda router::logits: z, router, x, bias"
        );
        let pointers = [z.arg(), x.arg(), rstd.arg(), weight.arg(), router.arg(), optional(bias)];
        let args = [&pointers[..], &[tokens, n, hidden].map(Arg::Size)].concat();
        let (entry, tile) = if tokens < MANY { ("logits", 1) } else { ("logits_of_many", TILE) };
        start_normed(x.gpu(), entry, Grid::row(tokens.div_ceil(tile), 256), &args, offset)
    }
}

/// Sets gates, mask and coefficients from the logits.
#[derive(Debug)]
pub struct Route<'a> {
    /// The routing.
    pub routed: &'a mut Routed,
    /// Logits, `[T, n]`.
    pub z: &'a Matrix<f32>,
    /// Two values: the threshold of the logit (at -inf all gates are open), and the logit at which a gate is a half.
    /// They are on the device, as they change from step to step.
    pub thresholds: &'a Matrix<f32>,
    /// The settings.
    pub gates: &'a Gates,
}

impl Route<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// There is no room for as many tokens or pairs, or there are not two thresholds.
    pub fn run(self) -> Result<()> {
        let Route { routed, z, thresholds, gates } = self;
        let n = gates.num_experts;
        let tokens = z.len() / n.max(1);
        let (len, room, pairs) = (z.len(), routed.room(), routed.mask.len());
        let fit = len == tokens * n && tokens <= room && len <= pairs && thresholds.len() == 2;
        assert!(
            fit,
            "cuda router::route: {len} logits of {n} experts, room for {room} tokens, {pairs} pairs"
        );
        (routed.tokens, routed.num_experts) = (tokens, n);
        let Routed { gates: sigmoids, coefficients, mask, active, .. } = routed;
        let pointers = [sigmoids.arg(), coefficients.arg(), mask.arg(), active.arg(), z.arg()];
        let flags = [gates.binary, gates.rescale, gates.force_argmax].map(Arg::from);
        let sizes = [tokens.into(), n.into(), thresholds.arg()];
        start(z.gpu(), "route", Grid::row(tokens.div_ceil(4), 128), &[&pointers[..], &sizes, &flags].concat())
    }
}

/// Sets the lists of active pairs, by a counting sort that keeps the tokens' order.
#[derive(Debug)]
pub struct Sort<'a> {
    /// The lists.
    pub lists: &'a mut Lists,
    /// The routing.
    pub routed: &'a Routed,
}

impl Sort<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// There is no room for as many tokens.
    pub fn run(self) -> Result<()> {
        let Sort { lists, routed } = self;
        let (tokens, n) = (routed.tokens, routed.num_experts);
        let parts = tokens.div_ceil(CHUNK);
        let pairs = lists.tokens.len().min(lists.slots.len());
        let fit = lists.offsets.len() > n && lists.token_offsets.len() > tokens && pairs >= tokens * n;
        assert!(
            fit && lists.chunks.len() >= parts * n,
            "cuda router::lists: no room for {tokens} tokens and {n} experts"
        );
        lists.num_experts = n;
        let gpu = routed.mask.gpu();
        let [t, e] = [tokens, n].map(Arg::Size);
        let (mask, active) = (routed.mask.arg(), routed.active.arg());
        let Lists { offsets, tokens: list, token_offsets, slots, chunks, .. } = lists;
        let (offsets, chunks, token_offsets) = (offsets.arg(), chunks.arg(), token_offsets.arg());
        let (pieces, one) = (Grid::row((parts * n).div_ceil(8), 256), Grid::row(1, 1024));
        start(gpu, "count", pieces, &[offsets, chunks, mask, t, e])?;
        start(gpu, "scan", one, &[offsets, chunks, t, e])?;
        start(gpu, "scan_tokens", one, &[token_offsets, active, t])?;
        start(gpu, "fill", pieces, &[list.arg(), slots.arg(), chunks, token_offsets, mask, t, e])
    }
}

/// Adds up the statistics of a routing.
#[derive(Debug)]
pub struct Stats<'a> {
    /// The tokens of every expert, and of every number of active experts: `[2 n + 1]`, added to.
    pub counts: &'a mut Matrix<u64>,
    /// The sums of the gates of active and of all experts: `[2]`, added to.
    pub sums: &'a mut Matrix<f64>,
    /// The active experts of every token: `[T]`, added to.
    pub of_tokens: Option<&'a mut Matrix<u32>>,
    /// The routing.
    pub routed: &'a Routed,
}

impl Stats<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Stats { counts, sums, of_tokens, routed } = self;
        let (tokens, n) = (routed.tokens, routed.num_experts);
        let lens = [counts.len(), sums.len(), of_tokens.as_ref().map_or(tokens, |all| all.len().min(tokens))];
        assert_eq!(lens, [2 * n + 1, 2, tokens], "cuda router::stats: counts, sums, of_tokens");
        let of_tokens = optional(of_tokens.as_deref());
        let Routed { gates, mask, active, .. } = routed;
        let pointers = [counts.arg(), sums.arg(), of_tokens, gates.arg(), mask.arg(), active.arg()];
        let threads = (tokens * n).next_multiple_of(32).clamp(32, 1024) as u32;
        let args = [&pointers[..], &[tokens.into(), n.into()]].concat();
        start(mask.gpu(), "stats", Grid::row(1, threads), &args)
    }
}

/// Adds to the counts of logits in bins of equal width around 0.
#[derive(Debug)]
pub struct CountLogits<'a> {
    /// The counts of all bins.
    pub bins: &'a mut Matrix<u64>,
    /// Logits.
    pub z: &'a Matrix<f32>,
    /// Bins per unit. Logits beyond the first and last bin are counted there, and what is not a number in the first.
    pub per_unit: f64,
}

impl CountLogits<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// There is no bin.
    pub fn run(self) -> Result<()> {
        let CountLogits { bins, z, per_unit } = self;
        let count = bins.len();
        assert!(count > 0, "cuda router::count_logits: no bins");
        let largest = Arg::F64(count as f64 / (2.0 * per_unit));
        let args = [bins.arg(), z.arg(), Arg::I64(z.len() as i64), count.into(), largest, Arg::F64(per_unit)];
        start(z.gpu(), "count_logits", Grid::row(z.len().div_ceil(256), 256), &args)
    }
}

/// Sets `dz` to the gradient of the logits.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[T, n]`
    pub dz: &'a mut Matrix<f32>,
    /// `[T, n]`
    pub dcoefficients: &'a Matrix<f32>,
    /// The routing.
    pub routed: &'a Routed,
    /// The sparsity loss.
    pub sparsity: Sparsity<'a>,
    /// Scratch memory for the amount of [`Over::Held`]: one value.
    pub held: &'a mut Matrix<f32>,
    /// The settings.
    pub gates: &'a Gates,
}

impl Backward<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Backward { dz, dcoefficients, routed, sparsity, held, gates } = self;
        let (tokens, n) = (routed.tokens, routed.num_experts);
        let lens = [dz.len(), dcoefficients.len(), gates.num_experts, sparsity.weight.len(), held.len()];
        let want = [tokens * n, tokens * n, n, 1, 1];
        assert_eq!(lens, want, "cuda router::backward: dz, dcoefficients, experts, sparsity, held");
        let Routed { gates: sigmoids, mask, active, .. } = routed;
        let pointers = [dz.arg(), dcoefficients.arg(), sigmoids.arg(), mask.arg(), active.arg()];
        let counted = [sparsity.over == Over::Active, sparsity.over == Over::All];
        let flags = [counted[0], counted[1], gates.binary, gates.rescale, gates.ste].map(Arg::from);
        let weight = [sparsity.weight.arg(), Arg::F32(sparsity.factor)];
        let args = [&pointers[..], &[tokens.into(), n.into()], &weight, &flags].concat();
        let gpu = mask.gpu();
        start(gpu, "backward", Grid::row(tokens.div_ceil(128), 128), &args)?;
        if sparsity.over != Over::Held {
            return Ok(());
        }
        let (dz, q, total) = (dz.arg(), sigmoids.arg(), Arg::I64((tokens * n) as i64));
        let args = [&[held.arg(), dz, q, total][..], &weight].concat();
        start(gpu, "held", Grid::row(1, 1024), &args)?;
        start(gpu, "hold", Grid::row((tokens * n).div_ceil(256), 256), &[dz, q, held.arg(), total])
    }
}

/// Returns the number of values of [`BackwardWeights::partials`].
pub fn partials_len(hidden: usize, num_experts: usize) -> usize {
    PARTS * num_experts * (hidden + 1)
}

/// Adds to the gradients of a router's weight and bias.
#[derive(Debug)]
pub struct BackwardWeights<'a> {
    /// `[n, hidden]`
    pub drouter: &'a mut Matrix<f32>,
    /// `[n]`
    pub dbias: Option<&'a mut Matrix<f32>>,
    /// `[T, n]`
    pub dz: &'a Matrix<f32>,
    /// The router's input.
    pub normed: Normed<'a>,
    /// Scratch memory of [`partials_len`] values.
    pub partials: &'a mut Matrix<f32>,
}

impl BackwardWeights<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let BackwardWeights { drouter, dbias, dz, normed: Normed { x, rstd, weight, offset }, partials } =
            self;
        let (tokens, hidden) = (rstd.len(), weight.len());
        let n = drouter.len() / hidden;
        let (dbias_len, room) = (dbias.as_ref().map_or(n, |dbias| dbias.len()), partials_len(hidden, n));
        let lens = [drouter.len(), dbias_len, dz.len(), x.len(), partials.len().min(room)];
        let want = [n * hidden, n, tokens * n, tokens * hidden, room];
        assert_eq!(lens, want, "cuda router::backward_weights: drouter, dbias, dz, x, partials");
        let weights = PARTS * n * hidden;
        let [of_weights, of_bias] = partials.parts([0..weights, weights..PARTS * n * (hidden + 1)]);
        let (outs, ins) = ([of_weights.arg(), of_bias.arg()], [dz.arg(), x.arg(), rstd.arg(), weight.arg()]);
        let args = [&outs[..], &ins, &[tokens, n, hidden].map(Arg::Size)].concat();
        let grid = Grid::plane(hidden.div_ceil(128), PARTS, 128);
        start_normed(x.gpu(), "backward_weights", grid, &args, offset)?;
        sum_partials(drouter, &of_weights, PARTS)?;
        dbias.map_or(Ok(()), |dbias| sum_partials(dbias, &of_bias, PARTS))
    }
}

/// Adds `dz W` to `dh`.
#[derive(Debug)]
pub struct BackwardInput<'a> {
    /// `[T, hidden]`
    pub dh: &'a mut Matrix<f32>,
    /// `[T, n]`
    pub dz: &'a Matrix<f32>,
    /// `[n, hidden]`
    pub router: &'a Matrix<f32>,
}

impl BackwardInput<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let BackwardInput { dh, dz, router } = self;
        let (tokens, hidden) = (dh.rows(), dh.cols());
        let n = router.len() / hidden;
        let lens = [router.len(), dz.len()];
        assert_eq!(lens, [n * hidden, tokens * n], "cuda router::backward_input: router, dz");
        let args = [dh.arg(), dz.arg(), router.arg(), tokens.into(), n.into(), hidden.into()];
        let grid = Grid::plane(hidden.div_ceil(128), tokens.div_ceil(TILE).min(65535), 128);
        start(dz.gpu(), "backward_input", grid, &args)
    }
}
