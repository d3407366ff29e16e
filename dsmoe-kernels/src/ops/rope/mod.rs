//! Rotary position embedding, rotate-half layout as in Hugging Face checkpoints.
//!
//! ```text
//! half = frequencies.len() <= head_dim / 2;  c = factor cos(p f_i),  s = factor sin(p f_i)
//! forward   x[i]        <- x[i] c - x[i + half] s            in place, every head at position p, i < half
//!           x[i + half] <- x[i + half] c + x[i] s            values from 2 half on stay
//! backward  the transpose (s negated), in place on the gradient
//! ```
//! Angles, sines and cosines are computed in f64 and kept in f32.

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use rayon::prelude::*;

use super::blocks::{block_rows, each};
use crate::isa::Isa;

/// Positions tabulated at a time.
const PAGE: usize = 256;

/// Cosines and sines of a model's positions, computed at the first use of a position.
#[derive(Debug)]
pub struct Table {
    frequencies: Vec<f64>,
    factor: f64,
    positions: usize,
    /// Pages of rows, one row per position: `half` cosines, then `half` sines.
    pages: Vec<OnceLock<Vec<f32>>>,
}

impl Table {
    /// Makes a table of `frequencies`, in radians per position, for positions below `positions`. Sines and cosines are
    /// multiplied by `factor`, which is 1 for a plain rotation.
    pub fn new(frequencies: Vec<f64>, factor: f64, positions: usize) -> Table {
        let pages = std::iter::repeat_with(OnceLock::new).take(positions.div_ceil(PAGE)).collect();
        Table { frequencies, factor, positions, pages }
    }

    /// Returns the number of positions.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Computes the angles of the first `positions` positions now, for calls that must not allocate.
    pub fn prepare(&self, positions: usize) {
        for p in (0..positions.min(self.positions)).step_by(PAGE) {
            self.row(p);
        }
    }

    /// Returns `(cos, sin)`, one value per frequency each, of position `p`.
    ///
    /// # Panics
    /// There is no such position.
    pub fn angles(&self, p: usize) -> (&[f32], &[f32]) {
        assert!(p < self.positions, "rope::Table: position {p} of {}", self.positions);
        self.row(p)
    }

    fn row(&self, p: usize) -> (&[f32], &[f32]) {
        let half = self.frequencies.len();
        let page = self.pages[p / PAGE].get_or_init(|| {
            let mut page = vec![0.0; PAGE * 2 * half];
            for (i, row) in page.chunks_exact_mut((2 * half).max(1)).enumerate() {
                let (cos, sin) = row.split_at_mut(half);
                for ((cos, sin), f) in cos.iter_mut().zip(sin).zip(&self.frequencies) {
                    let angle = (p / PAGE * PAGE + i) as f64 * f;
                    (*cos, *sin) = ((self.factor * angle.cos()) as f32, (self.factor * angle.sin()) as f32);
                }
            }
            page
        });
        page[p % PAGE * 2 * half..][..2 * half].split_at(half)
    }
}

/// The rows and their angles.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// The model's angles.
    pub table: &'a Table,
    /// Rows of a sequence; row r is at position `start + r % seq`.
    pub seq: usize,
    /// Position of a sequence's first row.
    pub start: usize,
    /// Heads in a row.
    pub heads: usize,
    /// Width of a head, at least two values per frequency of the table.
    pub head_dim: usize,
}

/// Rotates the heads in the first [`Args::width`] columns of the rows of `x` in place; the columns past them, such as the
/// values of a joined qkv, stay as they are.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[batch * seq, stride]`
    pub x: &'a mut [f32],
    /// Length of a row, at least [`Args::width`].
    pub stride: usize,
    /// The rotation.
    pub args: Args<'a>,
}

/// Rotates the columns of the gradient `dx` back, in place.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[batch * seq, stride]`
    pub dx: &'a mut [f32],
    /// Length of a row, at least [`Args::width`].
    pub stride: usize,
    /// The rotation.
    pub args: Args<'a>,
}

run_on_current_tier!(Forward, Backward);

impl Forward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// `x` is no whole number of sequences, a position is not in the table, or a head is too narrow for the table.
    pub fn run_on(self, isa: Isa) {
        rotate("rope::Forward", isa, self.x, self.stride, self.args, 1.0);
    }
}

impl Backward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Panics under the conditions of [`Forward::run_on`].
    pub fn run_on(self, isa: Isa) {
        rotate("rope::Backward", isa, self.dx, self.stride, self.args, -1.0);
    }
}

impl Args<'_> {
    /// Returns the number of columns of the heads, `heads * head_dim`.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

fn rotate(op: &str, isa: Isa, x: &mut [f32], stride: usize, args: Args<'_>, direction: f32) {
    let Args { table, seq, start, heads, head_dim } = args;
    let width = args.width();
    if x.is_empty() {
        return;
    }
    assert!(
        width > 0 && seq > 0 && stride >= width && x.len().is_multiple_of(seq * stride),
        "{op}: {} values for sequences of {seq} rows of {heads} heads of {head_dim}, rows of {stride}",
        x.len()
    );
    assert!(
        2 * table.frequencies.len() <= head_dim,
        "{op}: {} frequencies for heads of {head_dim}",
        table.frequencies.len()
    );
    assert!(
        start <= table.positions && seq <= table.positions - start,
        "{op}: position {} of {}",
        start.saturating_add(seq - 1),
        table.positions
    );
    let rows = block_rows(stride);
    each(x.par_chunks_mut(rows * stride).enumerate(), |(block, x)| {
        for (i, x) in x.chunks_exact_mut(stride).enumerate() {
            let (cos, sin) = table.row(start + (block * rows + i) % seq);
            isa.run(kernel::Rotate { x: &mut x[..width], head_dim, cos, sin, direction });
        }
    });
}
