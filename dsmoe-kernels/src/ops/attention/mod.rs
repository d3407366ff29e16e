//! Causal attention with grouped keys and values, tiled: no `[queries, keys]` matrix is kept.
//!
//! ```text
//! forward   s[i,j] = <q[i], k[j]> / sqrt(head_dim)      for j <= i + keys - queries: the queries are the last ones
//!           p[i,:] = softmax(s[i,:]),  lse[i] = logsumexp(s[i,:])
//!           out[i] = sum_j p[i,j] v[j]
//! backward  dv[j] = sum_i p[i,j] dout[i]                                             set
//!           ds[i,j] = p[i,j] (<dout[i], v[j]> - <dout[i], out[i]>) / sqrt(head_dim)
//!           dq[i] = sum_j ds[i,j] k[j],  dk[j] = sum_i ds[i,j] q[i]                  set
//! ```
//! per batch item and head; head h reads keys and values of head h / (heads / kv_heads). q, out
//! `[batch * queries, heads * head_dim]`; k, v `[batch * keys, kv_heads * head_dim]`; lse `[batch * queries, heads]`.
//! In training q, k and v are columns of one matrix, qkv `[batch * queries, (heads + 2 kv_heads) * head_dim]`, and so
//! are their gradients: they come out of one linear layer.

mod backward;
mod decode;
mod forward;
pub mod reference;
#[cfg(test)]
mod tests;
mod tile;

use rayon::prelude::*;

