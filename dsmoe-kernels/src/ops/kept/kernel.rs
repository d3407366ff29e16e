//! Vector bodies.

use super::cells::{Cells, GROUP, WORDS};
use super::{Kept, PANEL};
use crate::buf::SharedRows;
use crate::matmul::Precision;
use crate::simd::{Product, ProductKernel, dot};

/// Columns that are asked for ahead of the one that is read: their places are known, but no processor guesses them.
const AHEAD: usize = 12;
/// Registers of sums.
const SUMS: usize = 8;
/// Lanes of a cache line.
const LINE: usize = 16;

/// Sets one panel of y.
pub(super) struct Panel<'a> {
    /// At most [`PANEL`] values.
    pub(super) y: &'a mut [f32],
    pub(super) kept: &'a Kept,
    pub(super) cells: &'a Cells,
    pub(super) panel: usize,
}

impl ProductKernel for Panel<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        match self.cells.precision {
            Precision::F32 => s.isolated(PanelOf::<false>(self)),
            Precision::Bf16 => s.isolated(PanelOf::<true>(self)),
        }
    }
}

struct PanelOf<'a, const BF16: bool>(Panel<'a>);

impl<const BF16: bool> ProductKernel for PanelOf<'_, BF16> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let Panel { y, kept, cells, panel } = self.0;
        let run = if BF16 { PANEL / 2 } else { PANEL };
        let words = cells.panel(panel);
        // Registers of a column, and columns with sums of their own.
        let (vectors, chains) = (PANEL / S::LANES, SUMS * S::LANES / PANEL);
        let mut sums = [s.splat(0.0); SUMS];
        let mut add = |chain: usize, index: u32, value: f32| {
            let column = &words[index as usize * run..][..run];
            let value = s.splat(value);
            if BF16 {
                for half in 0..vectors / 2 {
                    let (group, within) = (half * S::LANES / WORDS, half * S::LANES % WORDS);
                    let (low, high) = s.widen(bytemuck::cast_slice(&column[half * S::LANES..]));
                    let lane = group * GROUP + within;
                    let (first, second) = (lane / S::LANES, (lane + WORDS) / S::LANES);
                    let (first, second) = (chain * vectors + first, chain * vectors + second);
                    sums[first] = s.fma(value, low, sums[first]);
                    sums[second] = s.fma(value, high, sums[second]);
                }
            } else {
                for vector in 0..vectors {
                    let at = chain * vectors + vector;
                    sums[at] = s.fma(value, s.load(&column[vector * S::LANES..]), sums[at]);
                }
            }
        };
        let ahead = |i: usize| {
            if let Some(&index) = kept.indices.get(i + AHEAD) {
                for line in (0..run).step_by(LINE) {
                    s.prefetch(words, index as usize * run + line);
                }
            }
        };
        let whole = kept.indices.len() - kept.indices.len() % chains;
        for first in (0..whole).step_by(chains) {
            for chain in 0..chains {
                ahead(first + chain);
                add(chain, kept.indices[first + chain], kept.values[first + chain]);
            }
        }
        for i in whole..kept.indices.len() {
            add(0, kept.indices[i], kept.values[i]);
        }
        for (vector, y) in y.chunks_mut(S::LANES).enumerate() {
            let mut sum = sums[vector];
            for chain in 1..chains {
                sum = s.add(sum, sums[chain * vectors + vector]);
            }
            s.store_tail(y, sum);
        }
    }
}

/// Sets the listed values of y.
pub(super) struct Rows<'a> {
    pub(super) y: SharedRows<'a>,
    /// As wide as the cells, rounded.
    pub(super) x: &'a [f32],
    pub(super) indices: &'a [u32],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) cells: &'a Cells,
}

impl ProductKernel for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let Rows { y, x, indices, bias, cells } = self;
        let (words, run) = (if cells.lanes == 0 { &[][..] } else { cells.panel(0) }, cells.run());
        for (i, &index) in indices.iter().enumerate() {
            if let Some(&next) = indices.get(i + 1) {
                for line in (0..run).step_by(LINE) {
                    s.prefetch(words, next as usize * run + line);
                }
            }
            let row = &words[index as usize * run..][..run];
            let sum = match cells.precision {
                Precision::F32 => dot(s, row, x),
                Precision::Bf16 => dot_bf16(s, row, x),
            };
            let bias = bias.map_or(0.0, |bias| bias[index as usize]);
            // SAFETY: an index is listed once, and tasks have different parts of the list.
            let y = unsafe { y.values(index as usize, 1) };
            y[0] = sum + bias;
        }
    }
}

/// Returns the sum of products of a row of bf16 with x.
#[inline(always)]
fn dot_bf16<S: Product>(s: S, row: &[f32], x: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    for (at, (words, x)) in row.chunks_exact(WORDS).zip(x.chunks_exact(GROUP)).enumerate() {
        for first in (0..WORDS).step_by(S::LANES) {
            let (low, high) = s.widen(bytemuck::cast_slice(&words[first..]));
            let chain = 2 * (at % 2);
            sums[chain] = s.fma(low, s.load(&x[first..]), sums[chain]);
            sums[chain + 1] = s.fma(high, s.load(&x[WORDS + first..]), sums[chain + 1]);
        }
    }
    s.reduce_add(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

/// Sets `out` to `x`, rounded to the precision.
pub(super) fn round_into(out: &mut [f32], x: &[f32], precision: Precision) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = if precision == Precision::Bf16 { half::bf16::from_f32(x).to_f32() } else { x };
    }
}
