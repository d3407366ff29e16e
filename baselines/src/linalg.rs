//! The factorisation of Hessians: by faer, or with the feature `lapack` by the system's LAPACK.

#[cfg(not(feature = "lapack"))]
pub(crate) use dsmoe_router::linalg::inverse_factor;
#[cfg(feature = "lapack")]
pub(crate) use lapack::inverse_factor;

#[cfg(feature = "lapack")]
mod lapack {
    use dsmoe_router::linalg::NotPositiveDefinite;
    use ndarray::Array2;
    use ndarray_linalg::{Cholesky, FactorizeCInto, InverseCInto, UPLO};

    /// Factorises as the reference implementation does: Cholesky, inverse, Cholesky (`potrf`, `potri`, `potrf`).
    pub(crate) fn inverse_factor(h: Vec<f32>, n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
        let h = Array2::from_shape_vec((n, n), h).expect("an [n, n] matrix");
        let inverse = h.factorizec_into(UPLO::Lower).and_then(|factor| factor.invc_into());
        let factor =
            inverse.and_then(|inverse| inverse.cholesky(UPLO::Lower)).map_err(|_| NotPositiveDefinite)?;
        Ok(factor.iter().copied().collect())
    }

    #[cfg(test)]
    mod tests {
        use dsmoe_kernels::testing::{assert_close, f64s, normals};
        use dsmoe_router::linalg;

        #[test]
        fn lapack_and_faer_agree() {
            for n in [1, 5, 200] {
                let rows = n + 3;
                let x = normals(rows * n, 11);
                let mut h = vec![0.0; n * n];
                for i in 0..n {
                    for j in 0..n {
                        let dot: f32 = (0..rows).map(|t| x[t * n + i] * x[t * n + j]).sum();
                        h[i * n + j] = dot / rows as f32 + if i == j { 0.1 } else { 0.0 };
                    }
                }
                let (ours, theirs) = (linalg::inverse_factor(h.clone(), n), super::inverse_factor(h, n));
                assert_close("L", &ours.unwrap(), &f64s(&theirs.unwrap()), 1e-4);
            }
            assert!(super::inverse_factor(vec![1.0, 2.0, 2.0, 1.0], 2).is_err());
        }
    }
}
