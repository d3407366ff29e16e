//! SparseGPT's sweep over the columns of one weight matrix: the columns to the right compensate for removed weights.
//!
//! ```text
//! per block of columns:                                           H^-1 = R^T R, R upper triangular
//!   removed = smallest w[r,i]^2 / R[i,i]^2                         of the block, or of groups as they are reached
//!   per column i of the block:
//!     e[r] = w[r,i] / R[i,i] where removed, else 0
//!     w[r,i..] -= e[r] R[i,i..]    in the block
//!   w[:, right of the block] -= E R[block, right of the block]
//! ```

use dsmoe_core::checkpoint::transpose;
use dsmoe_core::masks::Mask;
use dsmoe_kernels::Precision;
use dsmoe_kernels::matmul::{Mat, Matmul};
use rayon::prelude::*;

use super::hessian::Factored;
use super::pattern::{Pattern, removed_of};
use super::select::{Smallest, mark_smallest};

/// Rows swept by one task.
const ROWS: usize = 16;
/// The longest group of a pattern.
const LONGEST_GROUP: usize = 8;

/// Options of a sweep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SweepOptions {
    /// Where zeros may lie.
    pub pattern: Pattern,
    /// Share of every block that is removed; a pattern of groups has its own.
    pub share: f64,
    /// Columns of a block, a multiple of the pattern's group.
    pub block: usize,
}

/// The result of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct Swept {
    /// The mask of kept weights.
    pub mask: Mask,
    /// Half the sum of e^2: `||W X - W' X||^2` in terms of the damped Hessian.
    pub loss: f64,
}

/// Prunes `weight` `[outputs, inputs]` in place. Weights whose input was always zero are removed first.
///
/// # Panics
/// Shapes do not fit, a block is no multiple of the pattern's group, or that is of more than 8 columns.
pub fn sweep(weight: &mut [f32], hessian: &Factored, options: &SweepOptions) -> Swept {
    let Factored { factor, dead, .. } = hessian;
    let cols = dead.len();
    let of = if let Pattern::Group { of, .. } = options.pattern { of } else { 1 };
    let fits = cols > 0 && weight.len().is_multiple_of(cols) && factor.len() == cols * cols;
    let blocks = options.block > 0 && options.block.is_multiple_of(of) && of <= LONGEST_GROUP;
    let lens = (weight.len(), factor.len());
    assert!(fits && blocks && cols.is_multiple_of(of), "sweep: {lens:?} values, {cols} columns, {options:?}");
    let rows = weight.len() / cols;
    let stride = cols.div_ceil(8);
    let mut kept = vec![0u8; rows * stride];
    // Columns are rows here: those right of a block are one piece of memory.
    let mut columns = vec![0.0; weight.len()];
    transpose(&mut columns, weight, rows, cols);
    let [mut w, mut errors, mut scores] = [(); 3].map(|()| vec![0.0; rows * options.block.min(cols)]);
    let mut losses = vec![0.0f64; rows];
    for first in (0..cols).step_by(options.block) {
        let width = options.block.min(cols - first);
        let end = first + width;
        let [w, errors, scores] = [&mut w, &mut errors, &mut scores].map(|buf| &mut buf[..rows * width]);
        transpose(w, &columns[first * rows..end * rows], width, rows);
        let mut upper = vec![0.0; width * width];
        for (i, upper) in upper.chunks_exact_mut(width).enumerate() {
            for (j, r) in upper.iter_mut().enumerate().skip(i) {
                *r = factor[(first + j) * cols + first + i];
            }
        }
        let block = Block { upper: &upper, dead: &dead[first..end], pattern: options.pattern };
        let smallest = match options.pattern {
            Pattern::Group { .. } => None,
            Pattern::Unstructured => {
                scores.par_chunks_mut(width).zip(w.par_chunks(width)).for_each(|(scores, w)| {
                    for (i, (score, &w)) in scores.iter_mut().zip(w).enumerate() {
                        *score = block.score(i, w);
                    }
                });
                Some(Smallest::of(scores, removed_of(rows * width, options.share)))
            }
        };
        let tasks = w.par_chunks_mut(ROWS * width).zip(errors.par_chunks_mut(ROWS * width));
        let tasks = tasks.zip(losses.par_chunks_mut(ROWS)).zip(kept.par_chunks_mut(ROWS * stride));
        tasks.enumerate().for_each(|(task, (((w, errors), losses), bits))| {
            let mut removed = vec![false; width];
            let rows = w.chunks_exact_mut(width).zip(errors.chunks_exact_mut(width)).zip(losses);
            for (r, ((w, errors), loss)) in rows.enumerate() {
                if let Some(smallest) = smallest {
                    let at = (task * ROWS + r) * width;
                    smallest.mark(&mut removed, &scores[at..at + width], at);
                }
                *loss += block.row(w, errors, &mut removed);
                let bits = &mut bits[r * stride..][..stride];
                for (col, _) in (first..).zip(&removed).filter(|(_, removed)| !**removed) {
                    bits[col / 8] |= 1 << (col % 8);
                }
            }
        });
        transpose(&mut columns[first * rows..end * rows], w, rows, width);
        if end < cols {
            let a = Mat::with_stride(&factor[end * cols + first..], cols - end, width, cols);
            let (c, b) = (&mut columns[end * rows..], Mat::new(errors, rows, width).t());
            Matmul { c, a, b, accumulate: true, precision: Precision::F32 }.run();
        }
    }
    transpose(weight, &columns, cols, rows);
    Swept { mask: Mask::from_bits(rows, cols, kept), loss: losses.iter().sum() }
}