use super::blocks::each_when;
use crate::isa::Isa;
use tile::{Shared, View};

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Sequences.
    pub batch: usize,
    /// Queries of a sequence: its last positions.
    pub queries: usize,
    /// Keys and values of a sequence, at least as many as queries.
    pub keys: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Dims {
    /// Query heads per head of keys.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Row length of q and out.
    fn width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Row length of k and v.
    fn kv_width(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Keys that query i of a sequence sees: the first so many.
    fn visible(self, i: usize) -> usize {
        i + 1 + self.keys - self.queries
    }

    fn scale(self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Row length of qkv.
    pub fn joined_width(self) -> usize {
        self.width() + 2 * self.kv_width()
    }

    /// Where q, k and v start in a row of qkv.
    fn starts(self) -> [usize; 3] {
        [0, self.width(), self.width() + self.kv_width()]
    }

    /// q, k and v of a qkv that is not empty.
    fn views(self, qkv: &[f32]) -> [View<'_>; 3] {
        self.starts().map(|start| View { data: &qkv[start..], stride: self.joined_width() })
    }

    fn check(self, op: &str, queries: &[usize], keys: &[usize]) {
        assert!(
            self.kv_heads > 0
                && self.heads > 0
                && self.head_dim > 0
                && self.heads.is_multiple_of(self.kv_heads)
                && self.queries <= self.keys
                && queries.iter().all(|&len| len == self.batch * self.queries * self.width())
                && keys.iter().all(|&len| len == self.batch * self.keys * self.kv_width()),
            "{op}: q and its like {queries:?}, k and its like {keys:?} values for {self:?}"
        );
    }
}

impl Dims {
    fn check_joined(self, op: &str, outs: &[usize], joined: &[usize], lse: usize) {
        let rows = self.batch * self.queries;
        self.check(op, outs, &[]);
        assert!(
            self.queries == self.keys
                && lse == rows * self.heads
                && joined.iter().all(|&len| len == rows * self.joined_width()),
            "{op}: qkv and its like {joined:?}, lse {lse} values for {self:?}"
        );
    }
}

/// Up to this many queries, [`decode`] serves.
pub const DECODE_QUERIES: usize = 4;

/// Queries times heads of a group in a task of the forward pass: what the packing of keys is shared by.
const BLOCK_ROWS: usize = 128;

/// Multiply-adds below which threads cost more than they bring.
const SERIAL_WORK: usize = 1 << 17;

/// Sets `out` and `lse`.
///
/// # Panics
/// Lengths do not fit `dims`, or there are fewer keys than queries.
pub fn forward(out: &mut [f32], lse: &mut [f32], q: &[f32], k: &[f32], v: &[f32], dims: Dims) {
    forward_on(Isa::current(), out, lse, q, k, v, dims);
}

/// [`forward`] on a given tier.
pub fn forward_on(isa: Isa, out: &mut [f32], lse: &mut [f32], q: &[f32], k: &[f32], v: &[f32], dims: Dims) {
    dims.check("attention::forward", &[out.len(), q.len()], &[k.len(), v.len()]);
    let Dims { batch, queries, heads, .. } = dims;
    assert_eq!(lse.len(), batch * queries * heads, "attention::forward: lse for {dims:?}");
    if !out.is_empty() {
        let [k, v] = [k, v].map(|data| View { data, stride: dims.kv_width() });
        forward_views(isa, out, lse, [View { data: q, stride: dims.width() }, k, v], dims);
    }
}

/// [`forward`] over `qkv`, with as many queries as keys.
///
/// # Panics
/// Lengths do not fit `dims`.
pub fn forward_joined(out: &mut [f32], lse: &mut [f32], qkv: &[f32], dims: Dims) {
    forward_joined_on(Isa::current(), out, lse, qkv, dims);
}

/// [`forward_joined`] on a given tier.
pub fn forward_joined_on(isa: Isa, out: &mut [f32], lse: &mut [f32], qkv: &[f32], dims: Dims) {
    dims.check_joined("attention::forward_joined", &[out.len()], &[qkv.len()], lse.len());
    if !out.is_empty() {
        forward_views(isa, out, lse, dims.views(qkv), dims);
    }
}

fn forward_views(isa: Isa, out: &mut [f32], lse: &mut [f32], [q, k, v]: [View<'_>; 3], dims: Dims) {
    let Dims { batch, queries, heads, kv_heads, .. } = dims;
    // SAFETY: the slices are borrowed until the end of this function, and every task writes the rows of its queries
    // at the columns of its heads.
    let out = unsafe { Shared::new(out, dims.width()) };
    // SAFETY: as above.
    let lse = unsafe { Shared::new(lse, heads) };
    let rows = (BLOCK_ROWS / dims.group()).max(1);
    let blocks = queries.div_ceil(rows);
    let tasks = batch * kv_heads * blocks;
    each_when(tasks > 1, (0..tasks).into_par_iter().with_max_len(1), |task| {
        let (item, kv_head, first) =
            (task / blocks / kv_heads, task / blocks % kv_heads, task % blocks * rows);
        let count = rows.min(queries - first);
        forward::Block { out, lse, q, k, v, item, kv_head, first, count, dims }.run(isa);
    });
}

/// [`forward`] for up to [`DECODE_QUERIES`] queries, without lse: reads keys and values in place.
///
/// # Panics
/// As [`forward`]; also with more queries.
pub fn decode(out: &mut [f32], q: &[f32], k: &[f32], v: &[f32], dims: Dims) {
    decode_on(Isa::current(), out, q, k, v, dims);
}

/// [`decode`] on a given tier.
pub fn decode_on(isa: Isa, out: &mut [f32], q: &[f32], k: &[f32], v: &[f32], dims: Dims) {
    dims.check("attention::decode", &[out.len(), q.len()], &[k.len(), v.len()]);
    let Dims { queries, keys, kv_heads, head_dim, .. } = dims;
    assert!(queries <= DECODE_QUERIES, "attention::decode: more than {DECODE_QUERIES} queries in {dims:?}");
    let width = dims.group() * head_dim;
    let parallel = q.len() * keys > SERIAL_WORK;
    each_when(parallel, out.par_chunks_mut(width).zip(q.par_chunks(width)).enumerate(), |(i, (out, q))| {
        let (row, kv_head) = (i / kv_heads, i % kv_heads);
        let (item, i) = (row / queries, row % queries);
        let first = item * keys * dims.kv_width() + kv_head * head_dim;
        let (k, v) = (&k[first..], &v[first..]);
        let visible = dims.visible(i);
        isa.run(decode::Group { out, q, k, v, stride: dims.kv_width(), visible, head_dim });
    });
}

/// Sets `dqkv`; `out` and `lse` are those of [`forward_joined`].
///
/// # Panics
/// Lengths do not fit `dims`, or there are fewer queries than keys.
pub fn backward(dqkv: &mut [f32], dout: &[f32], out: &[f32], qkv: &[f32], lse: &[f32], dims: Dims) {
    backward_on(Isa::current(), dqkv, dout, out, qkv, lse, dims);
}

/// [`backward`] on a given tier.
pub fn backward_on(
    isa: Isa,
    dqkv: &mut [f32],
    dout: &[f32],
    out: &[f32],
    qkv: &[f32],
    lse: &[f32],
    dims: Dims,
) {
    dims.check_joined("attention::backward", &[dout.len(), out.len()], &[dqkv.len(), qkv.len()], lse.len());
    if out.is_empty() {
        return;
    }
    let Dims { batch, heads, kv_heads, .. } = dims;
    let [q, k, v] = dims.views(qkv);
    let [dout, out] = [dout, out].map(|data| View { data, stride: dims.width() });
    let lse = View { data: lse, stride: heads };
    // SAFETY: the slice is borrowed until the end of this function, and every task writes the rows of its batch item
    // at the columns of its heads.
    let all = unsafe { Shared::new(dqkv, dims.joined_width()) };
    let [dq, dk, dv] = dims.starts().map(|start| all.starting_at_column(start));
    let tasks = batch * kv_heads;
    each_when(tasks > 1, (0..tasks).into_par_iter().with_max_len(1), |task| {
        let (item, kv_head) = (task / kv_heads, task % kv_heads);
        backward::Head { dq, dk, dv, dout, out, q, k, v, lse, item, kv_head, dims }.run(isa);
    });
}
