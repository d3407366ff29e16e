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
use crate::buf::with_spare;
use crate::isa::Isa;

fn check(op: &str, values: [usize; 2], rstd: usize, weight: usize, hidden: usize) {
    assert!(
        hidden > 0 && weight == hidden && values == [rstd * hidden; 2],
        "{op}: {values:?} values, rstd {rstd}, weight {weight}, hidden {hidden}"
    );
}

/// Sets `y` `[T, hidden]` and `rstd` `[T]` from `x` `[T, hidden]` and `weight` `[hidden]`.
///
/// # Panics
/// Lengths do not fit.
pub fn forward(y: &mut [f32], rstd: &mut [f32], x: &[f32], weight: &[f32], eps: f32, hidden: usize) {
    forward_on(Isa::current(), y, rstd, x, weight, eps, hidden);
}

/// [`forward`] on a given tier.
pub fn forward_on(
    isa: Isa,
    y: &mut [f32],
    rstd: &mut [f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
    hidden: usize,
) {
    check("rms_norm::forward", [y.len(), x.len()], rstd.len(), weight.len(), hidden);
    let rows = block_rows(hidden);
    let blocks = y.par_chunks_mut(rows * hidden).zip(rstd.par_chunks_mut(rows));
    each(blocks.zip(x.par_chunks(rows * hidden)), |((y, rstd), x)| {
        isa.run(kernel::Forward { y, rstd, x, weight, eps });
    });
}

/// Sets `x` to `a + b`, all `[T, hidden]`, and `y` and `rstd` to the norm of that.
///
/// # Panics
/// Lengths do not fit.
#[expect(clippy::too_many_arguments, reason = "the op's operands, in the order of its formula")]
pub fn forward_sum(
    y: &mut [f32],
    rstd: &mut [f32],
    x: &mut [f32],
    a: &[f32],
    b: &[f32],
    weight: &[f32],
    eps: f32,
    hidden: usize,
) {
    forward_sum_on(Isa::current(), y, rstd, x, a, b, weight, eps, hidden);
}

/// [`forward_sum`] on a given tier.
#[expect(clippy::too_many_arguments, reason = "the op's operands, in the order of its formula")]
pub fn forward_sum_on(
    isa: Isa,
    y: &mut [f32],
    rstd: &mut [f32],
    x: &mut [f32],
    a: &[f32],
    b: &[f32],
    weight: &[f32],
    eps: f32,
    hidden: usize,
) {
    check("rms_norm::forward_sum", [y.len(), x.len()], rstd.len(), weight.len(), hidden);
    check("rms_norm::forward_sum", [a.len(), b.len()], rstd.len(), weight.len(), hidden);
    let rows = block_rows(hidden);
    let outputs =
        y.par_chunks_mut(rows * hidden).zip(rstd.par_chunks_mut(rows)).zip(x.par_chunks_mut(rows * hidden));
    let inputs = a.par_chunks(rows * hidden).zip(b.par_chunks(rows * hidden));
    each(outputs.zip(inputs), |(((y, rstd), x), (a, b))| {
        isa.run(kernel::ForwardSum { y, rstd, x, a, b, weight, eps });
    });
}

/// Sets `y` again to what [`forward`] set it to, from its `x`, `weight` and `rstd`.
///
/// # Panics
/// Lengths do not fit.
pub fn restore(y: &mut [f32], x: &[f32], weight: &[f32], rstd: &[f32], hidden: usize) {
    restore_on(Isa::current(), y, x, weight, rstd, hidden);
}

/// [`restore`] on a given tier.
pub fn restore_on(isa: Isa, y: &mut [f32], x: &[f32], weight: &[f32], rstd: &[f32], hidden: usize) {
    check("rms_norm::restore", [y.len(), x.len()], rstd.len(), weight.len(), hidden);
    let rows = block_rows(hidden);
    let blocks = y.par_chunks_mut(rows * hidden).zip(x.par_chunks(rows * hidden)).zip(rstd.par_chunks(rows));
    each(blocks, |((y, x), rstd)| isa.run(kernel::Restore { y, x, weight, rstd }));
}

/// Sets `dx` `[T, hidden]` and adds to `dweight` `[hidden]`; `rstd` `[T]` is the forward pass's.
///
/// # Panics
/// Lengths do not fit.
pub fn backward(
    dx: &mut [f32],
    dweight: &mut [f32],
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    hidden: usize,
) {
    backward_on(Isa::current(), dx, dweight, dy, x, weight, rstd, hidden, false);
}

/// [`backward`] that adds to `dx`: the input of a norm is the residual stream, which has a gradient already.
///
/// # Panics
/// Lengths do not fit.
pub fn backward_add(
    dx: &mut [f32],
    dweight: &mut [f32],
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    hidden: usize,
) {
    backward_on(Isa::current(), dx, dweight, dy, x, weight, rstd, hidden, true);
}

/// [`backward`], or with `add` [`backward_add`], on a given tier.
#[expect(clippy::too_many_arguments, reason = "the op's operands, in the order of its formula")]
pub fn backward_on(
    isa: Isa,
    dx: &mut [f32],
    dweight: &mut [f32],
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    hidden: usize,
    add: bool,
) {
    check("rms_norm::backward", [dx.len(), x.len()], rstd.len(), weight.len(), hidden);
    check("rms_norm::backward", [dy.len(), x.len()], rstd.len(), dweight.len(), hidden);
    // A block's sums cost a row each: few of them.
    let rows = (2 * BLOCK / hidden).max(8);
    with_spare(rstd.len().div_ceil(rows) * hidden, |sums| {
        let grads = dx.par_chunks_mut(rows * hidden).zip(sums.par_chunks_mut(hidden));
        let inputs = dy.par_chunks(rows * hidden).zip(x.par_chunks(rows * hidden)).zip(rstd.par_chunks(rows));
        each(grads.zip(inputs), |((dx, dweight), ((dy, x), rstd))| {
            dweight.fill(0.0);
            isa.run(kernel::Backward { dx, dweight, dy, x, weight, rstd, add });
        });
        for sums in sums.chunks_exact(hidden) {
            super::add::add_on(isa, dweight, sums);
        }
    });
}
