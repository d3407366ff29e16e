//! RMSNorm over the rows of x.
//!
//! ```text
//! forward   rstd[t] = 1 / sqrt(mean_j x[t,j]^2 + eps)                   kept for the backward pass
//!           y[t,j] = x[t,j] rstd[t] w[j]                                 x, y [T, hidden], w [hidden]
//!           or of x = a + b, which is stored too: a residual join and the norm after it
//! backward  g = dy * w;  dx = rstd (g - x rstd^2 <g, x> / hidden)        set, or added to
//!           dw[j] += sum_t dy[t,j] x[t,j] rstd[t]                        added to
//! ```
//! Rows are cut into blocks by shape; the blocks' sums for dw are added in their order.

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
    /// `[T]`, from the forward pass.
    pub rstd: &'a [f32],
    /// Adds to `dx`: the input of a norm is the residual stream, which has a gradient already.
    pub add: bool,
}

fn check(op: &str, values: [usize; 2], rstd: usize, hidden: usize) {
    assert!(
        hidden > 0 && values == [rstd * hidden; 2],
        "rms_norm::{op}: {values:?} values, rstd {rstd}, weight {hidden}"
    );
}

run_on_current_tier!(Forward, ForwardSum, Restore, Backward);

impl Forward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let Forward { y, rstd, x, weight, eps } = self;
        let hidden = weight.len();
        check("Forward", [y.len(), x.len()], rstd.len(), hidden);
        let rows = block_rows(hidden);
        let blocks = y.par_chunks_mut(rows * hidden).zip(rstd.par_chunks_mut(rows));
        each(blocks.zip(x.par_chunks(rows * hidden)), |((y, rstd), x)| {
            isa.run(Forward { y, rstd, x, weight, eps });
        });
    }
}

impl ForwardSum<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let ForwardSum { y, rstd, x, a, b, weight, eps } = self;
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
            isa.run(ForwardSum { y, rstd, x, a, b, weight, eps });
        });
    }
}

impl Restore<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let Restore { y, x, weight, rstd } = self;
        let hidden = weight.len();
        check("Restore", [y.len(), x.len()], rstd.len(), hidden);
        let rows = block_rows(hidden);
        let blocks =
            y.par_chunks_mut(rows * hidden).zip(x.par_chunks(rows * hidden)).zip(rstd.par_chunks(rows));
        each(blocks, |((y, x), rstd)| isa.run(Restore { y, x, weight, rstd }));
    }
}

impl Backward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths do not fit.
    pub fn run_on(self, isa: Isa) {
        let Backward { dx, dweight, dy, x, weight, rstd, add } = self;
        let hidden = weight.len();
        check("Backward", [dx.len(), x.len()], rstd.len(), hidden);
        check("Backward", [dy.len(), x.len()], rstd.len(), hidden);
        assert_eq!(dweight.len(), hidden, "rms_norm::Backward: dweight");
        // A block's sums cost a row each: few of them.
        let rows = (2 * BLOCK / hidden).max(8);
        with_spare(rstd.len().div_ceil(rows) * hidden, |sums| {
            let grads = dx.par_chunks_mut(rows * hidden).zip(sums.par_chunks_mut(hidden));
            let inputs =
                dy.par_chunks(rows * hidden).zip(x.par_chunks(rows * hidden)).zip(rstd.par_chunks(rows));
            each(grads.zip(inputs), |((dx, dweight), ((dy, x), rstd))| {
                dweight.fill(0.0);
                isa.run(Backward { dx, dweight, dy, x, weight, rstd, add });
            });
            for sums in sums.chunks_exact(hidden) {
                Add { y: dweight, x: sums }.run_on(isa);
            }
        });
    }
}
