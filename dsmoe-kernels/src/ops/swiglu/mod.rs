//! The gated unit of LLaMA's FFN, elementwise.
//!
//! ```text
//! forward   c = act(a) * b,  act(a) = a sigmoid(a), or another activation
//! backward  db = dc act(a)          set
//!           da = dc b act'(a)       set;  silu'(a) = s (1 + a (1 - s)),  s = sigmoid(a)
//! ```

pub(crate) mod activation;
mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

pub use activation::Activation;

use super::blocks::{BLOCK, each};
use crate::isa::Isa;
use activation::with_unit;

/// Sets `c = act(a) * b`.
#[derive(Debug)]
pub struct Forward<'a> {
    /// Set.
    pub c: &'a mut [f32],
    /// Has the length of `c`.
    pub a: &'a [f32],
    /// Has the length of `c`.
    pub b: &'a [f32],
    /// The activation of a.
    pub activation: Activation,
}

/// Sets `da` and `db`.
#[derive(Debug)]
pub struct Backward<'a> {
    /// Set.
    pub da: &'a mut [f32],
    /// Set; as long as `da`.
    pub db: &'a mut [f32],
    /// Has the length of `da`.
    pub dc: &'a [f32],
    /// `a` of the forward pass.
    pub a: &'a [f32],
    /// `b` of the forward pass.
    pub b: &'a [f32],
    /// The activation of a.
    pub activation: Activation,
}

run_on_current_tier!(Forward, Backward);

impl Forward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run_on(self, isa: Isa) {
        let Forward { c, a, b, activation } = self;
        assert_eq!([a.len(), b.len()], [c.len(); 2], "swiglu::Forward: a and b for {} values", c.len());
        let blocks = c.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK));
        with_unit!(activation, unit => {
            each(blocks, |((c, a), b)| isa.run(kernel::Forward { c, a, b, unit }));
        });
    }
}

impl Backward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run_on(self, isa: Isa) {
        let Backward { da, db, dc, a, b, activation } = self;
        let lens = [da.len(), db.len(), a.len(), b.len()];
        assert_eq!(lens, [dc.len(); 4], "swiglu::Backward: da, db, a and b for {} values", dc.len());
        let grads = da.par_chunks_mut(BLOCK).zip(db.par_chunks_mut(BLOCK)).zip(dc.par_chunks(BLOCK));
        let blocks = grads.zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK));
        with_unit!(activation, unit => {
            each(blocks, |((((da, db), dc), a), b)| isa.run(kernel::Backward { da, db, dc, a, b, unit }));
        });
    }
}
