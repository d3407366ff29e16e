//! Products of the active pairs (token, expert) of an FFN. Pairs that are not routed cost nothing, and nothing waits for the
//! routing. See [`crate::expert_ffn`] for the same on the CPU.
//!
//! Values of pairs lie where those of all pairs would, `[T, intermediate]`. Those of inactive pairs are neither read nor
//! written.

use half::bf16;

use super::ffn::{self, Dims};
use super::router::Lists;
use super::{Arg, Define, Gpu, Grid, Matrix, Result, Source};
use crate::cuda::kernel::Call;
use crate::swiglu::Activation;

pub(super) static SOURCE: Source = Source { name: "experts", text: include_str!("experts.cu") };

/// Bytes of shared memory that a step of a tile takes.
const STAGE_BYTES: u32 = (128 + 256) * 64 * 2;
/// Bytes of shared memory beside the steps: results on their way out, and room to align the start.
const OTHER_BYTES: u32 = 8 * 16 * 272 + 1024;

impl Dims {
    /// Tells whether these kernels take an FFN of such sizes: rows of an expert's weights and activations are whole groups of
    /// 8 values, and a block may have at least 131 KiB of shared memory.
    pub fn fit_lists(&self, gpu: &Gpu) -> bool {
        let Dims { hidden, intermediate, num_experts, .. } = *self;
        hidden.is_multiple_of(8) && intermediate.is_multiple_of(8 * num_experts.max(1)) && stages(gpu) >= 2
    }

    /// Returns the number of values of [`Down::parts`] and [`BackwardInput::parts`].
    pub fn parts(&self) -> usize {
        self.tokens * self.num_experts * self.hidden
    }
}

/// Checks the sizes of an op: `lens` are those of values of pairs `[T, intermediate]`, of rows `[T, hidden]` and of weights
/// `[intermediate, hidden]`.
fn check(
    op: &str,
    [tokens, hidden]: [usize; 2],
    intermediate: usize,
    lists: &Lists,
    lens: [&[usize]; 3],
) -> Dims {
    let num_experts = lists.num_experts();
    let dims = Dims { tokens, hidden, intermediate, num_experts };
    let whole = num_experts > 0 && hidden.is_multiple_of(8) && intermediate.is_multiple_of(8 * num_experts);
    let want = [tokens * intermediate, tokens * hidden, intermediate * hidden];
    let fit = whole && lens.iter().zip(want).all(|(lens, want)| lens.iter().all(|&len| len == want));
    assert!(fit, "cuda experts::{op}: {lens:?} values of pairs, rows and weights for {dims:?}");
    let (pairs, room) = (tokens * num_experts, lists.tokens.len().min(lists.slots.len()));
    assert!(lists.token_offsets.len() > tokens && room >= pairs, "cuda experts::{op}: lists for {dims:?}");
    dims
}

/// Returns the number of steps of a tile that shared memory has room for.
fn stages(gpu: &Gpu) -> u32 {
    (gpu.shared_memory().saturating_sub(OTHER_BYTES) / STAGE_BYTES).min(4)
}