/// A block of columns.
struct Block<'a> {
    /// R of the block, `[width, width]`.
    upper: &'a [f32],
    dead: &'a [bool],
    pattern: Pattern,
}

impl Block<'_> {
    fn score(&self, i: usize, w: f32) -> f32 {
        let r = self.upper[i * self.dead.len() + i];
        if self.dead[i] { 0.0 } else { w * w / (r * r) }
    }

    /// Sweeps one row `w` `[width]`; sets `errors` to -e. Of a pattern of groups, sets `removed`. Returns the loss.
    fn row(&self, w: &mut [f32], errors: &mut [f32], removed: &mut [bool]) -> f64 {
        let width = w.len();
        let mut loss = 0.0;
        for i in 0..width {
            if let Pattern::Group { removed: count, of } = self.pattern
                && i % of == 0
            {
                let mut scores = [0.0; LONGEST_GROUP];
                for (j, score) in scores[..of].iter_mut().enumerate() {
                    *score = self.score(i + j, w[i + j]);
                }
                mark_smallest(&mut removed[i..i + of], &scores[..of], count);
            }
            errors[i] = 0.0;
            if removed[i] {
                let upper = &self.upper[i * width + i..(i + 1) * width];
                let error = w[i] / upper[0];
                for (w, r) in w[i..].iter_mut().zip(upper) {
                    *w -= error * r;
                }
                w[i] = 0.0;
                errors[i] = -error;
                loss += 0.5 * f64::from(error).powi(2);
            }
        }
        loss
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, assert_same_on_threads, f64s, normals};

    use super::*;
    use crate::linalg::inverse_factor;
    use crate::sparse::hessian::Hessian;

    const TWO_OF_FOUR: Pattern = Pattern::Group { removed: 2, of: 4 };

    fn options(pattern: Pattern, share: f64, block: usize) -> SweepOptions {
        SweepOptions { pattern, share, block }
    }

    fn swept(w: &mut [f32], h: Vec<f32>, options: &SweepOptions) -> Swept {
        let cols = h.len().isqrt();
        let factor = inverse_factor(h, cols).unwrap();
        sweep(w, &Factored { factor, dead: vec![false; cols], damping: 0.0 }, options)
    }

    /// A random layer and its Hessian `2 X^T X`: weights `[rows, cols]`, inputs X `[tokens, cols]`.
    fn layer(rows: usize, cols: usize, tokens: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let x = normals(tokens * cols, 1);
        let column = |i: usize| x[i..].iter().step_by(cols).map(|&x| f64::from(x));
        let entry = |i, j| column(i).zip(column(j)).map(|(a, b)| 2.0 * a * b).sum::<f64>() as f32;
        let h = (0..cols * cols).map(|at| entry(at / cols, at % cols)).collect();
        (normals(rows * cols, 2), x, h)
    }

    /// `||(a - b) X^T||^2`.
    fn output_error(a: &[f32], b: &[f32], x: &[f32], cols: usize) -> f64 {
        let rows = a.chunks(cols).zip(b.chunks(cols));
        let outputs = rows.flat_map(|(a, b)| {
            let lost: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(a - b)).collect();
            x.chunks(cols).map(move |x| lost.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum::<f64>())
        });
        outputs.map(|y| y * y).sum()
    }

    #[test]
    fn one_removed_weight_is_made_good_by_its_neighbour() {
        // w1 + w0 H01 / H11 = 1.25; loss = w0^2 / Hinv00 / 2 = 0.1875.
        for (damping, want, loss) in [(0.0, 1.25, 0.1875), (0.02, 1.247_525, 0.190_619)] {
            let mut w = [0.5, 1.0];
            let h = vec![2.0 + damping, 1.0, 1.0, 2.0 + damping];
            let swept = swept(&mut w, h, &options(Pattern::Unstructured, 0.5, 128));
            assert_close("w", &w, &[0.0, want], 1e-6);
            assert!((swept.loss - loss).abs() < 1e-6, "{}", swept.loss);
            assert_eq!(swept.mask, Mask::from_bits(1, 2, vec![0b10]));
        }
    }

    #[test]
    fn an_identity_hessian_removes_the_smallest_of_each_group() {
        let mut w = [0.1, 3.0, 2.0, 0.2];
        let mut h = vec![0.0; 16];
        (0..4).for_each(|i| h[i * 4 + i] = 2.0);
        let swept = swept(&mut w, h, &options(TWO_OF_FOUR, 0.0, 128));
        assert_eq!(w, [0.0, 3.0, 2.0, 0.0]);
        assert_eq!(swept.mask, Mask::from_bits(1, 4, vec![0b0110]));
    }

    #[test]
    fn the_loss_is_the_output_error_and_less_than_without_the_update() {
        let (rows, cols) = (5, 12);
        let (dense, x, h) = layer(rows, cols, 200);
        for (pattern, block) in [(Pattern::Unstructured, 5), (Pattern::Unstructured, 128), (TWO_OF_FOUR, 4)] {
            let mut w = dense.clone();
            let swept = swept(&mut w, h.clone(), &options(pattern, 0.5, block));
            let error = output_error(&w, &dense, &x, cols);
            assert!((swept.loss / error - 1.0).abs() < 1e-4, "{} {error}", swept.loss);
            let mut zeroed = dense.clone();
            let kept = |at: usize| f32::from(u8::from(swept.mask.keeps(at / cols, at % cols)));
            zeroed.iter_mut().enumerate().for_each(|(at, w)| *w *= kept(at));
            assert!(error < output_error(&zeroed, &dense, &x, cols));
            for (at, &w) in w.iter().enumerate() {
                assert_eq!(w == 0.0, !swept.mask.keeps(at / cols, at % cols));
            }
        }
    }

    #[test]
    fn blocks_of_any_width_update_alike() {
        // Masks of groups do not depend on the blocks.
        let (dense, _, h) = layer(37, 304, 700);
        let run = |block| {
            let mut w = dense.clone();
            let swept = swept(&mut w, h.clone(), &options(TWO_OF_FOUR, 0.0, block));
            (w, swept)
        };
        let (want, whole) = run(304);
        for block in [4, 16, 128] {
            let (got, part) = run(block);
            assert_eq!(part.mask, whole.mask, "{block}");
            assert_close("w", &got, &f64s(&want), 2e-5);
        }
        for row in 0..37 {
            for group in 0..76 {
                assert_eq!((0..4).filter(|i| whole.mask.keeps(row, group * 4 + i)).count(), 2);
            }
        }
    }

    #[test]
    fn every_block_loses_its_share_exactly() {
        let (rows, cols) = (9, 300);
        let (dense, _, h) = layer(rows, cols, 500);
        for share in [0.0, 0.1, 0.5147, 1.0] {
            let mut w = dense.clone();
            let swept = swept(&mut w, h.clone(), &options(Pattern::Unstructured, share, 128));
            for block in [0..128, 128..256, 256..300] {
                let kept = (0..rows * block.len())
                    .filter(|i| swept.mask.keeps(i / block.len(), block.start + i % block.len()))
                    .count();
                let removed = (share * (rows * block.len()) as f64) as usize;
                assert_eq!(kept, rows * block.len() - removed);
            }
            assert!(share > 0.0 || (w == dense && swept.loss == 0.0));
            assert!(share < 1.0 || (w.iter().all(|&w| w == 0.0) && swept.loss.is_finite()));
        }
    }

    #[test]
    fn columns_without_input_go_first_and_only_as_many_as_asked_for() {
        let (rows, cols, tokens) = (3, 8, 40);
        let mut x = normals(tokens * cols, 6);
        x.chunks_exact_mut(cols).for_each(|x| (x[2], x[5]) = (0.0, 0.0));
        let mut hessian = Hessian::new(cols);
        hessian.add(&x);
        let factored = hessian.factorise(0.01, "test").unwrap();
        let dense = vec![100.0; rows * cols];
        let mut w = dense.clone();
        let half = options(Pattern::Unstructured, 0.125, 128);
        let swept = sweep(&mut w, &factored, &half);
        // Nothing but those weights changes: their inputs are nobody else's.
        let mut want = dense;
        for (row, col) in [(0, 2), (0, 5), (1, 2)] {
            assert!(!swept.mask.keeps(row, col));
            want[row * cols + col] = 0.0;
        }
        assert_eq!(w, want);
        assert_eq!(swept.mask.kept(), 21);
    }

    #[test]
    fn threads_do_not_show() {
        let (dense, _, h) = layer(70, 200, 300);
        for pattern in [Pattern::Unstructured, TWO_OF_FOUR] {
            assert_same_on_threads("sweep", || {
                let mut w = dense.clone();
                let swept = swept(&mut w, h.clone(), &options(pattern, 0.5147, 64));
                (w, swept)
            });
        }
    }
}
