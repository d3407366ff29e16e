//! Backward of one head of keys and values: the scores are computed again, tile by tile.

use super::Dims;
use super::tile::{self, KEYS, Left, Rows, product};
use crate::simd::{Kernel, Simd, exp};

/// Where the gradients of one kv head lie in its buffer: dq `[queries, group * head_dim]`, then dk and dv
/// `[keys, padded]`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) dk: usize,
    pub(super) dv: usize,
    pub(super) padded: usize,
    len: usize,
}

impl Shape {
    pub(super) fn new(dims: Dims) -> Shape {
        let padded = tile::padded(dims.head_dim);
        let dk = dims.queries * dims.group() * dims.head_dim;
        let dv = dk + dims.keys * padded;
        Shape { dk, dv, padded, len: dv + dims.keys * padded }
    }

    pub(super) fn len(self) -> usize {
        self.len
    }
}

/// Head `kv_head` of batch item `item`, with the query heads that read it; `buffer` starts as zeros.
pub(super) struct Head<'a> {
    pub(super) buffer: &'a mut [f32],
    pub(super) dout: &'a [f32],
    pub(super) out: &'a [f32],
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) item: usize,
    pub(super) kv_head: usize,
    pub(super) dims: Dims,
}

impl Kernel for Head<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Head { buffer, dout, out, q, k, v, lse, item, kv_head, dims } = self;
        let (head_dim, stride) = (dims.head_dim, dims.kv_width());
        let Shape { dk, padded, .. } = Shape::new(dims);
        let (dq, kv) = buffer.split_at_mut(dk);
        let (dk, dv) = kv.split_at_mut(dims.keys * padded);
        let base = item * dims.keys * stride + kv_head * head_dim;
        let [mut q_columns, mut q_rows, mut dout_columns, mut dout_rows] = [const { Vec::new() }; 4];
        let [mut scores, mut slopes] = [const { Vec::new() }; 2];
        for first in (0..dims.queries).step_by(tile::queries(dims)) {
            let count = tile::queries(dims).min(dims.queries - first);
            let rows = Rows { item, kv_head, first, count, dims };
            let n = rows.padded();
            rows.pack_columns(&mut q_columns, q, dims.scale());
            rows.pack_rows(&mut q_rows, q, dims.scale());
            rows.pack_columns(&mut dout_columns, dout, 1.0);
            rows.pack_rows(&mut dout_rows, dout, 1.0);
            // Per row: logsumexp, and <dout, out>.
            let (mut logs, mut deltas) = (vec![0.0; n], vec![0.0; n]);
            for (row, at, head) in rows.each() {
                logs[row] = lse[head];
                deltas[row] = crate::simd::dot(s, &dout[at..][..head_dim], &out[at..][..head_dim]);
            }
            let mut sums = vec![0.0; head_dim * n];
            scores.resize(KEYS * n, 0.0);
            slopes.resize(KEYS * n, 0.0);
            let visible = rows.visible();
            for first_key in (0..visible).step_by(KEYS) {
                let keys = KEYS.min(visible - first_key);
                let at = base + first_key * stride;
                let (k, v) = (&k[at..], &v[at..]);
                let (p, ds) = (&mut scores[..keys * n], &mut slopes[..keys * n]);
                product(s, p, k, Left::Rows(stride), &q_columns, [keys, n, head_dim], false);
                product(s, ds, v, Left::Rows(stride), &dout_columns, [keys, n, head_dim], false);
                probabilities(s, p, &logs);
                if first_key + keys > dims.visible(first) {
                    rows.mask(p, first_key, 0.0);
                }
                score_gradients(s, ds, p, &deltas);
                let dv = &mut dv[first_key * padded..][..keys * padded];
                product(s, dv, p, Left::Rows(n), &dout_rows, [keys, padded, n], true);
                let dk = &mut dk[first_key * padded..][..keys * padded];
                product(s, dk, ds, Left::Rows(n), &q_rows, [keys, padded, n], true);
                product(s, &mut sums, k, Left::Columns(stride), ds, [head_dim, n, keys], true);
            }
            let scale = dims.scale();
            for row in 0..dims.group() * count {
                let (h, i) = (row / count, row % count);
                let dq = &mut dq[((first + i) * dims.group() + h) * head_dim..][..head_dim];
                for (dq, sum) in dq.iter_mut().zip(sums[row..].iter().step_by(n)) {
                    *dq = scale * sum;
                }
            }
        }
    }
}

/// `scores[j, row] <- e^(scores[j, row] - logs[row])`.
#[inline(always)]
fn probabilities<S: Simd>(s: S, scores: &mut [f32], logs: &[f32]) {
    for scores in scores.chunks_exact_mut(logs.len()) {
        for j in (0..logs.len()).step_by(S::LANES) {
            let p = exp(s, s.sub(s.load(&scores[j..]), s.load(&logs[j..])));
            s.store(&mut scores[j..], p);
        }
    }
}

/// `slopes[j, row] <- p[j, row] (slopes[j, row] - deltas[row])`.
#[inline(always)]
fn score_gradients<S: Simd>(s: S, slopes: &mut [f32], p: &[f32], deltas: &[f32]) {
    let n = deltas.len();
    for (slopes, p) in slopes.chunks_exact_mut(n).zip(p.chunks_exact(n)) {
        for j in (0..n).step_by(S::LANES) {
            let slope = s.sub(s.load(&slopes[j..]), s.load(&deltas[j..]));
            s.store(&mut slopes[j..], s.mul(s.load(&p[j..]), slope));
        }
    }
}