#[cfg(test)]
thread_local! {
    /// Makes this thread use the instructions of older devices on any device.
    pub(crate) static PLAIN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Queues a kernel with `args`, which the arguments common to all kernels but `combine` follow.
fn start(gpu: &Gpu, entry: &'static str, args: &[Arg], lists: &Lists, dims: &Dims) -> Result<()> {
    start_with(gpu, entry, args, (lists, dims), Activation::Silu)
}

/// Does the same for a kernel with an activation.
fn start_with(
    gpu: &Gpu,
    entry: &'static str,
    args: &[Arg],
    (lists, dims): (&Lists, &Dims),
    activation: Activation,
) -> Result<()> {
    let stages = stages(gpu);
    // Tensor cores of Hopper read a step while the one before is still in use.
    let plain = stages < 3;
    #[cfg(test)]
    let plain = plain || PLAIN.get();
    let of_lists = [lists.offsets.arg(), lists.tokens.arg()];
    let call = call(entry, args, of_lists, dims, &defines(stages, plain, activation), gpu.multiprocessors());
    // SAFETY: the arguments are those of the kernel in experts.cu. The callers checked the sizes, and that rows are groups of
    // 8 values, so that all of them start at 16 bytes, as buffers do; lists name tokens and pairs of these sizes.
    unsafe { call.queue(gpu) }
}

/// Makes the call of a kernel with `args`, which the arguments common to all kernels but `combine` follow.
pub(super) fn call(
    entry: &'static str,
    args: &[Arg],
    lists: [Arg; 2],
    dims: &Dims,
    defines: &[Define; 3],
    blocks: u32,
) -> Call {
    let Dims { hidden, intermediate, num_experts: n, .. } = *dims;
    let ends = [n, intermediate / n, hidden].map(Arg::Size);
    let [(_, stages), ..] = *defines;
    let shared = stages as u32 * STAGE_BYTES + OTHER_BYTES;
    let grid = Grid { shared, ..Grid::row(blocks as usize, 256) };
    Call { source: &SOURCE, entry, defines: defines.to_vec(), grid, args: [args, &lists, &ends].concat() }
}

pub(super) fn defines(stages: u32, plain: bool, activation: Activation) -> [Define; 3] {
    [("STAGES", i64::from(stages)), ("PLAIN", i64::from(plain)), ffn::define(activation)]
}

/// Sets `y` to the sums of the parts of every token.
fn combine(y: &mut Matrix<f32>, parts: &Matrix<bf16>, lists: &Lists, dims: &Dims) -> Result<()> {
    let args = [y.arg(), parts.arg(), lists.token_offsets.arg(), lists.slots.arg(), dims.hidden.into()];
    let threads = (dims.hidden / 8).next_multiple_of(32).clamp(32, 256) as u32;
    // SAFETY: a block per token. The callers checked the sizes; slots are places of active pairs, of which there are no more
    // than `parts` has room for.
    unsafe {
        SOURCE.launch(
            y.gpu(),
            "combine",
            &defines(2, true, Activation::Silu),
            Grid::row(dims.tokens, threads),
            &args,
        )
    }
}

fn check_parts(dims: &Dims, parts: &Matrix<bf16>) {
    assert!(parts.len() >= dims.parts(), "cuda experts: {} values to work in for {dims:?}", parts.len());
}

/// Sets `c` to `coefficient act(x gate^T) (x up^T)`, and `projections` to the two products.
#[derive(Debug)]
pub struct Up<'a> {
    /// `[T, intermediate]`
    pub c: &'a mut Matrix<bf16>,
    /// `[T, intermediate]` each.
    pub projections: Option<[&'a mut Matrix<bf16>; 2]>,
    /// `[T, hidden]`
    pub x: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub gate: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub up: &'a Matrix<bf16>,
    /// `[T, n]`
    pub coefficients: &'a Matrix<f32>,
    /// The active pairs.
    pub lists: &'a Lists,
    /// The activation of the gate projection.
    pub activation: Activation,
}

impl Up<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or [`Dims::fit_lists`] is false.
    pub fn run(self) -> Result<()> {
        let Up { c, projections, x, gate, up, coefficients, lists, activation } = self;
        let lens = [&[c.len()][..], &[x.len()], &[gate.len(), up.len()]];
        let dims = check("up", [x.rows(), x.cols()], c.cols(), lists, lens);
        let len = coefficients.len();
        let fit =
            len == dims.tokens * dims.num_experts && projections.iter().flatten().all(|a| a.len() == c.len());
        assert!(fit, "cuda experts::up: {len} coefficients for {dims:?}");
        let [a, b] = projections.map_or([Arg::NULL; 2], |both| both.map(|projection| projection.arg()));
        let args = [c.arg(), a, b, x.arg(), gate.arg(), up.arg(), coefficients.arg()];
        start_with(x.gpu(), "up", &args, (lists, &dims), activation)
    }
}

/// Sets `out` to `x weight^T`.
#[derive(Debug)]
pub struct Project<'a> {
    /// `[T, intermediate]`
    pub out: &'a mut Matrix<bf16>,
    /// `[T, hidden]`
    pub x: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub weight: &'a Matrix<bf16>,
    /// The active pairs.
    pub lists: &'a Lists,
}

