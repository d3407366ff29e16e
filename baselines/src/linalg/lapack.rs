//! By the reference implementation's way: Cholesky, inverse, Cholesky (`potrf`, `potri`, `potrf`).

use ndarray::Array2;
use ndarray_linalg::{Cholesky, FactorizeCInto, InverseCInto, UPLO};

use super::NotPositiveDefinite;

pub(super) fn inverse_factor(h: Vec<f32>, n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
    let h = Array2::from_shape_vec((n, n), h).expect("an [n, n] matrix");
    let inverse = h.factorizec_into(UPLO::Lower).and_then(|factor| factor.invc_into());
    let factor =
        inverse.and_then(|inverse| inverse.cholesky(UPLO::Lower)).map_err(|_| NotPositiveDefinite)?;
    Ok(factor.iter().copied().collect())
}
