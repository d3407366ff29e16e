//! Elementwise sum: the residual join.
//!
//! ```text
//! forward   y += x      or      out = a + b
//! backward  dx = dy, da = db = dout: nothing to compute
//! ```

pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{BLOCK, each};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd};

/// Adds `x` to `y`.
///
/// # Panics
/// The lengths differ.
pub fn add(y: &mut [f32], x: &[f32]) {
    add_on(Isa::current(), y, x);
}

/// [`add`] on a given tier.
pub fn add_on(isa: Isa, y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "add::add: y {} values, x {}", y.len(), x.len());
    each(y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)), |(y, x)| isa.run(Add { y, x }));
}

/// Sets `out = a + b`.
///
/// # Panics
/// The lengths differ.
pub fn sum(out: &mut [f32], a: &[f32], b: &[f32]) {
    assert_eq!(out.len(), a.len(), "add::sum: out {} values, a {}", out.len(), a.len());
    out.copy_from_slice(a);
    add(out, b);
}

struct Add<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        crate::simd::axpy(s, self.y, 1.0, self.x);
    }
}
