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

pub mod reference;

use crate::buf::Buf;

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
    /// (eq. 16). Without it a, b and B are computed for active pairs only. Not used by [`forward`].
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
    /// `x Wg^T`: `[tokens, intermediate]`, or of the active pairs alone in an order of its own.
    pub a: Buf,
    /// `x Wu^T`, as `a`.
    pub b: Buf,
}

/// Work space, grown on demand and kept between calls. Any scratch serves any shape.
#[derive(Debug, Default)]
pub struct Scratch {}

impl Scratch {
    /// An empty scratch.
    pub fn new() -> Scratch {
        Scratch::default()
    }
}

/// Sets y `[tokens, hidden]` to the sum of the active experts' outputs of x `[tokens, hidden]`.
///
/// # Panics
/// Lengths do not fit `dims`.
pub fn forward(
    y: &mut [f32],
    x: &[f32],
    weights: &Weights<'_>,
    routes: &Routes<'_>,
    dims: Dims,
    _scratch: &mut Scratch,
) {
    let (mask, coef) = dense_routes(routes, dims);
    let f = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let want =
        reference::forward(&f(x), &f(weights.gate), &f(weights.up), &f(weights.down), &mask, &coef, dims);
    for (y, want) in y.iter_mut().zip(want) {
        *y = want as f32;
    }
}

/// [`forward`] that keeps what [`backward`] needs.
///
/// # Panics
/// As [`forward`].
pub fn forward_train(
    y: &mut [f32],
    saved: &mut Saved,
    x: &[f32],
    weights: &Weights<'_>,
    routes: &Routes<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    saved.a.resize(0);
    forward(y, x, weights, routes, dims, scratch);
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
    _saved: &Saved,
    x: &[f32],
    weights: &Weights<'_>,
    routes: &Routes<'_>,
    dims: Dims,
    _scratch: &mut Scratch,
) {
    let (mask, coef) = dense_routes(routes, dims);
    let f = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let want = reference::backward(
        &f(dy),
        &f(x),
        &f(weights.gate),
        &f(weights.up),
        &f(weights.down),
        &mask,
        &coef,
        dims,
    );
    let add = |g: &mut [f32], want: &[f64]| g.iter_mut().zip(want).for_each(|(g, w)| *g += *w as f32);
    dx.fill(0.0);
    dcoefficients.fill(0.0);
    add(dx, &want.dx);
    add(dcoefficients, &want.dcoef);
    add(grads.gate, &want.dgate);
    add(grads.up, &want.dup);
    add(grads.down, &want.ddown);
}

/// Sets y to the dense FFN `(silu(x Wg^T) * (x Wu^T)) Wd`.
///
/// # Panics
/// Lengths do not fit the sizes.
pub fn forward_dense(
    y: &mut [f32],
    x: &[f32],
    weights: &Weights<'_>,
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    scratch: &mut Scratch,
) {
    let all: Vec<u32> = (0..tokens as u32).collect();
    let (offsets, ones, each) = ([0, tokens], vec![1.0; tokens], (0..=tokens).collect::<Vec<_>>());
    let routes =
        Routes { offsets: &offsets, tokens: &all, coefficients: &ones, token_offsets: &each, slots: &all };
    let dims = Dims { tokens, hidden, intermediate, num_experts: 1, all_pairs: true };
    forward(y, x, weights, &routes, dims, scratch);
}

/// [`forward_dense`] that keeps what [`backward_dense`] needs.
///
/// # Panics
/// As [`forward_dense`].
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
    saved.a.resize(0);
    forward_dense(y, x, weights, tokens, hidden, intermediate, scratch);
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
    let all: Vec<u32> = (0..tokens as u32).collect();
    let (offsets, ones, each) = ([0, tokens], vec![1.0; tokens], (0..=tokens).collect::<Vec<_>>());
    let routes =
        Routes { offsets: &offsets, tokens: &all, coefficients: &ones, token_offsets: &each, slots: &all };
    let dims = Dims { tokens, hidden, intermediate, num_experts: 1, all_pairs: true };
    backward(dx, &mut vec![0.0; tokens], grads, dy, saved, x, weights, &routes, dims, scratch);
}

fn dense_routes(routes: &Routes<'_>, dims: Dims) -> (Vec<bool>, Vec<f64>) {
    let n = dims.num_experts;
    let (mut mask, mut coef) = (vec![false; dims.tokens * n], vec![0.0; dims.tokens * n]);
    for i in 0..n {
        for r in routes.offsets[i]..routes.offsets[i + 1] {
            let pair = routes.tokens[r] as usize * n + i;
            mask[pair] = true;
            coef[pair] = f64::from(routes.coefficients[r]);
        }
    }
    (mask, coef)
}
