//! Elementary functions on vectors.

use super::Simd;

/// Returns e^x, within 2 ULP on [-87.3, 88.3]. It is clamped outside, so that it never overflows or becomes denormal.
/// NaN stays NaN.
///
/// x = n ln 2 + r with |r| <= ln(2)/2; the polynomial for e^r is the degree-6 one of Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let (q, power) = exp_parts(s, clamp(s, x, [-87.3, 88.3]));
    s.mul(s.add(q, s.splat(1.0)), power)
}

/// Returns `x` inside the bounds; NaN stays NaN.
#[inline(always)]
pub(crate) fn clamp<S: Simd>(s: S, x: S::V, [low, high]: [f32; 2]) -> S::V {
    // `max` and `min` return their second operand when one is NaN.
    s.min(s.splat(high), s.max(s.splat(low), x))
}

/// Returns `(e^r - 1, 2^n)` of x = n ln 2 + r.
#[inline(always)]
fn exp_parts<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    (s.fma(s.mul(r, r), p, r), s.exp2_integral(n))
}

/// Returns 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// Returns tanh(x), within 4 ULP. NaN stays NaN.
///
/// tanh(x) = m / (m + 2) with m = e^(2x) - 1 = (e^r - 1) 2^n + (2^n - 1), which has no cancellation.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    // Past 10 the result is 1 to the last place.
    let (q, power) = exp_parts(s, clamp(s, s.add(x, x), [-20.0, 20.0]));
    let m = s.fma(q, power, s.sub(power, s.splat(1.0)));
    s.div(m, s.add(m, s.splat(2.0)))
}
