//! Least squares of an output projection whose inputs are masked or fewer than before, near its old weights.
//!
//! ```text
//! over tokens t     r_t = y_t - W h_t                      the wanted output without what W gives of the inputs left
//! minimise          sum_t s_t^2 |r_t - C h_t - b|^2 + lambda |C|^2          by C and b; D = W + C
//! C^T               = (sum s^2 (h - m)(h - m)^T + lambda)^-1 sum s^2 (h - m)(r - n)^T,   b = n - C m
//! ```
//! s are factors of rows: 0 leaves a token out, and the inverse norm of the residual stream makes the error of a token
//! one that the next norm sees. m and n are the means of h and r under s^2; without an intercept they and b are 0.
//! lambda is a share of the mean of the matrix's diagonal.

use std::ops::Range;
use std::sync::Arc;

use dsmoe_kernels::Precision;
use dsmoe_kernels::comm::{Communicator, What, alone};
use dsmoe_kernels::matmul::{Mat, Matmul};
use dsmoe_router::linalg::solve_positive;
use rayon::prelude::*;

use crate::error::Result;
use crate::gram::Gram;
use crate::rounds::broadcast;

/// Tokens whose products are taken together.
const BATCH: usize = 1024;
/// Columns summed by one task.
const COLUMNS: usize = 64;
/// Shares tried in place of a ridge with which the matrix has no factor.
const RIDGES: [f64; 3] = [0.01, 0.1, 1.0];

/// The sums of a least-squares problem, over the tokens seen so far.
///
/// ```
/// use dsmoe_core::compensate::{Correction, LeastSquares, Rows};
///
/// // What is missing is twice the input.
/// let mut squares = LeastSquares::new(1, 1);
/// squares.add(Rows { inputs: &[1.0, 2.0, 3.0], residuals: &[2.0, 4.0, 6.0], factors: &[1.0; 3] });
/// let Correction { weight, .. } = squares.solve(1e-6, false).unwrap();
/// assert!((weight[0] - 2.0).abs() < 1e-3);
/// ```
#[derive(Clone, Debug)]
pub struct LeastSquares {
    outputs: usize,
    precision: Precision,
    /// Tokens that are not in the sums yet: their s h and s r, and their s.
    waiting: [Vec<f32>; 2],
    factors: Vec<f32>,
    gram: Gram,
    /// `[inputs, outputs]`: sum of s^2 h r^T. Each process has its rows until all have all.
    products: Vec<f32>,
    /// Sums of s^2 h and of s^2 r.
    sums: [Vec<f64>; 2],
    /// Sum of s^2.
    weight: f64,
    comm: Arc<dyn Communicator>,
}

/// The solution of a least-squares problem.
///
/// ```
/// use dsmoe_core::compensate::{Correction, LeastSquares, Rows};
///
/// // What is missing is the input plus 3.
/// let mut squares = LeastSquares::new(1, 1);
/// squares.add(Rows { inputs: &[1.0, 2.0, 3.0], residuals: &[4.0, 5.0, 6.0], factors: &[1.0; 3] });
/// let Correction { weight, bias, ridge } = squares.solve(1e-6, true).unwrap();
/// assert!((weight[0] - 1.0).abs() < 1e-3);
/// assert!(bias.is_some_and(|bias| (bias[0] - 3.0).abs() < 1e-2));
/// assert_eq!(ridge, 1e-6); // it sufficed
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Correction {
    /// C transposed, `[inputs, outputs]`: to be added to the projection.
    pub weight: Vec<f32>,
    /// b `[outputs]`; none without an intercept.
    pub bias: Option<Vec<f32>>,
    /// The share that lambda is of the mean of the diagonal; larger than the one asked for where that did not suffice.
    pub ridge: f64,
}

/// Tokens of a least-squares problem.
///
/// ```
/// use dsmoe_core::compensate::{LeastSquares, Rows};
///
/// // The third token is an outlier: its factor of 0 leaves it out.
/// let mut squares = LeastSquares::new(1, 1);
/// let rows = Rows { inputs: &[1.0, 2.0, 900.0], residuals: &[2.0, 4.0, -5.0], factors: &[1.0, 1.0, 0.0] };
/// squares.add(rows);
/// assert!((squares.solve(1e-6, false).unwrap().weight[0] - 2.0).abs() < 1e-3);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// h `[tokens, inputs]`.
    pub inputs: &'a [f32],
    /// r `[tokens, outputs]`.
    pub residuals: &'a [f32],
    /// s `[tokens]`.
    pub factors: &'a [f32],
}

