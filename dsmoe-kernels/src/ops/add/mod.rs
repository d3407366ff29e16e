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
    sum_on(Isa::current(), out, a, b);
}

/// [`sum`] on a given tier.
pub fn sum_on(isa: Isa, out: &mut [f32], a: &[f32], b: &[f32]) {
    assert_eq!([a.len(), b.len()], [out.len(); 2], "add::sum: a and b for {} values", out.len());
    let blocks = out.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK));
    each(blocks, |((out, a), b)| isa.run(Sum { out, a, b }));
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

/// Sets `out = a + b`, equally long.
pub(crate) struct Sum<'a> {
    pub(crate) out: &'a mut [f32],
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
}

impl Kernel for Sum<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Sum { out, a, b } = self;
        let head = out.len() - out.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            s.store(&mut out[j..], s.add(s.load(&a[j..]), s.load(&b[j..])));
        }
        if head < out.len() {
            s.store_tail(&mut out[head..], s.add(s.load_tail(&a[head..]), s.load_tail(&b[head..])));
        }
    }
}
