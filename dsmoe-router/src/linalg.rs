//! The factorisations behind ridge regression and second-order pruning: Cholesky factors, and their triangular inverses; and
//! eigenvectors of symmetric matrices.
//!
//! ```text
//! J H J = C C^T            J reverses the order of rows or columns
//! R = J C^-1 J             upper triangular, R^T R = (J C C^T J)^-1 = H^-1
//! H = U diag(s) U^T        s descending; the largest entry of every column of U is positive
//! ```

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::cholesky::llt::solve::{solve_in_place, solve_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, Mat, MatMut, MatRef, Par};

/// A matrix has no Cholesky factor.
///
/// ```
/// use dsmoe_router::linalg::{NotPositiveDefinite, inverse_factor};
///
/// // Calibration with fewer rows than columns gives a singular matrix; a ridge on its diagonal helps.
/// let gram = |ridge: f32| vec![1.0 + ridge, -1.0, -1.0, 1.0 + ridge];
/// assert_eq!(inverse_factor(gram(0.0), 2), Err(NotPositiveDefinite));
/// assert!(inverse_factor(gram(0.01), 2).is_ok());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotPositiveDefinite;

/// A matrix has no eigenvectors: it holds values that are not finite.
///
/// ```
/// use dsmoe_router::linalg::{NoEigenvectors, symmetric_eigen};
///
/// match symmetric_eigen(&[1.0, f64::INFINITY, f64::INFINITY, 1.0], 2) {
///     Ok(eigen) => panic!("the largest eigenvalue is {}", eigen.values[0]),
///     Err(NoEigenvectors) => {} // a caller names the layer whose values are not finite
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoEigenvectors;

/// Eigenvalues of a symmetric matrix, descending, and its eigenvectors.
///
/// ```
/// use dsmoe_router::linalg::{Eigen, NoEigenvectors, NotPositiveDefinite, solve_positive, symmetric_eigen};
///
/// let Eigen { values, .. } = symmetric_eigen(&[2.0, 1.0, 1.0, 2.0], 2).unwrap();
/// assert!((values[0] - 3.0).abs() < 1e-12 && (values[1] - 1.0).abs() < 1e-12);
/// assert!(matches!(symmetric_eigen(&[f64::NAN], 1), Err(NoEigenvectors)));
/// // A matrix with a negative eigenvalue has no Cholesky factor.
/// assert_eq!(solve_positive(vec![-1.0], 1, &mut [1.0]), Err(NotPositiveDefinite));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Eigen {
    /// `[n]`
    pub values: Vec<f64>,
    /// U `[n, n]`, row-major: column i belongs to value i.
    pub vectors: Vec<f64>,
}

/// Computes the eigenvectors of a symmetric `h` `[n, n]`. Of a column and its opposite the one whose largest entry, the first of
/// equal ones, is positive is taken.
///
/// # Errors
/// `h` holds values that are not finite.
///
/// # Panics
/// `h` does not hold `n * n` values.
pub fn symmetric_eigen(h: &[f64], n: usize) -> Result<Eigen, NoEigenvectors> {
    assert_eq!(h.len(), n * n, "symmetric_eigen: values of an [{n}, {n}] matrix");
    if !h.iter().all(|x| x.is_finite()) {
        return Err(NoEigenvectors);
    }
    if n == 0 {
        return Ok(Eigen { values: vec![], vectors: vec![] });
    }
    // One thread: the same bits on any number of them.
    let par = Par::Seq;
    let (mut u, mut s) = (Mat::<f64>::zeros(n, n), Diag::<f64>::zeros(n));
    let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    let h = MatRef::from_row_major_slice(h, n, n);
    self_adjoint_evd(h, s.as_mut(), Some(u.as_mut()), par, stack, Default::default())
        .map_err(|_| NoEigenvectors)?;
    // They are found in ascending order.
    let values = (0..n).rev().map(|i| s.column_vector()[i]).collect();
    let mut vectors = vec![0.0; n * n];
    for column in 0..n {
        let found = u.col(n - 1 - column);
        let largest =
            (0..n).fold(0.0f64, |most, i| if found[i].abs() > most.abs() { found[i] } else { most });
        let sign = if largest < 0.0 { -1.0 } else { 1.0 };
        for row in 0..n {
            vectors[row * n + column] = sign * found[row];
        }
    }
    Ok(Eigen { values, vectors })
}

