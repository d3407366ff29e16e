//! Sums of products of columns over tokens: `G = X^T X`, of which panels of rows are kept from the diagonal block on,
//! since the rest is symmetric.
//!
//! Several processes that see the same tokens divide the rows. Every entry is a sum over tokens in one process, so their number
//! does not change it.

use std::ops::Range;
use std::sync::Arc;

use dsmoe_kernels::Precision;
use dsmoe_kernels::comm::{Communicator, What, alone};
use dsmoe_kernels::matmul::{Mat, Matmul};
use rayon::prelude::*;

use crate::checkpoint::transpose;
use crate::error::Result;
use crate::rounds::broadcast;

/// Rows of G in a panel.
const PANEL: usize = 512;
/// Rows filled by one task: a cache line of a panel's row.
const LINE: usize = 16;

/// G, `[columns, columns]`.
///
/// ```
/// use dsmoe_core::gram::Gram;
///
/// let mut gram = Gram::new(2);
/// gram.add(&[1.0, 2.0, 3.0, 4.0]); // two rows
/// assert_eq!(gram.square(1.0), [10.0, 14.0, 14.0, 20.0]);
/// ```
#[derive(Clone, Debug)]
pub struct Gram {
    columns: usize,
    precision: Precision,
    panels: Vec<Panel>,
    comm: Arc<dyn Communicator>,
}

/// Some rows of G from their diagonal block on.
#[derive(Clone, Debug)]
struct Panel {
    rows: Range<usize>,
    /// The process that adds tokens to it.
    owner: usize,
    /// `[rows, columns - rows.start]`; empty in other processes until all have it.
    values: Vec<f32>,
}

impl Gram {
    /// Makes the sums over no token.
    pub fn new(columns: usize) -> Gram {
        Gram::of(columns, alone())
    }

    /// Divides the rows among the processes of `comm`, which add the same tokens and then call [`Gram::complete`].
    #[must_use]
    pub fn on(self, comm: &Arc<dyn Communicator>) -> Gram {
        Gram { precision: self.precision, ..Gram::of(self.columns, comm) }
    }

    fn of(columns: usize, comm: &Arc<dyn Communicator>) -> Gram {
        let panel = |owner: usize, first: usize, end: usize| {
            let rows = first..end.min(first + PANEL);
            let len = if owner == comm.rank() { rows.len() * (columns - first) } else { 0 };
            Panel { rows, owner, values: vec![0.0; len] }
        };
        let size = comm.size();
        // Of a triangle of area 1 the rows before this one have the area rank / size.
        let cut = |rank: usize| {
            let row = columns as f64 * (1.0 - (1.0 - rank as f64 / size as f64).sqrt());
            if rank == size { columns } else { (row / LINE as f64).round() as usize * LINE }.min(columns)
        };
        let of_owner = |owner: usize| {
            (cut(owner)..cut(owner + 1)).step_by(PANEL).map(move |first| panel(owner, first, cut(owner + 1)))
        };
        let panels = (0..size).flat_map(of_owner).collect();
        Gram { columns, precision: Precision::F32, panels, comm: Arc::clone(comm) }
    }

    /// Gives all processes all rows. Nothing is read before; nothing is added after.
    ///
    /// # Errors
    /// Another process fails.
    pub fn complete(&mut self) -> Result<()> {
        for Panel { rows, owner, values } in &mut self.panels {
            values.resize(rows.len() * (self.columns - rows.start), 0.0);
            broadcast(&*self.comm, What::of("sums of products"), *owner, values)?;
        }
        Ok(())
    }

    /// Returns the panel with row `i`.
    fn panel(&self, i: usize) -> &Panel {
        let panel = &self.panels[self.panels.partition_point(|panel| panel.rows.end <= i)];
        assert!(!panel.values.is_empty(), "Gram: rows of another process are read before it is complete");
        panel
    }

    /// Rounds the tokens to `precision` instead of f32.
    #[must_use]
    pub fn in_precision(self, precision: Precision) -> Gram {
        Gram { precision, ..self }
    }

