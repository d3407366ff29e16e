//! Tiles: small products in registers, and the packing they need.
//!
//! A *unit* is a few queries with all heads of one group; a row of it is one (query, head). Its scores are kept
//! transposed, `[keys, rows]`: a vector holds several rows at one key, so that the softmax needs no sum across lanes, and
//! rows that see few keys lie in the first lanes. Packed values are padded with zeros to whole vectors: no row sees a
//! padded key, and a padded row contributes zeros.

use super::dims::Dims;
use crate::simd::{Product, ProductKernel, SQUARE, Simd};

/// Approximate rows of a unit.
const ROWS: usize = 32;
/// Keys of a tile.
pub(super) const KEYS: usize = 128;
/// Rows and head widths are padded to this, a multiple of every tier's lanes.
const PAD: usize = SQUARE;
/// Keys are padded to this, a multiple of the rows of every tier's blocks.
const KEY_PAD: usize = 8;

/// Returns the queries of a unit.
pub(super) fn unit_queries(dims: Dims) -> usize {
    (ROWS / dims.group()).max(1)
}

/// Pads `n` rows or values of a head.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// Pads `n` keys.
pub(super) fn padded_keys(n: usize) -> usize {
    n.next_multiple_of(KEY_PAD)
}

/// Rows of `stride` values.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
}

impl<'a> View<'a> {
    pub(super) fn row(self, row: usize, first: usize, width: usize) -> &'a [f32] {
        &self.data[row * self.stride + first..][..width]
    }
}

/// The rows of one unit: `count` queries from `first` on of batch item `item`, for the heads of `kv_head`. Row
/// `i * group + h` is query `first + i` at the group's head h.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) item: usize,
    pub(super) kv_head: usize,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) dims: Dims,
}

impl Rows {
    /// Returns the padded number of rows.
    pub(super) fn padded(self) -> usize {
        padded(self.len())
    }

    fn len(self) -> usize {
        self.dims.group() * self.count
    }

    /// Returns the number of keys that at least one row sees.
    pub(super) fn visible(self) -> usize {
        self.dims.visible(self.first + self.count - 1)
    }

    /// Returns how many of the `keys` keys from `first_key` on at least one row sees, padded.
    pub(super) fn visible_of(self, first_key: usize, keys: usize) -> usize {
        padded_keys(self.visible().saturating_sub(first_key).min(keys))
    }

    /// Returns `(token, head)` of a row.
    pub(super) fn place(self, row: usize) -> (usize, usize) {
        let group = self.dims.group();
        (self.item * self.dims.queries + self.first + row / group, self.kv_head * group + row % group)
    }

