//! Every kernel is compiled where NVRTC is installed. Every op is compared with its reference where there is a GPU.

mod attention;
mod choice;
mod compiled;
mod emulated;
mod experts;
mod ffn;
mod gemv;
mod matmul;
mod products;
mod router;
mod rows;
mod slot_ffn;
mod slots;
mod tree;

use crate::cuda::Gpu;

/// Opens the first GPU, or notes that the test is skipped.
///
/// # Panics
/// There is none, and `DSMOE_REQUIRE` asks for one.
fn gpu_or_skip(test: &str) -> Option<Gpu> {
    crate::testing::has_gpu(test).then(|| Gpu::open(0).expect("a device that was found"))
}

/// Returns values from -1 to 1 that bf16 holds exactly.
fn values(len: usize, seed: u64) -> Vec<half::bf16> {
    let mut rng = crate::rng::Rng::new(seed, 0);
    (0..len).map(|_| half::bf16::from_f32(2.0 * rng.uniform() - 1.0)).collect()
}

fn to_f32(values: &[half::bf16]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}

fn to_f64(values: &[half::bf16]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// Checks that no value is further from the wanted one than the `tolerance` of its index.
fn check_close(what: &str, got: &[f32], want: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let worst = (0..got.len())
        .map(|i| (i, (f64::from(got[i]) - want[i]).abs() / tolerance(i)))
        .fold((0, 0.0f64), |a, b| if b.1 > a.1 || b.1.is_nan() { b } else { a });
    assert!(
        worst.1 <= 1.0,
        "{what}: value {} is {}, not {}: {} of its tolerance",
        worst.0,
        got[worst.0],
        want[worst.0],
        worst.1
    );
}
