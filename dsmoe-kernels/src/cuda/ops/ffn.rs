//! The nonlinear part of a gated FFN, between its products; see [`crate::expert_ffn`].

use half::bf16;

use super::router::Routed;
use super::slots::{Places, ROWS, Shape, Slots};
use super::{Arg, Define, Grid, Matrix, Result, Source, optional};
use crate::cuda::kernel::Call;
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

/// Addresses of the values of the backward pass of the activation, as [`BackwardSlots`] has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Values {
    pub(super) da: u64,
    pub(super) db: u64,
    pub(super) c: u64,
    pub(super) dcoefficients: u64,
    pub(super) g: u64,
    pub(super) a: u64,
    pub(super) b: u64,
}

/// Makes the call of the activation of pairs in slots, from the products of all pairs.
pub(super) fn activate_slots(
    (shape, slots): (&Shape, &Places),
    [c, a, b]: [u64; 3],
    activation: Activation,
    blocks: usize,
) -> Call {
    let pointers = [c, a, b, slots.coefficients, slots.tiles, slots.pairs, slots.tokens];
    let sizes = [shape.intermediate(), shape.wide(), shape.width, shape.pieces(), shape.core];
    let args = pointers.into_iter().map(Arg::Ptr).chain(sizes.map(Arg::Size)).collect();
    let grid = rows_of_tiles(shape, blocks);
    Call { source: &SOURCE, entry: "activate_slots", defines: vec![define(activation)], grid, args }
}

/// Returns the grid of a kernel whose blocks take eight rows of tiles at a time, a warp for each.
fn rows_of_tiles(shape: &Shape, blocks: usize) -> Grid {
    Grid::row(blocks.min((shape.tiles() * ROWS).div_ceil(8)), 256)
}

/// Makes the call of the backward pass of the activation of pairs in slots; with `dense`, `g`, `a` and `b` are of all pairs.
pub(super) fn backward_slots(
    (shape, slots): (&Shape, &Places),
    values: &Values,
    (dense, activation): (bool, Activation),
    blocks: usize,
) -> Call {
    let Values { da, db, c, dcoefficients, g, a, b } = *values;
    let pointers =
        [da, db, c, dcoefficients, g, a, b, slots.coefficients, slots.tiles, slots.pairs, slots.tokens];
    let dense = if dense { shape.intermediate() } else { 0 };
    let sizes = [dense, shape.num_experts, shape.wide(), shape.width, shape.pieces(), shape.core];
    let args = pointers.into_iter().map(Arg::Ptr).chain(sizes.map(Arg::Size)).collect();
    let grid = rows_of_tiles(shape, blocks);
    Call { source: &SOURCE, entry: "backward_slots", defines: vec![define(activation)], grid, args }
}

/// Makes the call that sets the gradients of the coefficients of inactive pairs, to 0 without the products of all pairs.
pub(super) fn backward_inactive(shape: &Shape, values: &Values, mask: u64, how: (bool, Activation)) -> Call {
    let Values { dcoefficients, g, a, b, .. } = *values;
    let pairs = shape.tokens * shape.num_experts;
    let (dense, activation) = how;
    let (entry, per_block) = if dense { ("backward_inactive", 8) } else { ("clear_inactive", 256) };
    let products = if dense { vec![g, a, b] } else { vec![] };
    let pointers = [dcoefficients].into_iter().chain(products).chain([mask]).map(Arg::Ptr);
    let mut args: Vec<Arg> = pointers.chain([Arg::I64(pairs as i64)]).collect();
    if dense {
        args.extend([shape.intermediate(), shape.num_experts, shape.width, shape.core].map(Arg::Size));
    }
    let grid = Grid::row(pairs.div_ceil(per_block), 256);
    Call { source: &SOURCE, entry, defines: vec![define(activation)], grid, args }
}

/// Makes the call that adds up the parts of tokens; see [`super::products::Sum`].
pub(super) fn sum_slots(shape: &Shape, y: u64, parts: u64, of_tokens: u64, active: u64) -> Call {
    let pointers = [y, parts, of_tokens, active].map(Arg::Ptr);
    let sizes = [shape.pieces(), shape.num_experts, shape.hidden].map(Arg::Size);
    let threads = (shape.hidden / 8).next_multiple_of(32).clamp(32, 256) as u32;
    let (defines, grid) = (vec![define(Activation::Silu)], Grid::row(shape.tokens, threads));
    Call { source: &SOURCE, entry: "sum_slots", defines, grid, args: [&pointers[..], &sizes].concat() }
}

/// Does what [`Backward`] does for pairs in slots: sets `da`, `db` and `c` of all groups' slots, and the gradients of the
/// coefficients of all pairs of experts.
#[derive(Debug)]
pub struct BackwardSlots<'a> {
    /// `[slots, wide]`
    pub da: &'a mut Matrix<bf16>,
    /// `[slots, wide]`
    pub db: &'a mut Matrix<bf16>,
    /// `[slots, wide]`
    pub c: &'a mut Matrix<bf16>,
    /// `[T, n]`
    pub dcoefficients: &'a mut Matrix<f32>,
    /// The gradient of the output times the down projection: `[slots, wide]`, or of all pairs `[T, intermediate]`.
    pub g: &'a Matrix<bf16>,
    /// Gate projections, as `g`.
    pub a: &'a Matrix<bf16>,
    /// Up projections, as `g`.
    pub b: &'a Matrix<bf16>,
    /// `g`, `a` and `b` are of all pairs, so that inactive ones have gradients of coefficients too.
    pub dense: bool,
    /// The active pairs.
    pub slots: &'a Slots,
    /// Their routing.
    pub routed: &'a Routed,
    /// The activation of a.
    pub activation: Activation,
}

impl BackwardSlots<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let BackwardSlots { da, db, c, dcoefficients, g, a, b, dense, slots, routed, activation } = self;
        let shape = slots.shape();
        let of_slots = shape.slots() * shape.wide();
        let of_products = if dense { shape.tokens * shape.intermediate() } else { of_slots };
        let pairs = shape.tokens * shape.num_experts;
        let lens = [[da.len(), db.len(), c.len()], [g.len(), a.len(), b.len()]];
        let fit = lens == [[of_slots; 3], [of_products; 3]] && dcoefficients.len() == pairs;
        assert!(fit, "cuda ffn::backward_slots: {lens:?} values for {shape:?}, dense: {dense}");
        assert_eq!(routed.tokens(), shape.tokens, "cuda ffn::backward_slots: tokens of the routing");
        let values = Values {
            da: da.ptr(),
            db: db.ptr(),
            c: c.ptr(),
            dcoefficients: dcoefficients.ptr(),
            g: g.ptr(),
            a: a.ptr(),
            b: b.ptr(),
        };
        let (gpu, how) = (g.gpu(), (dense, activation));
        let blocks = 8 * gpu.multiprocessors() as usize;
        let calls = [
            backward_slots((&shape, &slots.places()), &values, how, blocks),
            backward_inactive(&shape, &values, routed.mask.ptr(), how),
        ];
        // SAFETY: the buffers have the values that the shape says, as checked above, and those of the slots by `with_room`.
        calls.iter().try_for_each(|call| unsafe { call.queue(gpu) })
    }
}
