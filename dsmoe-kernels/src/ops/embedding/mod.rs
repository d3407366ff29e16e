//! Token embedding: a row of the table per token.
//!
//! ```text
//! forward   out[t] = table[ids[t]]            table [vocab, hidden], out [T, hidden]
//! backward  dtable[ids[t]] += dout[t]         added to, t ascending
//! ```

pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{block_rows, each};

fn check(op: &str, activations: usize, table: usize, ids: &[u32], hidden: usize) {
    assert!(
        hidden > 0 && table.is_multiple_of(hidden) && activations == ids.len() * hidden,
        "{op}: {activations} activations, table {table}, {} ids, hidden {hidden}",
        ids.len()
    );
    let vocab = table / hidden;
    for (t, &id) in ids.iter().enumerate() {
        assert!((id as usize) < vocab, "{op}: id {id} of token {t} in a table of {vocab} rows");
    }
}

/// Sets `out` `[T, hidden]` to the rows `ids` `[T]` of `table` `[vocab, hidden]`.
///
/// # Panics
/// Lengths do not fit, or an id is not below the number of rows.
pub fn forward(out: &mut [f32], table: &[f32], ids: &[u32], hidden: usize) {
    check("embedding::forward", out.len(), table.len(), ids, hidden);
    let rows = block_rows(hidden);
    each(out.par_chunks_mut(rows * hidden).zip(ids.par_chunks(rows)), |(out, ids)| {
        for (out, &id) in out.chunks_exact_mut(hidden).zip(ids) {
            out.copy_from_slice(&table[id as usize * hidden..][..hidden]);
        }
    });
}

/// Adds the rows of `dout` `[T, hidden]` to the rows `ids` `[T]` of `dtable` `[vocab, hidden]`.
///
/// # Panics
/// Lengths do not fit, or an id is not below the number of rows.
pub fn backward(dtable: &mut [f32], dout: &[f32], ids: &[u32], hidden: usize) {
    check("embedding::backward", dout.len(), dtable.len(), ids, hidden);
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&t| ids[t]);
    // One row of the table with all its tokens is one item, so that no two threads meet.
    let mut items = Vec::new();
    let (mut rest, mut first) = (dtable, 0);
    for tokens in order.chunk_by(|&s, &t| ids[s] == ids[t]) {
        let id = ids[tokens[0]] as usize;
        let (row, after) = rest[(id - first) * hidden..].split_at_mut(hidden);
        items.push((row, tokens));
        (rest, first) = (after, id + 1);
    }
    let add = |(row, tokens): (&mut [f32], &[usize])| {
        for &t in tokens {
            super::add::add(row, &dout[t * hidden..][..hidden]);
        }
    };
    each(items.into_par_iter().with_min_len(block_rows(hidden)), add);
}
