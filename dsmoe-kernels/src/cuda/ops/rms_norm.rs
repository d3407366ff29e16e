//! RMS norm; see [`crate::ops::rms_norm`]. Its output is rounded to bf16, for products.

use half::bf16;

use super::router::Routed;
use super::slots::{Shape, Slots};
use super::{Arg, Define, Gpu, Grid, Matrix, Result, Source, optional};
use crate::cuda::Float;
use crate::cuda::kernel::Call;

pub(super) static SOURCE: Source = Source { name: "rms_norm", text: include_str!("rms_norm.cu") };

/// Blocks of the backward pass: each keeps a part of the weight's gradient.
const PARTS: usize = 512;

/// Variants of the kernels: whether weights have an offset, and whether the second part of a sum has a factor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Variant {
    pub(super) offset: bool,
    pub(super) scaled: bool,
}

pub(super) fn defines(hidden: usize, Variant { offset, scaled }: Variant) -> [Define; 4] {
    // About eight values a thread.
    let threads = hidden.div_ceil(8).next_multiple_of(32).clamp(32, 1024);
    let [offset, scaled] = [offset, scaled].map(i64::from);
    [("HIDDEN", hidden as i64), ("THREADS", threads as i64), ("OFFSET", offset), ("SCALED", scaled)]
}

/// Queues a kernel that takes the offset of its weight.
fn start(
    gpu: &Gpu,
    entry: &'static str,
    [rows, hidden]: [usize; 2],
    args: &[Arg],
    offset: f32,
) -> Result<()> {
    start_scaled(gpu, entry, [rows, hidden], args, [offset, 1.0])
}

/// Queues a kernel that takes the offset of its weight and the factor of a part of a sum.
fn start_scaled(
    gpu: &Gpu,
    entry: &'static str,
    [rows, hidden]: [usize; 2],
    args: &[Arg],
    [offset, scale]: [f32; 2],
) -> Result<()> {
    let call = call(entry, [rows, hidden], args, [offset, scale]);
    // SAFETY: the callers checked that the buffers have `rows` rows, or parts, of `hidden` values.
    unsafe { call.queue(gpu) }
}

/// Makes the call of such a kernel.
pub(super) fn call(
    entry: &'static str,
    [rows, hidden]: [usize; 2],
    args: &[Arg],
    [offset, scale]: [f32; 2],
) -> Call {
    let variant = Variant { offset: offset != 0.0, scaled: scale != 1.0 };
    let defines = defines(hidden, variant);
    let grid = Grid::row(rows, defines[1].1 as u32);
    let mut args = [args, &offset_args(offset)].concat();
    if variant.scaled {
        args.push(Arg::F32(scale));
    }
    Call { source: &SOURCE, entry, defines: defines.to_vec(), grid, args }
}

/// Returns what kernels for a weight with an offset take at their end.
pub(super) fn offset_args(offset: f32) -> Vec<Arg> {
    if offset == 0.0 { Vec::new() } else { vec![Arg::F32(offset)] }
}

/// Checks that matrices have a row for each value of `rstd`. Returns the numbers of rows and of columns.
fn check(op: &str, matrices: &[usize], weight: &Matrix<f32>, rstd: &Matrix<f32>) -> [usize; 2] {
    let (rows, hidden) = (rstd.len(), weight.len());
    let fit = hidden > 0 && matrices.iter().all(|&len| len == rows * hidden);
    assert!(fit, "cuda rms_norm::{op}: {matrices:?} values for {rows} rows of {hidden}");
    [rows, hidden]
}

/// Sets `h` to the normed rows of `x`, rounded to its type, and `rstd` to their reciprocal standard deviations.
#[derive(Debug)]
pub struct Forward<'a, T: Float> {
    /// `[T, hidden]`
    pub h: &'a mut Matrix<T>,
    /// `[T]`
    pub rstd: &'a mut Matrix<f32>,
    /// `[T, hidden]`
    pub x: &'a Matrix<f32>,
    /// `[hidden]`
    pub weight: &'a Matrix<f32>,
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// The term that keeps the division finite.
    pub eps: f32,
}