impl LeastSquares {
    /// Makes the sums over no token, of a projection from `inputs` to `outputs`.
    pub fn new(inputs: usize, outputs: usize) -> LeastSquares {
        let sums = [vec![0.0; inputs], vec![0.0; outputs]];
        LeastSquares {
            outputs,
            precision: Precision::F32,
            waiting: [Vec::new(), Vec::new()],
            factors: Vec::new(),
            gram: Gram::new(inputs),
            products: vec![0.0; inputs * outputs],
            sums,
            weight: 0.0,
            comm: Arc::clone(alone()),
        }
    }

    /// Divides the products among the processes of `comm`, which add the same tokens and then call [`LeastSquares::complete`].
    #[must_use]
    pub fn on(self, comm: &Arc<dyn Communicator>) -> LeastSquares {
        LeastSquares { gram: self.gram.on(comm), comm: Arc::clone(comm), ..self }
    }

    /// Gives all processes all sums, as [`Gram::complete`] does.
    ///
    /// # Errors
    /// Another process fails.
    pub fn complete(&mut self) -> Result<()> {
        self.take_waiting();
        self.gram.complete()?;
        for rank in 0..self.comm.size() {
            let rows = self.rows_of(rank);
            let products = &mut self.products[rows.start * self.outputs..rows.end * self.outputs];
            broadcast(&*self.comm, What::of("sums of products"), rank, products)?;
        }
        Ok(())
    }

    /// Returns the rows of the products that a process adds to.
    fn rows_of(&self, rank: usize) -> Range<usize> {
        let (inputs, size) = (self.gram.columns(), self.comm.size());
        rank * inputs / size..(rank + 1) * inputs / size
    }

    /// Rounds the factors of all products to `precision` instead of f32.
    #[must_use]
    pub fn in_precision(self, precision: Precision) -> LeastSquares {
        LeastSquares { gram: self.gram.in_precision(precision), precision, ..self }
    }

    /// Adds tokens.
    ///
    /// # Panics
    /// The lengths do not fit each other.
    pub fn add(&mut self, rows: Rows<'_>) {
        let (tokens, inputs, outputs) = (rows.factors.len(), self.gram.columns(), self.outputs);
        let lens = [rows.inputs.len(), rows.residuals.len()];
        assert_eq!(lens, [tokens * inputs, tokens * outputs], "LeastSquares: values of {tokens} tokens");
        for (waiting, values) in self.waiting.iter_mut().zip([rows.inputs, rows.residuals]) {
            let width = (values.len() / tokens.max(1)).max(1);
            let first = waiting.len();
            waiting.resize(first + values.len(), 0.0);
            let pairs = waiting[first..].par_chunks_exact_mut(width).zip(values.par_chunks_exact(width));
            pairs.zip(rows.factors).for_each(|((to, from), &s)| {
                to.iter_mut().zip(from).for_each(|(to, &x)| *to = s * x);
            });
        }
        self.factors.extend(rows.factors);
        self.weight += squares(rows.factors);
        if self.factors.len() >= BATCH {
            self.take_waiting();
        }
    }

    /// Adds the products of the tokens that wait.
    fn take_waiting(&mut self) {
        let [h, r] = &self.waiting;
        let (tokens, inputs, outputs) = (self.factors.len(), self.gram.columns(), self.outputs);
        if tokens > 0 {
            for (sums, values) in self.sums.iter_mut().zip([h, r]) {
                add_rows(sums, values, &self.factors);
            }
            self.gram.add(h);
            let rows = self.rows_of(self.comm.rank());
            if !rows.is_empty() {
                let a = Mat::with_stride(&h[rows.start..], tokens, rows.len(), inputs).t();
                let (c, b) = (
                    &mut self.products[rows.start * outputs..rows.end * outputs],
                    Mat::new(r, tokens, outputs),
                );
                Matmul { c, a, b, accumulate: true, precision: self.precision }.run();
            }
        }
        self.waiting.iter_mut().for_each(Vec::clear);
        self.factors.clear();
    }

    /// Solves with a ridge that is a share of the mean of the diagonal, or with the first larger one of 0.01, 0.1 and
    /// 1 that gives a positive definite matrix. Returns none if values are not finite.
    pub fn solve(mut self, ridge: f64, intercept: bool) -> Option<Correction> {
        self.take_waiting();
        let LeastSquares { gram, products, sums, weight, .. } = self;
        let sums = sums.each_ref().map(|sums| &sums[..]);
        solve(Equations { matrix: &|| gram.square(1.0), products, sums, weight }, ridge, intercept)
    }
}

