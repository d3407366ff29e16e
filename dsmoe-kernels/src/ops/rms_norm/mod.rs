//! RMSNorm over the rows of x.
//!
//! ```text
//! forward   rstd[t] = 1 / sqrt(mean_j x[t,j]^2 + eps)                   kept for the backward pass
//!           y[t,j] = x[t,j] rstd[t] (w[j] + offset)                      x, y [T, hidden], w [hidden]
//!           or of x = a + b, which is stored too: a residual join and the norm after it
//! backward  g = dy * (w + offset)
//!           dx = rstd (g - x rstd^2 <g, x> / hidden)                     set, or added to
//!           dw[j] += sum_t dy[t,j] x[t,j] rstd[t]                        added to
//! ```
//! Rows are cut into blocks by shape; the blocks' sums for dw are added in their order. The form over heads takes the norm
//! of every head of a row by itself, with one weight `[head_dim]` for all, in place in some columns of a matrix.

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{BLOCK, block_rows, each};
use crate::add::Add;
use crate::buf::with_spare;
use crate::isa::Isa;

/// Sets `y` and `rstd` from `x`.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[T, hidden]`, set.
    pub y: &'a mut [f32],
    /// `[T]`, set.
    pub rstd: &'a mut [f32],
    /// `[T, hidden]`
    pub x: &'a [f32],
    /// `[hidden]`
    pub weight: &'a [f32],
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Sets `x` to `a + b`, and `y` and `rstd` to the norm of that.
#[derive(Debug)]
pub struct ForwardSum<'a> {
    /// `[T, hidden]`, set.
    pub y: &'a mut [f32],
    /// `[T]`, set.
    pub rstd: &'a mut [f32],
    /// `[T, hidden]`, set.
    pub x: &'a mut [f32],
    /// `[T, hidden]`
    pub a: &'a [f32],
    /// `[T, hidden]`
    pub b: &'a [f32],
    /// `[hidden]`
    pub weight: &'a [f32],
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Recomputes the `y` of [`Forward`] from its `x`, `weight` and `rstd`.
#[derive(Debug)]
pub struct Restore<'a> {
    /// `[T, hidden]`, set.
    pub y: &'a mut [f32],
    /// `[T, hidden]`
    pub x: &'a [f32],
    /// `[hidden]`
    pub weight: &'a [f32],
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// `[T]`
    pub rstd: &'a [f32],
}

/// Sets `dx`, or adds to it, and adds to `dweight`.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[T, hidden]`, set; with `add`, added to.
    pub dx: &'a mut [f32],
    /// `[hidden]`, added to.
    pub dweight: &'a mut [f32],
    /// `[T, hidden]`
    pub dy: &'a [f32],
    /// `[T, hidden]`
    pub x: &'a [f32],
    /// `[hidden]`
    pub weight: &'a [f32],
    /// Added to the weight: 0, or 1 where the weights are stored as their distance from 1.
    pub offset: f32,
    /// `[T]`, from the forward pass.
    pub rstd: &'a [f32],
    /// Adds to `dx`: the input of a norm is the residual stream, which has a gradient already.
    pub add: bool,
}

/// The heads of a row, and the constants of their norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Heads of a row, side by side from its first column on. A single head is the norm over a row's first columns.
    pub heads: usize,
    /// Distance of two rows; at least the width of the heads.
    pub stride: usize,
    /// Added to the weight.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Takes the norm of every head in place. To norm columns in the middle of a matrix, let `x` start at the first of them.
#[derive(Debug)]
pub struct ForwardHeads<'a> {
    /// The heads' columns, set from their old values; the other columns stay. It may end with the last row's heads.
    pub x: &'a mut [f32],
    /// `[T, heads * head_dim]`, set to the old values: [`BackwardHeads`] needs them.
    pub saved: Option<&'a mut [f32]>,
    /// `[T, heads]`, set.
    pub rstd: &'a mut [f32],
    /// `[head_dim]`
    pub weight: &'a [f32],
    /// The heads.
    pub heads: Heads,
}

/// Turns the gradient of the normed heads into that of the old values, in place, and adds to `dweight`.
#[derive(Debug)]
pub struct BackwardHeads<'a> {
    /// The heads' columns, dy before and dx after; the other columns stay. It may end with the last row's heads.
    pub dx: &'a mut [f32],
    /// `[head_dim]`, added to.
    pub dweight: &'a mut [f32],
    /// `[T, heads * head_dim]`: `saved` of the forward pass.
    pub x: &'a [f32],
    /// `[T, heads]`, from the forward pass.
    pub rstd: &'a [f32],
    /// `[head_dim]`
    pub weight: &'a [f32],
    /// The heads.
    pub heads: Heads,
}

impl Heads {
    /// Checks lengths, `rows` being that of the strided matrix, and returns the width of the heads.
    fn check(self, op: &str, rows: usize, rstd: usize, saved: Option<usize>, head_dim: usize) -> usize {
        let Heads { heads, stride, .. } = self;
        let (tokens, width) = (rstd / heads.max(1), heads * head_dim);
        assert!(
            width > 0
                && stride >= width
                && rstd == tokens * heads
                && rows.div_ceil(stride) == tokens
                && (tokens == 0 || rows >= (tokens - 1) * stride + width)
                && saved.is_none_or(|saved| saved == tokens * width),
            "rms_norm::{op}: {rows} values, rstd {rstd}, saved {saved:?}, weight {head_dim} for {self:?}"
        );
        width
    }
}

fn check(op: &str, values: [usize; 2], rstd: usize, hidden: usize) {
    assert!(
        hidden > 0 && values == [rstd * hidden; 2],
        "rms_norm::{op}: {values:?} values, rstd {rstd}, weight {hidden}"
    );
}

