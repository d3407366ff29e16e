//! Elementwise sum: the residual join.
//!
//! ```text
//! forward   y += scale x      or      out = a + b
//! backward  dx = scale dy (Scale);  da = db = dout: nothing to compute
//! ```

pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{BLOCK, each};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd};

/// Adds `scale * x` to `y`.
#[derive(Debug)]
pub struct Add<'a> {
    /// Added to.
    pub y: &'a mut [f32],
    /// Has the length of `y`.
    pub x: &'a [f32],
    /// 1 for a plain sum.
    pub scale: f32,
}

/// Sets `y = scale * x`.
#[derive(Debug)]
pub struct Scale<'a> {
    /// Set.
    pub y: &'a mut [f32],
    /// Has the length of `y`.
    pub x: &'a [f32],
    /// The factor.
    pub scale: f32,
}

/// Sets `out = a + b`.
#[derive(Debug)]
pub struct Sum<'a> {
    /// Set.
    pub out: &'a mut [f32],
    /// Has the length of `out`.
    pub a: &'a [f32],
    /// Has the length of `out`.
    pub b: &'a [f32],
}

run_on_current_tier!(Add, Scale, Sum);

impl Add<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run_on(self, isa: Isa) {
        let Add { y, x, scale } = self;
        assert_eq!(y.len(), x.len(), "add::Add: y {} values, x {}", y.len(), x.len());
        each(y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)), |(y, x)| isa.run(Add { y, x, scale }));
    }
}

impl Scale<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run_on(self, isa: Isa) {
        let Scale { y, x, scale } = self;
        assert_eq!(y.len(), x.len(), "add::Scale: y {} values, x {}", y.len(), x.len());
        each(y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)), |(y, x)| isa.run(Scale { y, x, scale }));
    }
}

impl Sum<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run_on(self, isa: Isa) {
        let Sum { out, a, b } = self;
        assert_eq!([a.len(), b.len()], [out.len(); 2], "add::Sum: a and b for {} values", out.len());
        let blocks = out.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK));
        each(blocks, |((out, a), b)| isa.run(Sum { out, a, b }));
    }
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        crate::simd::axpy(s, self.y, self.scale, self.x);
    }
}

impl Kernel for Scale<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Scale { y, x, scale } = self;
        let scale = s.splat(scale);
        let head = y.len() - y.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            s.store(&mut y[j..], s.mul(scale, s.load(&x[j..])));
        }
        if head < y.len() {
            s.store_tail(&mut y[head..], s.mul(scale, s.load_tail(&x[head..])));
        }
    }
}

impl Kernel for Sum<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
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
