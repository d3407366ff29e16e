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
//! depend on the number of threads. The `dense` functions are the same op with one expert, always active with
//! coefficient 1.

mod infer;
mod kernel;
mod packed;
mod plan;
pub mod reference;
#[cfg(test)]
mod tests;
mod train;

pub use packed::PackedWeights;
use packed::tile_depth;

use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::Precision;
use plan::{Cut, Pairs};

/// Sizes of an expert FFN.
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
    /// Training: whether inactive pairs get a coefficient gradient too, as the straight-through rule needs
    /// (eq. 16). Without it a, b and B are computed for active pairs only. Not used by inference.
    pub all_pairs: bool,
}

impl Dims {
    /// Neurons of one expert.
    pub fn expert_width(self) -> usize {
        self.intermediate / self.num_experts
    }
}

/// Which tokens go to which expert: CSR by expert, with its token-major inverse. R is the number of active pairs;
/// pair r of the expert-major arrays is token `tokens[r]` at the expert i with `offsets[i] <= r < offsets[i+1]`.
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
    /// `w_down`, transposed: row j is what neuron j adds to y.
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

/// What the backward needs of the forward; made by [`forward_train`] and [`forward_dense_train`].
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// `x Wg^T`: `[tokens, intermediate]`, or of the active pairs alone `[R, expert_width]`.
    pub a: Buf,
    /// `x Wu^T`, as `a`.
    pub b: Buf,
}

impl Saved {
    /// A place that no routing of `dims` outgrows.
    pub fn with_room(dims: Dims) -> Saved {
        let len = dims.tokens * dims.intermediate;
        Saved { a: Buf::zeros(len), b: Buf::zeros(len) }
    }
}

/// Work space, instruction-set tier and precision of training. The space grows on demand and is kept; any scratch
/// serves any shape.
#[derive(Debug)]
pub struct Scratch {
    isa: Isa,
    precision: Precision,
    tiles: Buf,
    g: Buf,
    da: Buf,
    db: Buf,
    scaled: Buf,
    dpairs: Buf,
    cut: Cut,
}

impl Scratch {
    /// An empty scratch for the current tier; training is in f32.
    pub fn new() -> Scratch {
        Scratch::with(Isa::current(), Precision::F32)
    }

    /// An empty scratch: the ops it is given to run on `isa`, and in training round the operands of their products
    /// to `precision`. (Inference has the precision of its packed weights.)
    pub fn with(isa: Isa, precision: Precision) -> Scratch {
        let empty = Buf::default;
        Scratch {
            isa,
            precision,
            tiles: empty(),
            g: empty(),
            da: empty(),
            db: empty(),
            scaled: empty(),
            dpairs: empty(),
            cut: Cut::default(),
        }
    }

    /// Makes room for training on `dims`, whatever the routing. Memory is taken when it is used.
    pub fn reserve(&mut self, dims: Dims) {
        let values = dims.tokens * dims.intermediate;
        for buf in [&mut self.g, &mut self.da, &mut self.db, &mut self.scaled] {
            buf.resize(values);
        }
        let pairs = dims.tokens * dims.num_experts;
        self.tiles.resize(2 * pairs * tile_depth(dims.expert_width()));
        self.dpairs.resize(pairs);
    }

