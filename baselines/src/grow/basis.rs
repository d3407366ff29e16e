//! The singular value decomposition of one kind of matrix over all layers.
//!
//! ```text
//! C = [W_1 | ... | W_L] = U S V         W_i [rows, cols];  C C^T = sum of W_i W_i^T = U S^2 U^T
//! V_i = S^-1 U^T W_i                    rows of V whose singular value is below 1e-6 of the largest are 0
//! ```
//! C is never in memory.

use dsmoe_router::linalg::{Eigen, product, symmetric_eigen};

use crate::error::{Error, Result};

/// Smallest singular value over the largest one that is inverted.
const SMALLEST: f64 = 1e-6;

/// U and S.
pub(super) struct Basis {
    rows: usize,
    /// `[rows, rows]`, row-major.
    u: Vec<f64>,
    s: Vec<f64>,
}

/// Sums of `W W^T` over layers.
pub(super) struct Sum {
    rows: usize,
    sum: Vec<f64>,
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn transposed(values: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    (0..rows * cols).map(|at| values[at % rows * cols + at / rows]).collect()
}

impl Sum {
    pub(super) fn new(rows: usize) -> Sum {
        Sum { rows, sum: vec![0.0; rows * rows] }
    }

    /// Adds a layer's matrix.
    pub(super) fn add(&mut self, weight: &[f32]) {
        let cols = weight.len() / self.rows;
        let weight = f64s(weight);
        let turned = transposed(&weight, self.rows, cols);
        product(&mut self.sum, &weight, &turned, [self.rows, cols, self.rows], true);
    }

    /// Decomposes the sum; `name` is for the error.
    pub(super) fn basis(self, name: &str) -> Result<Basis> {
        let Eigen { values, vectors } = symmetric_eigen(&self.sum, self.rows).map_err(|_| {
            Error::numeric(name, "has weights without a decomposition", "use an undamaged model")
        })?;
        let s = values.into_iter().map(|square| square.max(0.0).sqrt()).collect();
        Ok(Basis { rows: self.rows, u: vectors, s })
    }
}

impl Basis {
    /// Returns `V_i` `[rows, cols]` of a layer's matrix.
    pub(super) fn rows_of(&self, weight: &[f32]) -> Vec<f64> {
        let (rows, cols) = (self.rows, weight.len() / self.rows);
        let mut v = vec![0.0; weight.len()];
        product(&mut v, &transposed(&self.u, rows, rows), &f64s(weight), [rows, rows, cols], false);
        let least = SMALLEST * self.s.first().copied().unwrap_or(0.0);
        for (v, &s) in v.chunks_exact_mut(cols).zip(&self.s) {
            let inverse = if s > least { 1.0 / s } else { 0.0 };
            v.iter_mut().for_each(|v| *v *= inverse);
        }
        v
    }

    /// Returns the matrix `U S v` of rows `v`.
    pub(super) fn matrix(&self, v: &[f64]) -> Vec<f64> {
        let (rows, cols) = (self.rows, v.len() / self.rows);
        let scaled: Vec<f64> = self.u.iter().enumerate().map(|(at, u)| u * self.s[at % rows]).collect();
        let mut w = vec![0.0; v.len()];
        product(&mut w, &scaled, v, [rows, rows, cols], false);
        w
    }
}
