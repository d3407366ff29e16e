//! [`Product`] for the x86 tiers.
//!
//! The token passed by value proves the features. The functions that carry a
//! `target_feature` hold the instructions; calling one is the `unsafe` step.

use std::arch::x86_64::*;

use super::Simd;
use super::product::{Product, ProductKernel, SQUARE, widened_dot};
use super::x86::{run_product_avx2, run_product_avx512, run_product_avx512bf16};
use crate::isa::{Avx2, Avx512, Avx512Bf16};

impl Product for Avx2 {
    const ROWS: usize = 6;
    const ROWS_OF_WIDE: usize = 0;
    // A tile of 6 rows uses a panel up so fast that the second-level cache could not keep up.
    const DEPTH: usize = 144;
    const DOTS: bool = false;

    #[inline(always)]
    fn isolated<K: ProductKernel>(self, kernel: K) -> K::Output {
        run_product_avx2(self, kernel)
    }
    #[inline(always)]
    fn transpose(self, out: &mut [f32], stride: usize, rows: [&[f32]; SQUARE], lanes: usize) {
        for j in [0, 8] {
            let mut left = [self.splat(0.0); 8];
            for r in 0..8 {
                left[r] = self.load(&rows[r][j..]);
            }
            // SAFETY: token: AVX is present.
            let left = unsafe { transpose8(left) };
            if lanes <= 8 {
                for c in 0..8 {
                    self.store(&mut out[(j + c) * stride..], left[c]);
                }
                continue;
            }
            let mut right = left;
            for r in 0..8 {
                right[r] = self.load(&rows[8 + r][j..]);
            }
            // SAFETY: token: AVX is present.
            let right = unsafe { transpose8(right) };
            for c in 0..8 {
                let out = &mut out[(j + c) * stride..];
                self.store(out, left[c]);
                self.store(&mut out[8..], right[c]);
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, x: &[f32], ahead: usize) {
        prefetch(x, ahead);
    }
    #[inline(always)]
    fn round_bf16(self, a: Self::V) -> Self::V {
        // SAFETY: token: AVX2 is present.
        unsafe { round8(a) }
    }
    #[inline(always)]
    fn store_pairs(self, out: &mut [u32], even: Self::V, odd: Self::V) {
        let out = &mut out[..8];
        // SAFETY: token: AVX2 is present.
        let pairs = unsafe { pairs8(even, odd) };
        // SAFETY: token; `out` holds 8 u32, and the store has no alignment requirement.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), pairs) }
    }
    #[inline(always)]
    fn widen(self, pairs: &[u32]) -> (Self::V, Self::V) {
        let pairs = &pairs[..8];
        // SAFETY: token; `pairs` holds 8 u32, and the load has no alignment requirement.
        let pairs = unsafe { _mm256_loadu_si256(pairs.as_ptr().cast()) };
        // SAFETY: token: AVX2 is present.
        unsafe { widen8(pairs) }
    }
    #[inline(always)]
    fn dot(self, acc: Self::V, a: u32, b: &[u32]) -> Self::V {
        widened_dot(self, acc, a, b)
    }
}

#[inline(always)]
fn prefetch(x: &[f32], ahead: usize) {
    let line = x.as_ptr().wrapping_add(ahead);
    // SAFETY: SSE is part of x86-64; a prefetch of any address is harmless.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
}

#[target_feature(enable = "avx2")]
fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
    // Loops, not `array::from_fn`: what that calls is not sure to be compiled with the tier's features.
    let (mut pairs, mut quads, mut out) = (r, r, r);
    for i in 0..8 {
        let (a, b) = (r[i / 2 * 2], r[i / 2 * 2 + 1]);
        pairs[i] = if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) };
    }
    for (i, quad) in quads.iter_mut().enumerate() {
        let (base, k) = (i / 4 * 4, i % 4);
        let (a, b) = (_mm256_castps_pd(pairs[base + k / 2]), _mm256_castps_pd(pairs[base + k / 2 + 2]));
        *quad =
            _mm256_castpd_ps(if k % 2 == 0 { _mm256_unpacklo_pd(a, b) } else { _mm256_unpackhi_pd(a, b) });
    }
    for i in 0..8 {
        let (a, b) = (quads[i % 4], quads[i % 4 + 4]);
        out[i] =
            if i < 4 { _mm256_permute2f128_ps::<0x20>(a, b) } else { _mm256_permute2f128_ps::<0x31>(a, b) };
    }
    out
}

/// Bits of the nearest bf16 in the upper halves; the lower halves are zero.
#[target_feature(enable = "avx2")]
fn round_bits8(a: __m256) -> __m256i {
    let bits = _mm256_castps_si256(a);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
    _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_set1_epi32(-0x1_0000))
}

#[target_feature(enable = "avx2")]
fn round8(a: __m256) -> __m256 {
    _mm256_castsi256_ps(round_bits8(a))
}

