//! Packs operands in the order in which the product kernels read them.
//!
//! A *tile* holds `width` lanes (rows of A, or the columns of one panel of B) k-major: value (k, lane) lies at
//! `k * width + lane`. In pairs, (k, k + 1) of a lane are one `u32` at `k / 2 * width + lane`.

use std::ops::Range;

use super::mat::Mat;
use crate::simd::{Product, SQUARE, pair};

/// Columns of a panel of B.
pub(crate) const PANEL: usize = 32;
/// Inner dimension packed at a time, even: the packed values stay in the first-level cache for the next step.
pub(crate) const DEPTH: usize = 256;
/// Values past a tile's end that packing may overwrite.
pub(crate) const SLACK: usize = SQUARE;

/// A matrix of lanes by k, whose lanes may be picked by a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    data: &'a [f32],
    lane_stride: usize,
    k_stride: usize,
    lanes: Option<&'a [u32]>,
}

impl<'a> Source<'a> {
    /// Takes rows as lanes.
    pub(crate) fn rows(mat: Mat<'a>) -> Source<'a> {
        let Mat { data, row_stride, col_stride, .. } = mat;
        Source { data, lane_stride: row_stride, k_stride: col_stride, lanes: None }
    }

    /// Takes row `list[lane]` for every lane.
    pub(crate) fn picked_rows(mat: Mat<'a>, list: Option<&'a [u32]>) -> Source<'a> {
        Source { lanes: list, ..Source::rows(mat) }
    }

    /// Tells whether neighbouring lanes lie side by side.
    pub(crate) fn lanes_are_dense(&self) -> bool {
        self.lane_stride == 1 && self.lanes.is_none() && !self.k_is_dense()
    }

    /// Tells whether the values of a lane lie side by side.
    fn k_is_dense(&self) -> bool {
        self.k_stride == 1
    }

    fn at_lane(&self, lane: usize) -> usize {
        self.lanes.map_or(lane, |list| list[lane] as usize) * self.lane_stride
    }

    fn at_k(&self, k: usize) -> usize {
        k * self.k_stride
    }
}

/// Lanes and depth of a source that are packed.
#[derive(Clone)]
pub(crate) struct Part<'a> {
    pub(crate) source: Source<'a>,
    pub(crate) lanes: Range<usize>,
    pub(crate) ks: Range<usize>,
}

/// Sets `width` lanes of a tile of `stride` lanes to `part`; missing lanes become 0. If `width` is `stride`, up to
/// [`SLACK`] values past the tile are overwritten; otherwise `width` is a multiple of 16.
#[inline(always)]
pub(crate) fn pack<S: Product>(s: S, out: &mut [f32], (width, stride): (usize, usize), part: Part<'_>) {
    if part.source.k_is_dense() {
        transposed(s, out, (width, stride), part);
    } else if part.source.lane_stride == 1 && part.source.lanes.is_none() {
        copied(s, out, (width, stride), part);
    } else {
        let Part { source, lanes, ks } = part;
        for (i, k) in ks.enumerate() {
            let row = &mut out[i * stride..][..width];
            row.fill(0.0);
            for (value, lane) in row.iter_mut().zip(lanes.clone()) {
                *value = source.data[source.at_lane(lane) + source.at_k(k)];
            }
        }
    }
}

static ZEROS: [f32; SQUARE] = [0.0; SQUARE];
static WIDE_ZEROS: [f32; 2 * SQUARE] = [0.0; 2 * SQUARE];

#[inline(always)]
fn transposed<S: Product>(s: S, out: &mut [f32], (width, stride): (usize, usize), part: Part<'_>) {
    let Part { source, lanes, ks } = part;
    if (width, stride, lanes.len()) == (1, 1, 1) {
        // A token by itself is its row.
        out[..ks.len()].copy_from_slice(&source.data[source.at_lane(lanes.start) + ks.start..][..ks.len()]);
        return;
    }
    let squares = ks.len() / SQUARE;
    for first in (0..width).step_by(SQUARE) {
        let mut rows = [&ZEROS[..0]; SQUARE];
        for (row, lane) in rows.iter_mut().zip(lanes.start + first..lanes.end) {
            *row = &source.data[source.at_lane(lane) + ks.start..][..ks.len()];
        }
        for square in 0..squares {
            let k = square * SQUARE;
            let block = std::array::from_fn(|lane| {
                let row: &[f32] = rows[lane];
                if row.is_empty() { &ZEROS[..] } else { &row[k..k + SQUARE] }
            });
            s.transpose(&mut out[k * stride + first..], stride, block, SQUARE.min(width - first));
        }
        for k in squares * SQUARE..ks.len() {
            let out = &mut out[k * stride + first..][..SQUARE.min(width - first)];
            for (out, row) in out.iter_mut().zip(rows) {
                *out = if row.is_empty() { 0.0 } else { row[k] };
            }
        }
    }
}