/// Sets `c` `[m, n]` to `a b`, or adds it, for a `[m, k]` and b `[k, n]`, both row-major. The work is cut by shape.
///
/// # Panics
/// Lengths do not fit.
pub fn product(c: &mut [f64], a: &[f64], b: &[f64], [m, k, n]: [usize; 3], add: bool) {
    assert_eq!([c.len(), a.len(), b.len()], [m * n, m * k, k * n], "product: values for {m} x {k} x {n}");
    if c.is_empty() || k == 0 {
        if !add {
            c.fill(0.0);
        }
        return;
    }
    let (a, b) = (MatRef::from_row_major_slice(a, m, k), MatRef::from_row_major_slice(b, k, n));
    let c = MatMut::from_row_major_slice_mut(c, m, n);
    matmul(c, if add { Accum::Add } else { Accum::Replace }, a, b, 1.0, Par::rayon(0));
}

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
    fn eigenvectors_of_a_small_matrix_and_of_large_ones() {
        // [[2, 1], [1, 2]] has 3 with (1, 1) / sqrt 2 and 1 with (1, -1) / sqrt 2.
        let Eigen { values, vectors } = symmetric_eigen(&[2.0, 1.0, 1.0, 2.0], 2).unwrap();
        let root = 0.5f64.sqrt();
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(&values, &[3.0, 1.0]), "{values:?}");
        assert!(close(&[vectors[0], vectors[2]], &[root, root]), "{vectors:?}");
        assert!((vectors[1] + vectors[3]).abs() < 1e-12 && vectors[1].abs() - root < 1e-12, "{vectors:?}");
        assert_eq!(symmetric_eigen(&[f64::NAN], 1), Err(NoEigenvectors));
        assert_eq!(symmetric_eigen(&[], 0).unwrap(), Eigen { values: vec![], vectors: vec![] });
        for n in [7, 150] {
            let h = f64s(&positive(n, 3));
            let Eigen { values, vectors } = symmetric_eigen(&h, n).unwrap();
            assert!(values.is_sorted_by(|a, b| a >= b));
            // U diag(s) U^T
            let scaled: Vec<f64> = (0..n * n).map(|at| vectors[at] * values[at % n]).collect();
            let transposed: Vec<f64> = (0..n * n).map(|at| vectors[at % n * n + at / n]).collect();
            let mut back = vec![1.0; n * n];
            product(&mut back, &scaled, &transposed, [n; 3], false);
            assert!(h.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-10), "{n}");
            product(&mut back, &scaled, &transposed, [n; 3], true);
            assert!(h.iter().zip(&back).all(|(a, b)| (2.0 * a - b).abs() < 1e-10), "{n} added");
        }
    }

    #[test]
    fn threads_do_not_show() {
        let (h, right) = (positive(333, 5), normals(333 * 70, 6));
        assert_same_on_threads("solve_positive", || {
            let mut x = right.clone();
            solve_positive(h.clone(), 333, &mut x).unwrap();
            x
        });
        let (a, b) = (f64s(&normals(333 * 200, 7)), f64s(&normals(200 * 150, 8)));
        assert_same_on_threads("product", || {
            let mut c = vec![0.0; 333 * 150];
            product(&mut c, &a, &b, [333, 200, 150], false);
            c
        });
        assert_same_on_threads("inverse_factor", || inverse_factor(h.clone(), 333).unwrap());
    }
}
