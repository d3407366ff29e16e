//! Times this matrix product and those of the gemm crate and of faer in turns: `y = x W^T` with row-major x
//! `[tokens, hidden]` and W `[intermediate, hidden]`, f32.
//!
//! `cargo bench -p dsmoe-kernels --bench peers -- --threads 2 --rounds 9 --shape 512,2048,8192` prints one JSON
//! object per implementation; without `--shape` for a few shapes.
#![expect(clippy::print_stdout, reason = "the result of a program")]

use std::process::ExitCode;
use std::time::Instant;

use dsmoe_kernels::linear::{self, Dims};
use dsmoe_kernels::testing::{assert_close, f64s, normals, with_threads};
use dsmoe_kernels::{Isa, Precision};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

const SHAPES: [[usize; 3]; 4] = [[512, 512, 512], [2048, 2048, 2048], [256, 2048, 8192], [1024, 288, 768]];
/// Least seconds of a sample.
const SAMPLE_SECONDS: f64 = 0.02;

struct Options {
    threads: usize,
    rounds: usize,
    shapes: Vec<[usize; 3]>,
}

fn main() -> ExitCode {
    match options() {
        Ok(Options { threads, rounds, shapes }) => {
            for shape in shapes {
                with_threads(threads, || measure(shape, threads, rounds));
            }
            ExitCode::SUCCESS
        }
        Err(problem) => {
            println!("peers: {problem}; use --threads N --rounds N --shape TOKENS,HIDDEN,INTERMEDIATE");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options, String> {
    let mut options = Options { threads: 1, rounds: 9, shapes: SHAPES.to_vec() };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        // Cargo says that this is a bench.
        if flag == "--bench" {
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{flag} without a value"))?;
        let numbers: Option<Vec<usize>> =
            value.split(',').map(|n| n.parse().ok().filter(|&n| n > 0)).collect();
        match (flag.as_str(), numbers.as_deref()) {
            ("--threads", Some(&[threads])) => options.threads = threads,
            ("--rounds", Some(&[rounds])) => options.rounds = rounds,
            ("--shape", Some(&[tokens, hidden, intermediate])) => {
                options.shapes = vec![[tokens, hidden, intermediate]];
            }
            _ => return Err(format!("{flag} {value} is not understood")),
        }
    }
    Ok(options)
}

/// An implementation: its name, its result, and a call that sets the result.
type Peer<'a> = (&'static str, Vec<f32>, Box<dyn FnMut(&mut [f32]) + 'a>);

fn measure([m, k, n]: [usize; 3], threads: usize, rounds: usize) {
    let (x, w) = (normals(m * k, 1), normals(n * k, 2));
    let (x, w) = (&x[..], &w[..]);
    let dims = Dims { rows: m, inputs: k, outputs: n, precision: Precision::F32 };
    let mut peers: [Peer<'_>; 3] = [
        ("dsmoe", vec![0.0; m * n], Box::new(move |y| linear::Forward { y, x, w, bias: None, dims }.run())),
        ("gemm", vec![0.0; m * n], Box::new(move |y| gemm_crate(y, x, w, [m, k, n], threads))),
        (
            "faer",
            vec![0.0; m * n],
            Box::new(move |y| {
                let (x, w) = (MatRef::from_row_major_slice(x, m, k), MatRef::from_row_major_slice(w, n, k));
                let par = if threads == 1 { Par::Seq } else { Par::rayon(threads) };
                let y = MatMut::from_row_major_slice_mut(y, m, n);
                matmul(y, Accum::Replace, x, w.transpose(), 1.0, par);
            }),
        ),
    ];
    let seconds = take_turns(&mut peers, rounds);
    let [ours, others @ ..] = &peers;
    for (name, y, _) in others {
        assert_close(name, y, &f64s(&ours.1), 1e-4);
    }
    for ((name, ..), seconds) in peers.iter().zip(seconds) {
        let gflops = (2 * m * k * n) as f64 / seconds / 1e9;
        let isa = Isa::current().name();
        println!(
            "{{\"peer\":\"{name}\",\"work\":\"matmul\",\"impl\":\"forward\",\"tokens\":{m},\"hidden\":{k},\
             \"intermediate\":{n},\"dtype\":\"f32\",\"threads\":{threads},\"isa\":\"{isa}\",\"seconds\":{seconds:e},\
             \"gflops\":{gflops:.2}}}"
        );
    }
}

fn gemm_crate(y: &mut [f32], x: &[f32], w: &[f32], [m, k, n]: [usize; 3], threads: usize) {
    assert!(y.len() == m * n && x.len() == m * k && w.len() == n * k);
    let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
    let (row, one) = (|len: usize| len.cast_signed(), 1);
    // SAFETY: y is [m, n], x [m, k] and W^T [k, n] with these strides, inside slices of those lengths.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            one,
            row(n),
            false,
            x.as_ptr(),
            one,
            row(k),
            w.as_ptr(),
            row(k),
            one,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Returns the median seconds per call; every peer has one sample per round.
fn take_turns(peers: &mut [Peer<'_>], rounds: usize) -> Vec<f64> {
    let sample = |(_, y, call): &mut Peer<'_>, calls: usize| {
        let started = Instant::now();
        for _ in 0..calls {
            call(y);
        }
        started.elapsed().as_secs_f64() / calls as f64
    };
    let calls: Vec<usize> = peers
        .iter_mut()
        .map(|peer| {
            // The first call sizes buffers and fills caches.
            sample(peer, 1);
            (SAMPLE_SECONDS / sample(peer, 1)).clamp(1.0, 1e4) as usize
        })
        .collect();
    let mut samples = vec![Vec::new(); peers.len()];
    for _ in 0..rounds {
        for ((peer, &calls), samples) in peers.iter_mut().zip(&calls).zip(&mut samples) {
            samples.push(sample(peer, calls));
        }
    }
    samples.iter_mut().for_each(|samples| samples.sort_by(f64::total_cmp));
    samples.iter().map(|samples| samples[rounds / 2]).collect()
}
