//! The NEON tiers.
//!
//! A vector is two registers of 128 bits. With 8 lanes a tile of a matrix product is 16 columns wide, so that a step reads a
//! whole cache line of a panel, and loops that add have twice the chains.
//!
//! Every method takes the tier's token by value. A token exists only where `Isa::available` has seen the
//! features, which is the proof each `unsafe` block below refers to as "token".

use std::arch::aarch64::*;

use super::{Kernel, ProductKernel, Simd};
use crate::isa::{Neon, NeonBf16};

/// Compiles `kernel` with NEON.
pub(crate) fn run<K: Kernel>(token: Neon, kernel: K) -> K::Output {
    #[target_feature(enable = "neon")]
    fn inner<K: Kernel>(token: Neon, kernel: K) -> K::Output {
        kernel.body(token)
    }
    // SAFETY: token: NEON is present.
    unsafe { inner(token, kernel) }
}

/// Compiles `kernel` with NEON.
pub(crate) fn run_product<K: ProductKernel>(token: Neon, kernel: K) -> K::Output {
    #[target_feature(enable = "neon")]
    #[inline(never)]
    fn inner<K: ProductKernel>(token: Neon, kernel: K) -> K::Output {
        kernel.body(token)
    }
    // SAFETY: token: NEON is present.
    unsafe { inner(token, kernel) }
}

/// Compiles `kernel` with NEON and its bf16 products.
pub(crate) fn run_product_bf16<K: ProductKernel>(token: NeonBf16, kernel: K) -> K::Output {
    #[target_feature(enable = "neon,bf16")]
    #[inline(never)]
    fn inner<K: ProductKernel>(token: NeonBf16, kernel: K) -> K::Output {
        kernel.body(token)
    }
    // SAFETY: token: NEON and BF16 are present.
    unsafe { inner(token, kernel) }
}

/// Applies an instruction to both registers of its operands.
macro_rules! both {
    ($instruction:expr; $($operand:expr),+) => {{
        // SAFETY: token: NEON is present.
        let low = unsafe { $instruction($($operand.0),+) };
        // SAFETY: as above.
        let high = unsafe { $instruction($($operand.1),+) };
        float32x4x2_t(low, high)
    }};
}

/// Loads 4 values, of which `x` may lack some; those are 0.
#[inline]
#[target_feature(enable = "neon")]
fn load4(x: &[f32]) -> float32x4_t {
    let four = match *x {
        [] => [0.0; 4],
        [a] => [a, 0.0, 0.0, 0.0],
        [a, b] => [a, b, 0.0, 0.0],
        [a, b, c] => [a, b, c, 0.0],
        [a, b, c, d, ..] => [a, b, c, d],
    };
    // SAFETY: `four` holds 4 f32, and the load has no alignment requirement.
    unsafe { vld1q_f32(four.as_ptr()) }
}

/// Stores as many lanes as `out` has, at most 4.
#[inline]
#[target_feature(enable = "neon")]
fn store4(out: &mut [f32], v: float32x4_t) {
    match out {
        [] => {}
        [a] => *a = vgetq_lane_f32::<0>(v),
        [a, b] => (*a, *b) = (vgetq_lane_f32::<0>(v), vgetq_lane_f32::<1>(v)),
        [a, b, c] => {
            (*a, *b, *c) = (vgetq_lane_f32::<0>(v), vgetq_lane_f32::<1>(v), vgetq_lane_f32::<2>(v));
        }
        // SAFETY: `out` holds 4 f32 at least, and the store has no alignment requirement.
        _ => unsafe { vst1q_f32(out.as_mut_ptr(), v) },
    }
}

/// Returns `a` where it is larger, else `b`: `fmax` has another result for NaN.
#[inline]
#[target_feature(enable = "neon")]
fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcgtq_f32(a, b), a, b)
}

/// Returns `a` where it is smaller, else `b`.
#[inline]
#[target_feature(enable = "neon")]
fn smaller(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcltq_f32(a, b), a, b)
}