#[inline(always)]
fn copied<S: Product>(s: S, out: &mut [f32], (width, stride): (usize, usize), part: Part<'_>) {
    let Part { source, lanes, ks } = part;
    for (i, k) in ks.enumerate() {
        let row = &source.data[source.at_k(k) + lanes.start..][..lanes.len()];
        let out = &mut out[i * stride..];
        for first in (0..width).step_by(S::LANES) {
            s.store(&mut out[first..], s.load_tail(&row[first.min(row.len())..]));
        }
    }
}

/// Values of k that [`copied_tiles`] moves for all tiles at a time. It reads one place of every row, and rows may be a
/// power of two apart; the first-level cache holds eight such lines.
const ROWS_AT_ONCE: usize = 8;

/// Returns the rows of `count` values of k from `start` on, empty ones behind them.
#[inline(always)]
fn rows_at<'a>(part: &Part<'a>, start: usize, count: usize) -> [&'a [f32]; ROWS_AT_ONCE] {
    let Part { source, lanes, ks } = part;
    let mut rows = [&ZEROS[..0]; ROWS_AT_ONCE];
    for (i, row) in rows[..count].iter_mut().enumerate() {
        *row = &source.data[source.at_k(ks.start + start + i) + lanes.start..][..lanes.len()];
    }
    rows
}

/// Sets tiles, cut as `tiles` says and `depth` deep each, to a part of a source with dense lanes. Values past the part in
/// a tile are unspecified.
#[inline(always)]
pub(crate) fn copied_tiles<S: Product, T: Iterator<Item = Range<usize>>>(
    s: S,
    out: &mut [f32],
    part: Part<'_>,
    depth: usize,
    tiles: impl Fn() -> T,
) {
    let (lanes, ks) = (part.lanes.clone(), part.ks.clone());
    for start in (0..ks.len()).step_by(ROWS_AT_ONCE) {
        let count = ROWS_AT_ONCE.min(ks.len() - start);
        let rows = rows_at(&part, start, count);
        for tile in tiles() {
            let width = tile.len();
            let out = &mut out[tile.start * depth + start * width..];
            // Whole vectors where what is past the tile's lanes belongs to a later k of this tile, which comes after.
            let after = (ks.len() - start - count + 1) * width;
            let whole = after >= S::LANES && width <= S::LANES && tile.start + S::LANES <= lanes.len();
            if whole {
                for (i, row) in rows[..count].iter().enumerate() {
                    s.store(&mut out[i * width..], s.load(&row[tile.start..]));
                }
            } else {
                for (out, row) in out.chunks_exact_mut(width).zip(&rows[..count]) {
                    for first in (0..width).step_by(S::LANES) {
                        s.store_tail(&mut out[first..], s.load_tail(&row[tile.start + first..]));
                    }
                }
            }
        }
    }
}

/// Does the same as [`copied_tiles`] for pairs. The depth is even: an odd last value is paired with a zero.
#[inline(always)]
pub(crate) fn copied_pair_tiles<S: Product, T: Iterator<Item = Range<usize>>>(
    s: S,
    out: &mut [u32],
    part: Part<'_>,
    tiles: impl Fn() -> T,
) {
    let (lanes, ks) = (part.lanes.clone(), part.ks.clone());
    let depth = ks.len().next_multiple_of(2);
    for start in (0..ks.len()).step_by(ROWS_AT_ONCE) {
        let count = ROWS_AT_ONCE.min(ks.len() - start);
        let rows = rows_at(&part, start, count);
        for tile in tiles() {
            let width = tile.len();
            let out = &mut out[(tile.start * depth + start * width) / 2..];
            let after = ((depth - start - count.next_multiple_of(2)) / 2 + 1) * width;
            let whole = after >= S::LANES && width <= S::LANES && tile.start + S::LANES <= lanes.len();
            if whole && count == ROWS_AT_ONCE {
                for i in 0..ROWS_AT_ONCE / 2 {
                    let (even, odd) = (&rows[2 * i][tile.start..], &rows[2 * i + 1][tile.start..]);
                    s.store_pairs(&mut out[i * width..], s.load(even), s.load(odd));
                }
                continue;
            }
            let mut pairs = [0; SQUARE];
            for (out, rows) in out.chunks_exact_mut(width).zip(rows[..count].chunks(2)) {
                for first in (0..width).step_by(S::LANES) {
                    let lanes = S::LANES.min(width - first);
                    let part = |row: Option<&&[f32]>| {
                        s.load_tail(row.map_or(&[][..], |row| &row[tile.start + first..][..lanes]))
                    };
                    s.store_pairs(&mut pairs, part(rows.first()), part(rows.get(1)));
                    out[first..first + lanes].copy_from_slice(&pairs[..lanes]);
                }
            }
        }
    }
}

