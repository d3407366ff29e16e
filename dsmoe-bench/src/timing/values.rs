//! Random values to compute with, and the counting of operations and bytes.

use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use rayon::prelude::*;

/// Returns `len` values as [`fill_random`] makes them.
pub(crate) fn random(len: usize, deviation: f32, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    fill_random(&mut values, deviation, seed);
    values
}

/// Sets `values` to uniform random numbers with mean 0 and that standard deviation, a function of `seed`.
pub(crate) fn fill_random(values: &mut [f32], deviation: f32, seed: u64) {
    let width = 12f32.sqrt() * deviation;
    values.par_chunks_mut(1 << 14).enumerate().for_each(|(stream, values)| {
        let mut rng = Rng::new(seed, stream as u64);
        values.iter_mut().for_each(|x| *x = width * (rng.uniform() - 0.5));
    });
}

/// Draws `count` token ids.
pub(crate) fn random_ids(count: usize, vocab: usize, mut rng: Rng) -> Vec<u32> {
    (0..count).map(|_| rng.below(vocab as u64) as u32).collect()
}

/// Returns the product of the sizes.
pub(crate) fn product(sizes: &[usize]) -> f64 {
    sizes.iter().map(|&size| size as f64).product()
}

/// Returns the bytes of f32 values.
pub(crate) fn f32_bytes(values: f64) -> f64 {
    4.0 * values
}

/// Returns the bytes of values in a precision.
pub(crate) fn bytes_in(precision: Precision, values: f64) -> f64 {
    precision.bytes() as f64 * values
}
