//! Rotary position embedding, rotate-half layout as in Hugging Face checkpoints.
//!
//! ```text
//! angle[p, i] = p f_i,  f_i = theta^(-2i / head_dim),  i < half = head_dim / 2     (f_i scaled by Scaling)
//! forward   x[i]        <- x[i] cos - x[i + half] sin        in place, every head at position p
//!           x[i + half] <- x[i + half] cos + x[i] sin
//! backward  the inverse rotation (sin negated), in place on the gradient
//! ```
//! Angles, sines and cosines are computed in f64 and kept in f32.

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use std::f64::consts::PI;
use std::sync::OnceLock;

use rayon::prelude::*;

use super::blocks::{block_rows, each};
use crate::isa::Isa;

/// The scaling of the frequencies of a model with an extended context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// No scaling.
    None,
    /// LLaMA-3.1's rule. With wavelength l = 2 pi / f and s = (original_max_position / l - low) / (high - low):
    /// f is kept for l < original_max_position / high, f / factor for l > original_max_position / low, and
    /// (1 - s) f / factor + s f between.
    Llama3 {
        /// Divides the frequencies of long wavelengths.
        factor: f64,
        /// `low` of the rule.
        low_freq_factor: f64,
        /// `high` of the rule.
        high_freq_factor: f64,
        /// Context length before the extension, in tokens.
        original_max_position: f64,
    },
}

/// Returns the frequencies `[head_dim / 2]` in radians per position.
pub fn frequencies(head_dim: usize, theta: f64, scaling: Scaling) -> Vec<f64> {
    let plain = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64));
    let Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } = scaling else {
        return plain.collect();
    };
    plain
        .map(|f| {
            let wavelength = 2.0 * PI / f;
            if wavelength < original_max_position / high_freq_factor {
                f
            } else if wavelength > original_max_position / low_freq_factor {
                f / factor
            } else {
                let kept = (original_max_position / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - kept) * f / factor + kept * f
            }
        })
        .collect()
}

/// Positions tabulated at a time.
const PAGE: usize = 256;

/// Cosines and sines of a model's positions, computed at the first use of a position.
#[derive(Debug)]
pub struct Table {
    frequencies: Vec<f64>,
    positions: usize,
    /// Pages of rows, one row per position: `half` cosines, then `half` sines.
    pages: Vec<OnceLock<Vec<f32>>>,
}

impl Table {
    /// Makes a table for heads of `head_dim` values and positions below `max_position`.
    ///
    /// # Panics
    /// `head_dim` is odd.
    pub fn new(head_dim: usize, theta: f64, scaling: Scaling, max_position: usize) -> Table {
        assert!(head_dim.is_multiple_of(2), "rope::Table: head_dim {head_dim} is odd");
        let pages = std::iter::repeat_with(OnceLock::new).take(max_position.div_ceil(PAGE)).collect();
        Table { frequencies: frequencies(head_dim, theta, scaling), positions: max_position, pages }
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

    /// Returns `(cos, sin)`, `[head_dim / 2]` each, of position `p`.
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
                    (*cos, *sin) = (angle.cos() as f32, angle.sin() as f32);
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
}

/// Rotates the first [`Args::width`] columns of the rows of `x` in place; the columns past them, such as the values of
/// a joined qkv, stay as they are.
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
    /// `x` is no whole number of sequences, or a position is not in the table.
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
    /// Returns the number of rotated columns, `heads * head_dim`.
    pub fn width(&self) -> usize {
        self.heads * 2 * self.table.frequencies.len()
    }
}

fn rotate(op: &str, isa: Isa, x: &mut [f32], stride: usize, args: Args<'_>, direction: f32) {
    let Args { table, seq, start, heads } = args;
    let width = args.width();
    if x.is_empty() {
        return;
    }
    assert!(
        width > 0 && seq > 0 && stride >= width && x.len().is_multiple_of(seq * stride),
        "{op}: {} values for sequences of {seq} rows of {heads} heads of {}, rows of {stride}",
        x.len(),
        2 * table.frequencies.len()
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
            isa.run(kernel::Rotate { x: &mut x[..width], cos, sin, direction });
        }
    });
}