impl<T: Float> Forward<'_, T> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Forward { h, rstd, x, weight, offset, eps } = self;
        let [rows, hidden] = check("forward", &[h.len(), x.len()], weight, rstd);
        let entry = if T::F32 { "forward_f32" } else { "forward_bf16" };
        let args = [h.arg(), rstd.arg(), x.arg(), weight.arg(), Arg::F32(eps)];
        start(x.gpu(), entry, [rows, hidden], &args, offset)
    }
}

/// Sets `out` to `x + scale y`, `h` to its normed rows, and `rstd` to their reciprocal standard deviations.
#[derive(Debug)]
pub struct ForwardSum<'a> {
    /// `[T, hidden]`
    pub h: &'a mut Matrix<bf16>,
    /// `[T]`
    pub rstd: &'a mut Matrix<f32>,
    /// `[T, hidden]`
    pub out: &'a mut Matrix<f32>,
    /// `[T, hidden]`
    pub x: &'a Matrix<f32>,
    /// `[T, hidden]`
    pub y: &'a Matrix<f32>,
    /// `[hidden]`
    pub weight: &'a Matrix<f32>,
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// The factor of `y`.
    pub scale: f32,
    /// The term that keeps the division finite.
    pub eps: f32,
}

impl ForwardSum<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let ForwardSum { h, rstd, out, x, y, weight, offset, scale, eps } = self;
        let [rows, hidden] = check("forward_sum", &[h.len(), out.len(), x.len(), y.len()], weight, rstd);
        let args = [h.arg(), rstd.arg(), out.arg(), x.arg(), y.arg(), weight.arg(), Arg::F32(eps)];
        start_scaled(x.gpu(), "forward_sum", [rows, hidden], &args, [offset, scale])
    }
}

/// Addresses of the operands of [`ForwardParts`].
#[derive(Clone, Copy, Debug)]
pub(super) struct PartsAt {
    pub(super) h: u64,
    pub(super) rstd: u64,
    pub(super) out: u64,
    pub(super) x: u64,
    pub(super) parts: u64,
    pub(super) of_tokens: u64,
    pub(super) active: u64,
    pub(super) weight: u64,
}

/// Makes the call of [`ForwardParts`] with the weight's offset, the factor of the sums, and the term of the division.
pub(super) fn forward_parts(shape: &Shape, at: &PartsAt, [offset, scale, eps]: [f32; 3]) -> Call {
    let PartsAt { h, rstd, out, x, parts, of_tokens, active, weight } = *at;
    let pointers = [h, rstd, out, x, parts, of_tokens, active].map(Arg::Ptr);
    let sizes = [shape.pieces(), shape.num_experts].map(Arg::Size);
    let args = [&pointers[..], &sizes, &[Arg::Ptr(weight), Arg::F32(eps)]].concat();
    call("forward_parts", [shape.tokens, shape.hidden], &args, [offset, scale])
}

/// Does what [`super::products::Sum`] and [`ForwardSum`] of its result do, with the same bits.
#[derive(Debug)]
pub struct ForwardParts<'a> {
    /// `[T, hidden]`
    pub h: &'a mut Matrix<bf16>,
    /// `[T]`
    pub rstd: &'a mut Matrix<f32>,
    /// `[T, hidden]`
    pub out: &'a mut Matrix<f32>,
    /// `[T, hidden]`
    pub x: &'a Matrix<f32>,
    /// `[slots, hidden]`
    pub parts: &'a Matrix<bf16>,
    /// The active pairs.
    pub slots: &'a Slots,
    /// Their routing.
    pub routed: &'a Routed,
    /// `[hidden]`
    pub weight: &'a Matrix<f32>,
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// The factor of the sums.
    pub scale: f32,
    /// The term that keeps the division finite.
    pub eps: f32,
}

