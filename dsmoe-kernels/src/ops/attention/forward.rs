//! Forward of one tile of queries: online softmax over tiles of keys.

use super::Dims;
use super::tile::{KEYS, Left, Rows, product};
use crate::simd::{Kernel, Simd, exp};

/// Queries from `first` on of batch item `item`, all heads; `out` and `lse` start at the first of them.
pub(super) struct Tile<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) lse: &'a mut [f32],
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) item: usize,
    pub(super) first: usize,
    pub(super) dims: Dims,
}

impl Kernel for Tile<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Tile { out, lse, q, k, v, item, first, dims } = self;
        let count = out.len() / dims.width();
        let (mut columns, mut scores) = (Vec::new(), Vec::new());
        let token = item * dims.queries + first;
        for kv_head in 0..dims.kv_heads {
            let rows = Rows { item, kv_head, first, count, dims };
            let n = rows.padded();
            rows.pack_columns(&mut columns, q, dims.scale());
            scores.resize(KEYS * n, 0.0);
            let mut sums = vec![0.0; dims.head_dim * n];
            // Per row: the largest score so far, and the sum of e^(score - largest).
            let (mut largest, mut total) = (vec![f32::NEG_INFINITY; n], vec![0.0; n]);
            let base = item * dims.keys * dims.kv_width() + kv_head * dims.head_dim;
            let visible = rows.visible();
            for first_key in (0..visible).step_by(KEYS) {
                let keys = KEYS.min(visible - first_key);
                let at = base + first_key * dims.kv_width();
                let scores = &mut scores[..keys * n];
                product(
                    s,
                    scores,
                    &k[at..],
                    Left::Rows(dims.kv_width()),
                    &columns,
                    [keys, n, dims.head_dim],
                    false,
                );
                let hides = first_key + keys > dims.visible(first);
                if hides {
                    rows.mask(scores, first_key, f32::NEG_INFINITY);
                }
                softmax(s, scores, &mut largest, &mut total, &mut sums);
                if hides {
                    rows.mask(scores, first_key, 0.0);
                }
                let left = Left::Columns(dims.kv_width());
                product(s, &mut sums, &v[at..], left, scores, [dims.head_dim, n, keys], true);
            }
            for (row, at, head) in rows.each() {
                lse[head - token * dims.heads] = largest[row] + total[row].ln();
                let out = &mut out[at - token * dims.width()..][..dims.head_dim];
                let share = 1.0 / total[row];
                for (out, sum) in out.iter_mut().zip(sums[row..].iter().step_by(n)) {
                    *out = sum * share;
                }
            }
        }
    }
}

/// Turns `scores` `[keys, n]` into e^(score - largest), with `largest` now over these keys too, and brings `total`
/// and `sums` `[head_dim, n]` to it.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [f32], largest: &mut [f32], total: &mut [f32], sums: &mut [f32]) {
    let n = largest.len();
    for j in (0..n).step_by(S::LANES) {
        let old = s.load(&largest[j..]);
        // A NaN may be lost here; the differences below keep it.
        let mut new = old;
        for scores in scores.chunks_exact(n) {
            new = s.max(new, s.load(&scores[j..]));
        }
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
        for sums in sums.chunks_exact_mut(n) {
            let sums = &mut sums[j..];
            s.store(sums, s.mul(s.load(sums), shrink));
        }
    }
}
