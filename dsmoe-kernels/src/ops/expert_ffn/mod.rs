//! Gated expert FFN: SwiGLU experts that are row ranges of one dense FFN, computed for the active pairs alone.
//!
//! ```text
//! forward   a = x Wg^T,  b = x Wu^T,  c = silu(a) * b                 [T, intermediate]
//!           o_i = c_i Wd_i                                            expert i = rows i*w..(i+1)*w
//!           y_t = sum over active i of coef[t,i] * o_i(x_t)           set (eqs. 6, 11)
//! backward  B = dy Wd^T                                               [T, intermediate]
//!           dcoef[t,i] = sum over j of expert i of c[t,j] B[t,j]      set; of every pair when `all_pairs` (eq. 16)
//!           dc = coef * B                                             active pairs
//!           dWd_i += (coef c_i)^T dy                                  added to (eq. 13)
//!           da = dc * b * silu'(a),  dWg_i += da^T x                  added to (eq. 14)
//!           db = dc * silu(a),       dWu_i += db^T x                  added to (eq. 15)
//!           dx = da Wg + db Wu                                        set
//! ```
//! `w_down` is kept transposed, `[intermediate, hidden]`: a neuron is one row of all three matrices. f32
//! accumulation. A token without an active expert gets `y = 0` and `dx = 0`.
//!
//! Work is cut by shape and routing alone and experts are summed in ascending order, so the result does not
//! depend on the number of threads. [`Pairs::Dense`] is the same op with one expert, always active with coefficient 1:
//! the dense FFN.
//!
//! `train.rs` has the passes of training, which keep a and b ([`Saved`]), and `infer.rs` the forward over packed weights.
//! Both end in the combine of `combine.rs`, which adds the experts' outputs to the rows of their tokens.

mod combine;
mod infer;
mod kernel;
mod packed;
mod plan;
pub mod reference;
#[cfg(test)]
mod tests;
mod train;

pub use packed::PackedWeights;
pub use plan::Pairs;

use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::Precision;
use combine::Blocks;
use packed::tile_depth;
use plan::Plan;

/// The sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of x and y.
    pub tokens: usize,
    /// Columns of x and y.
    pub hidden: usize,
    /// Neurons of all experts together.
    pub intermediate: usize,
    /// Experts; divides `intermediate`.
    pub num_experts: usize,
    /// Training computes the coefficient gradients of inactive pairs too, which the straight-through rule needs (eq. 16).
    /// Without it a, b and B are computed for active pairs only. Inference ignores it.
    pub all_pairs: bool,
}

impl Dims {
    /// Returns the sizes of a dense FFN, which has one expert.
    pub fn dense(tokens: usize, hidden: usize, intermediate: usize) -> Dims {
        Dims { tokens, hidden, intermediate, num_experts: 1, all_pairs: true }
    }

    /// Returns the neurons of one expert.
    pub fn expert_width(self) -> usize {
        self.intermediate / self.num_experts
    }
}

/// The tokens of each expert in CSR form, with the token-major inverse. R is the number of active pairs: pair r of the
/// expert-major arrays is token `tokens[r]` at the expert i with `offsets[i] <= r < offsets[i+1]`.
#[derive(Clone, Copy, Debug)]
pub struct Routes<'a> {
    /// `[num_experts + 1]`: where each expert's pairs start.
    pub offsets: &'a [usize],
    /// `[R]`, ascending inside an expert.
    pub tokens: &'a [u32],
    /// `[R]`
    pub coefficients: &'a [f32],
    /// `[tokens + 1]`: where each token's pairs start in `slots`.
    pub token_offsets: &'a [usize],
    /// `[R]`: token-major, the pair's index in the expert-major arrays; ascending inside a token.
    pub slots: &'a [u32],
}

/// The three matrices, each `[intermediate, hidden]`.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// `w_gate`
    pub gate: &'a [f32],
    /// `w_up`
    pub up: &'a [f32],
    /// `w_down`, transposed: row j is the output of neuron j.
    pub down: &'a [f32],
}

/// Gradients of [`Weights`], added to.
#[derive(Debug)]
pub struct WeightGrads<'a> {
    /// `[intermediate, hidden]`
    pub gate: &'a mut [f32],
    /// `[intermediate, hidden]`
    pub up: &'a mut [f32],
    /// `[intermediate, hidden]`
    pub down: &'a mut [f32],
}

