//! The AVX2 and AVX-512 tiers.
//!
//! Every method takes the tier's token by value. A token exists only where `Isa::available` has seen the
//! features, which is the proof each `unsafe` block below refers to as "token".

use std::arch::x86_64::*;

use super::{Kernel, ProductKernel, Simd};
use crate::isa::{Avx2, Avx512, Avx512Bf16};

/// Compiles `kernel` with AVX2 and FMA.
pub(crate) fn run_avx2<K: Kernel>(token: Avx2, kernel: K) -> K::Output {
    #[target_feature(enable = "avx2,fma")]
    fn inner<K: Kernel>(token: Avx2, kernel: K) -> K::Output {
        kernel.body(token)
    }
    // SAFETY: token: AVX2 and FMA are present.
    unsafe { inner(token, kernel) }
}

/// Compiles `kernel` with AVX-512.
pub(crate) fn run_avx512<K: Kernel>(token: Avx512, kernel: K) -> K::Output {
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    fn inner<K: Kernel>(token: Avx512, kernel: K) -> K::Output {
        kernel.body(token)
    }
    // SAFETY: token: AVX-512 F, VL, BW, DQ, AVX2 and FMA are present.
    unsafe { inner(token, kernel) }
}

/// Compiles `kernel` with AVX2 and FMA.
pub(crate) fn run_product_avx2<K: ProductKernel>(token: Avx2, kernel: K) -> K::Output {
    #[target_feature(enable = "avx2,fma")]
    #[inline(never)]
    fn inner<K: ProductKernel>(token: Avx2, kernel: K) -> K::Output {
        kernel.body(token)
    }
    // SAFETY: token: AVX2 and FMA are present.
    unsafe { inner(token, kernel) }
}

/// Compiles `kernel` with AVX-512.
pub(crate) fn run_product_avx512<K: ProductKernel>(token: Avx512, kernel: K) -> K::Output {
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    #[inline(never)]
    fn inner<K: ProductKernel>(token: Avx512, kernel: K) -> K::Output {
        kernel.body(token)
    }
    // SAFETY: token: AVX-512 F, VL, BW, DQ, AVX2 and FMA are present.
    unsafe { inner(token, kernel) }
}

/// Compiles `kernel` with AVX-512 and its bf16 products.
pub(crate) fn run_product_avx512bf16<K: ProductKernel>(token: Avx512Bf16, kernel: K) -> K::Output {
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")]
    #[inline(never)]
    fn inner<K: ProductKernel>(token: Avx512Bf16, kernel: K) -> K::Output {
        kernel.body(token)
    }
    // SAFETY: token: AVX-512 F, VL, BW, DQ, BF16, AVX2 and FMA are present.
    unsafe { inner(token, kernel) }
}

