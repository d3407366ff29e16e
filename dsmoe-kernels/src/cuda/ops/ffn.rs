//! The nonlinear part of a gated FFN, between its products; see [`crate::expert_ffn`].

use half::bf16;

use super::{Arg, Define, Grid, Matrix, Result, Source, optional};
use crate::swiglu::Activation;

pub(super) static SOURCE: Source = Source { name: "ffn", text: include_str!("ffn.cu") };

/// Returns the definition of kernels with this activation.
pub(super) fn define(activation: Activation) -> Define {
    ("GELU", i64::from(activation == Activation::GeluTanh))
}

/// Experts that the backward pass of a dense FFN is cut into: a warp takes each.
const SLICES: usize = 8;

/// Sizes of an FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Tokens.
    pub tokens: usize,
    /// Width of the input.
    pub hidden: usize,
    /// Neurons of all experts together.
    pub intermediate: usize,
    /// Experts; 1 for a dense FFN.
    pub num_experts: usize,
}

/// Checks that matrices have the size of `a`, and coefficients a row per token. Returns the number of experts, 1 without
/// coefficients.
fn check(op: &str, a: &Matrix<bf16>, lens: &[usize], coefficients: Option<&Matrix<f32>>) -> usize {
    let n = coefficients.map_or(1, Matrix::cols);
    assert!(
        n > 0
            && a.cols().is_multiple_of(n)
            && lens.iter().all(|&len| len == a.len())
            && coefficients.is_none_or(|k| k.rows() == a.rows()),
        "cuda ffn::{op}: {lens:?} values for {} rows of {}, {n} coefficients each",
        a.rows(),
        a.cols()
    );
    n
}

/// Sets `c` to `coefficient act(a) b`. Without coefficients they are 1.
#[derive(Debug)]
pub struct Activate<'a> {
    /// `[T, intermediate]`
    pub c: &'a mut Matrix<bf16>,
    /// Gate projections, `[T, intermediate]`.
    pub a: &'a Matrix<bf16>,
    /// Up projections, `[T, intermediate]`.
    pub b: &'a Matrix<bf16>,
    /// `[T, n]`
    pub coefficients: Option<&'a Matrix<f32>>,
    /// The activation of a.
    pub activation: Activation,
}

impl Activate<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Activate { c, a, b, coefficients, activation } = self;
        let n = check("activate", a, &[c.len(), b.len()], coefficients);
        let (k, tokens) = (optional(coefficients), Arg::I64(a.rows() as i64));
        let args = [c.arg(), a.arg(), b.arg(), k, tokens, a.cols().into(), n.into()];
        let grid = Grid::row(c.len().div_ceil(8 * 256), 256);
        // SAFETY: eight values per thread of buffers whose lengths were checked above; buffers start at 16 bytes.
        unsafe { SOURCE.launch(a.gpu(), "activate", &[define(activation)], grid, &args) }
    }
}

/// Sets the gradients `da` and `db`, and `c` as [`Activate`] does. With coefficients it sets their gradients:
/// `sum over an expert of act(a) b g`.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[T, intermediate]`
    pub da: &'a mut Matrix<bf16>,
    /// `[T, intermediate]`
    pub db: &'a mut Matrix<bf16>,
    /// `[T, intermediate]`
    pub c: &'a mut Matrix<bf16>,
    /// `[T, n]`
    pub dcoefficients: Option<&'a mut Matrix<f32>>,
    /// The gradient of the output times the down projection, `[T, intermediate]`.
    pub g: &'a Matrix<bf16>,
    /// Gate projections, `[T, intermediate]`.
    pub a: &'a Matrix<bf16>,
    /// Up projections, `[T, intermediate]`.
    pub b: &'a Matrix<bf16>,
    /// `[T, n]`
    pub coefficients: Option<&'a Matrix<f32>>,
    /// Sets the coefficients' gradients of inactive pairs too.
    pub all_pairs: bool,
    /// The activation of a.
    pub activation: Activation,
}

impl Backward<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or `dcoefficients` and `coefficients` are not both given.
    pub fn run(self) -> Result<()> {
        let Backward { da, db, c, dcoefficients, g, a, b, coefficients, all_pairs, activation } = self;
        let n = check("backward", a, &[da.len(), db.len(), c.len(), g.len(), b.len()], coefficients);
        let given = [dcoefficients.as_ref().map(|k| k.len()), coefficients.map(|k| k.len())];
        assert!(given[0] == given[1], "cuda ffn::backward: {given:?} coefficients");
        let dense = coefficients.is_none();
        let slices = if dense && a.cols().is_multiple_of(SLICES) { SLICES } else { n };
        let (k, dk) = (optional(coefficients), optional(dcoefficients.as_deref()));
        let pointers = [da.arg(), db.arg(), c.arg(), dk, g.arg(), a.arg(), b.arg(), k];
        let args = [&pointers[..], &[a.cols().into(), slices.into(), (all_pairs || dense).into()]].concat();
        // SAFETY: a block per token of buffers whose lengths were checked above.
        unsafe { SOURCE.launch(a.gpu(), "backward", &[define(activation)], Grid::row(a.rows(), 256), &args) }
    }
}