/// The second moments of all inputs of a projection, from which its fit on any choice of them follows.
///
/// ```
/// use dsmoe_core::compensate::Moments;
///
/// // The second input is always twice the first: it can take the first one's part.
/// let mut moments = Moments::new(2);
/// moments.add(&[1.0, 2.0, 3.0, 6.0, -2.0, -4.0], &[1.0; 3]);
/// let projection = [1.0, 1.0]; // [inputs, outputs]
/// let fitted = moments.fit(&projection, &[1], 1e-6, false).unwrap();
/// assert!((projection[1] + fitted.weight[0] - 1.5).abs() < 1e-3);
/// ```
#[derive(Clone, Debug)]
pub struct Moments {
    gram: Gram,
    /// Sum of s^2 h.
    sums: Vec<f64>,
    /// Sum of s^2.
    weight: f64,
}

impl Moments {
    /// Makes the sums over no token.
    pub fn new(inputs: usize) -> Moments {
        Moments { gram: Gram::new(inputs), sums: vec![0.0; inputs], weight: 0.0 }
    }

    /// Divides the products among the processes of `comm`, which add the same tokens and then call [`Moments::complete`].
    #[must_use]
    pub fn on(self, comm: &Arc<dyn Communicator>) -> Moments {
        Moments { gram: self.gram.on(comm), ..self }
    }

    /// Gives all processes all sums, as [`Gram::complete`] does.
    ///
    /// # Errors
    /// Another process fails.
    pub fn complete(&mut self) -> Result<()> {
        self.gram.complete()
    }

    /// Adds tokens `h` `[tokens, inputs]` with their factors s.
    ///
    /// # Panics
    /// The lengths do not fit each other.
    pub fn add(&mut self, h: &[f32], factors: &[f32]) {
        let inputs = self.gram.columns();
        assert_eq!(h.len(), factors.len() * inputs, "Moments: values of {} tokens", factors.len());
        let h = scaled(h, factors, inputs);
        add_rows(&mut self.sums, &h, factors);
        self.weight += squares(factors);
        self.gram.add(&h);
    }

    /// Fits the projection `weight` `[outputs, inputs]` to what it gives on all inputs, when it reads `kept` alone: C is
    /// to be added to these columns. The ridge is that of [`LeastSquares::solve`], and so is the result.
    ///
    /// # Panics
    /// `kept` names an input that there is not, or one twice; `weight` has no whole number of rows.
    pub fn fit(&self, weight: &[f32], kept: &[usize], ridge: f64, intercept: bool) -> Option<Correction> {
        let inputs = self.gram.columns();
        assert!(weight.len().is_multiple_of(inputs.max(1)), "Moments: values of the projection");
        let outputs = weight.len() / inputs.max(1);
        let mut is_kept = vec![false; inputs];
        for &i in kept {
            assert!(!std::mem::replace(&mut is_kept[i], true), "Moments: input {i} twice");
        }
        let removed: Vec<usize> = (0..inputs).filter(|&i| !is_kept[i]).collect();
        let square = self.gram.square(1.0);
        let part = |columns: &[usize]| -> Vec<f32> {
            let row = |&i: &usize| columns.iter().map(move |&j| (i, j));
            kept.iter().flat_map(row).map(|(i, j)| square[i * inputs + j]).collect()
        };
        // The lost part of W, over the removed inputs: [removed, outputs].
        let at = |&i: &usize| (0..outputs).map(move |o| weight[o * inputs + i]);
        let lost: Vec<f32> = removed.iter().flat_map(at).collect();
        let across = part(&removed);
        let mut products = vec![0.0; kept.len() * outputs];
        if !removed.is_empty() {
            let a = Mat::new(&across, kept.len(), removed.len());
            multiply(&mut products, a, Mat::new(&lost, removed.len(), outputs));
        }
        let of_kept: Vec<f64> = kept.iter().map(|&i| self.sums[i]).collect();
        let mut of_lost = vec![0.0; outputs];
        for (row, &i) in lost.chunks_exact(outputs.max(1)).zip(&removed) {
            of_lost.iter_mut().zip(row).for_each(|(sum, &w)| *sum += self.sums[i] * f64::from(w));
        }
        let sums = [&of_kept[..], &of_lost];
        let equations = Equations { matrix: &|| part(kept), products, sums, weight: self.weight };
        solve(equations, ridge, intercept)
    }
}

