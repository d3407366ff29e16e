//! The one factorisation that pruning needs, by faer; with the feature `lapack` by the system's LAPACK.

#[cfg(any(test, not(feature = "lapack")))]
mod faer;
#[cfg(feature = "lapack")]
mod lapack;

#[cfg(not(feature = "lapack"))]
use self::faer as backend;
#[cfg(feature = "lapack")]
use self::lapack as backend;

/// A matrix that has no Cholesky factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotPositiveDefinite;

/// L `[n, n]`, lower triangular and row-major, with `H^-1 = L L^T`, for a symmetric `h` `[n, n]`. R of `H^-1 = R^T R`
/// is its transpose.
///
/// # Panics
/// `h` does not hold `n * n` values.
pub(crate) fn inverse_factor(h: Vec<f32>, n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
    assert_eq!(h.len(), n * n, "inverse_factor: values of an [{n}, {n}] matrix");
    backend::inverse_factor(h, n)
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
        let mut h = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                let dot: f64 = (0..rows).map(|t| x(t, i) * x(t, j)).sum();
                h[i * n + j] = (dot / rows as f64) as f32 + if i == j { 0.1 } else { 0.0 };
            }
        }
        h
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
    fn threads_do_not_show() {
        let h = positive(333, 5);
        assert_same_on_threads("inverse_factor", || inverse_factor(h.clone(), 333).unwrap());
    }

    #[cfg(feature = "lapack")]
    #[test]
    fn lapack_and_faer_agree() {
        for n in [1, 5, 200] {
            let h = positive(n, 11);
            let (ours, theirs) = (super::faer::inverse_factor(h.clone(), n), lapack::inverse_factor(h, n));
            assert_close("L", &ours.unwrap(), &f64s(&theirs.unwrap()), 1e-4);
        }
        assert!(super::faer::inverse_factor(vec![1.0, 2.0, 2.0, 1.0], 2).is_err());
    }
}