    /// What training rounds to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Changes what training rounds to.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch::new()
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

fn check_routes(op: &str, routes: &Routes<'_>, dims: Dims) {
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

/// Sets y `[tokens, hidden]` to the sum of the active experts' outputs of x `[tokens, hidden]`. x and c are rounded
/// to the weights' precision.
///
/// # Panics
/// Lengths do not fit `dims`, or the weights are of another shape.
pub fn forward_packed(
    y: &mut [f32],
    x: &[f32],
    weights: &PackedWeights,
    routes: &Routes<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    check_packed("forward_packed", y, x, weights, dims);
    check_routes("forward_packed", routes, dims);
    infer(y, x, weights, Pairs::Routed(routes), dims, scratch);
}

/// Sets y to the dense FFN `(silu(x Wg^T) * (x Wu^T)) Wd` of weights packed as one expert.
///
/// # Panics
/// Lengths do not fit, or there are several experts.
pub fn forward_dense_packed(
    y: &mut [f32],
    x: &[f32],
    weights: &PackedWeights,
    tokens: usize,
    scratch: &mut Scratch,
) {
    let (hidden, intermediate) = (weights.hidden(), weights.intermediate());
    let dims = Dims { tokens, hidden, intermediate, num_experts: 1, all_pairs: false };
    check_packed("forward_dense_packed", y, x, weights, dims);
    infer(y, x, weights, Pairs::Dense, dims, scratch);
}

fn check_packed(op: &str, y: &[f32], x: &[f32], weights: &PackedWeights, dims: Dims) {
    let Dims { tokens, hidden, intermediate, num_experts, .. } = dims;
    let packed = (weights.hidden(), weights.intermediate(), weights.num_experts());
    assert!(
        x.len() == tokens * hidden && y.len() == x.len() && packed == (hidden, intermediate, num_experts),
        "expert_ffn::{op}: input {}, output {} values, weights {packed:?} for {dims:?}",
        x.len(),
        y.len()
    );
}

fn infer(
    y: &mut [f32],
    x: &[f32],
    weights: &PackedWeights,
    pairs: Pairs<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    if is_empty(dims) {
        y.fill(0.0);
    } else {
        infer::forward(y, x, weights, pairs, dims, scratch);
    }
}

/// [`forward_packed`] over row-major weights that keeps what [`backward`] needs.
///
/// # Panics
/// As [`forward_packed`].
pub fn forward_train(
    y: &mut [f32],
    saved: &mut Saved,
    x: &[f32],
    weights: &Weights<'_>,
    routes: &Routes<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    check("forward_train", y, x, weights, dims);
    check_routes("forward_train", routes, dims);
    if is_empty(dims) {
        y.fill(0.0);
    } else {
        train::forward(y, saved, x, weights, Pairs::Routed(routes), dims, scratch);
    }
}

/// [`forward_dense_packed`] over row-major weights that keeps what [`backward_dense`] needs.
///
/// # Panics
/// As [`forward_dense_packed`].
#[expect(
    clippy::too_many_arguments,
    reason = "outputs, inputs and sizes of one op, each with its own meaning"
)]
pub fn forward_dense_train(
    y: &mut [f32],
    saved: &mut Saved,
    x: &[f32],
    weights: &Weights<'_>,
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    scratch: &mut Scratch,
) {
    let dims = Dims { tokens, hidden, intermediate, num_experts: 1, all_pairs: true };
    check("forward_dense_train", y, x, weights, dims);
    if is_empty(dims) {
        y.fill(0.0);
    } else {
        train::forward(y, saved, x, weights, Pairs::Dense, dims, scratch);
    }
}

/// Sets dx `[tokens, hidden]` and dcoefficients `[tokens, num_experts]`, adds to the weights' gradients.
/// dcoefficients is `<dy_t, o_i(x_t)>`, of inactive pairs only when [`Dims::all_pairs`] (else 0).
/// `saved` is of [`forward_train`] with the same x, weights, routes and dims.
///
/// # Panics
/// Lengths do not fit `dims`.
#[expect(
    clippy::too_many_arguments,
    reason = "outputs, inputs and sizes of one op, each with its own meaning"
)]
pub fn backward(
    dx: &mut [f32],
    dcoefficients: &mut [f32],
    grads: WeightGrads<'_>,
    dy: &[f32],
    saved: &Saved,
    x: &[f32],
    weights: &Weights<'_>,
    routes: &Routes<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    check("backward", dx, x, weights, dims);
    check("backward", dx, dy, weights, dims);
    check_routes("backward", routes, dims);
    check_grads("backward", &grads, dims);
    assert!(
        dcoefficients.len() == dims.tokens * dims.num_experts,
        "expert_ffn::backward: {} coefficient gradients for {dims:?}",
        dcoefficients.len()
    );
    if is_empty(dims) {
        dx.fill(0.0);
        dcoefficients.fill(0.0);
    } else {
        let pairs = Pairs::Routed(routes);
        train::backward(dx, Some(dcoefficients), grads, dy, saved, x, weights, pairs, dims, scratch);
    }
}

/// Sets dx, adds to the weights' gradients: the backward of [`forward_dense_train`].
///
/// # Panics
/// Lengths do not fit the sizes.
#[expect(
    clippy::too_many_arguments,
    reason = "outputs, inputs and sizes of one op, each with its own meaning"
)]
pub fn backward_dense(
    dx: &mut [f32],
    grads: WeightGrads<'_>,
    dy: &[f32],
    saved: &Saved,
    x: &[f32],
    weights: &Weights<'_>,
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    scratch: &mut Scratch,
) {
    let dims = Dims { tokens, hidden, intermediate, num_experts: 1, all_pairs: true };
    check("backward_dense", dx, x, weights, dims);
    check("backward_dense", dx, dy, weights, dims);
    check_grads("backward_dense", &grads, dims);
    if is_empty(dims) {
        dx.fill(0.0);
    } else {
        train::backward(dx, None, grads, dy, saved, x, weights, Pairs::Dense, dims, scratch);
    }
}