/// The values of the forward that the backward needs; set by [`ForwardTrain`].
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// `x Wg^T`: `[tokens, intermediate]`, or of the active pairs alone `[R, expert_width]`.
    pub a: Buf,
    /// `x Wu^T`, as `a`.
    pub b: Buf,
}

impl Saved {
    /// Allocates the memory that the largest routing of `dims` needs.
    pub fn with_room(dims: Dims) -> Saved {
        let len = dims.tokens * dims.intermediate;
        Saved { a: Buf::zeros(len), b: Buf::zeros(len) }
    }
}

/// Work space and precision of training. The space grows on demand and is kept; any scratch serves any shape.
#[derive(Debug, Default)]
pub struct Scratch {
    precision: Precision,
    blocks: Blocks,
    g: Buf,
    da: Buf,
    db: Buf,
    scaled: Buf,
    dpairs: Buf,
}

impl Scratch {
    /// Returns an empty scratch; in training, products round their operands to `precision`. (Inference has the
    /// precision of its packed weights.)
    pub fn new(precision: Precision) -> Scratch {
        Scratch { precision, ..Scratch::default() }
    }

    /// Reserves the memory for training on `dims` with any routing.
    pub fn reserve(&mut self, dims: Dims) {
        let values = dims.tokens * dims.intermediate;
        for buf in [&mut self.g, &mut self.da, &mut self.db, &mut self.scaled] {
            buf.resize(values);
        }
        let pairs = dims.tokens * dims.num_experts;
        self.blocks.tiles.resize(2 * pairs * tile_depth(dims.expert_width()));
        self.dpairs.resize(pairs);
    }

    /// Returns the precision to which training rounds.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Changes the precision to which training rounds.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }
}

fn check(op: &str, y: &[f32], x: &[f32], weights: &Weights<'_>, dims: Dims) {
    let Dims { tokens, hidden, intermediate, num_experts, .. } = dims;
    assert!(
        num_experts > 0 && intermediate.is_multiple_of(num_experts),
        "expert_ffn::{op}: num_experts does not divide intermediate in {dims:?}"
    );
    let w = [weights.gate.len(), weights.up.len(), weights.down.len()];
    assert!(
        x.len() == tokens * hidden && y.len() == x.len() && w == [intermediate * hidden; 3],
        "expert_ffn::{op}: input {}, output {}, weights {w:?} values for {dims:?}",
        x.len(),
        y.len()
    );
}

fn check_pairs(op: &str, pairs: Pairs<'_>, dims: Dims) {
    let Pairs::Routed(routes) = pairs else {
        assert_eq!(dims.num_experts, 1, "expert_ffn::{op}: a dense FFN has one expert");
        return;
    };
    let r = routes.tokens.len();
    assert!(
        routes.offsets.len() == dims.num_experts + 1
            && routes.offsets.first() == Some(&0)
            && routes.offsets.last() == Some(&r)
            && routes.offsets.is_sorted()
            && routes.coefficients.len() == r
            && routes.token_offsets.len() == dims.tokens + 1
            && routes.token_offsets.last() == Some(&r)
            && routes.slots.len() == r,
        "expert_ffn::{op}: offsets {:?}, {r} tokens, {} coefficients, {} token_offsets, {} slots for {dims:?}",
        routes.offsets,
        routes.coefficients.len(),
        routes.token_offsets.len(),
        routes.slots.len()
    );
}

fn check_grads(op: &str, grads: &WeightGrads<'_>, dims: Dims) {
    let w = [grads.gate.len(), grads.up.len(), grads.down.len()];
    assert!(
        w == [dims.intermediate * dims.hidden; 3],
        "expert_ffn::{op}: weight gradients {w:?} values for {dims:?}"
    );
}

fn is_empty(dims: Dims) -> bool {
    dims.tokens == 0 || dims.hidden == 0 || dims.intermediate == 0
}

