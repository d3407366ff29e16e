//! The operations of a tier that matrix products need in addition to [`Simd`].

use half::bf16;

use super::{Portable, Simd};

/// Rows or columns of a block that [`Product::transpose`] moves.
pub(crate) const SQUARE: usize = 16;

/// The operations of matrix products. A *pair* is two bf16 in a `u32`, the even index in the low half.
pub(crate) trait Product: Simd {
    /// Most rows of a tile of two registers' width.
    const ROWS: usize;
    /// Most rows of a tile of four registers' width.
    const ROWS_OF_WIDE: usize;
    /// Inner dimension of one pass, an even number of values or, where pairs are multiplied, of pairs: a panel of that depth
    /// and a tile stay in the first-level cache.
    const DEPTH: usize;
    /// [`Product::dot`] is one instruction: bf16 products run on pairs instead of widened f32.
    const DOTS: bool;

    /// Returns value `r` of `a` in every lane. Where a product takes a lane of a register as its factor, neighbouring values
    /// come from one load.
    #[inline(always)]
    fn splat_of<const R: usize>(self, a: &[f32; R], r: usize) -> Self::V {
        self.splat(a[r])
    }
    /// Runs `kernel` in a function of its own, so that one inner loop gets all registers.
    fn isolated<K: ProductKernel>(self, kernel: K) -> K::Output;
    /// Sets `out[j * stride + i] = rows[i][j]` for i < lanes and j < 16, ascending j. Values at `lanes <= i < 16` become
    /// unspecified: with a stride below 16 they overlap the next j.
    fn transpose(self, out: &mut [f32], stride: usize, rows: [&[f32]; SQUARE], lanes: usize);
    /// Sets `out[j * stride + i]` to the pair (`rows[i][2 j]`, `rows[i][2 j + 1]`), rounded to bf16, for i < lanes and j < 16;
    /// otherwise like [`Product::transpose`]. Used only if [`Product::DOTS`].
    #[inline(always)]
    fn transpose_pairs(self, out: &mut [u32], stride: usize, rows: [&[f32]; SQUARE], lanes: usize) {
        let rows = rows.map(|row| &row[..2 * SQUARE]);
        for j in 0..SQUARE {
            for (out, row) in out[j * stride..][..lanes].iter_mut().zip(rows) {
                *out = pair(row[2 * j], row[2 * j + 1]);
            }
        }
    }
    /// Prefetches the cache line `ahead` values after the start of `x`, which may lie past its end.
    fn prefetch(self, x: &[f32], ahead: usize);
    /// Rounds to the nearest bf16, ties to even. NaN stays NaN.
    fn round_bf16(self, a: Self::V) -> Self::V;
    /// Stores the pairs (even, odd), rounded to bf16. Subnormals may become 0, as they do in [`Product::dot`].
    fn store_pairs(self, out: &mut [u32], even: Self::V, odd: Self::V);
    /// Stores up to [`Simd::LANES`] values, rounded to bf16 as by [`Product::store_pairs`], neighbours in pairs: as many as
    /// `out` has pairs for.
    #[inline(always)]
    fn store_bf16(self, out: &mut [u32], values: Self::V) {
        let mut lanes = [0.0; SQUARE];
        self.store(&mut lanes, values);
        for (out, lanes) in out.iter_mut().zip(lanes[..Self::LANES].chunks_exact(2)) {
            *out = pair(lanes[0], lanes[1]);
        }
    }
    /// Returns the even and the odd values of the first [`Simd::LANES`] pairs.
    fn widen(self, pairs: &[u32]) -> (Self::V, Self::V);
    /// Returns `acc + even(a) even(b) + odd(a) odd(b)` in every lane.
    fn dot(self, acc: Self::V, a: u32, b: &[u32]) -> Self::V;
    /// Does the same for pairs in a register. Used only if [`Product::DOTS`].
    #[inline(always)]
    fn dot_pairs(self, acc: Self::V, a: u32, b: Self::V) -> Self::V {
        let mut pairs = [0.0; SQUARE];
        self.store(&mut pairs, b);
        self.dot(acc, a, bytemuck::cast_slice(&pairs))
    }
    /// Returns the pairs of two rows, of twice [`Simd::LANES`] bf16 each: of the first half of the columns, and of the other.
    /// Used only if [`Product::DOTS`].
    #[inline(always)]
    fn pairs_of_rows(self, even: &[f32], odd: &[f32]) -> [Self::V; 2] {
        let [even, odd]: [&[bf16]; 2] = [even, odd].map(|row| bytemuck::cast_slice(&row[..Self::LANES]));
        let mut pairs = [0; 2 * SQUARE];
        for (pair, (even, odd)) in pairs.iter_mut().zip(even.iter().zip(odd)) {
            *pair = u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16;
        }
        let pairs: &[f32] = bytemuck::cast_slice(&pairs);
        [self.load(pairs), self.load(&pairs[Self::LANES..])]
    }
}

/// A [`super::Kernel`] whose body needs [`Product`].
pub(crate) trait ProductKernel {
    type Output;
    fn body<S: Product>(self, s: S) -> Self::Output;
}

impl Product for Portable {
    const ROWS: usize = 2;
    const ROWS_OF_WIDE: usize = 0;
    const DEPTH: usize = 256;
    const DOTS: bool = false;

    #[inline(never)]
    fn isolated<K: ProductKernel>(self, kernel: K) -> K::Output {
        kernel.body(self)
    }
    #[inline(always)]
    fn transpose(self, out: &mut [f32], stride: usize, rows: [&[f32]; SQUARE], lanes: usize) {
        let rows = rows.map(|row| &row[..SQUARE]);
        for j in 0..SQUARE {
            for (out, row) in out[j * stride..][..lanes].iter_mut().zip(rows) {
                *out = row[j];
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, _x: &[f32], _ahead: usize) {}
    #[inline(always)]
    fn round_bf16(self, a: Self::V) -> Self::V {
        a.map(|x| bf16::from_f32(x).to_f32())
    }
    #[inline(always)]
    fn store_pairs(self, out: &mut [u32], even: Self::V, odd: Self::V) {
        for (i, out) in out[..Self::LANES].iter_mut().enumerate() {
            *out = pair(even[i], odd[i]);
        }
    }
    #[inline(always)]
    fn widen(self, pairs: &[u32]) -> (Self::V, Self::V) {
        let pairs = &pairs[..Self::LANES];
        let even = std::array::from_fn(|i| f32::from_bits(pairs[i] << 16));
        (even, std::array::from_fn(|i| f32::from_bits(pairs[i] & 0xffff_0000)))
    }
    #[inline(always)]
    fn dot(self, acc: Self::V, a: u32, b: &[u32]) -> Self::V {
        widened_dot(self, acc, a, b)
    }
}

/// Returns a pair of bf16, rounded.
#[inline(always)]
pub(crate) fn pair(even: f32, odd: f32) -> u32 {
    u32::from(bf16::from_f32(even).to_bits()) | u32::from(bf16::from_f32(odd).to_bits()) << 16
}

/// Computes [`Product::dot`] in f32.
#[inline(always)]
pub(super) fn widened_dot<S: Product>(s: S, acc: S::V, a: u32, b: &[u32]) -> S::V {
    let (even, odd) = s.widen(b);
    let acc = s.fma(s.splat(f32::from_bits(a << 16)), even, acc);
    s.fma(s.splat(f32::from_bits(a & 0xffff_0000)), odd, acc)
}
