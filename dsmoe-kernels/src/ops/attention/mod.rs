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

mod backward;
mod decode;
mod forward;
pub mod reference;
#[cfg(test)]
mod tests;
mod tile;

use rayon::prelude::*;

use super::blocks::{block_rows, each, each_when};
use crate::isa::Isa;

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

/// Up to this many queries, [`decode`] serves.
pub const DECODE_QUERIES: usize = 4;

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
    if out.is_empty() {
        return;
    }
    let rows = tile::queries(dims);
    let outs = out.chunks_mut(queries * dims.width()).zip(lse.chunks_mut(queries * heads)).enumerate();
    let tasks: Vec<_> = outs
        .flat_map(|(item, (out, lse))| {
            let tiles = out.chunks_mut(rows * dims.width()).zip(lse.chunks_mut(rows * heads)).enumerate();
            tiles.map(move |(i, (out, lse))| (item, i * rows, out, lse))
        })
        .collect();
    each(tasks.into_par_iter(), |(item, first, out, lse)| {
        isa.run(forward::Tile { out, lse, q, k, v, item, first, dims });
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

/// Sets `dq`, `dk` and `dv`; `out` and `lse` are the forward pass's.
///
/// # Panics
/// As [`forward`].
#[expect(clippy::too_many_arguments, reason = "the op's operands, in the order of its formula")]
pub fn backward(
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    dout: &[f32],
    out: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    lse: &[f32],
    dims: Dims,
) {
    backward_on(Isa::current(), dq, dk, dv, dout, out, q, k, v, lse, dims);
}

/// [`backward`] on a given tier.
#[expect(clippy::too_many_arguments, reason = "the op's operands, in the order of its formula")]
pub fn backward_on(
    isa: Isa,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    dout: &[f32],
    out: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    lse: &[f32],
    dims: Dims,
) {
    dims.check(
        "attention::backward",
        &[dq.len(), dout.len(), out.len(), q.len()],
        &[dk.len(), dv.len(), k.len(), v.len()],
    );
    let Dims { batch, queries, keys, heads, kv_heads, head_dim } = dims;
    assert_eq!(lse.len(), batch * queries * heads, "attention::backward: lse for {dims:?}");
    if dk.is_empty() {
        return;
    }
    // Every (batch item, kv head) sums into a buffer of its own; the buffers' columns are then interleaved.
    let shape = backward::Shape::new(dims);
    let mut buffers = vec![0.0; batch * kv_heads * shape.len()];
    each(buffers.par_chunks_mut(shape.len()).enumerate(), |(i, buffer)| {
        let (item, kv_head) = (i / kv_heads, i % kv_heads);
        isa.run(backward::Head { buffer, dout, out, q, k, v, lse, item, kv_head, dims });
    });
    let group = dims.group() * head_dim;
    let rows = block_rows(dims.width());
    each(dq.par_chunks_mut(rows * dims.width()).enumerate(), |(block, dq)| {
        for (i, dq) in dq.chunks_exact_mut(group).enumerate() {
            let (row, kv_head) = (block * rows + i / kv_heads, i % kv_heads);
            let (item, row) = (row / queries, row % queries);
            let buffer = &buffers[(item * kv_heads + kv_head) * shape.len()..];
            dq.copy_from_slice(&buffer[row * group..][..group]);
        }
    });
    let rows = block_rows(dims.kv_width());
    let grads = dk.par_chunks_mut(rows * dims.kv_width()).zip(dv.par_chunks_mut(rows * dims.kv_width()));
    each(grads.enumerate(), |(block, (dk, dv))| {
        let heads = dk.chunks_exact_mut(head_dim).zip(dv.chunks_exact_mut(head_dim));
        for (i, (dk, dv)) in heads.enumerate() {
            let (row, kv_head) = (block * rows + i / kv_heads, i % kv_heads);
            let (item, row) = (row / keys, row % keys);
            let buffer = &buffers[(item * kv_heads + kv_head) * shape.len()..];
            dk.copy_from_slice(&buffer[shape.dk + row * shape.padded..][..head_dim]);
            dv.copy_from_slice(&buffer[shape.dv + row * shape.padded..][..head_dim]);
        }
    });
}
