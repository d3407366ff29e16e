//! The definition of the sum, in f64.

/// Returns `a + scale * b`.
pub fn sum(a: &[f64], b: &[f64], scale: f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + scale * b).collect()
}
