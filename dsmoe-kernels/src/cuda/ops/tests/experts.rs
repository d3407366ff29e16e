use half::bf16;

use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::cuda::ops::experts::{Dims, PLAIN, backward_input, backward_weights, down, project, up};
use crate::cuda::ops::router::{self, Lists, Routed};

/// Rows that the experts of each case have; 131 tokens.
const CASES: [(usize, usize, &[usize]); 5] = [
    (64, 64, &[0, 1, 63, 64, 129]),
    (136, 72, &[131, 0, 65]),
    (264, 200, &[17, 128]),
    (8, 8, &[3, 0, 0, 131, 20, 64, 1]),
    (520, 136, &[100]),
];
const TOKENS: usize = 131;

/// The mask with so many tokens for each expert.
fn mask(counts: &[usize]) -> Vec<u8> {
    let n = counts.len();
    (0..TOKENS * n).map(|at| u8::from((at / n * 7 + at % n * 3) % TOKENS < counts[at % n])).collect()
}

/// `[rows, cols]` from the sums of `term(row, col, i)` over i.
fn product(rows: usize, cols: usize, terms: usize, term: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
    (0..rows * cols).map(|at| (0..terms).map(|i| term(at / cols, at % cols, i)).sum()).collect()
}

#[test]
fn cuda_experts_are_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_experts_are_the_reference") else { return };
    for plain in [true, false] {
        PLAIN.set(plain);
        for (hidden, w, counts) in CASES {
            check(
                &gpu,
                hidden,
                w,
                counts,
                &format!("plain {plain}, hidden {hidden}, {w} neurons, {counts:?}"),
            );
        }
    }
}

