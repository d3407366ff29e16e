//! One body per kernel, compiled for every tier.
//!
//! A kernel is a struct of its arguments that implements [`Kernel`]: a body generic over [`Simd`]. `Isa::run`
//! compiles that body once per tier inside a function that enables the tier's features, so the tiers cannot
//! drift apart. The implementors of [`Simd`] are the proofs that the features exist (see [`crate::isa`]).

mod math;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_product;
mod portable;
mod product;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_product;

pub(crate) use math::{clamp, exp, sigmoid, tanh};
pub(crate) use portable::Portable;
pub(crate) use product::{Product, ProductKernel, SQUARE, pair};

/// Lanes of the widest tier.
const MOST_LANES: usize = 16;

/// A vector of `f32` lanes and the operations kernels need.
pub(crate) trait Simd: Copy + Send + Sync {
    /// The vector register.
    type V: Copy;
    /// Lanes in a register.
    const LANES: usize;

    fn splat(self, x: f32) -> Self::V;
    /// Loads the first [`Self::LANES`] values. Panics when there are fewer.
    fn load(self, x: &[f32]) -> Self::V;
    /// Loads up to [`Self::LANES`] values; the missing lanes are 0.
    fn load_tail(self, x: &[f32]) -> Self::V;
    /// Stores to the first [`Self::LANES`] places. Panics when there are fewer.
    fn store(self, out: &mut [f32], v: Self::V);
    /// Stores as many lanes as `out` has, at most [`Self::LANES`].
    fn store_tail(self, out: &mut [f32], v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    /// Returns the larger value, or `b` if one is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// Returns the smaller value, or `b` if one is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Returns `a * b + c`, fused where the tier has it.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Rounds to the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// Returns 2^a for integral `a` in [-126, 127].
    fn exp2_integral(self, a: Self::V) -> Self::V;
    /// Adds the lanes in a fixed order.
    fn reduce_add(self, a: Self::V) -> f32;
    /// Returns the largest lane.
    #[inline(always)]
    fn reduce_max(self, a: Self::V) -> f32 {
        let mut lanes = [0.0; MOST_LANES];
        self.store(&mut lanes, a);
        lanes[..Self::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// A kernel body with its arguments; see the docs of the module.
///
/// Implementations mark `body`, and every function it calls with a [`Simd`], `#[inline(always)]`: only code
/// inlined into the tier's entry function is compiled with the tier's features.
pub(crate) trait Kernel {
    type Output;
    fn body<S: Simd>(self, s: S) -> Self::Output;
}

/// Computes `y[i] += a * x[i]`.
#[inline(always)]
pub(crate) fn axpy<S: Simd>(s: S, y: &mut [f32], a: f32, x: &[f32]) {
    assert_eq!(y.len(), x.len());
    let a = s.splat(a);
    let mut ys = y.chunks_exact_mut(S::LANES);
    let mut xs = x.chunks_exact(S::LANES);
    for (y, x) in (&mut ys).zip(&mut xs) {
        s.store(y, s.fma(a, s.load(x), s.load(y)));
    }
    let y = ys.into_remainder();
    if !y.is_empty() {
        s.store_tail(y, s.fma(a, s.load_tail(xs.remainder()), s.load_tail(y)));
    }
}

/// Returns the sum of `a[i] * b[i]`, with four independent accumulators and a fixed order.
#[inline(always)]
pub(crate) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut acc = [s.splat(0.0); 4];
    let mut a4 = a.chunks_exact(4 * S::LANES);
    let mut b4 = b.chunks_exact(4 * S::LANES);
    for (a, b) in (&mut a4).zip(&mut b4) {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = s.fma(s.load(&a[i * S::LANES..]), s.load(&b[i * S::LANES..]), *acc);
        }
    }
    let mut a1 = a4.remainder().chunks_exact(S::LANES);
    let mut b1 = b4.remainder().chunks_exact(S::LANES);
    for (a, b) in (&mut a1).zip(&mut b1) {
        acc[0] = s.fma(s.load(a), s.load(b), acc[0]);
    }
    if !a1.remainder().is_empty() {
        acc[1] = s.fma(s.load_tail(a1.remainder()), s.load_tail(b1.remainder()), acc[1]);
    }
    s.reduce_add(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])))
}

/// Returns the largest value of `x`, or negative infinity for an empty slice.
#[inline(always)]
pub(crate) fn max_of<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut acc = s.splat(f32::NEG_INFINITY);
    let mut xs = x.chunks_exact(S::LANES);
    for x in &mut xs {
        acc = s.max(acc, s.load(x));
    }
    xs.remainder().iter().fold(s.reduce_max(acc), |m, &v| m.max(v))
}

/// Sets `x = cap tanh(x / cap)`.
#[inline(always)]
pub(crate) fn soft_cap<S: Simd>(s: S, x: &mut [f32], cap: f32) {
    let (shrink, cap) = (s.splat(1.0 / cap), s.splat(cap));
    let mut whole = x.chunks_exact_mut(S::LANES);
    for x in &mut whole {
        s.store(x, s.mul(cap, tanh(s, s.mul(s.load(x), shrink))));
    }
    let x = whole.into_remainder();
    if !x.is_empty() {
        s.store_tail(x, s.mul(cap, tanh(s, s.mul(s.load_tail(x), shrink))));
    }
}
