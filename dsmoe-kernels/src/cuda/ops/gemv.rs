//! Products and FFNs of a few tokens. Every weight is read once, and those of experts only where a token has them active.

use half::bf16;

use super::ffn::{self, Dims};
use super::{Arg, Define, Grid, Matrix, Result, Source, optional};
use crate::cuda::Float;
use crate::swiglu::Activation;

pub(super) static SOURCE: Source = Source { name: "gemv", text: include_str!("gemv.cu") };

/// The largest number of tokens.
pub const FEW: usize = 8;
/// Neurons that one block of the down projection takes.
const NEURONS: usize = 32;

pub(super) fn defines(tokens: usize, width: usize, activation: Activation) -> [Define; 4] {
    let aligned = width.is_multiple_of(8);
    let sizes = [("TOKENS", tokens as i64), ("ALIGNED", i64::from(aligned)), ("NEURONS", NEURONS as i64)];
    let [tokens, aligned, neurons] = sizes;
    [tokens, aligned, neurons, ffn::define(activation)]
}

/// Sets `y` to `x W^T`, rounded to its type, for at most [`FEW`] tokens.
#[derive(Debug)]
pub struct Linear<'a, T: Float> {
    /// `[T, outputs]`
    pub y: &'a mut Matrix<T>,
    /// `[T, inputs]`
    pub x: &'a Matrix<bf16>,
    /// `[outputs, inputs]`
    pub w: &'a Matrix<bf16>,
}

impl<T: Float> Linear<'_, T> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or there are more tokens.
    pub fn run(self) -> Result<()> {
        let Linear { y, x, w } = self;
        let (tokens, inputs, outputs) = (x.rows(), x.cols(), y.cols());
        assert!((1..=FEW).contains(&tokens), "cuda gemv: {tokens} tokens");
        assert_eq!([y.rows(), w.len()], [tokens, inputs * outputs], "cuda gemv: rows of y, weights");
        let entry = if T::F32 { "gemv_f32" } else { "gemv_bf16" };
        let (defines, grid) =
            (defines(tokens, inputs, Activation::Silu), Grid::row(outputs.div_ceil(8), 256));
        let args = [y.arg(), x.arg(), w.arg(), inputs.into(), outputs.into()];
        // SAFETY: a warp per output; sizes were checked above, and rows of a width of 8 values start at 16 bytes where their
        // matrix does, as all buffers do.
        unsafe { SOURCE.launch(x.gpu(), entry, &defines, grid, &args) }
    }
}

/// The three matrices of an FFN, `[intermediate, hidden]` each: a neuron is a row.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// Gate projection.
    pub gate: &'a Matrix<bf16>,
    /// Up projection.
    pub up: &'a Matrix<bf16>,
    /// Down projection, transposed.
    pub down: &'a Matrix<bf16>,
}

impl Dims {
    fn gemv_blocks(&self) -> usize {
        (self.intermediate / self.num_experts).div_ceil(NEURONS)
    }

    /// Returns the number of values of [`Ffn::scratch`].
    pub fn gemv_scratch(&self) -> usize {
        self.tokens * (self.intermediate + self.num_experts * self.gemv_blocks() * self.hidden)
    }
}

/// The factors of the experts of an FFN.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a> {
    /// The leading experts, whose factor is 1 for every token.
    pub core: usize,
    /// Those of the others, `[T, n - core]`.
    pub coefficients: &'a Matrix<f32>,
}

/// Sets `y` to the sum of the active experts' outputs times their factors. Without these it is the output of all neurons.
#[derive(Debug)]
pub struct Ffn<'a> {
    /// `[T, hidden]`
    pub y: &'a mut Matrix<f32>,
    /// `[T, hidden]`
    pub h: &'a Matrix<bf16>,
    /// The projections.
    pub weights: Weights<'a>,
    /// The factors of experts.
    pub factors: Option<Factors<'a>>,
    /// The activation of the gate projection.
    pub activation: Activation,
    /// Scratch memory of [`Dims::gemv_scratch`] values.
    pub scratch: &'a mut Matrix<f32>,
}

impl Ffn<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or there are more than [`FEW`] tokens.
    pub fn run(self) -> Result<()> {
        let Ffn { y, h, weights: Weights { gate, up, down }, factors, activation, scratch } = self;
        let (tokens, hidden) = (h.rows(), h.cols());
        let coefficients = factors.map(|factors| factors.coefficients);
        let core = factors.map_or(0, |factors| factors.core);
        let n = coefficients.map_or(1, |coefficients| core + coefficients.cols());
        let dims = Dims { tokens, hidden, intermediate: gate.len() / hidden, num_experts: n };
        let width = dims.intermediate;
        assert!((1..=FEW).contains(&tokens) && n > 0 && width.is_multiple_of(n), "cuda gemv::Ffn: {dims:?}");
        let (len, rows, need) =
            (hidden * width, coefficients.map_or(tokens, Matrix::rows), dims.gemv_scratch());
        let lens = [gate.len(), up.len(), down.len(), y.len(), rows, scratch.len().min(need)];
        let want = [len, len, len, h.len(), tokens, need];
        assert_eq!(lens, want, "cuda gemv::Ffn: gate, up, down, y, coefficients, scratch for {dims:?}");
        let (gpu, defines, pairs) = (h.gpu(), defines(tokens, hidden, activation), tokens * width);
        let [c, partials] = scratch.parts([0..pairs, pairs..dims.gemv_scratch()]);
        let (k, parts) = (optional(coefficients), dims.gemv_blocks());
        let [hidden_arg, width_arg, n_arg, parts_arg] = [hidden, width, n, parts].map(Arg::Size);
        let core = Arg::Size(core);

        let args = [c.arg(), h.arg(), gate.arg(), up.arg(), k, hidden_arg, width_arg, n_arg, core];
        // SAFETY: a warp per neuron; sizes were checked above.
        unsafe { SOURCE.launch(gpu, "gemv_up", &defines, Grid::row(width.div_ceil(8), 256), &args) }?;

        let args = [partials.arg(), c.arg(), down.arg(), k, hidden_arg, width_arg, n_arg, core, parts_arg];
        let grid = Grid::plane(hidden.div_ceil(512), n * parts, 128);
        // SAFETY: a block per neurons of one expert and 512 columns; partial sums have room for each.
        unsafe { SOURCE.launch(gpu, "gemv_down", &defines, grid, &args) }?;

        let args = [y.arg(), partials.arg(), k, hidden_arg, n_arg, core, parts_arg];
        let grid = Grid::plane(hidden.div_ceil(32), tokens, 256);
        // SAFETY: a block per 32 values of y reads the partial sums that were set above.
        unsafe { SOURCE.launch(gpu, "gemv_sum", &defines, grid, &args) }
    }
}