    /// Lists the places of all rows, in their order.
    pub(super) fn places(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.len()).map(move |row| self.place(row))
    }

    /// Sets `out[d, row] = factor * x[row, d]`, `[head_dim, padded rows]`.
    #[inline(always)]
    pub(super) fn pack_columns<S: Product>(self, s: S, out: &mut [f32], x: View<'_>, factor: f32) {
        let (n, head_dim) = (self.padded(), self.dims.head_dim);
        let out = &mut out[..head_dim * n];
        for first in (0..n).step_by(SQUARE) {
            let mut rows = [&ZEROS[..0]; SQUARE];
            for (slot, row) in rows.iter_mut().zip(first..self.len()) {
                let (token, head) = self.place(row);
                *slot = x.row(token, head * head_dim, head_dim);
            }
            let whole = head_dim - head_dim % SQUARE;
            for d in (0..whole).step_by(SQUARE) {
                let mut block = [&ZEROS[..]; SQUARE];
                for (part, row) in block.iter_mut().zip(rows) {
                    if !row.is_empty() {
                        *part = &row[d..d + SQUARE];
                    }
                }
                s.transpose(&mut out[d * n + first..], n, block, SQUARE);
            }
            for d in whole..head_dim {
                for (out, row) in out[d * n + first..][..SQUARE].iter_mut().zip(rows) {
                    *out = if row.is_empty() { 0.0 } else { row[d] };
                }
            }
        }
        if factor != 1.0 {
            scale(s, out, factor);
        }
    }

    /// Sets `out[row, d] = factor * x[row, d]`, `[padded rows, padded head_dim]`.
    #[inline(always)]
    pub(super) fn pack_rows<S: Product>(self, s: S, out: &mut [f32], x: View<'_>, factor: f32) {
        let (width, head_dim) = (padded(self.dims.head_dim), self.dims.head_dim);
        let out = &mut out[..self.padded() * width];
        let mut places = self.places();
        for out in out.chunks_exact_mut(width) {
            match places.next() {
                Some((token, head)) => copy(s, out, x.row(token, head * head_dim, head_dim)),
                None => out.fill(0.0),
            }
        }
        if factor != 1.0 {
            scale(s, out, factor);
        }
    }

    /// Returns the first key that at least one row sees.
    pub(super) fn first_seen(self) -> usize {
        self.dims.first_seen(self.first)
    }

    /// Returns the key at which tiles start: [`Rows::first_seen`] or one just before it.
    pub(super) fn first_key(self) -> usize {
        self.first_seen() / KEY_PAD * KEY_PAD
    }

    /// Sets the places of `scores` `[keys, padded rows]` that causality or the window hides, for the keys from `first_key`
    /// on.
    #[inline(always)]
    pub(super) fn mask(self, scores: &mut [f32], first_key: usize, value: f32) {
        let seen_by_all = self.dims.visible(self.first);
        let first_hidden = seen_by_all.saturating_sub(first_key);
        for (j, scores) in scores.chunks_exact_mut(self.padded()).enumerate().skip(first_hidden) {
            let hidden = (first_key + j + 1 - seen_by_all).min(self.count);
            scores[..hidden * self.dims.group()].fill(value);
        }
        let Some(window) = self.dims.scores.window else { return };
        for (j, scores) in scores.chunks_exact_mut(self.padded()).enumerate() {
            // The first query that is too far behind the key; later keys are hidden from fewer queries.
            let far = (first_key + j + 1).saturating_add(window).saturating_sub(seen_by_all);
            if far >= self.count {
                break;
            }
            scores[far * self.dims.group()..self.len()].fill(value);
        }
    }
}

static ZEROS: [f32; SQUARE] = [0.0; SQUARE];

/// Sets `out` to `x` followed by zeros.
#[inline(always)]
fn copy<S: Product>(s: S, out: &mut [f32], x: &[f32]) {
    for (i, out) in out.chunks_exact_mut(S::LANES).enumerate() {
        s.store(out, s.load_tail(&x[(i * S::LANES).min(x.len())..]));
    }
}

#[inline(always)]
fn scale<S: Product>(s: S, x: &mut [f32], factor: f32) {
    let factor = s.splat(factor);
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(x, s.mul(factor, s.load(x)));
    }
}

/// Sets `out` `[padded keys, padded head_dim]` to `keys` rows of `x` from `row` on, columns from `column` on.
#[inline(always)]
pub(super) fn pack_keys<S: Product>(
    s: S,
    out: &mut [f32],
    x: View<'_>,
    [row, keys]: [usize; 2],
    column: usize,
    head_dim: usize,
) {
    let width = padded(head_dim);
    for (j, out) in out[..padded_keys(keys) * width].chunks_exact_mut(width).enumerate() {
        if j < keys {
            copy(s, out, x.row(row + j, column, head_dim));
        } else {
            out.fill(0.0);
        }
    }
}

/// Sets `out` `[n, m]` to the transpose of `x` `[m, n]`; both are multiples of [`SQUARE`].
#[inline(always)]
pub(super) fn transpose<S: Product>(s: S, out: &mut [f32], x: &[f32], [m, n]: [usize; 2]) {
    for i in (0..m).step_by(SQUARE) {
        for j in (0..n).step_by(SQUARE) {
            let mut block = [&ZEROS[..]; SQUARE];
            for (r, part) in block.iter_mut().enumerate() {
                *part = &x[(i + r) * n + j..][..SQUARE];
            }
            s.transpose(&mut out[j * m + i..], m, block, SQUARE);
        }
    }
}

