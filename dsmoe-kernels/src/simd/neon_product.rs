//! [`Product`] for the NEON tiers.
//!
//! The token passed by value proves the features. The functions that carry a
//! `target_feature` hold the instructions; calling one is the `unsafe` step.

use std::arch::aarch64::*;
use std::arch::asm;

use super::Simd;
use super::neon::{run_product, run_product_bf16};
use super::product::{Product, ProductKernel, SQUARE, widened_dot};
use crate::isa::{Neon, NeonBf16};

#[inline(always)]
fn prefetch(x: &[f32], ahead: usize) {
    let line = x.as_ptr().wrapping_add(ahead).addr();
    // SAFETY: `prfm` is a hint: no address makes it fail, and it changes neither memory nor registers.
    unsafe { asm!("prfm pldl1keep, [{line}]", line = in(reg) line, options(nomem, nostack, preserves_flags)) }
}

/// Bits of the nearest bf16 in the upper halves; the lower halves are unspecified.
#[inline]
#[target_feature(enable = "neon")]
fn round_bits(a: float32x4_t) -> uint32x4_t {
    let bits = vreinterpretq_u32_f32(a);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
    vbslq_u32(vceqq_f32(a, a), rounded, quiet)
}

#[inline]
#[target_feature(enable = "neon")]
fn rounded(a: float32x4_t) -> float32x4_t {
    vreinterpretq_f32_u32(vandq_u32(round_bits(a), vdupq_n_u32(0xffff_0000)))
}

#[inline]
#[target_feature(enable = "neon")]
fn pairs(even: float32x4_t, odd: float32x4_t) -> uint32x4_t {
    vsriq_n_u32::<16>(round_bits(odd), round_bits(even))
}

/// Rounds 8 neighbours to 4 pairs.
#[inline]
#[target_feature(enable = "neon")]
fn pairs_of_neighbours(values: float32x4x2_t) -> uint32x4_t {
    let [low, high] = [round_bits(values.0), round_bits(values.1)].map(|bits| vreinterpretq_u16_u32(bits));
    vreinterpretq_u32_u16(vuzp2q_u16(low, high))
}

#[inline]
#[target_feature(enable = "neon")]
fn widened(pairs: uint32x4_t) -> (float32x4_t, float32x4_t) {
    let odd = vandq_u32(pairs, vdupq_n_u32(0xffff_0000));
    (vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)), vreinterpretq_f32_u32(odd))
}

#[inline]
#[target_feature(enable = "neon")]
fn transposed(r: [float32x4_t; 4]) -> [float32x4_t; 4] {
    let [a, b, c, d] =
        [vtrn1q_f32(r[0], r[1]), vtrn2q_f32(r[0], r[1]), vtrn1q_f32(r[2], r[3]), vtrn2q_f32(r[2], r[3])]
            .map(|pairs| vreinterpretq_f64_f32(pairs));
    [vzip1q_f64(a, c), vzip1q_f64(b, d), vzip2q_f64(a, c), vzip2q_f64(b, d)]
        .map(|quads| vreinterpretq_f32_f64(quads))
}

/// Sets `out[j * stride + i]` to value j of `row(i)` for i < 4 `groups` and j < 4, ascending j.
#[inline]
#[target_feature(enable = "neon")]
fn transpose_columns(out: &mut [f32], stride: usize, groups: usize, row: impl Fn(usize) -> float32x4_t) {
    let mut blocks = [[vdupq_n_f32(0.0); 4]; SQUARE / 4];
    for (g, block) in blocks[..groups].iter_mut().enumerate() {
        *block = transposed([row(4 * g), row(4 * g + 1), row(4 * g + 2), row(4 * g + 3)]);
    }
    for c in 0..4 {
        for (g, block) in blocks[..groups].iter().enumerate() {
            let out = &mut out[c * stride + 4 * g..][..4];
            // SAFETY: `out` holds 4 f32, and the store has no alignment requirement.
            unsafe { vst1q_f32(out.as_mut_ptr(), block[c]) };
        }
    }
}