/// Tells whether the processor is AMD's, by its CPUID vendor string.
pub(crate) fn is_amd() -> bool {
    let vendor = __cpuid(0);
    (vendor.ebx, vendor.edx, vendor.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
}

/// All-ones for the first `n` of 8 lanes when read from index `8 - n`.
static TAIL_MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[inline(always)]
fn tail_mask(_token: Avx2, n: usize) -> __m256i {
    let window = &TAIL_MASK[8 - n.min(8)..][..8];
    // SAFETY: token; `window` holds 8 i32, and the load has no alignment requirement.
    unsafe { _mm256_loadu_si256(window.as_ptr().cast()) }
}

/// Adds the lanes: the upper half to the lower half until one is left.
///
/// # Safety
/// AVX is present.
#[inline(always)]
unsafe fn sum_of_8(a: __m256) -> f32 {
    // SAFETY: AVX by contract.
    let low = unsafe { _mm256_castps256_ps128(a) };
    // SAFETY: AVX by contract.
    let high = unsafe { _mm256_extractf128_ps::<1>(a) };
    // SAFETY: AVX by contract includes SSE.
    let four = unsafe { _mm_add_ps(low, high) };
    // SAFETY: as above.
    let upper = unsafe { _mm_movehl_ps(four, four) };
    // SAFETY: as above.
    let two = unsafe { _mm_add_ps(four, upper) };
    // SAFETY: AVX by contract includes SSE3.
    let odd = unsafe { _mm_movehdup_ps(two) };
    // SAFETY: as above.
    let one = unsafe { _mm_add_ss(two, odd) };
    // SAFETY: as above.
    unsafe { _mm_cvtss_f32(one) }
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::V {
        let x = &x[..8];
        // SAFETY: token; `x` holds 8 f32, and the load has no alignment requirement.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn load_tail(self, x: &[f32]) -> Self::V {
        let mask = tail_mask(self, x.len());
        // SAFETY: token; lanes at and past `x.len()` are masked off and not read.
        unsafe { _mm256_maskload_ps(x.as_ptr(), mask) }
    }
    #[inline(always)]
    fn store(self, out: &mut [f32], v: Self::V) {
        let out = &mut out[..8];
        // SAFETY: token; `out` holds 8 f32, and the store has no alignment requirement.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn store_tail(self, out: &mut [f32], v: Self::V) {
        // In halves: AMD's cores take tens of cycles for a masked store, even of all lanes.
        if out.len() >= 8 {
            return self.store(out, v);
        }
        let mut out = out;
        // SAFETY: token.
        let mut part = unsafe { _mm256_castps256_ps128(v) };
        if out.len() >= 4 {
            let four;
            (four, out) = out.split_at_mut(4);
            // SAFETY: token; `four` holds 4 f32, and the store has no alignment requirement.
            unsafe { _mm_storeu_ps(four.as_mut_ptr(), part) };
            // SAFETY: token.
            part = unsafe { _mm256_extractf128_ps::<1>(v) };
        }
        if out.len() >= 2 {
            let two;
            (two, out) = out.split_at_mut(2);
            // SAFETY: token.
            let bits = unsafe { _mm_castps_si128(part) };
            // SAFETY: token; `two` holds 8 bytes, and the store has no alignment requirement.
            unsafe { _mm_storel_epi64(two.as_mut_ptr().cast(), bits) };
            // SAFETY: token.
            part = unsafe { _mm_movehl_ps(part, part) };
        }
        if let [one, ..] = out {
            // SAFETY: token.
            *one = unsafe { _mm_cvtss_f32(part) };
        }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // SAFETY: token.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn exp2_integral(self, a: Self::V) -> Self::V {
        // SAFETY: token.
        let n = unsafe { _mm256_cvtps_epi32(a) };
        // SAFETY: token.
        let bias = unsafe { _mm256_set1_epi32(127) };
        // SAFETY: token.
        let exponent = unsafe { _mm256_add_epi32(n, bias) };
        // SAFETY: token.
        let bits = unsafe { _mm256_slli_epi32::<23>(exponent) };
        // SAFETY: token.
        unsafe { _mm256_castsi256_ps(bits) }
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::V) -> f32 {
        // SAFETY: token.
        unsafe { sum_of_8(a) }
    }
}

/// The 16-lane tiers differ in their matrix products alone.
macro_rules! sixteen_lanes {
    ($token:ty) => {
        impl Simd for $token {
            type V = __m512;
            const LANES: usize = 16;

            #[inline(always)]
            fn splat(self, x: f32) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_set1_ps(x) }
            }
            #[inline(always)]
            fn load(self, x: &[f32]) -> Self::V {
                let x = &x[..16];
                // SAFETY: token; `x` holds 16 f32, and the load has no alignment requirement.
                unsafe { _mm512_loadu_ps(x.as_ptr()) }
            }
            #[inline(always)]
            fn load_tail(self, x: &[f32]) -> Self::V {
                let mask = ((1u32 << x.len().min(16)) - 1) as __mmask16;
                // SAFETY: token; lanes at and past `x.len()` are masked off and not read.
                unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }
            }
            #[inline(always)]
            fn store(self, out: &mut [f32], v: Self::V) {
                let out = &mut out[..16];
                // SAFETY: token; `out` holds 16 f32, and the store has no alignment requirement.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
            }
            #[inline(always)]
            fn store_tail(self, out: &mut [f32], v: Self::V) {
                let mask = ((1u32 << out.len().min(16)) - 1) as __mmask16;
                // SAFETY: token; lanes at and past `out.len()` are masked off and not written.
                unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, v) }
            }
            #[inline(always)]
            fn add(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            fn sub(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_sub_ps(a, b) }
            }
            #[inline(always)]
            fn mul(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            fn div(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_div_ps(a, b) }
            }
            #[inline(always)]
            fn max(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            fn min(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_min_ps(a, b) }
            }
            #[inline(always)]
            fn sqrt(self, a: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_sqrt_ps(a) }
            }
            #[inline(always)]
            fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            fn round(self, a: Self::V) -> Self::V {
                // SAFETY: token.
                unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
            }
            #[inline(always)]
            fn exp2_integral(self, a: Self::V) -> Self::V {
                // SAFETY: token.
                let n = unsafe { _mm512_cvtps_epi32(a) };
                // SAFETY: token.
                let bias = unsafe { _mm512_set1_epi32(127) };
                // SAFETY: token.
                let exponent = unsafe { _mm512_add_epi32(n, bias) };
                // SAFETY: token.
                let bits = unsafe { _mm512_slli_epi32::<23>(exponent) };
                // SAFETY: token.
                unsafe { _mm512_castsi512_ps(bits) }
            }
            #[inline(always)]
            fn reduce_add(self, a: Self::V) -> f32 {
                // SAFETY: token.
                let low = unsafe { _mm512_castps512_ps256(a) };
                // SAFETY: token.
                let high = unsafe { _mm512_extractf32x8_ps::<1>(a) };
                // SAFETY: token.
                let sums = unsafe { _mm256_add_ps(low, high) };
                // SAFETY: token.
                unsafe { sum_of_8(sums) }
            }
        }
    };
}

sixteen_lanes!(Avx512);
sixteen_lanes!(Avx512Bf16);
