//! Vector bodies.

use super::cells::{Cells, GROUP, WORDS};
use super::{Kept, PANEL};
use crate::buf::SharedRows;
use crate::matmul::Precision;
use crate::simd::{Product, ProductKernel, dot};

/// Columns that are added together, so that a sum is loaded and stored once for all of them.
const TOGETHER: usize = 8;
/// Lanes of a cache line.
const LINE: usize = 16;
/// Sums that stay in the first-level cache beside the columns.
const SUMS: usize = 2048;

/// Sets y to the sum of the kept columns, of lanes `first` and on.
pub(super) struct Lanes<'a> {
    pub(super) y: &'a mut [f32],
    pub(super) kept: &'a Kept,
    pub(super) cells: &'a Cells,
    /// A multiple of [`PANEL`].
    pub(super) first: usize,
}

impl ProductKernel for Lanes<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        match self.cells.precision {
            Precision::F32 => s.isolated(Columns::<false>(self)),
            Precision::Bf16 => s.isolated(Columns::<true>(self)),
        }
    }
}

/// Lanes of f32 or bf16.
struct Columns<'a, const BF16: bool>(Lanes<'a>);

impl<const BF16: bool> ProductKernel for Columns<'_, BF16> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let Lanes { y, kept, cells, first } = self.0;
        let (run, words) = (cells.run(), cells.words());
        let (indices, values) = (&kept.indices[..], &kept.values[..kept.indices.len()]);
        let (groups, others) = indices.as_chunks::<TOGETHER>();
        let (group_values, other_values) = values.as_chunks::<TOGETHER>();
        let mut sums = [0.0; SUMS];
        for (block, y) in y.chunks_mut(SUMS).enumerate() {
            let first = first + block * SUMS;
            let lanes = first..first + y.len().next_multiple_of(PANEL);
            let lanes = if BF16 { lanes.start / 2..lanes.end / 2 } else { lanes };
            let column = |index: u32| &words[index as usize * run..][lanes.clone()];
            let sums = &mut sums[..y.len().next_multiple_of(PANEL)];
            sums.fill(0.0);
            for (i, (group, values)) in groups.iter().zip(group_values).enumerate() {
                // The places of the next columns are known, but no processor guesses them.
                let next = groups.get(i + 1).unwrap_or(group).map(column);
                add_columns::<S, BF16, TOGETHER>(s, sums, group.map(column), *values, Some(next));
            }
            for (&index, &value) in others.iter().zip(other_values) {
                add_columns::<S, BF16, 1>(s, sums, [column(index)], [value], None);
            }
            y.copy_from_slice(&sums[..y.len()]);
        }
    }
}

/// Adds columns times their values, in order, and asks for the columns that come next.
#[inline(always)]
fn add_columns<S: Product, const BF16: bool, const N: usize>(
    s: S,
    sums: &mut [f32],
    columns: [&[f32]; N],
    values: [f32; N],
    next: Option<[&[f32]; N]>,
) {
    let values = values.map(|value| s.splat(value));
    // Lines of a fixed length, so that no load in the loop is checked.
    let lines = columns[0].len() / LINE;
    let columns = columns.map(|column| &column.as_chunks::<LINE>().0[..lines]);
    let ask = |line: usize| {
        if let Some(next) = next {
            next.iter().for_each(|next| s.prefetch(next, line * LINE));
        }
    };
    if BF16 {
        for (line, sums) in sums.as_chunks_mut::<GROUP>().0[..lines].iter_mut().enumerate() {
            ask(line);
            for word in (0..LINE).step_by(S::LANES) {
                let (mut low, mut high) = (s.load(&sums[word..]), s.load(&sums[WORDS + word..]));
                for (column, &value) in columns.iter().zip(&values) {
                    let (a, b) = s.widen(bytemuck::cast_slice(&column[line][word..]));
                    (low, high) = (s.fma(value, a, low), s.fma(value, b, high));
                }
                s.store(&mut sums[word..], low);
                s.store(&mut sums[WORDS + word..], high);
            }
        }
    } else {
        for (line, sums) in sums.as_chunks_mut::<LINE>().0[..lines].iter_mut().enumerate() {
            ask(line);
            for word in (0..LINE).step_by(S::LANES) {
                let mut sum = s.load(&sums[word..]);
                for (column, &value) in columns.iter().zip(&values) {
                    sum = s.fma(value, s.load(&column[line][word..]), sum);
                }
                s.store(&mut sums[word..], sum);
            }
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
        let (words, run) = (cells.words(), cells.run());
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
