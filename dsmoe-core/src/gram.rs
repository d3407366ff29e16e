//! Sums of products of columns over tokens: `G = X^T X`, of which panels of rows are kept from the diagonal block on,
//! since the rest is symmetric.

use dsmoe_kernels::Precision;
use dsmoe_kernels::matmul::{Mat, Matmul};
use rayon::prelude::*;

use crate::checkpoint::transpose;

/// Rows of G in a panel.
const PANEL: usize = 512;
/// Rows filled by one task: a cache line of a panel's row.
const LINE: usize = 16;

/// G, `[columns, columns]`.
#[derive(Clone, Debug)]
pub struct Gram {
    columns: usize,
    precision: Precision,
    panels: Vec<Vec<f32>>,
}

impl Gram {
    /// Makes the sums over no token.
    pub fn new(columns: usize) -> Gram {
        let panel = |first| vec![0.0; PANEL.min(columns - first) * (columns - first)];
        let precision = Precision::F32;
        Gram { columns, precision, panels: (0..columns).step_by(PANEL).map(panel).collect() }
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
        for (number, panel) in self.panels.iter_mut().enumerate() {
            let first = number * PANEL;
            let of = |count| Mat::new(&transposed[first * tokens..(first + count) * tokens], count, tokens);
            let (a, b) = (of(PANEL.min(columns - first)), of(columns - first).t());
            Matmul { c: panel, a, b, accumulate: true, precision: self.precision }.run();
        }
    }

    /// Returns the sum of squares of column `i`.
    ///
    /// # Panics
    /// There is no such column.
    pub fn diagonal(&self, i: usize) -> f32 {
        let row = i % PANEL;
        self.panels[i / PANEL][row * (self.columns - i / PANEL * PANEL) + row]
    }

    /// Returns all of G times `scale`, row-major.
    pub fn square(&self, scale: f32) -> Vec<f32> {
        let n = self.columns;
        let mut values = vec![0.0; n * n];
        values.par_chunks_mut(LINE * n.max(1)).enumerate().for_each(|(task, out)| {
            let top = task * LINE;
            let rows = out.len() / n;
            let first = top / PANEL * PANEL;
            let width = n - first;
            for (r, out) in out.chunks_exact_mut(n).enumerate() {
                let row = &self.panels[first / PANEL][(top + r - first) * width..][..width];
                out[first..].copy_from_slice(row);
            }
            for j in 0..first {
                let panel_first = j / PANEL * PANEL;
                let at = (j - panel_first) * (n - panel_first) + (top - panel_first);
                let line = &self.panels[j / PANEL][at..][..rows];
                line.iter().enumerate().for_each(|(r, &x)| out[r * n + j] = x);
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
}