/// The normal equations of a least-squares problem.
struct Equations<'a> {
    /// Makes the sum of s^2 h h^T.
    matrix: &'a dyn Fn() -> Vec<f32>,
    /// Sum of s^2 h r^T.
    products: Vec<f32>,
    /// Sums of s^2 h and of s^2 r.
    sums: [&'a [f64]; 2],
    /// Sum of s^2.
    weight: f64,
}

fn solve(equations: Equations<'_>, ridge: f64, intercept: bool) -> Option<Correction> {
    let Equations { matrix, mut products, sums, weight: total } = equations;
    let [inputs, outputs] = sums.map(<[f64]>::len);
    let [h, r] = sums.map(|sums| {
        let mean = |sum: &f64| if intercept && total > 0.0 { sum / total } else { 0.0 };
        sums.iter().map(mean).collect::<Vec<f64>>()
    });
    subtract(&mut products, total, &h, &r);
    let mut tried = std::iter::once(ridge).chain(RIDGES.into_iter().filter(|&next| next > ridge));
    let ridge = tried.find(|ridge| {
        let mut raised = matrix();
        subtract(&mut raised, total, &h, &h);
        let trace: f64 = raised.iter().step_by(inputs + 1).map(|&v| f64::from(v)).sum();
        let mean = (trace / inputs.max(1) as f64).max(f64::from(f32::MIN_POSITIVE));
        raised.iter_mut().step_by(inputs + 1).for_each(|v| *v += (ridge * mean) as f32);
        solve_positive(raised, inputs, &mut products).is_ok()
    })?;
    let weight = products;
    let bias = intercept.then(|| {
        let mut bias = r;
        for (row, &m) in weight.chunks_exact(outputs.max(1)).zip(&h) {
            bias.iter_mut().zip(row).for_each(|(b, &c)| *b -= f64::from(c) * m);
        }
        bias.into_iter().map(|b| b as f32).collect::<Vec<f32>>()
    });
    let finite = weight.iter().chain(bias.iter().flatten()).all(|v| v.is_finite());
    finite.then_some(Correction { weight, bias, ridge })
}

impl Correction {
    /// Adds C to the projection `weight` `[outputs, inputs]`.
    ///
    /// # Panics
    /// `weight` has another number of values.
    pub fn add_to(&self, weight: &mut [f32], inputs: usize) {
        assert_eq!(weight.len(), self.weight.len(), "Correction: values of the projection");
        let outputs = weight.len() / inputs.max(1);
        for (output, row) in weight.chunks_exact_mut(inputs.max(1)).enumerate() {
            row.iter_mut().enumerate().for_each(|(i, w)| *w += self.weight[i * outputs + output]);
        }
    }
}

/// Returns rows of `width` values times their factors.
fn scaled(values: &[f32], factors: &[f32], width: usize) -> Vec<f32> {
    let rows = values.chunks_exact(width.max(1)).zip(factors);
    rows.flat_map(|(row, &s)| row.iter().map(move |&x| s * x)).collect()
}

/// Adds to `sums` the rows of `values`, times their factors.
fn add_rows(sums: &mut [f64], values: &[f32], factors: &[f32]) {
    let width = sums.len().max(1);
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, sums)| {
        for (row, &s) in values.chunks_exact(width).zip(factors) {
            let row = &row[task * COLUMNS..][..sums.len()];
            sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(s) * f64::from(x));
        }
    });
}

fn squares(factors: &[f32]) -> f64 {
    factors.iter().map(|&s| f64::from(s) * f64::from(s)).sum()
}

/// Subtracts `weight a b^T`.
fn subtract(matrix: &mut [f32], weight: f64, a: &[f64], b: &[f64]) {
    for (row, &a) in matrix.chunks_exact_mut(b.len().max(1)).zip(a) {
        row.iter_mut().zip(b).for_each(|(m, &b)| *m = (f64::from(*m) - weight * a * b) as f32);
    }
}

