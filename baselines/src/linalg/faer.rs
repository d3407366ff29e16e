//! By one Cholesky factorisation and one triangular inverse.
//!
//! ```text
//! J H J = C C^T            J reverses the order of rows or columns
//! R = J C^-1 J             upper triangular, R^T R = (J C C^T J)^-1 = H^-1
//! ```

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{MatMut, Par};

use super::NotPositiveDefinite;

pub(super) fn inverse_factor(mut h: Vec<f32>, n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
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