impl Project<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or [`Dims::fit_lists`] is false.
    pub fn run(self) -> Result<()> {
        let Project { out, x, weight, lists } = self;
        let lens = [&[out.len()][..], &[x.len()], &[weight.len()]];
        let dims = check("project", [x.rows(), x.cols()], out.cols(), lists, lens);
        start(x.gpu(), "project", &[out.arg(), x.arg(), weight.arg()], lists, &dims)
    }
}

/// Sets `y` to the sum over a token's experts of `c weight`, each rounded to bf16.
#[derive(Debug)]
pub struct Down<'a> {
    /// `[T, hidden]`
    pub y: &'a mut Matrix<f32>,
    /// Scratch memory of [`Dims::parts`] values.
    pub parts: &'a mut Matrix<bf16>,
    /// `[T, intermediate]`
    pub c: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub weight: &'a Matrix<bf16>,
    /// The active pairs.
    pub lists: &'a Lists,
}

impl Down<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or [`Dims::fit_lists`] is false.
    pub fn run(self) -> Result<()> {
        let Down { y, parts, c, weight, lists } = self;
        let lens = [&[c.len()][..], &[y.len()], &[weight.len()]];
        let dims = check("down", [y.rows(), y.cols()], c.cols(), lists, lens);
        check_parts(&dims, parts);
        start(c.gpu(), "down", &[parts.arg(), c.arg(), weight.arg()], lists, &dims)?;
        combine(y, parts, lists, &dims)
    }
}

/// Sets `dx` to the sum over a token's experts of `da gate + db up`, each rounded to bf16.
#[derive(Debug)]
pub struct BackwardInput<'a> {
    /// `[T, hidden]`
    pub dx: &'a mut Matrix<f32>,
    /// Scratch memory of [`Dims::parts`] values.
    pub parts: &'a mut Matrix<bf16>,
    /// `[T, intermediate]`
    pub da: &'a Matrix<bf16>,
    /// `[T, intermediate]`
    pub db: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub gate: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub up: &'a Matrix<bf16>,
    /// The active pairs.
    pub lists: &'a Lists,
}

impl BackwardInput<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or [`Dims::fit_lists`] is false.
    pub fn run(self) -> Result<()> {
        let BackwardInput { dx, parts, da, db, gate, up, lists } = self;
        let lens = [&[da.len(), db.len()][..], &[dx.len()], &[gate.len(), up.len()]];
        let dims = check("backward_input", [dx.rows(), dx.cols()], da.cols(), lists, lens);
        check_parts(&dims, parts);
        let args = [parts.arg(), da.arg(), db.arg(), gate.arg(), up.arg()];
        start(da.gpu(), "input", &args, lists, &dims)?;
        combine(dx, parts, lists, &dims)
    }
}

/// Adds to the gradients of the three projections: `da^T x`, `db^T x` and `c^T dy`.
#[derive(Debug)]
pub struct BackwardWeights<'a> {
    /// `[intermediate, hidden]`
    pub dgate: &'a mut Matrix<f32>,
    /// `[intermediate, hidden]`
    pub dup: &'a mut Matrix<f32>,
    /// `[intermediate, hidden]`
    pub ddown: &'a mut Matrix<f32>,
    /// `[T, intermediate]`
    pub da: &'a Matrix<bf16>,
    /// `[T, intermediate]`
    pub db: &'a Matrix<bf16>,
    /// `[T, intermediate]`
    pub c: &'a Matrix<bf16>,
    /// `[T, hidden]`
    pub x: &'a Matrix<bf16>,
    /// `[T, hidden]`
    pub dy: &'a Matrix<bf16>,
    /// The active pairs.
    pub lists: &'a Lists,
}

impl BackwardWeights<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or [`Dims::fit_lists`] is false.
    pub fn run(self) -> Result<()> {
        let BackwardWeights { dgate, dup, ddown, da, db, c, x, dy, lists } = self;
        let weights = [dgate.len(), dup.len(), ddown.len()];
        let lens = [&[da.len(), db.len(), c.len()][..], &[x.len(), dy.len()], &weights];
        let dims = check("backward_weights", [x.rows(), x.cols()], c.cols(), lists, lens);
        let outs = [dgate.arg(), dup.arg(), ddown.arg()];
        let args = [&outs[..], &[da.arg(), db.arg(), c.arg(), x.arg(), dy.arg()]].concat();
        start(x.gpu(), "weights", &args, lists, &dims)
    }
}
