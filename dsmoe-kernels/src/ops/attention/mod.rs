//! Causal attention with grouped keys and values, tiled: no `[queries, keys]` matrix is kept.
//!
//! ```text
//! forward   s[i,j] = scale <q[i], k[j]>, and with a cap c: s <- c tanh(s / c)
//!           for j <= p = i + keys - queries: the queries are the last ones; with a window w: p - j < w as well
//!           p[i,:] = softmax(s[i,:]),  lse[i] = logsumexp(s[i,:])
//!           out[i] = sum_j p[i,j] v[j]
//! backward  dv[j] = sum_i p[i,j] dout[i]                                             set
//!           ds[i,j] = p[i,j] (<dout[i], v[j]> - <dout[i], out[i]>), with a cap: times 1 - (s[i,j] / c)^2
//!           dq[i] = scale sum_j ds[i,j] k[j],  dk[j] = scale sum_i ds[i,j] q[i]      set
//! ```
//! per batch item and head; head h reads keys and values of head h / (heads / kv_heads). q, out
//! `[batch * queries, heads * head_dim]`; k, v `[batch * keys, kv_heads * head_dim]`; lse `[batch * queries, heads]`.
//! In training q, k and v are columns of one matrix, qkv `[batch * queries, (heads + 2 kv_heads) * head_dim]`, and so
//! are their gradients: they come out of one linear layer.

mod backward;
mod decode;
mod dims;
mod forward;
pub mod reference;
#[cfg(test)]
mod tests;
mod tile;

pub use dims::{Dims, Scores};

use rayon::prelude::*;

use super::blocks::each_when;
use crate::buf::SharedRows;
use crate::crew;
use crate::isa::Isa;
use crate::matmul::{for_tasks_when, tasks_for};
use tile::View;

/// Most queries of [`Decode`].
pub const DECODE_QUERIES: usize = 4;

/// Queries times heads of a group in a task of the forward pass: they share the packed keys.
const BLOCK_ROWS: usize = 128;

/// Multiply-adds below which threads cost more time than they save. Under Miri threads share small problems too.
const SERIAL_WORK: usize = if cfg!(miri) { 1 << 4 } else { 1 << 17 };

/// Sets `out` and `lse`.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[batch * queries, heads * head_dim]`, set.
    pub out: &'a mut [f32],
    /// `[batch * queries, heads]`, set.
    pub lse: &'a mut [f32],
    /// `[batch * queries, heads * head_dim]`
    pub q: &'a [f32],
    /// `[batch * keys, kv_heads * head_dim]`
    pub k: &'a [f32],
    /// `[batch * keys, kv_heads * head_dim]`
    pub v: &'a [f32],
    /// The sizes.
    pub dims: Dims,
}

/// Does the same as [`Forward`] over `qkv`, with as many queries as keys.
#[derive(Debug)]
pub struct ForwardJoined<'a> {
    /// `[batch * queries, heads * head_dim]`, set.
    pub out: &'a mut [f32],
    /// `[batch * queries, heads]`, set.
    pub lse: &'a mut [f32],
    /// `[batch * queries, (heads + 2 kv_heads) * head_dim]`
    pub qkv: &'a [f32],
    /// The sizes.
    pub dims: Dims,
}

/// Sets `out` like [`Forward`], for up to [`DECODE_QUERIES`] queries. Reads keys and values in place.
#[derive(Debug)]
pub struct Decode<'a> {
    /// `[batch * queries, heads * head_dim]`, set.
    pub out: &'a mut [f32],
    /// `[batch * queries, heads * head_dim]`
    pub q: &'a [f32],
    /// `[batch * keys, kv_heads * head_dim]`
    pub k: &'a [f32],
    /// `[batch * keys, kv_heads * head_dim]`
    pub v: &'a [f32],
    /// The sizes.
    pub dims: Dims,
}

/// Sets `dqkv`; `out` and `lse` are those of [`ForwardJoined`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[batch * queries, (heads + 2 kv_heads) * head_dim]`, set.
    pub dqkv: &'a mut [f32],
    /// `[batch * queries, heads * head_dim]`
    pub dout: &'a [f32],
    /// `[batch * queries, heads * head_dim]`
    pub out: &'a [f32],
    /// `[batch * queries, (heads + 2 kv_heads) * head_dim]`
    pub qkv: &'a [f32],
    /// `[batch * queries, heads]`
    pub lse: &'a [f32],
    /// The sizes.
    pub dims: Dims,
}

run_on_current_tier!(Forward, ForwardJoined, Decode, Backward);

