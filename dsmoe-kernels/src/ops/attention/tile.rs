//! Tiles: small products in registers, and the packing they need.
//!
//! A tile's scores are kept transposed, `[keys, rows]`, where a row is one (head of the group, query): every
//! vector then holds as many rows at one key, so that the softmax needs no sum across lanes, and keys and values
//! are read in place, one value at a time for all lanes.

use super::Dims;
use crate::simd::Simd;

/// Rows of a tile, about: queries times heads of a group.
const ROWS: usize = 64;
/// Keys of a tile.
pub(super) const KEYS: usize = 64;
/// Widths are padded to this, a multiple of every tier's lanes.
const PAD: usize = 16;

/// Queries of a tile.
pub(super) fn queries(dims: Dims) -> usize {
    (ROWS / dims.group()).max(1)
}

/// `n` padded to whole vectors.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// The rows of one tile: `count` queries from `first` on of batch item `item`, for the heads of `kv_head`.
/// Row `h * count + i` is query `first + i` at the group's head h.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) item: usize,
    pub(super) kv_head: usize,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) dims: Dims,
}

impl Rows {
    /// Rows, padded.
    pub(super) fn padded(self) -> usize {
        padded(self.dims.group() * self.count)
    }

    /// Keys that some row sees.
    pub(super) fn visible(self) -> usize {
        self.dims.visible(self.first + self.count - 1)
    }

    /// `(row, index of the query's values in the whole q, index of its head in lse)` of every row.
    pub(super) fn each(self) -> impl Iterator<Item = (usize, usize, usize)> {
        let Rows { item, kv_head, first, count, dims } = self;
        let group = dims.group();
        (0..group * count).map(move |row| {
            let (h, i) = (row / count, row % count);
            let token = item * dims.queries + first + i;
            let head = token * dims.heads + kv_head * group + h;
            (row, head * dims.head_dim, head)
        })
    }

    /// `out[d, row] = factor * x[row, d]`, zero in the padding.
    pub(super) fn pack_columns(self, out: &mut Vec<f32>, x: &[f32], factor: f32) {
        let (n, head_dim) = (self.padded(), self.dims.head_dim);
        out.clear();
        out.resize(head_dim * n, 0.0);
        for (row, first, _) in self.each() {
            for (out, x) in out[row..].iter_mut().step_by(n).zip(&x[first..][..head_dim]) {
                *out = factor * x;
            }
        }
    }

    /// `out[row, d] = factor * x[row, d]`, rows and columns padded with zeros.
    pub(super) fn pack_rows(self, out: &mut Vec<f32>, x: &[f32], factor: f32) {
        let (width, head_dim) = (padded(self.dims.head_dim), self.dims.head_dim);
        out.clear();
        out.resize(self.padded() * width, 0.0);
        for (row, first, _) in self.each() {
            for (out, x) in out[row * width..].iter_mut().zip(&x[first..][..head_dim]) {
                *out = factor * x;
            }
        }
    }

    /// Fills the places of `scores` `[keys, rows]` that causality hides, for the keys from `first_key` on.
    pub(super) fn mask(self, scores: &mut [f32], first_key: usize, value: f32) {
        let seen_by_all = self.dims.visible(self.first);
        for (j, scores) in scores.chunks_exact_mut(self.padded()).enumerate() {
            let hidden = (first_key + j + 1).saturating_sub(seen_by_all).min(self.count);
            for scores in scores[..self.dims.group() * self.count].chunks_exact_mut(self.count) {
                scores[..hidden].fill(value);
            }
        }
    }
}

/// How the left factor of a product lies in memory.
#[derive(Clone, Copy)]
pub(super) enum Left {
    /// A[i, k] at `i * stride + k`.
    Rows(usize),
    /// A[i, k] at `k * stride + i`.
    Columns(usize),
}

/// `C = A B`, or `C += A B` when `accumulate`: C `[m, n]`, A `[m, k]` as `left` says, B `[k, n]`; n is whole
/// vectors.
#[inline(always)]
pub(super) fn product<S: Simd>(
    s: S,
    c: &mut [f32],
    a: &[f32],
    left: Left,
    b: &[f32],
    [m, n, k]: [usize; 3],
    accumulate: bool,
) {
    match left {
        Left::Rows(stride) => sized::<S, false>(s, c, a, stride, b, [m, n, k], accumulate),
        Left::Columns(stride) => sized::<S, true>(s, c, a, stride, b, [m, n, k], accumulate),
    }
}

#[inline(always)]
fn sized<S: Simd, const COLUMNS: bool>(
    s: S,
    c: &mut [f32],
    a: &[f32],
    stride: usize,
    b: &[f32],
    [m, n, k]: [usize; 3],
    accumulate: bool,
) {
    let mut j = 0;
    while j + 2 * S::LANES <= n {
        column::<S, 2, COLUMNS>(s, &mut c[j..], a, stride, &b[j..], [m, n, k], accumulate);
        j += 2 * S::LANES;
    }
    if j < n {
        column::<S, 1, COLUMNS>(s, &mut c[j..], a, stride, &b[j..], [m, n, k], accumulate);
    }
}

/// N vectors of every row of C.
#[inline(always)]
fn column<S: Simd, const N: usize, const COLUMNS: bool>(
    s: S,
    c: &mut [f32],
    a: &[f32],
    stride: usize,
    b: &[f32],
    [m, n, k]: [usize; 3],
    accumulate: bool,
) {
    let step = if COLUMNS { 1 } else { stride };
    let mut i = 0;
    // Eight rows of two vectors need more than the 16 registers of the narrower tiers.
    while S::LANES >= 16 && i + 8 <= m {
        block::<S, 8, N, COLUMNS>(s, &mut c[i * n..], &a[i * step..], stride, b, n, k, accumulate);
        i += 8;
    }
    while i + 4 <= m {
        block::<S, 4, N, COLUMNS>(s, &mut c[i * n..], &a[i * step..], stride, b, n, k, accumulate);
        i += 4;
    }
    while i < m {
        block::<S, 1, N, COLUMNS>(s, &mut c[i * n..], &a[i * step..], stride, b, n, k, accumulate);
        i += 1;
    }
}

/// N vectors of M rows of C, in registers.
#[expect(clippy::too_many_arguments, reason = "a product's operands and sizes")]
#[inline(always)]
fn block<S: Simd, const M: usize, const N: usize, const COLUMNS: bool>(
    s: S,
    c: &mut [f32],
    a: &[f32],
    stride: usize,
    b: &[f32],
    n: usize,
    k: usize,
    accumulate: bool,
) {
    let rows: [&[f32]; M] = std::array::from_fn(|i| if COLUMNS { a } else { &a[i * stride..][..k] });
    let mut sums = [[s.splat(0.0); N]; M];
    for l in 0..k {
        let b = &b[l * n..][..N * S::LANES];
        let mut bs = [s.splat(0.0); N];
        for v in 0..N {
            bs[v] = s.load(&b[v * S::LANES..]);
        }
        let column = if COLUMNS { &a[l * stride..][..M] } else { &[] };
        for i in 0..M {
            let x = s.splat(if COLUMNS { column[i] } else { rows[i][l] });
            for v in 0..N {
                sums[i][v] = s.fma(x, bs[v], sums[i][v]);
            }
        }
    }
    for i in 0..M {
        let c = &mut c[i * n..][..N * S::LANES];
        for v in 0..N {
            let c = &mut c[v * S::LANES..];
            let sum = if accumulate { s.add(s.load(c), sums[i][v]) } else { sums[i][v] };
            s.store(c, sum);
        }
    }
}