impl ForwardParts<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let ForwardParts { h, rstd, out, x, parts, slots, routed, weight, offset, scale, eps } = self;
        let [rows, hidden] = check("forward_parts", &[h.len(), out.len(), x.len()], weight, rstd);
        let shape = slots.shape();
        let lens = [rows, hidden, parts.len(), routed.tokens(), routed.num_experts()];
        let want =
            [shape.tokens, shape.hidden, shape.slots() * shape.hidden, shape.tokens, shape.num_experts];
        assert_eq!(
            lens, want,
            "cuda rms_norm::forward_parts: rows, hidden, parts, tokens, experts for {shape:?}"
        );
        let at = PartsAt {
            h: h.ptr(),
            rstd: rstd.ptr(),
            out: out.ptr(),
            x: x.ptr(),
            parts: parts.ptr(),
            of_tokens: slots.of_tokens.ptr(),
            active: routed.active.ptr(),
            weight: weight.ptr(),
        };
        let call = forward_parts(&shape, &at, [offset, scale, eps]);
        // SAFETY: a block per token of buffers whose lengths were checked above; those of the slots are by `with_room`, and name
        // slots of this shape.
        unsafe { call.queue(x.gpu()) }
    }
}

/// Sets `h` as [`Forward`] did, from the `rstd` that it set.
#[derive(Debug)]
pub struct Restore<'a> {
    /// `[T, hidden]`
    pub h: &'a mut Matrix<bf16>,
    /// `[T, hidden]`
    pub x: &'a Matrix<f32>,
    /// `[hidden]`
    pub weight: &'a Matrix<f32>,
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// `[T]`
    pub rstd: &'a Matrix<f32>,
}

impl Restore<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Restore { h, x, weight, offset, rstd } = self;
        let [rows, hidden] = check("restore", &[h.len(), x.len()], weight, rstd);
        start(x.gpu(), "restore", [rows, hidden], &[h.arg(), x.arg(), weight.arg(), rstd.arg()], offset)
    }
}

/// Returns the number of values of [`Backward::partials`].
pub fn partials_len(tokens: usize, hidden: usize) -> usize {
    tokens.min(PARTS) * hidden
}

/// Sets `dx`, or adds to it, and adds to `dweight`.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[T, hidden]`
    pub dx: &'a mut Matrix<f32>,
    /// `[hidden]`
    pub dweight: &'a mut Matrix<f32>,
    /// `[T, hidden]`
    pub dy: &'a Matrix<f32>,
    /// `[T, hidden]`
    pub x: &'a Matrix<f32>,
    /// `[hidden]`
    pub weight: &'a Matrix<f32>,
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// `[T]`
    pub rstd: &'a Matrix<f32>,
    /// Scratch memory of [`partials_len`] values.
    pub partials: &'a mut Matrix<f32>,
    /// Adds to `dx` instead of setting it.
    pub add: bool,
}

impl Backward<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Backward { dx, dweight, dy, x, weight, offset, rstd, partials, add } = self;
        let [rows, hidden] = check("backward", &[dx.len(), dy.len(), x.len()], weight, rstd);
        let need = partials_len(rows, hidden);
        let lens = [dweight.len(), partials.len().min(need)];
        assert_eq!(lens, [hidden, need], "cuda rms_norm::backward: dweight, partials");
        let parts = rows.min(PARTS);
        let pointers = [dx.arg(), partials.arg(), dy.arg(), x.arg(), weight.arg(), rstd.arg()];
        let args = [&pointers[..], &[rows.into(), add.into()]].concat();
        start(x.gpu(), "backward", [parts, hidden], &args, offset)?;
        sum_partials(dweight, partials, parts)
    }
}

/// Adds to the vector `out` the sum of the first `parts` rows of `partials`, in order.
pub(super) fn sum_partials(out: &mut Matrix<f32>, partials: &Matrix<f32>, parts: usize) -> Result<()> {
    let width = out.len();
    assert!(partials.len() >= parts * width, "cuda sum_partials: {} of {parts} rows", partials.len());
    let (grid, args) =
        (Grid::row(width.div_ceil(128), 128), [out.arg(), partials.arg(), parts.into(), width.into()]);
    // SAFETY: the lengths were checked above; a thread per value of `out`.
    unsafe { SOURCE.launch(out.gpu(), "sum_partials", &defines(8, Variant::default()), grid, &args) }
}