run_on_current_tier!(Forward, ForwardSum, Restore, Backward, ForwardHeads, BackwardHeads);

impl Forward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let Forward { y, rstd, x, weight, offset, eps } = self;
        let hidden = weight.len();
        check("Forward", [y.len(), x.len()], rstd.len(), hidden);
        let rows = block_rows(hidden);
        let blocks = y.par_chunks_mut(rows * hidden).zip(rstd.par_chunks_mut(rows));
        each(blocks.zip(x.par_chunks(rows * hidden)), |((y, rstd), x)| {
            isa.run(Forward { y, rstd, x, weight, offset, eps });
        });
    }
}

impl ForwardSum<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let ForwardSum { y, rstd, x, a, b, weight, offset, eps } = self;
        let hidden = weight.len();
        check("ForwardSum", [y.len(), x.len()], rstd.len(), hidden);
        check("ForwardSum", [a.len(), b.len()], rstd.len(), hidden);
        let rows = block_rows(hidden);
        let outputs = y
            .par_chunks_mut(rows * hidden)
            .zip(rstd.par_chunks_mut(rows))
            .zip(x.par_chunks_mut(rows * hidden));
        let inputs = a.par_chunks(rows * hidden).zip(b.par_chunks(rows * hidden));
        each(outputs.zip(inputs), |(((y, rstd), x), (a, b))| {
            isa.run(ForwardSum { y, rstd, x, a, b, weight, offset, eps });
        });
    }
}

impl Restore<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let Restore { y, x, weight, offset, rstd } = self;
        let hidden = weight.len();
        check("Restore", [y.len(), x.len()], rstd.len(), hidden);
        let rows = block_rows(hidden);
        let blocks =
            y.par_chunks_mut(rows * hidden).zip(x.par_chunks(rows * hidden)).zip(rstd.par_chunks(rows));
        each(blocks, |((y, x), rstd)| isa.run(Restore { y, x, weight, offset, rstd }));
    }
}

impl Backward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let Backward { dx, dweight, dy, x, weight, offset, rstd, add } = self;
        let hidden = weight.len();
        check("Backward", [dx.len(), x.len()], rstd.len(), hidden);
        check("Backward", [dy.len(), x.len()], rstd.len(), hidden);
        assert_eq!(dweight.len(), hidden, "rms_norm::Backward: dweight");
        let rows = backward_rows(hidden);
        with_spare(rstd.len().div_ceil(rows) * hidden, |sums| {
            let grads = dx.par_chunks_mut(rows * hidden).zip(sums.par_chunks_mut(hidden));
            let inputs =
                dy.par_chunks(rows * hidden).zip(x.par_chunks(rows * hidden)).zip(rstd.par_chunks(rows));
            each(grads.zip(inputs), |((dx, dweight), ((dy, x), rstd))| {
                dweight.fill(0.0);
                isa.run(Backward { dx, dweight, dy, x, weight, offset, rstd, add });
            });
            for sums in sums.chunks_exact(hidden) {
                Add { y: dweight, x: sums, scale: 1.0 }.run_on(isa);
            }
        });
    }
}

/// Returns the rows of a block of the backward pass. A block's sums cost a row each: few of them.
fn backward_rows(width: usize) -> usize {
    (2 * BLOCK / width).max(8)
}

impl ForwardHeads<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let ForwardHeads { x, saved, rstd, weight, heads } = self;
        let saved_len = saved.as_ref().map(|saved| saved.len());
        let width = heads.check("ForwardHeads", x.len(), rstd.len(), saved_len, weight.len());
        let rows = block_rows(heads.stride);
        let blocks = x.par_chunks_mut(rows * heads.stride).zip(rstd.par_chunks_mut(rows * heads.heads));
        let Some(saved) = saved else {
            each(blocks, |(x, rstd)| isa.run(kernel::NormHeads { x, rstd, weight, heads }));
            return;
        };
        each(blocks.zip(saved.par_chunks_mut(rows * width)), |((x, rstd), saved)| {
            for (x, saved) in x.chunks(heads.stride).zip(saved.chunks_exact_mut(width)) {
                saved.copy_from_slice(&x[..width]);
            }
            isa.run(kernel::NormHeads { x, rstd, weight, heads });
        });
    }
}

impl BackwardHeads<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let BackwardHeads { dx, dweight, x, rstd, weight, heads } = self;
        let head_dim = weight.len();
        let width = heads.check("BackwardHeads", dx.len(), rstd.len(), Some(x.len()), head_dim);
        assert_eq!(dweight.len(), head_dim, "rms_norm::BackwardHeads: dweight");
        let rows = backward_rows(width);
        let blocks = (rstd.len() / heads.heads).div_ceil(rows);
        // A block's sums, and room for the gradient of one head.
        with_spare(blocks * 2 * head_dim, |spare| {
            let grads = dx.par_chunks_mut(rows * heads.stride).zip(spare.par_chunks_mut(2 * head_dim));
            let inputs = x.par_chunks(rows * width).zip(rstd.par_chunks(rows * heads.heads));
            each(grads.zip(inputs), |((dx, spare), (x, rstd))| {
                let (dweight, dy) = spare.split_at_mut(head_dim);
                dweight.fill(0.0);
                isa.run(kernel::NormHeadsBackward { dx, dweight, dy, x, rstd, weight, heads });
            });
            for spare in spare.chunks_exact(2 * head_dim) {
                Add { y: dweight, x: &spare[..head_dim], scale: 1.0 }.run_on(isa);
            }
        });
    }
}