/// Tells whether [`pack_pairs`] takes this source.
pub(crate) fn packs_pairs(source: &Source<'_>) -> bool {
    source.k_is_dense() || source.lane_stride == 1 && source.lanes.is_none()
}

/// Does the same as [`pack`] for pairs: `ks.len()` is made even with zeros, and up to [`SLACK`] pairs past the tile are
/// overwritten.
#[inline(always)]
pub(crate) fn pack_pairs<S: Product>(s: S, out: &mut [u32], (width, stride): (usize, usize), part: Part<'_>) {
    let Part { source, lanes, ks } = part;
    if !source.k_is_dense() {
        for k in (0..ks.len()).step_by(2) {
            let row = |k: usize| &source.data[source.at_k(ks.start + k) + lanes.start..][..lanes.len()];
            let (even, odd) = (row(k), if k + 1 < ks.len() { row(k + 1) } else { &[] });
            let out = &mut out[k / 2 * stride..];
            for first in (0..width).step_by(S::LANES) {
                let part = |row: &'_ [f32]| s.load_tail(&row[first.min(row.len())..]);
                s.store_pairs(&mut out[first..], part(even), part(odd));
            }
        }
        return;
    }
    if (width, stride, lanes.len()) == (1, 1, 1) {
        // A token by itself is its row.
        let row = &source.data[source.at_lane(lanes.start) + ks.start..][..ks.len()];
        let out = &mut out[..ks.len().div_ceil(2)];
        for (out, row) in out.chunks_mut(S::LANES / 2).zip(row.chunks(S::LANES)) {
            s.store_bf16(out, s.load_tail(row));
        }
        return;
    }
    const WIDE: usize = 2 * SQUARE;
    let blocks = ks.len() / WIDE;
    for first in (0..width).step_by(SQUARE) {
        let mut rows = [&WIDE_ZEROS[..0]; SQUARE];
        for (row, lane) in rows.iter_mut().zip(lanes.start + first..lanes.end) {
            *row = &source.data[source.at_lane(lane) + ks.start..][..ks.len()];
        }
        let lanes = SQUARE.min(width - first);
        for block in 0..blocks {
            let k = block * WIDE;
            let block = std::array::from_fn(|lane| {
                let row: &[f32] = rows[lane];
                if row.is_empty() { &WIDE_ZEROS[..] } else { &row[k..k + WIDE] }
            });
            s.transpose_pairs(&mut out[k / 2 * stride + first..], stride, block, lanes);
        }
        for k in (blocks * WIDE..ks.len()).step_by(2) {
            let out = &mut out[k / 2 * stride + first..][..lanes];
            for (out, row) in out.iter_mut().zip(rows) {
                *out = pair(row.get(k).copied().unwrap_or(0.0), row.get(k + 1).copied().unwrap_or(0.0));
            }
        }
    }
}

/// Rounds to bf16, in place.
#[inline(always)]
pub(crate) fn round<S: Product>(s: S, values: &mut [f32]) {
    for x in values.chunks_mut(S::LANES) {
        let rounded = s.round_bf16(s.load_tail(x));
        s.store_tail(x, rounded);
    }
}

/// Sets the pairs of a tile of `width` lanes and `depth` values of k, which is even or followed by zeros. Both slices
/// have [`SLACK`] values past the tile.
#[inline(always)]
pub(crate) fn pairs<S: Product>(s: S, out: &mut [u32], values: &[f32], width: usize, depth: usize) {
    for k in (0..depth).step_by(2) {
        let out = &mut out[k / 2 * width..];
        let (even, odd) = (&values[k * width..], &values[(k + 1) * width..]);
        for first in (0..width).step_by(S::LANES) {
            s.store_pairs(&mut out[first..], s.load(&even[first..]), s.load(&odd[first..]));
        }
    }
}