    /// Returns the number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Adds tokens `x` `[tokens, columns]`.
    ///
    /// # Panics
    /// `x` holds no whole number of rows.
    pub fn add(&mut self, x: &[f32]) {
        let columns = self.columns;
        assert!(
            columns > 0 && x.len().is_multiple_of(columns),
            "Gram: {} values, {columns} columns",
            x.len()
        );
        let tokens = x.len() / columns;
        // The products need the tokens of a column contiguous.
        let mut transposed = vec![0.0; x.len()];
        transpose(&mut transposed, x, tokens, columns);
        let rank = self.comm.rank();
        for Panel { rows, values, .. } in self.panels.iter_mut().filter(|panel| panel.owner == rank) {
            let first = rows.start;
            let of = |count| Mat::new(&transposed[first * tokens..(first + count) * tokens], count, tokens);
            let (a, b) = (of(rows.len()), of(columns - first).t());
            Matmul { c: values, a, b, accumulate: true, precision: self.precision }.run();
        }
    }

    /// Returns the sum of squares of column `i`.
    ///
    /// # Panics
    /// There is no such column.
    pub fn diagonal(&self, i: usize) -> f32 {
        let Panel { rows, values, .. } = self.panel(i);
        let row = i - rows.start;
        values[row * (self.columns - rows.start) + row]
    }

    /// Returns all of G times `scale`, row-major.
    pub fn square(&self, scale: f32) -> Vec<f32> {
        let n = self.columns;
        let mut values = vec![0.0; n * n];
        values.par_chunks_mut(LINE * n.max(1)).enumerate().for_each(|(task, out)| {
            let top = task * LINE;
            let count = out.len() / n;
            let own = self.panel(top);
            let first = own.rows.start;
            for (r, out) in out.chunks_exact_mut(n).enumerate() {
                out[first..].copy_from_slice(&own.values[(top + r - first) * (n - first)..][..n - first]);
            }
            for Panel { rows, values, .. } in self.panels.iter().take_while(|panel| panel.rows.end <= first) {
                for j in rows.clone() {
                    let at = (j - rows.start) * (n - rows.start) + (top - rows.start);
                    let line = &values[at..][..count];
                    line.iter().enumerate().for_each(|(r, &x)| out[r * n + j] = x);
                }
            }
            out.iter_mut().for_each(|x| *x *= scale);
        });
        values
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, assert_same_on_threads, normals};

    use super::*;

    #[test]
    fn it_is_the_sum_of_products() {
        for columns in [1, 5, 40, PANEL + 21, 2 * PANEL + 3] {
            let (tokens, count) = (11, 3);
            let x = normals(count * tokens * columns, columns as u64);
            let mut gram = Gram::new(columns);
            x.chunks_exact(tokens * columns).for_each(|x| gram.add(x));
            let mut want = vec![0.0; columns * columns];
            for row in x.chunks_exact(columns) {
                for (at, want) in want.iter_mut().enumerate() {
                    *want += 0.5 * f64::from(row[at / columns]) * f64::from(row[at % columns]);
                }
            }
            assert_close("G", &gram.square(0.5), &want, 1e-6);
            let diagonal: Vec<f32> = (0..columns).map(|i| 0.5 * gram.diagonal(i)).collect();
            let want: Vec<f64> = want.into_iter().step_by(columns + 1).collect();
            assert_close("diagonal", &diagonal, &want, 1e-6);
        }
    }

    #[test]
    fn threads_do_not_show() {
        let x = normals(64 * 600, 8);
        assert_same_on_threads("gram", || {
            let mut gram = Gram::new(600);
            gram.add(&x);
            gram.square(1.0)
        });
    }

    #[test]
    fn processes_do_not_show() {
        use dsmoe_kernels::comm::threads::members;
        for columns in [1, 40, 600, PANEL + 300] {
            let x = normals(37 * columns, 8);
            let sums = |comm: Arc<dyn Communicator>| {
                let mut gram = Gram::new(columns).on(&comm);
                x.chunks(20 * columns).for_each(|x| gram.add(x));
                gram.complete().unwrap();
                (0..columns).map(|i| gram.diagonal(i)).chain(gram.square(0.5)).collect::<Vec<f32>>()
            };
            let alone = sums(Arc::clone(alone()));
            for size in [2, 3, 4] {
                std::thread::scope(|scope| {
                    let threads = members(size, std::time::Duration::from_secs(60)).into_iter();
                    let threads: Vec<_> = threads.map(|one| scope.spawn(|| sums(Arc::new(one)))).collect();
                    for thread in threads {
                        assert!(thread.join().unwrap() == alone, "{columns} columns, {size} processes");
                    }
                });
            }
        }
    }
}