/// Sets `c` to the product of `a` and `b`.
fn multiply(c: &mut [f32], a: Mat<'_>, b: Mat<'_>) {
    Matmul { c, a, b, accumulate: false, precision: Precision::F32 }.run();
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, f64s, normals};

    use super::*;

    const TOKENS: usize = 60;
    const INPUTS: usize = 7;
    const OUTPUTS: usize = 3;

    /// Solves `a x = b` for `b` `[n, columns]` by elimination with pivots.
    fn eliminate(mut a: Vec<f64>, mut b: Vec<f64>, n: usize) -> Vec<f64> {
        let columns = b.len() / n;
        for k in 0..n {
            let pivot = (k..n).max_by(|&i, &j| a[i * n + k].abs().total_cmp(&a[j * n + k].abs())).unwrap();
            (0..n).for_each(|j| a.swap(k * n + j, pivot * n + j));
            (0..columns).for_each(|j| b.swap(k * columns + j, pivot * columns + j));
            for i in (0..n).filter(|&i| i != k) {
                let factor = a[i * n + k] / a[k * n + k];
                (0..n).for_each(|j| a[i * n + j] -= factor * a[k * n + j]);
                (0..columns).for_each(|j| b[i * columns + j] -= factor * b[k * columns + j]);
            }
        }
        (0..n * columns).map(|at| b[at] / a[at / columns * n + at / columns]).collect()
    }

    struct Problem {
        inputs: Vec<f32>,
        residuals: Vec<f32>,
        factors: Vec<f32>,
    }

    fn problem() -> Problem {
        let mut inputs = normals(TOKENS * INPUTS, 1);
        // Means that are not 0, and an input that is always 0.
        inputs.iter_mut().skip(1).step_by(INPUTS).for_each(|x| *x += 2.0);
        inputs.iter_mut().skip(4).step_by(INPUTS).for_each(|x| *x = 0.0);
        let residuals = normals(TOKENS * OUTPUTS, 2).iter().map(|r| r + 1.0).collect();
        let mut factors: Vec<f32> = normals(TOKENS, 3).iter().map(|s| s.abs()).collect();
        factors[0] = 0.0;
        Problem { inputs, residuals, factors }
    }

    /// The normal equations with the intercept as one more input, which has no ridge.
    fn reference(of: &Problem, ridge: f64, intercept: bool) -> (Vec<f64>, Vec<f64>) {
        let n = INPUTS + usize::from(intercept);
        let value = |t: usize, i: usize| if i < INPUTS { f64::from(of.inputs[t * INPUTS + i]) } else { 1.0 };
        let square = |t: usize| f64::from(of.factors[t]) * f64::from(of.factors[t]);
        let total: f64 = (0..TOKENS).map(square).sum();
        let mean = |i: usize| match intercept {
            true => (0..TOKENS).map(|t| square(t) * value(t, i)).sum::<f64>() / total,
            false => 0.0,
        };
        let variance =
            |i: usize| (0..TOKENS).map(|t| square(t) * (value(t, i) - mean(i)).powi(2)).sum::<f64>();
        let lambda = ridge * (0..INPUTS).map(variance).sum::<f64>() / INPUTS as f64;
        let entry = |at: usize| {
            let (i, j) = (at / n, at % n);
            let sum: f64 = (0..TOKENS).map(|t| square(t) * value(t, i) * value(t, j)).sum();
            sum + if i == j && i < INPUTS { lambda } else { 0.0 }
        };
        let right = |at: usize| {
            let (i, o) = (at / OUTPUTS, at % OUTPUTS);
            (0..TOKENS).map(|t| square(t) * value(t, i) * f64::from(of.residuals[t * OUTPUTS + o])).sum()
        };
        let solved =
            eliminate((0..n * n).map(entry).collect(), (0..n * OUTPUTS).map(right).collect::<Vec<f64>>(), n);
        let (weight, bias) = solved.split_at(INPUTS * OUTPUTS);
        (weight.to_vec(), bias.to_vec())
    }

    #[test]
    fn it_is_the_solution_of_the_normal_equations() {
        let of = problem();
        for (ridge, intercept) in [(0.01, true), (0.3, true), (0.01, false)] {
            let mut sums = LeastSquares::new(INPUTS, OUTPUTS);
            for part in [0..25, 25..TOKENS] {
                sums.add(Rows {
                    inputs: &of.inputs[part.start * INPUTS..part.end * INPUTS],
                    residuals: &of.residuals[part.start * OUTPUTS..part.end * OUTPUTS],
                    factors: &of.factors[part],
                });
            }
            let got = sums.solve(ridge, intercept).unwrap();
            let (weight, bias) = reference(&of, ridge, intercept);
            assert_eq!(got.ridge, ridge);
            assert_close("C", &got.weight, &weight, 1e-5);
            assert!(got.weight[4 * OUTPUTS..5 * OUTPUTS].iter().all(|&c| c == 0.0), "an input of zeros");
            assert_eq!(got.bias.is_some(), intercept);
            assert_close("b", &got.bias.clone().unwrap_or_default(), &bias, 1e-5);
            let mut w = normals(OUTPUTS * INPUTS, 5);
            let want: Vec<f64> = (0..w.len())
                .map(|at| f64::from(w[at]) + weight[at % INPUTS * OUTPUTS + at / INPUTS])
                .collect();
            got.add_to(&mut w, INPUTS);
            assert_close("W + C", &w, &want, 1e-5);
        }
    }

    /// The fit on a choice of inputs is the solution with what the others give as the residual.
    #[test]
    fn any_choice_of_inputs_is_fitted_from_the_moments_of_all() {
        let of = problem();
        let w = normals(OUTPUTS * INPUTS, 6);
        let mut moments = Moments::new(INPUTS);
        moments.add(&of.inputs[..30 * INPUTS], &of.factors[..30]);
        moments.add(&of.inputs[30 * INPUTS..], &of.factors[30..]);
        for (kept, intercept) in
            [(&[5, 1, 0][..], true), (&[2, 3, 4, 6], false), (&[0, 1, 2, 3, 4, 5, 6], true)]
        {
            let columns = |t: usize| kept.iter().map(move |&i| (t, i));
            let inputs: Vec<f32> =
                (0..TOKENS).flat_map(columns).map(|(t, i)| of.inputs[t * INPUTS + i]).collect();
            let lost = |t: usize, o: usize| -> f32 {
                let left = (0..INPUTS).filter(|i| !kept.contains(i));
                left.map(|i| w[o * INPUTS + i] * of.inputs[t * INPUTS + i]).sum()
            };
            let residuals: Vec<f32> =
                (0..TOKENS * OUTPUTS).map(|at| lost(at / OUTPUTS, at % OUTPUTS)).collect();
            let mut sums = LeastSquares::new(kept.len(), OUTPUTS);
            sums.add(Rows { inputs: &inputs, residuals: &residuals, factors: &of.factors });
            let (got, want) =
                (moments.fit(&w, kept, 0.05, intercept).unwrap(), sums.solve(0.05, intercept).unwrap());
            assert_close("C", &got.weight, &f64s(&want.weight), 1e-5);
            let [got, want] = [got, want].map(|solved| solved.bias.unwrap_or_default());
            assert_close("b", &got, &f64s(&want), 1e-5);
        }
    }

    #[test]
    fn without_tokens_nothing_changes_and_odd_values_have_no_solution() {
        let none = LeastSquares::new(INPUTS, OUTPUTS).solve(0.01, true).unwrap();
        assert!(none.weight.iter().chain(none.bias.iter().flatten()).all(|&v| v == 0.0));
        let mut sums = LeastSquares::new(1, 1);
        sums.add(Rows { inputs: &[1.0, f32::NAN], residuals: &[1.0, 1.0], factors: &[1.0, 1.0] });
        assert_eq!(sums.solve(0.01, true), None);
        // Two inputs that are one: a ridge of 0 has no factor, or one that rounding made.
        let mut sums = LeastSquares::new(2, 1);
        sums.add(Rows { inputs: &[3.0; 40], residuals: &[1.0; 20], factors: &[1.0; 20] });
        let got = sums.solve(0.0, false).unwrap();
        let sum = f64::from(got.weight[0] + got.weight[1]);
        assert!((sum - 1.0 / 3.0).abs() < 0.01, "{got:?}");
    }

    #[test]
    fn processes_do_not_show() {
        use dsmoe_kernels::comm::threads::members;
        let of = problem();
        let solved = |comm: Arc<dyn Communicator>| {
            let mut sums = LeastSquares::new(INPUTS, OUTPUTS).on(&comm);
            sums.add(Rows { inputs: &of.inputs, residuals: &of.residuals, factors: &of.factors });
            sums.complete().unwrap();
            sums.solve(0.01, true).unwrap()
        };
        let alone = solved(Arc::clone(alone()));
        std::thread::scope(|scope| {
            let threads = members(9, std::time::Duration::from_secs(60)).into_iter();
            let threads: Vec<_> = threads.map(|one| scope.spawn(|| solved(Arc::new(one)))).collect();
            threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), alone));
        });
    }
}
