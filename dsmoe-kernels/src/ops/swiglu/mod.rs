//! The gated unit of LLaMA's FFN, elementwise.
//!
//! ```text
//! forward   c = silu(a) * b,  silu(a) = a sigmoid(a)
//! backward  db = dc silu(a)                                    set
//!           da = dc b s (1 + a (1 - s)),  s = sigmoid(a)       set
//! ```

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{BLOCK, each};
use crate::isa::Isa;

/// Sets `c = silu(a) * b`.
///
/// # Panics
/// The lengths differ.
pub fn forward(c: &mut [f32], a: &[f32], b: &[f32]) {
    forward_on(Isa::current(), c, a, b);
}

/// [`forward`] on a given tier.
pub fn forward_on(isa: Isa, c: &mut [f32], a: &[f32], b: &[f32]) {
    assert!(
        c.len() == a.len() && c.len() == b.len(),
        "swiglu::forward: c {}, a {}, b {} values",
        c.len(),
        a.len(),
        b.len()
    );
    let blocks = c.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK));
    each(blocks, |((c, a), b)| isa.run(kernel::Forward { c, a, b }));
}

/// Sets `da` and `db`.
///
/// # Panics
/// The lengths differ.
pub fn backward(da: &mut [f32], db: &mut [f32], dc: &[f32], a: &[f32], b: &[f32]) {
    backward_on(Isa::current(), da, db, dc, a, b);
}

/// [`backward`] on a given tier.
pub fn backward_on(isa: Isa, da: &mut [f32], db: &mut [f32], dc: &[f32], a: &[f32], b: &[f32]) {
    assert!(
        [da.len(), db.len(), a.len(), b.len()] == [dc.len(); 4],
        "swiglu::backward: da {}, db {}, dc {}, a {}, b {} values",
        da.len(),
        db.len(),
        dc.len(),
        a.len(),
        b.len()
    );
    let grads = da.par_chunks_mut(BLOCK).zip(db.par_chunks_mut(BLOCK)).zip(dc.par_chunks(BLOCK));
    let blocks = grads.zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK));
    each(blocks, |((((da, db), dc), a), b)| isa.run(kernel::Backward { da, db, dc, a, b }));
}