#[target_feature(enable = "avx2")]
fn pairs8(even: __m256, odd: __m256) -> __m256i {
    _mm256_or_si256(_mm256_srli_epi32::<16>(round_bits8(even)), round_bits8(odd))
}

#[target_feature(enable = "avx2")]
fn widen8(pairs: __m256i) -> (__m256, __m256) {
    let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(-0x1_0000));
    (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(odd))
}

macro_rules! sixteen_lanes {
    ($token:ty, $run:ident, $dots:literal, $dot:ident, $pairs:ident, {$($more:tt)*}) => {
        impl Product for $token {
            // Two fewer registers than there are stay free: with one, the compiler spills.
            const ROWS: usize = 13;
            const ROWS_OF_WIDE: usize = 6;
            const DEPTH: usize = 256;
            const DOTS: bool = $dots;

            #[inline(always)]
            fn isolated<K: ProductKernel>(self, kernel: K) -> K::Output {
                $run(self, kernel)
            }
            #[inline(always)]
            fn transpose(self, out: &mut [f32], stride: usize, rows: [&[f32]; SQUARE], _lanes: usize) {
                let mut block = [self.splat(0.0); 16];
                for r in 0..16 {
                    block[r] = self.load(rows[r]);
                }
                // SAFETY: token: AVX-512 F is present.
                let columns = unsafe { transpose16(block) };
                for (c, column) in columns.into_iter().enumerate() {
                    self.store(&mut out[c * stride..], column);
                }
            }
            #[inline(always)]
            fn prefetch(self, x: &[f32], ahead: usize) {
                prefetch(x, ahead);
            }
            #[inline(always)]
            fn round_bf16(self, a: Self::V) -> Self::V {
                // SAFETY: token: AVX-512 F is present.
                unsafe { round16(a) }
            }
            #[inline(always)]
            fn store_pairs(self, out: &mut [u32], even: Self::V, odd: Self::V) {
                let out = &mut out[..16];
                // SAFETY: token: its features are present.
                let pairs = unsafe { $pairs(even, odd) };
                // SAFETY: token; `out` holds 16 u32, and the store has no alignment requirement.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs) }
            }
            #[inline(always)]
            fn widen(self, pairs: &[u32]) -> (Self::V, Self::V) {
                let pairs = &pairs[..16];
                // SAFETY: token; `pairs` holds 16 u32, and the load has no alignment requirement.
                let pairs = unsafe { _mm512_loadu_si512(pairs.as_ptr().cast()) };
                // SAFETY: token: AVX-512 F is present.
                unsafe { widen16(pairs) }
            }
            #[inline(always)]
            fn dot(self, acc: Self::V, a: u32, b: &[u32]) -> Self::V {
                $dot(self, acc, a, b)
            }
            $($more)*
        }
    };
}

sixteen_lanes!(Avx512, run_product_avx512, false, widened_dot, pairs16, {});
sixteen_lanes!(Avx512Bf16, run_product_avx512bf16, true, pair_dot, converted_pairs, {
    #[inline(always)]
    fn transpose_pairs(self, out: &mut [u32], stride: usize, rows: [&[f32]; SQUARE], _lanes: usize) {
        let mut block = [self.splat(0.0); 16];
        for r in 0..16 {
            let (left, right) = (self.load(rows[r]), self.load(&rows[r][16..]));
            // SAFETY: token: AVX512_BF16 is present.
            block[r] = unsafe { converted(left, right) };
        }
        // SAFETY: token: AVX-512 F is present.
        let columns = unsafe { transpose16(block) };
        for (c, column) in columns.into_iter().enumerate() {
            self.store(bytemuck::cast_slice_mut(&mut out[c * stride..]), column);
        }
    }
    #[inline(always)]
    fn store_bf16(self, out: &mut [u32], values: Self::V) {
        // SAFETY: token: AVX512_BF16 is present.
        let pairs = unsafe { rounded(values) };
        let mask = if out.len() < 8 { (1 << out.len()) - 1 } else { u8::MAX };
        // SAFETY: token: AVX-512 VL is present; the mask leaves out the places that `out` does not have.
        unsafe { _mm256_mask_storeu_epi32(out.as_mut_ptr().cast(), mask, pairs) }
    }
    #[inline(always)]
    fn dot_pairs(self, acc: Self::V, a: u32, b: Self::V) -> Self::V {
        // SAFETY: token: AVX-512 F is present.
        let b = unsafe { _mm512_castps_si512(b) };
        // SAFETY: token: AVX512_BF16 is present.
        unsafe { dot16(acc, a, b) }
    }
    #[inline(always)]
    fn pairs_of_rows(self, even: &[f32], odd: &[f32]) -> [Self::V; 2] {
        let (even, odd) = (self.load(even), self.load(odd));
        // SAFETY: token: AVX-512 F and BW are present.
        unsafe { interleaved(even, odd) }
    }
});

