//! Token embedding: a row of the table per token.
//!
//! ```text
//! forward   out[t] = scale table[ids[t]]            table [vocab, hidden], out [T, hidden]
//! backward  dtable[ids[t]] += scale dout[t]         added to, t ascending
//! ```

pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{block_rows, each};
use crate::add::{Add, Scale};
use crate::isa::Isa;

/// Tasks of the backward, each of which reads all ids.
const TASKS: usize = 16;

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

/// Sets `out` to the rows `ids` of `table`, scaled.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[T, hidden]`, set.
    pub out: &'a mut [f32],
    /// `[vocab, hidden]`
    pub table: &'a [f32],
    /// `[T]`
    pub ids: &'a [u32],
    /// Length of a row.
    pub hidden: usize,
    /// Multiplies the rows; 1 for plain rows.
    pub scale: f32,
}

/// Adds the rows of `dout`, scaled, to the rows `ids` of `dtable`.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[vocab, hidden]`, added to.
    pub dtable: &'a mut [f32],
    /// `[T, hidden]`
    pub dout: &'a [f32],
    /// `[T]`
    pub ids: &'a [u32],
    /// Length of a row.
    pub hidden: usize,
    /// Multiplies the rows; 1 for plain rows.
    pub scale: f32,
}

run_on_current_tier!(Forward, Backward);

impl Forward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit, or an id is not below the number of rows.
    pub fn run_on(self, isa: Isa) {
        let Forward { out, table, ids, hidden, scale } = self;
        check("embedding::Forward", out.len(), table.len(), ids, hidden);
        let rows = block_rows(hidden);
        each(out.par_chunks_mut(rows * hidden).zip(ids.par_chunks(rows)), |(out, ids)| {
            for (out, &id) in out.chunks_exact_mut(hidden).zip(ids) {
                let row = &table[id as usize * hidden..][..hidden];
                if scale == 1.0 {
                    out.copy_from_slice(row);
                } else {
                    isa.run(Scale { y: out, x: row, scale });
                }
            }
        });
    }
}

impl Backward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit, or an id is not below the number of rows.
    pub fn run_on(self, isa: Isa) {
        let Backward { dtable, dout, ids, hidden, scale } = self;
        check("embedding::Backward", dout.len(), dtable.len(), ids, hidden);
        // Every task owns some rows of the table and looks for their tokens, so that no two threads meet.
        let rows = (dtable.len() / hidden).div_ceil(TASKS).max(1);
        each(dtable.par_chunks_mut(rows * hidden).enumerate(), |(task, dtable)| {
            let first = task * rows;
            for (&id, dout) in ids.iter().zip(dout.chunks_exact(hidden)) {
                if let Some(at) = (id as usize).checked_sub(first)
                    && let Some(row) = dtable.get_mut(at * hidden..(at + 1) * hidden)
                {
                    Add { y: row, x: dout, scale }.run_on(isa);
                }
            }
        });
    }
}