/// Sets y to the sum of the active experts' outputs of x. x and c are rounded to the weights' precision.
#[derive(Debug)]
pub struct ForwardPacked<'a> {
    /// `[tokens, hidden]`, set.
    pub y: &'a mut [f32],
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    /// The weights.
    pub weights: &'a PackedWeights,
    /// The active pairs.
    pub pairs: Pairs<'a>,
    /// The sizes.
    pub dims: Dims,
    /// Work space.
    pub scratch: &'a mut Scratch,
}

/// Sets y like [`ForwardPacked`], over row-major weights, and keeps the values that [`Backward`] needs.
#[derive(Debug)]
pub struct ForwardTrain<'a> {
    /// `[tokens, hidden]`, set.
    pub y: &'a mut [f32],
    /// Set; the backward reads it.
    pub saved: &'a mut Saved,
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    /// The weights.
    pub weights: &'a Weights<'a>,
    /// The active pairs.
    pub pairs: Pairs<'a>,
    /// The sizes.
    pub dims: Dims,
    /// Work space and precision.
    pub scratch: &'a mut Scratch,
}

/// Sets dx and dcoefficients, adds to the weights' gradients. x, weights, pairs and dims are those of the forward.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[tokens, hidden]`, set.
    pub dx: &'a mut [f32],
    /// `[tokens, num_experts]`, set to `<dy_t, o_i(x_t)>`, of inactive pairs only when [`Dims::all_pairs`] (else 0).
    /// None of a dense FFN, which has no coefficients.
    pub dcoefficients: Option<&'a mut [f32]>,
    /// Added to.
    pub grads: WeightGrads<'a>,
    /// `[tokens, hidden]`
    pub dy: &'a [f32],
    /// Set by [`ForwardTrain`].
    pub saved: &'a Saved,
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    /// The weights.
    pub weights: &'a Weights<'a>,
    /// The active pairs.
    pub pairs: Pairs<'a>,
    /// The sizes.
    pub dims: Dims,
    /// Work space and precision.
    pub scratch: &'a mut Scratch,
}

run_on_current_tier!(ForwardPacked, ForwardTrain, Backward);

impl ForwardPacked<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`, or the weights are of another shape.
    pub fn run_on(self, isa: Isa) {
        let ForwardPacked { y, x, weights, pairs, dims, scratch } = self;
        let Dims { tokens, hidden, intermediate, num_experts, .. } = dims;
        let packed = (weights.hidden(), weights.intermediate(), weights.num_experts());
        assert!(
            x.len() == tokens * hidden && y.len() == x.len() && packed == (hidden, intermediate, num_experts),
            "expert_ffn::ForwardPacked: input {}, output {} values, weights {packed:?} for {dims:?}",
            x.len(),
            y.len()
        );
        check_pairs("ForwardPacked", pairs, dims);
        if is_empty(dims) {
            y.fill(0.0);
            return;
        }
        let plan = Plan { pairs, dims, isa, precision: weights.precision() };
        infer::forward(y, x, weights, &plan, &mut scratch.blocks);
    }
}

impl ForwardTrain<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(self, isa: Isa) {
        let ForwardTrain { y, saved, x, weights, pairs, dims, scratch } = self;
        check("ForwardTrain", y, x, weights, dims);
        check_pairs("ForwardTrain", pairs, dims);
        if is_empty(dims) {
            y.fill(0.0);
            return;
        }
        let plan = Plan { pairs, dims, isa, precision: scratch.precision };
        train::forward(y, saved, x, weights, &plan, &mut scratch.blocks);
    }
}

impl Backward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(mut self, isa: Isa) {
        let (dims, pairs) = (self.dims, self.pairs);
        check("Backward", self.dx, self.x, self.weights, dims);
        check("Backward", self.dx, self.dy, self.weights, dims);
        check_pairs("Backward", pairs, dims);
        check_grads("Backward", &self.grads, dims);
        if let Some(dcoefficients) = &self.dcoefficients {
            assert!(
                dcoefficients.len() == dims.tokens * dims.num_experts,
                "expert_ffn::Backward: {} coefficient gradients for {dims:?}",
                dcoefficients.len()
            );
        }
        if is_empty(dims) {
            self.dx.fill(0.0);
            if let Some(dcoefficients) = &mut self.dcoefficients {
                dcoefficients.fill(0.0);
            }
            return;
        }
        let plan = Plan { pairs, dims, isa, precision: self.scratch.precision };
        train::backward(self, &plan);
    }
}