/// Interleaves 16-bit values: those of the first halves, and those of the second halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleaved(even: __m512, odd: __m512) -> [__m512; 2] {
    /// Value `i / 2` of the even row for even i, and of the odd row for odd i.
    const FIRST: [u16; 32] = {
        let mut places = [0; 32];
        let mut i = 0;
        while i < 32 {
            places[i] = (i / 2 + 32 * (i % 2)) as u16;
            i += 1;
        }
        places
    };
    // SAFETY: both are 512 bits of integers.
    let first = unsafe { std::mem::transmute::<[u16; 32], __m512i>(FIRST) };
    let second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    let (even, odd) = (_mm512_castps_si512(even), _mm512_castps_si512(odd));
    let left = _mm512_castsi512_ps(_mm512_permutex2var_epi16(even, first, odd));
    [left, _mm512_castsi512_ps(_mm512_permutex2var_epi16(even, second, odd))]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(values: __m512) -> __m256i {
    let pairs = _mm512_cvtneps_pbh(values);
    // SAFETY: both are 256 bits, and every bit pattern is a vector of integers.
    unsafe { std::mem::transmute::<__m256bh, __m256i>(pairs) }
}

#[inline(always)]
fn pair_dot(_token: Avx512Bf16, acc: __m512, a: u32, b: &[u32]) -> __m512 {
    let b = &b[..16];
    // SAFETY: token; `b` holds 16 u32, and the load has no alignment requirement.
    let b = unsafe { _mm512_loadu_si512(b.as_ptr().cast()) };
    // SAFETY: token: AVX512_BF16 is present.
    unsafe { dot16(acc, a, b) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot16(acc: __m512, a: u32, b: __m512i) -> __m512 {
    let a = _mm512_set1_epi32(a.cast_signed());
    // SAFETY: both are 512 bits, and every bit pattern is a vector of bf16.
    let a = unsafe { std::mem::transmute::<__m512i, __m512bh>(a) };
    // SAFETY: as above.
    let b = unsafe { std::mem::transmute::<__m512i, __m512bh>(b) };
    _mm512_dpbf16_ps(acc, a, b)
}

/// Rounds to bf16: `left`, then `right`, as pairs of neighbours.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn converted(left: __m512, right: __m512) -> __m512 {
    let pairs = _mm512_cvtne2ps_pbh(right, left);
    // SAFETY: both are 512 bits, and every bit pattern is a vector of f32.
    unsafe { std::mem::transmute::<__m512bh, __m512>(pairs) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn converted_pairs(even: __m512, odd: __m512) -> __m512i {
    let (even, odd) = (_mm512_cvtneps_pbh(even), _mm512_cvtneps_pbh(odd));
    // SAFETY: both are 256 bits, and every bit pattern is a vector of integers.
    let even = unsafe { std::mem::transmute::<__m256bh, __m256i>(even) };
    // SAFETY: as above.
    let odd = unsafe { std::mem::transmute::<__m256bh, __m256i>(odd) };
    _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn transpose16(r: [__m512; 16]) -> [__m512; 16] {
    let (mut pairs, mut quads) = (r, r);
    for i in 0..16 {
        let (a, b) = (r[i / 2 * 2], r[i / 2 * 2 + 1]);
        pairs[i] = if i % 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) };
    }
    // quads[4 g + c]: lane 4 q + i holds row 4 g + i, column 4 q + c.
    for (i, quad) in quads.iter_mut().enumerate() {
        let (base, k) = (i / 4 * 4, i % 4);
        let (a, b) = (_mm512_castps_pd(pairs[base + k / 2]), _mm512_castps_pd(pairs[base + k / 2 + 2]));
        *quad =
            _mm512_castpd_ps(if k % 2 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) });
    }
    // The 4 x 4 blocks of 128 bits: for each column c, blocks q of row groups g.
    let mut out = [_mm512_setzero_ps(); 16];
    for c in 0..4 {
        let (a, b, d, e) = (quads[c], quads[4 + c], quads[8 + c], quads[12 + c]);
        let (ab02, ab13) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (de02, de13) = (_mm512_shuffle_f32x4::<0x88>(d, e), _mm512_shuffle_f32x4::<0xdd>(d, e));
        out[c] = _mm512_shuffle_f32x4::<0x88>(ab02, de02);
        out[4 + c] = _mm512_shuffle_f32x4::<0x88>(ab13, de13);
        out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(ab02, de02);
        out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(ab13, de13);
    }
    out
}

/// Bits of the nearest bf16 in the upper halves; the lower halves are zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn round_bits16(a: __m512) -> __m512i {
    let bits = _mm512_castps_si512(a);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
    _mm512_and_si512(_mm512_mask_mov_epi32(rounded, nan, quiet), _mm512_set1_epi32(-0x1_0000))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn round16(a: __m512) -> __m512 {
    _mm512_castsi512_ps(round_bits16(a))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pairs16(even: __m512, odd: __m512) -> __m512i {
    _mm512_or_si512(_mm512_srli_epi32::<16>(round_bits16(even)), round_bits16(odd))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen16(pairs: __m512i) -> (__m512, __m512) {
    let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000));
    (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(odd))
}
