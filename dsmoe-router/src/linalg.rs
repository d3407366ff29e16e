//! The factorisations behind ridge regression and second-order pruning: Cholesky factors, and their triangular inverses.
//!
//! ```text
//! J H J = C C^T            J reverses the order of rows or columns
//! R = J C^-1 J             upper triangular, R^T R = (J C C^T J)^-1 = H^-1
//! ```

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::cholesky::llt::solve::{solve_in_place, solve_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{MatMut, Par};

/// A matrix has no Cholesky factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotPositiveDefinite;

/// Computes L `[n, n]`, lower triangular and row-major, with `H^-1 = L L^T`, for a symmetric `h` `[n, n]`. R of
/// `H^-1 = R^T R` is its transpose.
///
/// # Errors
/// `h` is not positive definite.
///
/// # Panics
/// `h` does not hold `n * n` values.
pub fn inverse_factor(mut h: Vec<f32>, n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
    assert_eq!(h.len(), n * n, "inverse_factor: values of an [{n}, {n}] matrix");
    // All threads of the pool; the work is cut by shape.
    let par = Par::rayon(0);
    h.reverse();
    let mut matrix = MatMut::from_column_major_slice_mut(&mut h, n, n);
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f32>(n, par, Default::default()));
    let stack = MemStack::new(&mut memory);
    cholesky_in_place(matrix.rb_mut(), Default::default(), par, stack, Default::default())
        .map_err(|_| NotPositiveDefinite)?;
    let mut inverse = vec![0.0; n * n];
    invert_lower_triangular(MatMut::from_column_major_slice_mut(&mut inverse, n, n), matrix.rb(), par);
    // Columns are R's; read as rows, they are those of its transpose.
    inverse.reverse();
    Ok(inverse)
}

/// Sets `x` `[n, columns]`, row-major, to `H^-1 x`, for a symmetric `h` `[n, n]`.
///
/// # Errors
/// `h` is not positive definite; `x` is then as before.
///
/// # Panics
/// `h` does not hold `n * n` values, or `x` no whole number of columns.
pub fn solve_positive(mut h: Vec<f32>, n: usize, x: &mut [f32]) -> Result<(), NotPositiveDefinite> {
    assert_eq!(h.len(), n * n, "solve_positive: values of an [{n}, {n}] matrix");
    assert!(x.len().is_multiple_of(n.max(1)), "solve_positive: {} values for {n} rows", x.len());
    let (par, columns) = (Par::rayon(0), x.len() / n.max(1));
    let mut matrix = MatMut::from_column_major_slice_mut(&mut h, n, n);
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f32>(n, par, Default::default()));
    cholesky_in_place(
        matrix.rb_mut(),
        Default::default(),
        par,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| NotPositiveDefinite)?;
    let mut memory = MemBuffer::new(solve_in_place_scratch::<f32>(n, columns, par));
    let x = MatMut::from_row_major_slice_mut(x, n, columns);
    solve_in_place(matrix.rb(), x, par, MemStack::new(&mut memory));
    Ok(())
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, assert_same_on_threads, f64s, normals};

    use super::*;

    /// `X^T X / rows + 0.1`, columns of unlike size.
    fn positive(n: usize, seed: u64) -> Vec<f32> {
        let rows = n + 3;
        let x = normals(rows * n, seed);
        let x = |t: usize, i: usize| f64::from(x[t * n + i]) * (1.0 + i as f64 / n as f64);
        let entry = |i: usize, j: usize| -> f32 {
            let dot: f64 = (0..rows).map(|t| x(t, i) * x(t, j)).sum();
            (dot / rows as f64) as f32 + if i == j { 0.1 } else { 0.0 }
        };
        (0..n * n).map(|at| entry(at / n, at % n)).collect()
    }

    #[test]
    fn the_factor_of_a_small_inverse() {
        // H = [[2, 1], [1, 2]]: R = [[sqrt(2/3), -sqrt(1/6)], [0, sqrt(1/2)]].
        let l = inverse_factor(vec![2.0, 1.0, 1.0, 2.0], 2).unwrap();
        let root = |square: f64| square.sqrt();
        assert_close("L", &l, &[root(2.0 / 3.0), 0.0, -root(1.0 / 6.0), root(0.5)], 1e-6);
        assert_eq!(inverse_factor(vec![1.0, 2.0, 2.0, 1.0], 2), Err(NotPositiveDefinite));
        assert_eq!(inverse_factor(vec![0.0], 1), Err(NotPositiveDefinite));
        assert_eq!(inverse_factor(vec![f32::NAN], 1), Err(NotPositiveDefinite));
    }

    #[test]
    fn the_product_with_the_matrix_is_the_identity() {
        for n in [1, 2, 7, 64, 150] {
            let h = positive(n, n as u64);
            let l = f64s(&inverse_factor(h.clone(), n).unwrap());
            let h = f64s(&h);
            assert!((0..n).all(|i| (i + 1..n).all(|j| l[i * n + j] == 0.0) && l[i * n + i] > 0.0));
            // H L L^T
            let product = |a: &[f64], b: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
                let entry = |i: usize, j: usize| (0..n).map(|k| a[i * n + k] * b(k, j)).sum();
                (0..n * n).map(|at| entry(at / n, at % n)).collect()
            };
            let got = product(&product(&h, &|i, j| l[i * n + j]), &|i, j| l[j * n + i]);
            let got: Vec<f32> = got.into_iter().map(|x| x as f32).collect();
            let identity: Vec<f64> = (0..n * n).map(|at| f64::from(u8::from(at / n == at % n))).collect();
            assert_close("H H^-1", &got, &identity, 2e-4);
        }
    }

    #[test]
    fn solutions_give_the_right_side_back() {
        for (n, columns) in [(1, 1), (2, 5), (64, 3), (150, 40)] {
            let (h, right) = (positive(n, n as u64), normals(n * columns, 9));
            let mut x = right.clone();
            solve_positive(h.clone(), n, &mut x).unwrap();
            let entry = |at: usize| -> f32 {
                let terms = (0..n)
                    .map(|k| f64::from(h[at / columns * n + k]) * f64::from(x[k * columns + at % columns]));
                terms.sum::<f64>() as f32
            };
            let back: Vec<f32> = (0..n * columns).map(entry).collect();
            assert_close("H x", &back, &f64s(&right), 1e-4);
        }
        let mut x = [5.0, 6.0];
        assert_eq!(solve_positive(vec![1.0, 2.0, 2.0, 1.0], 2, &mut x), Err(NotPositiveDefinite));
        assert_eq!(x, [5.0, 6.0]);
    }

    #[test]
    fn threads_do_not_show() {
        let (h, right) = (positive(333, 5), normals(333 * 70, 6));
        assert_same_on_threads("solve_positive", || {
            let mut x = right.clone();
            solve_positive(h.clone(), 333, &mut x).unwrap();
            x
        });
        assert_same_on_threads("inverse_factor", || inverse_factor(h.clone(), 333).unwrap());
    }
}
