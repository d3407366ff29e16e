//! SparseGPT of one decoder layer of the shape of LLaMA-3.2-1B: random weights and inputs, density 0.4853.
//!
//! `cargo bench -p dsmoe-baselines --bench sparsegpt -- --threads 2 --sequences 2 --tokens 2048` prints one JSON
//! object per group of linears and one for all, in seconds. The counterpart in PyTorch is
//! `tests/golden/make_sparse.py --time`.
#![expect(clippy::print_stdout, reason = "the result of a program")]

use std::time::Instant;

use dsmoe_baselines::sparse::{Hessian, Pattern, SweepOptions, sweep};
use dsmoe_kernels::testing::{normals, with_threads};

/// Each group: the input, its width, and the rows of the weights that read it.
const GROUPS: [(&str, usize, &[usize]); 4] = [
    ("q, k, v", 2048, &[2048, 512, 512]),
    ("o", 2048, &[2048]),
    ("gate, up", 2048, &[8192, 8192]),
    ("down", 8192, &[2048]),
];

fn main() -> Result<(), String> {
    let mut options = [("--threads", 1), ("--sequences", 2), ("--tokens", 2048)];
    // Cargo says that this is a bench.
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(flag) = args.next() {
        let number = args.next().and_then(|value| value.parse().ok()).filter(|&n: &usize| n > 0);
        let option = options.iter_mut().find(|(name, _)| *name == flag).zip(number);
        let ((_, value), number) =
            option.ok_or_else(|| format!("{flag}: use --threads N --sequences N --tokens N"))?;
        *value = number;
    }
    let [threads, sequences, tokens] = options.map(|(_, value)| value);
    with_threads(threads, || measure(threads, sequences, tokens));
    Ok(())
}

fn measure(threads: usize, sequences: usize, tokens: usize) {
    let print = |what: &str, [hessian, factor, sweep]: [f64; 3]| {
        let total = hessian + factor + sweep;
        println!(
            "{{\"work\":\"sparsegpt\",\"linears\":\"{what}\",\"sequences\":{sequences},\"tokens\":{tokens},\
             \"threads\":{threads},\"hessian\":{hessian:.3},\"factor\":{factor:.3},\"sweep\":{sweep:.3},\
             \"seconds\":{total:.3}}}"
        );
    };
    let options = SweepOptions { pattern: Pattern::Unstructured, share: 0.5147, block: 128 };
    let mut totals = [0.0; 3];
    for (seed, (what, width, rows)) in (0..).zip(GROUPS) {
        let inputs: Vec<_> = (0..sequences).map(|s| normals(tokens * width, 10 * s as u64 + seed)).collect();
        let mut weights: Vec<_> =
            rows.iter().map(|rows| normals(rows * width, 1000 + *rows as u64)).collect();
        let started = Instant::now();
        let mut hessian = Hessian::new(width);
        inputs.iter().for_each(|x| hessian.add(x));
        let summed = started.elapsed().as_secs_f64();
        let factored = hessian.factorise(0.01, what).expect("a positive definite Hessian");
        let ready = started.elapsed().as_secs_f64();
        for weight in &mut weights {
            let swept = sweep(weight, &factored, &options);
            assert!(swept.loss.is_finite());
        }
        let done = started.elapsed().as_secs_f64();
        let parts = [summed, ready - summed, done - ready];
        print(what, parts);
        totals.iter_mut().zip(parts).for_each(|(total, part)| *total += part);
    }
    print("all", totals);
}