impl Forward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`, or there are fewer keys than queries.
    pub fn run_on(self, isa: Isa) {
        let Forward { out, lse, q, k, v, dims } = self;
        dims.check("attention::Forward", &[out.len(), q.len()], &[k.len(), v.len()]);
        let Dims { batch, queries, heads, .. } = dims;
        assert_eq!(lse.len(), batch * queries * heads, "attention::Forward: lse for {dims:?}");
        if !out.is_empty() {
            let [k, v] = [k, v].map(|data| View { data, stride: dims.kv_width() });
            forward_views(isa, out, lse, [View { data: q, stride: dims.width() }, k, v], dims);
        }
    }
}

impl ForwardJoined<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(self, isa: Isa) {
        let ForwardJoined { out, lse, qkv, dims } = self;
        dims.check_joined("attention::ForwardJoined", &[out.len()], &[qkv.len()], lse.len());
        if !out.is_empty() {
            forward_views(isa, out, lse, dims.views(qkv), dims);
        }
    }
}

fn forward_views(isa: Isa, out: &mut [f32], lse: &mut [f32], [q, k, v]: [View<'_>; 3], dims: Dims) {
    let Dims { batch, queries, heads, kv_heads, .. } = dims;
    let (out, lse) = (SharedRows::new(out, dims.width()), SharedRows::new(lse, heads));
    let rows = (BLOCK_ROWS / dims.group()).max(1);
    let blocks = queries.div_ceil(rows);
    let tasks = batch * kv_heads * blocks;
    each_when(tasks > 1, (0..tasks).into_par_iter().with_max_len(1), |task| {
        let (item, kv_head, first) =
            (task / blocks / kv_heads, task / blocks % kv_heads, task % blocks * rows);
        let count = rows.min(queries - first);
        let block = forward::Block { out, lse, q, k, v, item, kv_head, first, count, dims };
        // SAFETY: every task has other queries or another head, and `block` alone refers to the outputs.
        unsafe { block.run(isa) };
    });
}

impl Decode<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Panics under the conditions of [`Forward::run_on`], and with more queries than [`DECODE_QUERIES`].
    pub fn run_on(self, isa: Isa) {
        let Decode { out, q, k, v, dims } = self;
        dims.check("attention::Decode", &[out.len(), q.len()], &[k.len(), v.len()]);
        let Dims { queries, keys, heads, kv_heads, head_dim, .. } = dims;
        assert!(
            queries <= DECODE_QUERIES,
            "attention::Decode: more than {DECODE_QUERIES} queries in {dims:?}"
        );
        let work = q.len() * keys.min(dims.scores.window.unwrap_or(keys));
        // A group reads its keys once. Where there are few groups, every head is a task.
        let groups = out.len() / (dims.group() * head_dim).max(1);
        let tasks = if crew::is_led() { tasks_for(work) } else { usize::from(work > SERIAL_WORK) * groups };
        let at_once = if tasks > groups { 1 } else { dims.group() };
        let (width, parts) = (at_once * head_dim, dims.group() / at_once.max(1));
        let (all, shared) = (groups * parts, SharedRows::new(out, width));
        let attend = |i: usize| {
            // SAFETY: every task has other heads.
            let (out, q) = (unsafe { shared.row(i, 0, width) }, &q[i * width..][..width]);
            let (row, kv_head) = (i * at_once / heads, i / parts % kv_heads);
            let (item, i) = (row / queries, row % queries);
            let first_seen = dims.first_seen(i);
            let first = (item * keys + first_seen) * dims.kv_width() + kv_head * head_dim;
            let (k, v) = (&k[first..], &v[first..]);
            let visible = dims.visible(i) - first_seen;
            isa.run(decode::Group { out, q, k, v, visible, dims });
        };
        for_tasks_when(tasks > 1, all, attend);
    }
}

impl Backward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`, or there are fewer queries than keys.
    pub fn run_on(self, isa: Isa) {
        let Backward { dqkv, dout, out, qkv, lse, dims } = self;
        let joined = [dqkv.len(), qkv.len()];
        dims.check_joined("attention::Backward", &[dout.len(), out.len()], &joined, lse.len());
        if out.is_empty() {
            return;
        }
        let Dims { batch, heads, kv_heads, .. } = dims;
        let [q, k, v] = dims.views(qkv);
        let [dout, out] = [dout, out].map(|data| View { data, stride: dims.width() });
        let lse = View { data: lse, stride: heads };
        let all = SharedRows::new(dqkv, dims.joined_width());
        let [dq, dk, dv] = dims.starts().map(|start| all.starting_at(start));
        let tasks = batch * kv_heads;
        each_when(tasks > 1, (0..tasks).into_par_iter().with_max_len(1), |task| {
            let (item, kv_head) = (task / kv_heads, task % kv_heads);
            let head = backward::Head { dq, dk, dv, dout, out, q, k, v, lse, item, kv_head, dims };
            // SAFETY: every task has another batch item or head, and `head` alone refers to dqkv.
            unsafe { head.run(isa) };
        });
    }
}
