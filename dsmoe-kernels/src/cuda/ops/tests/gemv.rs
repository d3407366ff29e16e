use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::Activation;
use crate::cuda::ops::ffn::Dims;
use crate::cuda::ops::gemv::{FEW, Factors, Ffn, Linear, Weights};
use crate::expert_ffn::{self, reference};

#[test]
fn cuda_products_of_few_tokens_are_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_products_of_few_tokens_are_the_reference") else { return };
    for tokens in 1..=FEW {
        for (inputs, outputs) in [(8, 1), (264, 33), (67, 5), (2048, 40)] {
            let (x, w) = (values(tokens * inputs, 1), values(outputs * inputs, 2));
            let (xs, ws) = (to_f64(&x), to_f64(&w));
            let want: Vec<f64> = (0..tokens * outputs)
                .map(|at| {
                    let (t, o) = (at / outputs, at % outputs);
                    (0..inputs).map(|i| xs[t * inputs + i] * ws[o * inputs + i]).sum()
                })
                .collect();
            let (x, w) = (&gpu.upload_rows(&x, inputs).unwrap(), &gpu.upload(&w).unwrap());
            let mut y = gpu.zero_rows::<f32>(tokens, outputs).unwrap();
            Linear { y: &mut y, x, w }.run().unwrap();
            let close = inputs as f64 * 1e-6;
            check_close("few", &y.download().unwrap(), &want, |_| close);
            let mut y = gpu.zero_rows::<half::bf16>(tokens, outputs).unwrap();
            Linear { y: &mut y, x, w }.run().unwrap();
            check_close("few", &to_f32(&y.download().unwrap()), &want, |i| close + want[i].abs() / 256.0);
        }
    }
}

#[test]
fn cuda_ffn_of_few_tokens_is_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_ffn_of_few_tokens_is_the_reference") else { return };
    for tokens in [1, 2, 3, 8] {
        // Sizes, and the leading experts that run for every token.
        for (hidden, intermediate, n, core) in
            [(64, 96, 3, 0), (33, 50, 5, 2), (520, 256, 8, 0), (16, 40, 1, 0), (64, 144, 9, 4)]
        {
            let pairs = tokens * n;
            let activation = if tokens == 3 { Activation::GeluTanh } else { Activation::Silu };
            for open in [0.0, 0.4, 1.0] {
                let mut rng = crate::rng::Rng::new(9, pairs as u64);
                let mask: Vec<bool> =
                    (0..pairs).map(|at| at % n < core || f64::from(rng.uniform()) < open).collect();
                let mut factor = |at: usize| match (at % n < core, mask[at]) {
                    (true, _) => 1.0,
                    (_, on) => {
                        if on {
                            0.5 + rng.uniform()
                        } else {
                            0.0
                        }
                    }
                };
                let coefficients: Vec<f32> = (0..pairs).map(&mut factor).collect();
                let x = values(tokens * hidden, 1);
                let [gate, up, down] = [2, 3, 4].map(|seed| values(hidden * intermediate, seed));
                let dense = expert_ffn::Dims::dense(tokens, hidden, intermediate, activation);
                let dims = expert_ffn::Dims { num_experts: n, all_pairs: false, ..dense };
                let double: Vec<f64> = coefficients.iter().map(|&k| f64::from(k)).collect();
                let f64s = [&x, &gate, &up, &down].map(|w| to_f64(w));
                let layer = {
                    let ([x, gate, up, down], mask, coef) = (&f64s, &mask, &double);
                    reference::Layer { x, gate, up, down, biases: None, mask, coef, dims }
                };
                let want = reference::forward(layer);
                let h = &gpu.upload_rows(&x, hidden).unwrap();
                let [g, u, d] = [&gate, &up, &down].map(|w| gpu.upload(w).unwrap());
                let weights = Weights { gate: &g, up: &u, down: &d };
                let routed: Vec<f32> = coefficients.chunks(n).flat_map(|row| &row[core..]).copied().collect();
                let k = gpu.upload_rows(&routed, n - core).unwrap();
                let dims = Dims { tokens, hidden, intermediate, num_experts: n };
                // Values left by earlier calls must not matter.
                let mut scratch = gpu.upload(&vec![f32::NAN; dims.gemv_scratch()]).unwrap();
                let mut y = gpu.zeros::<f32>(want.len()).unwrap();
                let factors = Some(Factors { core, coefficients: &k });
                Ffn { y: &mut y, h, weights, factors, activation, scratch: &mut scratch }.run().unwrap();
                let size = (hidden * intermediate) as f64;
                check_close(&format!("{dims:?}"), &y.download().unwrap(), &want, |i| {
                    1e-6 * size + 1e-5 * want[i].abs()
                });
                if n == 1 && open == 1.0 {
                    let (mask, coef) = (&vec![true; tokens], &vec![1.0; tokens]);
                    let want = reference::forward(reference::Layer { mask, coef, ..layer });
                    Ffn { y: &mut y, h, weights, factors: None, activation, scratch: &mut scratch }
                        .run()
                        .unwrap();
                    check_close("dense", &y.download().unwrap(), &want, |i| {
                        1e-6 * size + 1e-5 * want[i].abs()
                    });
                }
            }
        }
    }
}
