//! Measures the products of an FFN's active pairs on the first GPU, beside those of all pairs by cuBLASLt. It prints a line of
//! JSON for each.
//!
//! `cargo bench -p dsmoe-kernels --features cuda --bench gpu`, with `DSMOE_CUDA_LIB_DIR` as for `dsmoe`.
#![expect(clippy::print_stdout, reason = "a program that prints what it measured")]

use std::time::Instant;

use dsmoe_kernels::Activation;
use dsmoe_kernels::cuda::ops::ffn::{Activate, Dims};
use dsmoe_kernels::cuda::ops::matmul::{Form, Product};
use dsmoe_kernels::cuda::ops::router::{Lists, Routed, Sort};
use dsmoe_kernels::cuda::ops::{experts, linear};
use dsmoe_kernels::cuda::{Float, Gpu, GpuBuf, Matrix, Result};
use dsmoe_kernels::rng::Rng;
use half::bf16;

/// The FFN of LLaMA 3.2 1B.
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 8192;
const EXPERTS: usize = 8;
const CALLS: u32 = 20;
const ROUNDS: usize = 5;

/// Returns the seconds of one call: the median over rounds.
fn seconds(gpu: &Gpu, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        gpu.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        gpu.synchronize()?;
        times.push(start.elapsed().as_secs_f64() / f64::from(CALLS));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}

fn halves(gpu: &Gpu, rows: usize, cols: usize, seed: u64) -> Result<GpuBuf<bf16>> {
    let mut rng = Rng::new(seed, 0);
    gpu.upload_rows(&(0..rows * cols).map(|_| bf16::from_f32(rng.uniform() - 0.5)).collect::<Vec<_>>(), cols)
}

/// Queues `y = x w^T`.
fn forward<T: Float>(y: &mut Matrix<T>, x: &Matrix<bf16>, w: &Matrix<bf16>) -> Result<()> {
    Product { out: y, a: x, b: w, form: Form::Nt, add: false }.run()
}

/// Queues `y = x w`, or `y += x w`.
fn times(y: &mut Matrix<f32>, x: &Matrix<bf16>, w: &Matrix<bf16>, add: bool) -> Result<()> {
    linear::BackwardInput { dx: y, dy: x, w, add }.run()
}

fn main() -> Result<()> {
    let gpu = &Gpu::open(0)?;
    for tokens in [1024, 8192] {
        for active in [3.0 / 8.0, 1.0] {
            run(gpu, tokens, active)?;
        }
    }
    Ok(())
}

fn run(gpu: &Gpu, tokens: usize, share: f32) -> Result<()> {
    let dims = Dims { tokens, hidden: HIDDEN, intermediate: INTERMEDIATE, num_experts: EXPERTS };
    let mut rng = Rng::new(1, 0);
    let mask: Vec<u8> = (0..tokens * EXPERTS).map(|_| u8::from(rng.uniform() < share)).collect();
    let coefficients: Vec<f32> = mask.iter().map(|&on| 0.5 * f32::from(on)).collect();
    let pairs = mask.iter().filter(|&&on| on != 0).count();
    let mut routed = Routed::with_room(gpu, tokens, EXPERTS)?;
    routed.set(&mask, &coefficients)?;
    let mut lists = Lists::with_room(gpu, tokens, EXPERTS)?;
    let [row, wide] = [HIDDEN, INTERMEDIATE].map(|cols| move |seed| halves(gpu, tokens, cols, seed));
    let weight = |seed| halves(gpu, INTERMEDIATE, HIDDEN, seed);
    let [x, dy] = &[row(2)?, row(3)?];
    let [gate, up, down] = &[weight(4)?, weight(5)?, weight(6)?];
    let [a, b, c] = &mut [wide(7)?, wide(8)?, wide(9)?];
    let y = &mut *gpu.zero_rows::<f32>(tokens, HIDDEN)?;
    let parts = &mut *gpu.zeros::<bf16>(dims.parts())?;
    let grad = || gpu.zero_rows::<f32>(INTERMEDIATE, HIDDEN);
    let [dgate, dup, ddown] = &mut [grad()?, grad()?, grad()?];

    // One product of all pairs.
    let flops = 2.0 * (tokens * INTERMEDIATE * HIDDEN) as f64;
    let part = pairs as f64 / (tokens * EXPERTS) as f64;
    let show = |op: &str, products: f64, dense: f64, sparse: f64| {
        println!(
            "{{\"work\":\"experts\",\"op\":\"{op}\",\"tokens\":{tokens},\"hidden\":{HIDDEN},\
             \"intermediate\":{INTERMEDIATE},\"experts\":{EXPERTS},\"active\":{part:.4},\"gpu\":\"{}\",\
             \"dense_us\":{:.1},\"us\":{:.1},\"ratio_to_dense\":{:.3},\"dense_tflops\":{:.0},\"tflops\":{:.0}}}",
            gpu.name(),
            1e6 * dense,
            1e6 * sparse,
            sparse / dense,
            products * flops / dense / 1e12,
            products * part * flops / sparse / 1e12,
        );
    };
    let sort = seconds(gpu, || Sort { lists: &mut lists, routed: &routed }.run())?;
    let lists = &lists;
    let dense = seconds(gpu, || {
        forward(a, x, gate)?;
        forward(b, x, up)?;
        Activate { c: &mut *c, a, b, coefficients: None, activation: Activation::Silu }.run()
    })?;
    let coefficients = &routed.coefficients();
    let sparse = seconds(gpu, || {
        experts::Up {
            c: &mut *c,
            projections: None,
            x,
            gate,
            up,
            coefficients,
            lists,
            activation: Activation::Silu,
        }
        .run()
    })?;
    show("gate, up and activation", 2.0, dense, sparse + sort);

    let down_dense = seconds(gpu, || times(y, c, down, false))?;
    let down_sparse =
        seconds(gpu, || experts::Down { y: &mut *y, parts: &mut *parts, c, weight: down, lists }.run())?;
    show("down", 1.0, down_dense, down_sparse);
    show("whole FFN forward", 3.0, dense + down_dense, sparse + sort + down_sparse);

    let dense = seconds(gpu, || forward(a, dy, down))?;
    let sparse = seconds(gpu, || experts::Project { out: &mut *a, x: dy, weight: down, lists }.run())?;
    show("gradient of the activation", 1.0, dense, sparse);

    let (da, db, c): (&GpuBuf<bf16>, &GpuBuf<bf16>, &GpuBuf<bf16>) = (a, b, c);
    let dense = seconds(gpu, || {
        times(y, da, gate, false)?;
        times(y, db, up, true)
    })?;
    let sparse = seconds(gpu, || {
        experts::BackwardInput { dx: &mut *y, parts: &mut *parts, da, db, gate, up, lists }.run()
    })?;
    show("gradient of the input", 2.0, dense, sparse);

    let dense = seconds(gpu, || {
        linear::BackwardWeight { dw: &mut *dgate, dy: da, x }.run()?;
        linear::BackwardWeight { dw: &mut *dup, dy: db, x }.run()?;
        linear::BackwardWeight { dw: &mut *ddown, dy: c, x: dy }.run()
    })?;
    let sparse = seconds(gpu, || {
        let (dgate, dup, ddown) = (&mut *dgate, &mut *dup, &mut *ddown);
        experts::BackwardWeights { dgate, dup, ddown, da, db, c, x, dy, lists }.run()
    })?;
    show("gradients of the weights", 3.0, dense, sparse);
    Ok(())
}
