//! Forward of one block of queries: online softmax over tiles of keys.

use std::cell::RefCell;

use super::dims::Dims;
use super::tile::{KEYS, Left, Rows, View, pack_keys, padded, padded_keys, product, transpose, unit_queries};
use crate::buf::{Buf, SharedRows};
use crate::isa::Isa;
use crate::simd::{Product, ProductKernel, exp, soft_cap};

/// `count` queries from `first` on of batch item `item`, the heads of `kv_head`.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) out: SharedRows<'a>,
    pub(super) lse: SharedRows<'a>,
    pub(super) q: View<'a>,
    pub(super) k: View<'a>,
    pub(super) v: View<'a>,
    pub(super) item: usize,
    pub(super) kv_head: usize,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) dims: Dims,
}

/// Memory of one thread.
#[derive(Default)]
struct Work {
    k: Buf,
    v: Buf,
    /// The queries of all units, transposed.
    columns: Buf,
    scores: Buf,
    /// Holds for all units the outputs so far, transposed, and for each row the largest score so far and the sum of
    /// `e^(score - largest)`.
    sums: Buf,
    largest: Buf,
    total: Buf,
    transposed: Buf,
}

thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
}

impl Block<'_> {
    /// Computes the block on this thread.
    ///
    /// # Safety
    /// No block of the same queries and heads runs at the same time.
    pub(super) unsafe fn run(self, isa: Isa) {
        WORK.with_borrow_mut(|work| isa.run_product((self, work)));
    }

    fn units(self) -> impl Iterator<Item = Rows> {
        let Block { item, kv_head, first, count, dims, .. } = self;
        let size = unit_queries(dims);
        (0..count).step_by(size).map(move |start| Rows {
            item,
            kv_head,
            first: first + start,
            count: size.min(count - start),
            dims,
        })
    }
}

impl ProductKernel for (Block<'_>, &mut Work) {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let (block, work) = self;
        let Block { out, lse, q, k, v, item, kv_head, first, count, dims } = block;
        let (head_dim, width) = (dims.head_dim, padded(dims.head_dim));
        // Rows of the largest unit, and of all.
        let n = padded(dims.group() * unit_queries(dims).min(count));
        let all = n * count.div_ceil(unit_queries(dims));
        let visible = dims.visible(first + count - 1);
        let start_key = Rows { item, kv_head, first, count, dims }.first_key();
        let keys = padded_keys(KEYS.min(visible - start_key));
        for (buf, len) in [
            (&mut work.k, keys * width),
            (&mut work.v, keys * width),
            (&mut work.columns, all * head_dim),
            (&mut work.scores, keys * n),
            (&mut work.sums, all * width),
            (&mut work.largest, all),
            (&mut work.total, all),
            (&mut work.transposed, n * width),
        ] {
            buf.resize(len);
        }
        let Work { k: keys_packed, v: values_packed, columns, scores, sums, largest, total, transposed } =
            work;
        // With a window, a row may see no key of its unit's first tile: its largest score stays finite there, since the
        // difference of two infinities is no number.
        largest.fill(if dims.scores.window.is_some() { f32::MIN } else { f32::NEG_INFINITY });
        total.fill(0.0);
        for (unit, columns) in block.units().zip(columns.chunks_mut(n * head_dim)) {
            unit.pack_columns(s, columns, q, dims.scores.scale);
        }
        for first_key in (start_key..visible).step_by(KEYS) {
            let keys = KEYS.min(visible - first_key);
            let (row, column) = (item * dims.keys + first_key, kv_head * head_dim);
            pack_keys(s, keys_packed, k, [row, keys], column, head_dim);
            pack_keys(s, values_packed, v, [row, keys], column, head_dim);
            for (i, unit) in block.units().enumerate() {
                let (n, start, seen) = (unit.padded(), i * n, unit.visible_of(first_key, keys));
                if seen == 0 || unit.first_seen() >= first_key + keys {
                    continue;
                }
                let is_first = first_key <= unit.first_seen();
                let scores = &mut scores[..seen * n];
                let columns = &columns[start * head_dim..];
                product(s, scores, Left::Rows(keys_packed, width), columns, [seen, n, head_dim], false);
                if let Some(cap) = dims.scores.cap {
                    soft_cap(s, scores, cap);
                }
                unit.mask(scores, first_key, f32::NEG_INFINITY);
                let (largest, total) = (&mut largest[start..start + n], &mut total[start..start + n]);
                let sums = &mut sums[start * width..][..width * n];
                softmax(s, scores, largest, total, (!is_first).then_some(&mut *sums));
                unit.mask(scores, first_key, 0.0);
                let sizes = [width, n, seen];
                product(s, sums, Left::Columns(values_packed, width), scores, sizes, !is_first);
            }
        }
        for (i, unit) in block.units().enumerate() {
            let (n, start) = (unit.padded(), i * n);
            transpose(s, transposed, &sums[start * width..][..width * n], [width, n]);
            for (row, (token, head)) in unit.places().enumerate() {
                let (largest, total) = (largest[start + row], total[start + row]);
                // SAFETY: by the contract of `run`, this row and head are written by this block alone.
                unsafe { lse.row(token, head, 1)[0] = largest + total.ln() };
                let share = 1.0 / total;
                // SAFETY: as above.
                let out = unsafe { out.row(token, head * head_dim, head_dim) };
                for (out, sum) in out.iter_mut().zip(&transposed[row * width..]) {
                    *out = sum * share;
                }
            }
        }
    }
}

/// Updates `largest` with `scores` `[keys, n]` and turns them into e^(score - largest). Rescales `total` and, unless these
/// are the first keys, `sums` `[width, n]` to the new `largest`.
#[inline(always)]
fn softmax<S: Product>(
    s: S,
    scores: &mut [f32],
    largest: &mut [f32],
    total: &mut [f32],
    mut sums: Option<&mut [f32]>,
) {
    let n = largest.len();
    for j in (0..n).step_by(S::LANES) {
        let old = s.load(&largest[j..]);
        // A NaN may be lost here; the differences below keep it.
        let mut maxima = [old; 4];
        let mut fours = scores.chunks_exact(4 * n);
        for scores in &mut fours {
            for (i, max) in maxima.iter_mut().enumerate() {
                *max = s.max(*max, s.load(&scores[i * n + j..]));
            }
        }
        for scores in fours.remainder().chunks_exact(n) {
            maxima[0] = s.max(maxima[0], s.load(&scores[j..]));
        }
        let new = s.max(s.max(maxima[0], maxima[1]), s.max(maxima[2], maxima[3]));
        s.store(&mut largest[j..], new);
        let mut sum = s.splat(0.0);
        for scores in scores.chunks_exact_mut(n) {
            let p = exp(s, s.sub(s.load(&scores[j..]), new));
            sum = s.add(sum, p);
            s.store(&mut scores[j..], p);
        }
        let shrink = exp(s, s.sub(old, new));
        let total = &mut total[j..];
        s.store(total, s.fma(s.load(total), shrink, sum));
        if let Some(sums) = &mut sums {
            for sums in sums.chunks_exact_mut(n) {
                let sums = &mut sums[j..];
                s.store(sums, s.mul(s.load(sums), shrink));
            }
        }
    }
}
