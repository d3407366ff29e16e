//! Backward of one head of keys and values, which recomputes the scores tile by tile.

use std::cell::RefCell;

use super::dims::Dims;
use super::tile::{KEYS, Left, Rows, View, pack_keys, padded, padded_keys, product, transpose, unit_queries};
use crate::buf::{Buf, SharedRows};
use crate::isa::Isa;
use crate::simd::{Product, ProductKernel, dot, exp, soft_cap};

/// Head `kv_head` of batch item `item`, with the query heads that read it.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub(super) dq: SharedRows<'a>,
    pub(super) dk: SharedRows<'a>,
    pub(super) dv: SharedRows<'a>,
    pub(super) dout: View<'a>,
    pub(super) out: View<'a>,
    pub(super) q: View<'a>,
    pub(super) k: View<'a>,
    pub(super) v: View<'a>,
    pub(super) lse: View<'a>,
    pub(super) item: usize,
    pub(super) kv_head: usize,
    pub(super) dims: Dims,
}

/// Memory of one thread.
#[derive(Default)]
struct Work {
    k: Buf,
    v: Buf,
    dk: Buf,
    dv: Buf,
    q_columns: Buf,
    q_rows: Buf,
    dout_columns: Buf,
    dout_rows: Buf,
    /// logsumexp and `<dout, out>` of each row.
    logs: Buf,
    deltas: Buf,
    scores: Buf,
    slopes: Buf,
    /// dq of a unit, transposed and as rows.
    sums: Buf,
    rows: Buf,
}

thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
}

impl Head<'_> {
    /// Computes the head on this thread.
    ///
    /// # Safety
    /// The same head of the same batch item does not run at the same time.
    pub(super) unsafe fn run(self, isa: Isa) {
        WORK.with_borrow_mut(|work| isa.run_product((self, work)));
    }
}

impl ProductKernel for (Head<'_>, &mut Work) {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let (head, work) = self;
        let Head { dk, dv, k, v, item, kv_head, dims, .. } = head;
        let (head_dim, width) = (dims.head_dim, padded(dims.head_dim));
        let (first_row, column) = (item * dims.keys, kv_head * head_dim);
        let keys = padded_keys(dims.keys);
        for buf in [&mut work.k, &mut work.v, &mut work.dk, &mut work.dv] {
            buf.resize(keys * width);
        }
        pack_keys(s, &mut work.k, k, [first_row, dims.keys], column, head_dim);
        pack_keys(s, &mut work.v, v, [first_row, dims.keys], column, head_dim);
        work.dk.fill(0.0);
        work.dv.fill(0.0);
        let size = unit_queries(dims);
        for first in (0..dims.queries).step_by(size) {
            let rows = Rows { item, kv_head, first, count: size.min(dims.queries - first), dims };
            head.unit(s, work, rows);
        }
        for j in 0..dims.keys {
            for (rows, sums) in [(dk, &work.dk), (dv, &work.dv)] {
                // SAFETY: by the contract of `run`, these columns of this batch item are written by this head alone.
                let row = unsafe { rows.row(first_row + j, column, head_dim) };
                row.copy_from_slice(&sums[j * width..][..head_dim]);
            }
        }
    }
}

impl Head<'_> {
    /// Sets dq of one unit and adds its share of dk and dv.
    #[inline(always)]
    fn unit<S: Product>(self, s: S, work: &mut Work, rows: Rows) {
        let Head { dq, dout, out, q, lse, dims, .. } = self;
        let (head_dim, width, n) = (dims.head_dim, padded(dims.head_dim), rows.padded());
        let Work { q_columns, q_rows, dout_columns, dout_rows, logs, deltas, scores, slopes, .. } = work;
        for buf in [&mut *q_columns, dout_columns] {
            buf.resize(head_dim * n);
        }
        for buf in [&mut *q_rows, dout_rows, &mut work.sums, &mut work.rows] {
            buf.resize(width * n);
        }
        rows.pack_columns(s, q_columns, q, dims.scores.scale);
        rows.pack_rows(s, q_rows, q, dims.scores.scale);
        rows.pack_columns(s, dout_columns, dout, 1.0);
        rows.pack_rows(s, dout_rows, dout, 1.0);
        for buf in [&mut *logs, deltas] {
            buf.resize(n);
            buf.fill(0.0);
        }
        for (row, (token, head)) in rows.places().enumerate() {
            logs[row] = lse.row(token, head, 1)[0];
            let out = out.row(token, head * head_dim, head_dim);
            deltas[row] = dot(s, &dout_rows[row * width..][..head_dim], out);
        }
        let (start, visible) = (rows.first_key(), rows.visible());
        let tile = padded_keys(KEYS.min(visible - start)) * n;
        scores.resize(tile);
        slopes.resize(tile);
        for first_key in (start..visible).step_by(KEYS) {
            let seen = rows.visible_of(first_key, KEYS);
            let part = first_key * width..(first_key + seen) * width;
            let (k, v) = (&work.k[part.clone()], &work.v[part.clone()]);
            let (p, ds) = (&mut scores[..seen * n], &mut slopes[..seen * n]);
            product(s, p, Left::Rows(k, width), q_columns, [seen, n, head_dim], false);
            product(s, ds, Left::Rows(v, width), dout_columns, [seen, n, head_dim], false);
            match dims.scores.cap {
                None => gradients::<S, false>(s, p, ds, [logs, deltas], 0.0),
                Some(cap) => {
                    soft_cap(s, p, cap);
                    gradients::<S, true>(s, p, ds, [logs, deltas], cap);
                }
            }
            rows.mask(p, first_key, 0.0);
            rows.mask(ds, first_key, 0.0);
            product(s, &mut work.dv[part.clone()], Left::Rows(p, n), dout_rows, [seen, width, n], true);
            product(s, &mut work.dk[part], Left::Rows(ds, n), q_rows, [seen, width, n], true);
            let sizes = [width, n, seen];
            product(s, &mut work.sums, Left::Columns(k, width), ds, sizes, first_key > start);
        }
        transpose(s, &mut work.rows, &work.sums, [width, n]);
        let scale = dims.scores.scale;
        for (row, (token, head)) in rows.places().enumerate() {
            // SAFETY: by the contract of `run`, this head of this token is written by this task alone.
            let dq = unsafe { dq.row(token, head * head_dim, head_dim) };
            for (dq, sum) in dq.iter_mut().zip(&work.rows[row * width..]) {
                *dq = scale * sum;
            }
        }
    }
}

/// Turns scores p and `ds = <dout, v>`, both `[keys, n]`, into `p <- e^(p - logs)` and `ds <- p (ds - deltas)`; if the scores
/// are CAPPED, times the derivative of the cap, `1 - (score / cap)^2`.
#[inline(always)]
fn gradients<S: Product, const CAPPED: bool>(
    s: S,
    p: &mut [f32],
    ds: &mut [f32],
    [logs, deltas]: [&[f32]; 2],
    cap: f32,
) {
    let n = logs.len();
    let (shrink, one) = (s.splat(1.0 / cap), s.splat(1.0));
    for (p, ds) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)) {
        for j in (0..n).step_by(S::LANES) {
            let score = s.load(&p[j..]);
            let share = exp(s, s.sub(score, s.load(&logs[j..])));
            let mut slope = s.sub(s.load(&ds[j..]), s.load(&deltas[j..]));
            if CAPPED {
                let t = s.mul(score, shrink);
                slope = s.mul(slope, s.sub(one, s.mul(t, t)));
            }
            s.store(&mut p[j..], share);
            s.store(&mut ds[j..], s.mul(share, slope));
        }
    }
}