fn check(gpu: &crate::cuda::Gpu, hidden: usize, w: usize, counts: &[usize], what: &str) {
    let (n, width) = (counts.len(), counts.len() * w);
    let dims = Dims { tokens: TOKENS, hidden, intermediate: width, num_experts: n };
    assert!(dims.fit(gpu), "{what}");
    let mask = mask(counts);
    let mut routed = Routed::with_room(gpu, TOKENS, n).unwrap();
    routed.mask.upload_from(&mask).unwrap();
    let active: Vec<u32> = mask.chunks(n).map(|row| row.iter().map(|&on| u32::from(on)).sum()).collect();
    routed.active.upload_from(&active).unwrap();
    let mut lists = Lists::with_room(gpu, TOKENS, n).unwrap();
    router::lists(gpu, &mut lists, &routed).unwrap();
    let on = |t: usize, neuron: usize| mask[t * n + neuron / w] != 0;

    let [x, dy] = [1, 2].map(|seed| values(TOKENS * hidden, seed));
    let weights = [3, 4, 5].map(|seed| values(width * hidden, seed));
    let pairs = [6, 7, 8].map(|seed| values(TOKENS * width, seed));
    let coefficients: Vec<f32> = to_f32(&values(TOKENS * n, 9)).iter().map(|x| x.abs() + 0.1).collect();
    let [xf, dyf] = [&x, &dy].map(|v| to_f64(v));
    let [gate, up_weight, down_weight] = weights.each_ref().map(|v| to_f64(v));
    let [da, db, c] = pairs.each_ref().map(|v| to_f64(v));

    let [x_on, dy_on] = [&x, &dy].map(|v| gpu.upload(v).unwrap());
    let weights_on = weights.each_ref().map(|v| gpu.upload(v).unwrap());
    let [gate_on, up_on, down_on] = weights_on.each_ref().map(|v| v.view());
    let pairs_on = pairs.each_ref().map(|v| gpu.upload(v).unwrap());
    let [da_on, db_on, c_on] = pairs_on.each_ref().map(|v| v.view());
    let k_on = gpu.upload(&coefficients).unwrap();
    // What no op may read: inactive pairs have no value.
    let nothing = || gpu.upload(&vec![bf16::NAN; TOKENS * width]).unwrap();
    let mut parts = gpu.upload(&vec![bf16::NAN; dims.scratch()]).unwrap();
    let picked = |values: &[f32], want: Vec<f64>| -> (Vec<f32>, Vec<f64>) {
        assert!(
            (0..values.len()).all(|at| on(at / width, at % width) || values[at].is_nan()),
            "{what}: inactive pairs"
        );
        (0..values.len()).filter(|&at| on(at / width, at % width)).map(|at| (values[at], want[at])).unzip()
    };
    // Rounding of the result, and of f32 sums.
    let near = |want: &[f64], terms: usize| {
        let sums = 2e-6 * terms as f64;
        want.iter().map(|x| x.abs() / 250.0 + sums).collect::<Vec<f64>>()
    };

    let [mut got_c, mut got_a, mut got_b] = [nothing(), nothing(), nothing()];
    let both = Some([got_a.view_mut(), got_b.view_mut()]);
    up(gpu, got_c.view_mut(), both, x_on.view(), gate_on, up_on, k_on.view(), &lists, dims).unwrap();
    let row = |of: &[f64], t: usize, neuron: usize, i: usize| xf[t * hidden + i] * of[neuron * hidden + i];
    let a = product(TOKENS, width, hidden, |t, neuron, i| row(&gate, t, neuron, i));
    let b = product(TOKENS, width, hidden, |t, neuron, i| row(&up_weight, t, neuron, i));
    let round = |x: f64| bf16::from_f64(x).to_f64();
    let gated: Vec<f64> = (0..a.len())
        .map(|at| {
            let (a, b) = (round(a[at]), round(b[at]));
            f64::from(coefficients[at / width * n + at % width / w]) * a / (1.0 + (-a).exp()) * b
        })
        .collect();
    let downloaded = [&got_a, &got_b].map(|of| to_f32(&of.download().unwrap()));
    for (of, (got, want)) in ["a", "b"].iter().zip(downloaded.iter().zip([a, b])) {
        let (got, want) = picked(got, want);
        let tolerance = near(&want, hidden);
        check_close(&format!("{what}: {of}"), &got, &want, |i| tolerance[i]);
    }
    let (got, want) = picked(&to_f32(&got_c.download().unwrap()), gated);
    // Projections may be rounded to a neighbour.
    check_close(&format!("{what}: c"), &got, &want, |i| want[i].abs() / 40.0 + 2e-5 * hidden as f64);
    let mut alone = nothing();
    up(gpu, alone.view_mut(), None, x_on.view(), gate_on, up_on, k_on.view(), &lists, dims).unwrap();
    let bits = |buf: &crate::cuda::GpuBuf<bf16>| -> Vec<u16> {
        buf.download().unwrap().iter().map(|x| x.to_bits()).collect()
    };
    assert_eq!(bits(&alone), bits(&got_c), "{what}: c without its projections");

    let mut got = nothing();
    project(gpu, got.view_mut(), dy_on.view(), down_on, &lists, dims).unwrap();
    let want =
        product(TOKENS, width, hidden, |t, neuron, i| dyf[t * hidden + i] * down_weight[neuron * hidden + i]);
    let (got, want) = picked(&to_f32(&got.download().unwrap()), want);
    let tolerance = near(&want, hidden);
    check_close(&format!("{what}: projection"), &got, &want, |i| tolerance[i]);

    // Every expert's part of a sum is rounded.
    let summed = |want: &[f64], sizes: &[f64], terms: usize| -> Vec<f64> {
        want.iter().zip(sizes).map(|(_, size)| size / 250.0 + 2e-6 * terms as f64).collect()
    };
    let masked = |values: &[f64], t: usize, neuron: usize| {
        if on(t, neuron) { values[t * width + neuron] } else { 0.0 }
    };
    let mut y = gpu.upload(&vec![f32::NAN; TOKENS * hidden]).unwrap();
    down(gpu, y.view_mut(), parts.view_mut(), c_on, down_on, &lists, dims).unwrap();
    let term = |t: usize, i: usize, neuron: usize| masked(&c, t, neuron) * down_weight[neuron * hidden + i];
    let want = product(TOKENS, hidden, width, term);
    // Sizes of the experts' parts.
    let sizes =
        product(TOKENS, hidden, n, |t, i, e| (e * w..(e + 1) * w).map(|m| term(t, i, m)).sum::<f64>().abs());
    let tolerance = summed(&want, &sizes, width);
    check_close(&format!("{what}: down"), &y.download().unwrap(), &want, |i| tolerance[i]);

    let mut dx = gpu.upload(&vec![f32::NAN; TOKENS * hidden]).unwrap();
    backward_input(gpu, dx.view_mut(), parts.view_mut(), [da_on, db_on], [gate_on, up_on], &lists, dims)
        .unwrap();
    let term = |t: usize, i: usize, neuron: usize| {
        masked(&da, t, neuron) * gate[neuron * hidden + i]
            + masked(&db, t, neuron) * up_weight[neuron * hidden + i]
    };
    let want = product(TOKENS, hidden, width, term);
    let sizes =
        product(TOKENS, hidden, n, |t, i, e| (e * w..(e + 1) * w).map(|m| term(t, i, m)).sum::<f64>().abs());
    let tolerance = summed(&want, &sizes, 2 * width);
    check_close(&format!("{what}: gradient of the input"), &dx.download().unwrap(), &want, |i| tolerance[i]);

    let before = to_f32(&values(width * hidden, 10));
    let mut grads = [0; 3].map(|_| gpu.upload(&before).unwrap());
    let [dgate, dup, ddown] = grads.each_mut().map(|of| of.view_mut());
    backward_weights(gpu, [dgate, dup, ddown], [da_on, db_on, c_on], x_on.view(), dy_on.view(), &lists, dims)
        .unwrap();
    for ((name, got), (of, with)) in
        ["gate", "up", "down"].iter().zip(&grads).zip([(&da, &xf), (&db, &xf), (&c, &dyf)])
    {
        let mut want =
            product(width, hidden, TOKENS, |neuron, i, t| masked(of, t, neuron) * with[t * hidden + i]);
        want.iter_mut().zip(&before).for_each(|(want, &before)| *want += f64::from(before));
        check_close(&format!("{what}: gradient of {name}"), &got.download().unwrap(), &want, |_| {
            2e-6 * TOKENS as f64
        });
    }
}
