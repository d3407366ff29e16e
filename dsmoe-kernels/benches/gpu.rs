//! Products of an FFN's active pairs on the first GPU, beside cuBLASLt's of all pairs: one line of JSON each.
//!
//! `cargo bench -p dsmoe-kernels --features cuda --bench gpu`, with `DSMOE_CUDA_LIB_DIR` as for `dsmoe`.
#![expect(clippy::print_stdout, reason = "a program that prints what it measured")]

use std::time::Instant;

use dsmoe_kernels::cuda::ops::experts::{self, Dims};
use dsmoe_kernels::cuda::ops::ffn;
use dsmoe_kernels::cuda::ops::matmul::{Gemm, gemm_bf16, gemm_f32};
use dsmoe_kernels::cuda::ops::router::{self, Lists, Routed};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, Result, ViewMut};
use dsmoe_kernels::rng::Rng;
use half::bf16;

/// LLaMA 3.2 1B's FFN.
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 8192;
const EXPERTS: usize = 8;
const CALLS: u32 = 20;
const ROUNDS: usize = 5;

/// Median over rounds of the seconds of one call.
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

fn halves(gpu: &Gpu, len: usize, seed: u64) -> Result<GpuBuf<bf16>> {
    let mut rng = Rng::new(seed, 0);
    gpu.upload(&(0..len).map(|_| bf16::from_f32(rng.uniform() - 0.5)).collect::<Vec<_>>())
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
    let (rows, wide, weight) = (tokens * HIDDEN, tokens * INTERMEDIATE, INTERMEDIATE * HIDDEN);
    let [x, dy] = [halves(gpu, rows, 2)?, halves(gpu, rows, 3)?];
    let [gate, up, down] = [halves(gpu, weight, 4)?, halves(gpu, weight, 5)?, halves(gpu, weight, 6)?];
    let [mut a, mut b, mut c] = [halves(gpu, wide, 7)?, halves(gpu, wide, 8)?, halves(gpu, wide, 9)?];
    let mut y = gpu.zeros::<f32>(rows)?;
    let mut parts = gpu.zeros::<bf16>(dims.scratch())?;
    let mut grads = [gpu.zeros::<f32>(weight)?, gpu.zeros::<f32>(weight)?, gpu.zeros::<f32>(weight)?];

    // Of one product of all pairs.
    let flops = 2.0 * (wide * HIDDEN) as f64;
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
    let nt = Gemm::nt(tokens, INTERMEDIATE, HIDDEN);
    let nn = Gemm::nn(tokens, HIDDEN, INTERMEDIATE);
    let tn = Gemm { beta_one: true, ..Gemm::tn(INTERMEDIATE, HIDDEN, tokens) };
    let all = ffn::Dims { tokens, intermediate: INTERMEDIATE, num_experts: 1 };

    let sort = seconds(gpu, || router::lists(gpu, &mut lists, &routed))?;
    let dense = seconds(gpu, || {
        gemm_bf16(gpu, a.view_mut(), x.view(), gate.view(), nt)?;
        gemm_bf16(gpu, b.view_mut(), x.view(), up.view(), nt)?;
        ffn::activate(gpu, c.view_mut(), a.view(), b.view(), None, all)
    })?;
    let k = routed.coefficients();
    let sparse = seconds(gpu, || {
        experts::up(gpu, c.view_mut(), None, x.view(), gate.view(), up.view(), k, &lists, dims)
    })?;
    show("gate, up and activation", 2.0, dense, sparse + sort);

    let down_dense = seconds(gpu, || gemm_f32(gpu, y.view_mut(), c.view(), down.view(), nn))?;
    let down_sparse = seconds(gpu, || {
        experts::down(gpu, y.view_mut(), parts.view_mut(), c.view(), down.view(), &lists, dims)
    })?;
    show("down", 1.0, down_dense, down_sparse);
    show("whole FFN forward", 3.0, dense + down_dense, sparse + sort + down_sparse);

    let dense = seconds(gpu, || gemm_bf16(gpu, a.view_mut(), dy.view(), down.view(), nt))?;
    let sparse = seconds(gpu, || experts::project(gpu, a.view_mut(), dy.view(), down.view(), &lists, dims))?;
    show("gradient of the activation", 1.0, dense, sparse);

    let dense = seconds(gpu, || {
        gemm_f32(gpu, y.view_mut(), a.view(), gate.view(), nn)?;
        gemm_f32(gpu, y.view_mut(), b.view(), up.view(), Gemm { beta_one: true, ..nn })
    })?;
    let (da, db, of_c) = (a.view(), b.view(), c.view());
    let sparse = seconds(gpu, || {
        let weights = [gate.view(), up.view()];
        experts::backward_input(gpu, y.view_mut(), parts.view_mut(), [da, db], weights, &lists, dims)
    })?;
    show("gradient of the input", 2.0, dense, sparse);

    let dense = seconds(gpu, || {
        let [dgate, dup, ddown]: [ViewMut<'_, f32>; 3] = grads.each_mut().map(GpuBuf::view_mut);
        gemm_f32(gpu, dgate, da, x.view(), tn)?;
        gemm_f32(gpu, dup, db, x.view(), tn)?;
        gemm_f32(gpu, ddown, of_c, dy.view(), tn)
    })?;
    let sparse = seconds(gpu, || {
        let grads = grads.each_mut().map(GpuBuf::view_mut);
        experts::backward_weights(gpu, grads, [da, db, of_c], x.view(), dy.view(), &lists, dims)
    })?;
    show("gradients of the weights", 3.0, dense, sparse);
    Ok(())
}