/// The heads of a matrix, side by side from column `first` on. A single head is the norm over a part of a row.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// The first column.
    pub first: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Added to the weight.
    pub offset: f32,
}

impl Heads {
    /// Checks sizes. Returns the address of the first head, and the number of heads of all rows.
    fn check(
        self,
        op: &str,
        x: &Matrix<bf16>,
        saved: Option<usize>,
        weight: &Matrix<f32>,
        rstd: &Matrix<f32>,
    ) -> (Arg, usize) {
        let (width, count) = (self.heads * weight.len(), x.rows() * self.heads);
        assert!(
            width > 0
                && self.first + width <= x.cols()
                && rstd.len() == count
                && saved.is_none_or(|saved| saved == x.rows() * width),
            "cuda rms_norm::{op}: {} rows of {}, {saved:?} saved, weight {}, rstd {} for {self:?}",
            x.rows(),
            x.cols(),
            weight.len(),
            rstd.len()
        );
        (Arg::Ptr(x.ptr() + (self.first * size_of::<bf16>()) as u64), count)
    }
}

/// Takes the norm of every head in place.
#[derive(Debug)]
pub struct ForwardHeads<'a> {
    /// `[T, width]`
    pub x: &'a mut Matrix<bf16>,
    /// The old values, `[T, heads * head_dim]`: [`BackwardHeads`] needs them.
    pub saved: Option<&'a mut Matrix<bf16>>,
    /// `[T, heads]`
    pub rstd: &'a mut Matrix<f32>,
    /// `[head_dim]`
    pub weight: &'a Matrix<f32>,
    /// The heads.
    pub heads: Heads,
    /// The term that keeps the division finite.
    pub eps: f32,
}

impl ForwardHeads<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let ForwardHeads { x, saved, rstd, weight, heads, eps } = self;
        let saved_len = saved.as_ref().map(|saved| saved.len());
        let (first, count) = heads.check("forward_heads", x, saved_len, weight, rstd);
        let pointers = [first, optional(saved.as_deref()), rstd.arg(), weight.arg()];
        let sizes = [heads.heads, x.cols()].map(Arg::Size);
        let args = [&pointers[..], &sizes, &[Arg::F32(eps)]].concat();
        start(x.gpu(), "norm_heads", [count, weight.len()], &args, heads.offset)
    }
}

/// Turns the gradient of the normed heads into that of the old values, in place, and adds to `dweight`.
#[derive(Debug)]
pub struct BackwardHeads<'a> {
    /// `[T, width]`
    pub dx: &'a mut Matrix<bf16>,
    /// `[head_dim]`
    pub dweight: &'a mut Matrix<f32>,
    /// `[T, heads * head_dim]`, saved by [`ForwardHeads`].
    pub x: &'a Matrix<bf16>,
    /// `[T, heads]`
    pub rstd: &'a Matrix<f32>,
    /// `[head_dim]`
    pub weight: &'a Matrix<f32>,
    /// The heads.
    pub heads: Heads,
    /// Scratch memory of [`partials_len`] values for as many tokens as there are heads.
    pub partials: &'a mut Matrix<f32>,
}

impl BackwardHeads<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let BackwardHeads { dx, dweight, x, rstd, weight, heads, partials } = self;
        let head_dim = weight.len();
        let (first, count) = heads.check("backward_heads", dx, Some(x.len()), weight, rstd);
        assert!(
            dweight.len() == head_dim && partials.len() >= partials_len(count, head_dim),
            "cuda rms_norm::backward_heads: {} partials",
            partials.len()
        );
        let parts = count.min(PARTS);
        let pointers = [first, partials.arg(), x.arg(), weight.arg(), rstd.arg()];
        let sizes = [count, heads.heads, dx.cols()].map(Arg::Size);
        let args = [&pointers[..], &sizes[..]].concat();
        start(dx.gpu(), "backward_heads", [parts, head_dim], &args, heads.offset)?;
        sum_partials(dweight, partials, parts)
    }
}
