//! Vector bodies.

use super::cells::{Cells, GROUP, WORDS};
use super::{Kept, PANEL};
use crate::buf::SharedRows;
use crate::matmul::Precision;
use crate::simd::{Product, ProductKernel, dot};

/// Columns that are asked for ahead of the one that is read: their places are known, but no processor guesses them.
const AHEAD: usize = 12;
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
        // Registers of a column.
        match (self.cells.precision, S::LANES) {
            (Precision::F32, 16) => s.isolated(Columns::<false, 4>(self)),
            (Precision::Bf16, 16) => s.isolated(Columns::<true, 4>(self)),
            (Precision::F32, _) => s.isolated(Columns::<false, 8>(self)),
            (Precision::Bf16, _) => s.isolated(Columns::<true, 8>(self)),
        }
    }
}

/// A panel whose columns are `V` registers of outputs.
struct Columns<'a, const BF16: bool, const V: usize>(Panel<'a>);

impl<const BF16: bool, const V: usize> ProductKernel for Columns<'_, BF16, V> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        assert_eq!(V * S::LANES, PANEL);
        let Panel { y, kept, cells, panel } = self.0;
        let run = if BF16 { PANEL / 2 } else { PANEL };
        let words = cells.panel(panel);
        let (indices, values) = (&kept.indices[..], &kept.values[..kept.indices.len()]);
        // Neighbours in the list have sums of their own: a loop over such sums would keep them in memory.
        let (mut sums, mut others) = ([s.splat(0.0); V], [s.splat(0.0); V]);
        let column = |index: u32| &words[index as usize * run..][..run];
        let ahead = |index: u32| {
            for line in 0..run / LINE {
                s.prefetch(words, index as usize * run + line * LINE);
            }
        };
        let (pairs, last) = indices.as_chunks::<2>();
        let (pairs_of_values, last_value) = values.as_chunks::<2>();
        let mut coming = indices[AHEAD.min(indices.len())..].chunks(2);
        for (&[first, second], &[a, b]) in pairs.iter().zip(pairs_of_values) {
            coming.next().unwrap_or_default().iter().for_each(|&index| ahead(index));
            add_column::<S, BF16, V>(s, &mut sums, column(first), a);
            add_column::<S, BF16, V>(s, &mut others, column(second), b);
        }
        if let (&[index], &[value]) = (last, last_value) {
            add_column::<S, BF16, V>(s, &mut sums, column(index), value);
        }
        for ((sum, other), y) in sums.into_iter().zip(others).zip(y.chunks_mut(S::LANES)) {
            s.store_tail(y, s.add(sum, other));
        }
    }
}

/// Adds a column times `value`.
#[inline(always)]
fn add_column<S: Product, const BF16: bool, const V: usize>(
    s: S,
    sums: &mut [S::V; V],
    column: &[f32],
    value: f32,
) {
    let value = s.splat(value);
    if BF16 {
        for half in 0..V / 2 {
            let word = half * S::LANES;
            let (low, high) = s.widen(bytemuck::cast_slice(&column[word..]));
            let first = (word / WORDS * GROUP + word % WORDS) / S::LANES;
            let second = first + WORDS / S::LANES;
            sums[first] = s.fma(value, low, sums[first]);
            sums[second] = s.fma(value, high, sums[second]);
        }
    } else {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = s.fma(value, s.load(&column[i * S::LANES..]), *sum);
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

/// Returns the sum of products of a row of bf16 with x; both are of whole panels.
#[inline(always)]
fn dot_bf16<S: Product>(s: S, row: &[f32], x: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    for (words, x) in row.chunks_exact(2 * WORDS).zip(x.chunks_exact(PANEL)) {
        for first in (0..WORDS).step_by(S::LANES) {
            let (low, high) = s.widen(bytemuck::cast_slice(&words[first..]));
            sums[0] = s.fma(low, s.load(&x[first..]), sums[0]);
            sums[1] = s.fma(high, s.load(&x[WORDS + first..]), sums[1]);
            let (low, high) = s.widen(bytemuck::cast_slice(&words[WORDS + first..]));
            sums[2] = s.fma(low, s.load(&x[GROUP + first..]), sums[2]);
            sums[3] = s.fma(high, s.load(&x[GROUP + WORDS + first..]), sums[3]);
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