/// Returns a value of `a` in 4 lanes, from the longest load that holds it: as `fmla` takes a lane as its factor, the loads of a
/// tile's rows become few.
#[inline]
#[target_feature(enable = "neon")]
fn splat4<const R: usize>(a: &[f32; R], r: usize) -> float32x4_t {
    let rest = &a[r / 4 * 4..];
    if rest.len() >= 4 {
        // SAFETY: `rest` holds 4 f32 at least, and the load has no alignment requirement.
        let four = unsafe { vld1q_f32(rest.as_ptr()) };
        match r % 4 {
            0 => vdupq_laneq_f32::<0>(four),
            1 => vdupq_laneq_f32::<1>(four),
            2 => vdupq_laneq_f32::<2>(four),
            _ => vdupq_laneq_f32::<3>(four),
        }
    } else if rest.len() >= 2 && r % 4 < 2 {
        // SAFETY: `rest` holds 2 f32 at least, and the load has no alignment requirement.
        let two = unsafe { vld1_f32(rest.as_ptr()) };
        if r.is_multiple_of(4) { vdupq_lane_f32::<0>(two) } else { vdupq_lane_f32::<1>(two) }
    } else {
        vdupq_n_f32(a[r])
    }
}

/// Returns `acc` plus the products of the pairs of `a` and `b`.
///
/// The standard library has no stable function for `bfdot`. Its result is that of the architecture's standard bf16
/// arithmetic, which is the same on all processors: products and sums are rounded to odd, and subnormal numbers are 0.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn bfdot(acc: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
    let mut acc = acc;
    // SAFETY: the function has the feature; the instruction reads and writes the named registers alone.
    unsafe {
        asm!(
            "bfdot {acc:v}.4s, {a:v}.8h, {b:v}.8h",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

#[inline]
#[target_feature(enable = "neon,bf16")]
fn dots(acc: float32x4x2_t, a: u32, b: [uint32x4_t; 2]) -> float32x4x2_t {
    let a = vdupq_n_u32(a);
    float32x4x2_t(bfdot(acc.0, a, b[0]), bfdot(acc.1, a, b[1]))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_pairs(pairs: &[u32]) -> [uint32x4_t; 2] {
    let (low, high) = pairs[..8].split_at(4);
    // SAFETY: `low` holds 4 u32, and the load has no alignment requirement.
    let low = unsafe { vld1q_u32(low.as_ptr()) };
    // SAFETY: as above, for `high`.
    [low, unsafe { vld1q_u32(high.as_ptr()) }]
}

/// Returns the pairs of two rows of 8 bf16: of the first 4 columns, and of the others.
#[inline]
#[target_feature(enable = "neon")]
fn interleaved(even: float32x4_t, odd: float32x4_t) -> float32x4x2_t {
    let (even, odd) = (vreinterpretq_u16_f32(even), vreinterpretq_u16_f32(odd));
    let left = vreinterpretq_f32_u16(vzip1q_u16(even, odd));
    float32x4x2_t(left, vreinterpretq_f32_u16(vzip2q_u16(even, odd)))
}

macro_rules! eight_lanes {
    ($token:ty, $run:ident, $dots:literal, $dot:ident, {$($more:tt)*}) => {
        impl Product for $token {
            // 24 registers of sums, 4 of B and 2 of A; two of the 32 stay free.
            const ROWS: usize = 6;
            const ROWS_OF_WIDE: usize = 0;
            // A panel of 32 KiB: the first-level caches of server cores and of Apple's hold 64 KiB or more.
            const DEPTH: usize = 256;
            const DOTS: bool = $dots;

            #[inline(always)]
            fn splat_of<const R: usize>(self, a: &[f32; R], r: usize) -> Self::V {
                // SAFETY: token: NEON is present.
                let x = unsafe { splat4(a, r) };
                float32x4x2_t(x, x)
            }
            #[inline(always)]
            fn isolated<K: ProductKernel>(self, kernel: K) -> K::Output {
                $run(self, kernel)
            }
            #[inline(always)]
            fn transpose(self, out: &mut [f32], stride: usize, rows: [&[f32]; SQUARE], lanes: usize) {
                let rows = rows.map(|row| &row[..SQUARE]);
                for j in (0..SQUARE).step_by(4) {
                    let row = |i: usize| {
                        let four = &rows[i][j..j + 4];
                        // SAFETY: token; `four` holds 4 f32, and the load has no alignment requirement.
                        unsafe { vld1q_f32(four.as_ptr()) }
                    };
                    let out = &mut out[j * stride..];
                    // SAFETY: token: NEON is present.
                    unsafe { transpose_columns(out, stride, lanes.div_ceil(4), row) };
                }
            }
            #[inline(always)]
            fn prefetch(self, x: &[f32], ahead: usize) {
                prefetch(x, ahead);
            }
            #[inline(always)]
            fn round_bf16(self, a: Self::V) -> Self::V {
                // SAFETY: token: NEON is present.
                let low = unsafe { rounded(a.0) };
                // SAFETY: token: NEON is present.
                float32x4x2_t(low, unsafe { rounded(a.1) })
            }
            #[inline(always)]
            fn store_pairs(self, out: &mut [u32], even: Self::V, odd: Self::V) {
                let (left, right) = out[..8].split_at_mut(4);
                // SAFETY: token: NEON is present.
                let low = unsafe { pairs(even.0, odd.0) };
                // SAFETY: token: NEON is present.
                let high = unsafe { pairs(even.1, odd.1) };
                // SAFETY: token; `left` holds 4 u32, and the store has no alignment requirement.
                unsafe { vst1q_u32(left.as_mut_ptr(), low) };
                // SAFETY: as above, for `right`.
                unsafe { vst1q_u32(right.as_mut_ptr(), high) };
            }
            #[inline(always)]
            fn store_bf16(self, out: &mut [u32], values: Self::V) {
                // SAFETY: token: NEON is present.
                let pairs = unsafe { pairs_of_neighbours(values) };
                let mut four = [0; 4];
                // SAFETY: token; `four` holds 4 u32, and the store has no alignment requirement.
                unsafe { vst1q_u32(four.as_mut_ptr(), pairs) };
                out.iter_mut().zip(four).for_each(|(out, pair)| *out = pair);
            }
            #[inline(always)]
            fn widen(self, pairs: &[u32]) -> (Self::V, Self::V) {
                // SAFETY: token: NEON is present.
                let [low, high] = unsafe { load_pairs(pairs) };
                // SAFETY: token: NEON is present.
                let (low_even, low_odd) = unsafe { widened(low) };
                // SAFETY: token: NEON is present.
                let (high_even, high_odd) = unsafe { widened(high) };
                (float32x4x2_t(low_even, high_even), float32x4x2_t(low_odd, high_odd))
            }
            #[inline(always)]
            fn dot(self, acc: Self::V, a: u32, b: &[u32]) -> Self::V {
                $dot(self, acc, a, b)
            }
            $($more)*
        }
    };
}

eight_lanes!(Neon, run_product, false, widened_dot, {});
eight_lanes!(NeonBf16, run_product_bf16, true, pair_dot, {
    #[inline(always)]
    fn transpose_pairs(self, out: &mut [u32], stride: usize, rows: [&[f32]; SQUARE], lanes: usize) {
        let out: &mut [f32] = bytemuck::cast_slice_mut(out);
        for j in (0..SQUARE).step_by(4) {
            let row = |i: usize| {
                let values = self.load(&rows[i][2 * j..]);
                // SAFETY: token: NEON is present.
                let pairs = unsafe { pairs_of_neighbours(values) };
                // SAFETY: token: NEON is present.
                unsafe { vreinterpretq_f32_u32(pairs) }
            };
            let out = &mut out[j * stride..];
            // SAFETY: token: NEON is present.
            unsafe { transpose_columns(out, stride, lanes.div_ceil(4), row) };
        }
    }
    #[inline(always)]
    fn dot_pairs(self, acc: Self::V, a: u32, b: Self::V) -> Self::V {
        // SAFETY: token: NEON is present.
        let low = unsafe { vreinterpretq_u32_f32(b.0) };
        // SAFETY: token: NEON is present.
        let high = unsafe { vreinterpretq_u32_f32(b.1) };
        // SAFETY: token: BF16 is present.
        unsafe { dots(acc, a, [low, high]) }
    }
    #[inline(always)]
    fn pairs_of_rows(self, even: &[f32], odd: &[f32]) -> [Self::V; 2] {
        let (even, odd) = (self.load(even), self.load(odd));
        // SAFETY: token: NEON is present.
        let left = unsafe { interleaved(even.0, odd.0) };
        // SAFETY: token: NEON is present.
        [left, unsafe { interleaved(even.1, odd.1) }]
    }
});

#[inline(always)]
fn pair_dot(_token: NeonBf16, acc: float32x4x2_t, a: u32, b: &[u32]) -> float32x4x2_t {
    // SAFETY: token: NEON is present.
    let b = unsafe { load_pairs(b) };
    // SAFETY: token: BF16 is present.
    unsafe { dots(acc, a, b) }
}