/// Returns 2^a.
#[inline]
#[target_feature(enable = "neon")]
fn power_of_two(a: float32x4_t) -> float32x4_t {
    let exponent = vaddq_s32(vcvtnq_s32_f32(a), vdupq_n_s32(127));
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
}

/// Adds the lanes: the upper half to the lower half until one is left.
#[inline]
#[target_feature(enable = "neon")]
fn sum_of_8(a: float32x4x2_t) -> f32 {
    let four = vaddq_f32(a.0, a.1);
    let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
}

/// The tiers differ in their matrix products alone.
macro_rules! eight_lanes {
    ($token:ty) => {
        impl Simd for $token {
            type V = float32x4x2_t;
            const LANES: usize = 8;

            #[inline(always)]
            fn splat(self, x: f32) -> Self::V {
                // SAFETY: token.
                let x = unsafe { vdupq_n_f32(x) };
                float32x4x2_t(x, x)
            }
            #[inline(always)]
            fn load(self, x: &[f32]) -> Self::V {
                let (low, high) = x[..8].split_at(4);
                // SAFETY: token; `low` holds 4 f32, and the load has no alignment requirement.
                let low = unsafe { vld1q_f32(low.as_ptr()) };
                // SAFETY: as above, for `high`.
                float32x4x2_t(low, unsafe { vld1q_f32(high.as_ptr()) })
            }
            #[inline(always)]
            fn load_tail(self, x: &[f32]) -> Self::V {
                // SAFETY: token.
                let low = unsafe { load4(x) };
                // SAFETY: token.
                float32x4x2_t(low, unsafe { load4(x.get(4..).unwrap_or(&[])) })
            }
            #[inline(always)]
            fn store(self, out: &mut [f32], v: Self::V) {
                let (low, high) = out[..8].split_at_mut(4);
                // SAFETY: token; `low` holds 4 f32, and the store has no alignment requirement.
                unsafe { vst1q_f32(low.as_mut_ptr(), v.0) };
                // SAFETY: as above, for `high`.
                unsafe { vst1q_f32(high.as_mut_ptr(), v.1) };
            }
            #[inline(always)]
            fn store_tail(self, out: &mut [f32], v: Self::V) {
                let (low, high) = out.split_at_mut(out.len().min(4));
                // SAFETY: token.
                unsafe { store4(low, v.0) };
                // SAFETY: token.
                unsafe { store4(high, v.1) };
            }
            #[inline(always)]
            fn add(self, a: Self::V, b: Self::V) -> Self::V {
                both!(vaddq_f32; a, b)
            }
            #[inline(always)]
            fn sub(self, a: Self::V, b: Self::V) -> Self::V {
                both!(vsubq_f32; a, b)
            }
            #[inline(always)]
            fn mul(self, a: Self::V, b: Self::V) -> Self::V {
                both!(vmulq_f32; a, b)
            }
            #[inline(always)]
            fn div(self, a: Self::V, b: Self::V) -> Self::V {
                both!(vdivq_f32; a, b)
            }
            #[inline(always)]
            fn max(self, a: Self::V, b: Self::V) -> Self::V {
                both!(larger; a, b)
            }
            #[inline(always)]
            fn min(self, a: Self::V, b: Self::V) -> Self::V {
                both!(smaller; a, b)
            }
            #[inline(always)]
            fn sqrt(self, a: Self::V) -> Self::V {
                both!(vsqrtq_f32; a)
            }
            #[inline(always)]
            fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                both!(vfmaq_f32; c, a, b)
            }
            #[inline(always)]
            fn round(self, a: Self::V) -> Self::V {
                both!(vrndnq_f32; a)
            }
            #[inline(always)]
            fn exp2_integral(self, a: Self::V) -> Self::V {
                both!(power_of_two; a)
            }
            #[inline(always)]
            fn reduce_add(self, a: Self::V) -> f32 {
                // SAFETY: token.
                unsafe { sum_of_8(a) }
            }
        }
    };
}

eight_lanes!(Neon);
eight_lanes!(NeonBf16);