/// The left factor of a product, with its stride.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// A[i, k] lies at `i * stride + k`.
    Rows(&'a [f32], usize),
    /// A[i, k] lies at `k * stride + i`.
    Columns(&'a [f32], usize),
}

/// Sets `C = A B`, or adds to it if `accumulate`. `sizes` are m, n and k: C `[m, n]`, A `[m, k]`, B `[k, n]`; m is a
/// multiple of [`KEY_PAD`] and n of [`PAD`].
#[inline(always)]
pub(super) fn product<S: Product>(
    s: S,
    c: &mut [f32],
    left: Left<'_>,
    b: &[f32],
    sizes: [usize; 3],
    accumulate: bool,
) {
    match left {
        Left::Rows(a, stride) => columns::<S, false>(s, c, (a, stride), b, sizes, accumulate),
        Left::Columns(a, stride) => columns::<S, true>(s, c, (a, stride), b, sizes, accumulate),
    }
}

#[inline(always)]
fn columns<S: Product, const COLUMNS: bool>(
    s: S,
    c: &mut [f32],
    (a, stride): (&[f32], usize),
    b: &[f32],
    sizes: [usize; 3],
    accumulate: bool,
) {
    let n = sizes[1];
    let mut j = 0;
    while j < n {
        let (c, b) = (&mut c[j..], &b[j..]);
        if j + 2 * S::LANES <= n {
            s.isolated(Column::<2, COLUMNS> { c, a, stride, b, sizes, accumulate });
            j += 2 * S::LANES;
        } else {
            s.isolated(Column::<1, COLUMNS> { c, a, stride, b, sizes, accumulate });
            j += S::LANES;
        }
    }
}

/// N vectors of every row of C.
struct Column<'a, const N: usize, const COLUMNS: bool> {
    c: &'a mut [f32],
    a: &'a [f32],
    stride: usize,
    b: &'a [f32],
    sizes: [usize; 3],
    accumulate: bool,
}

impl<const N: usize, const COLUMNS: bool> ProductKernel for Column<'_, N, COLUMNS> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        // As many rows as the tier's registers hold.
        if S::ROWS >= 8 {
            self.blocks::<S, 8>(s);
        } else if S::ROWS >= 4 {
            self.blocks::<S, 4>(s);
        } else {
            self.blocks::<S, 2>(s);
        }
    }
}

impl<const N: usize, const COLUMNS: bool> Column<'_, N, COLUMNS> {
    #[inline(always)]
    fn blocks<S: Product, const M: usize>(self, s: S) {
        let Column { c, a, stride, b, sizes: [m, n, k], accumulate } = self;
        for i in (0..m).step_by(M) {
            let c = &mut c[i * n..];
            let mut sums = [[s.splat(0.0); N]; M];
            if COLUMNS {
                for (a, b) in a[i..].chunks(stride).zip(b.chunks(n)).take(k) {
                    let a: &[f32; M] = a.first_chunk().expect("M values");
                    let bs = load::<S, N>(s, b);
                    for r in 0..M {
                        let x = s.splat(a[r]);
                        for v in 0..N {
                            sums[r][v] = s.fma(x, bs[v], sums[r][v]);
                        }
                    }
                }
            } else {
                let mut rows = [&a[..0]; M];
                for (r, row) in rows.iter_mut().enumerate() {
                    *row = &a[(i + r) * stride..][..k];
                }
                for (l, b) in b.chunks(n).take(k).enumerate() {
                    let bs = load::<S, N>(s, b);
                    for r in 0..M {
                        let x = s.splat(rows[r][l]);
                        for v in 0..N {
                            sums[r][v] = s.fma(x, bs[v], sums[r][v]);
                        }
                    }
                }
            }
            for r in 0..M {
                let c = &mut c[r * n..][..N * S::LANES];
                for v in 0..N {
                    let c = &mut c[v * S::LANES..];
                    let sum = if accumulate { s.add(s.load(c), sums[r][v]) } else { sums[r][v] };
                    s.store(c, sum);
                }
            }
        }
    }
}

/// N vectors.
#[inline(always)]
fn load<S: Simd, const N: usize>(s: S, x: &[f32]) -> [S::V; N] {
    let mut vectors = [s.splat(0.0); N];
    for (v, vector) in vectors.iter_mut().enumerate() {
        *vector = s.load(&x[v * S::LANES..]);
    }
    vectors
}
