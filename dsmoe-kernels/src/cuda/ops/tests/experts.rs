use half::bf16;

use super::emulated::{Emulator, Program, Step};
use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::Activation;
use crate::cuda::ops::Arg;
use crate::cuda::ops::experts::{self, BackwardInput, BackwardWeights, Down, PLAIN, Project, Up};
use crate::cuda::ops::ffn::Dims;
use crate::cuda::ops::router::{self, Lists, Routed};
use crate::cuda::{Gpu, GpuBuf};
use crate::swiglu::reference::value;

/// Sizes, and the rows of the experts, of each case.
const CASES: [(usize, usize, &[usize]); 5] = [
    (64, 64, &[0, 1, 63, 64, 129]),
    (136, 72, &[131, 0, 65]),
    (264, 200, &[17, 128]),
    (8, 8, &[3, 0, 0, 131, 20, 64, 1]),
    (520, 136, &[100]),
];
const TOKENS: usize = 131;

/// Returns a mask with so many tokens for each expert.
fn mask(counts: &[usize]) -> Vec<u8> {
    let n = counts.len();
    (0..TOKENS * n).map(|at| u8::from((at / n * 7 + at % n * 3) % TOKENS < counts[at % n])).collect()
}

/// Returns `[rows, cols]` from the sums of `term(row, col, i)` over i.
fn product(rows: usize, cols: usize, terms: usize, term: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
    (0..rows * cols).map(|at| (0..terms).map(|i| term(at / cols, at % cols, i)).sum()).collect()
}

#[test]
fn cuda_experts_are_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_experts_are_the_reference") else { return };
    for (hidden, w, counts) in CASES {
        check(&gpu, hidden, w, counts);
    }
}

fn check(gpu: &Gpu, hidden: usize, w: usize, counts: &[usize]) {
    let (n, width) = (counts.len(), counts.len() * w);
    let dims = Dims { tokens: TOKENS, hidden, intermediate: width, num_experts: n };
    assert!(dims.fit_lists(gpu), "{dims:?}");
    let mask = mask(counts);
    let mut routed = Routed::with_room(gpu, TOKENS, n).unwrap();
    routed.mask.upload_from(&mask).unwrap();
    let active: Vec<u32> = mask.chunks(n).map(|row| row.iter().map(|&on| u32::from(on)).sum()).collect();
    routed.active.upload_from(&active).unwrap();
    let mut lists = Lists::with_room(gpu, TOKENS, n).unwrap();
    router::Sort { lists: &mut lists, routed: &routed }.run().unwrap();
    let lists = &lists;
    let on = |at: usize| mask[at / width * n + at % width / w] != 0;

    let [x, dy] = [1, 2].map(|seed| values(TOKENS * hidden, seed));
    let weights = [3, 4, 5].map(|seed| values(width * hidden, seed));
    let pairs = [6, 7, 8].map(|seed| values(TOKENS * width, seed));
    let coefficients: Vec<f32> = to_f32(&values(TOKENS * n, 9)).iter().map(|x| x.abs() + 0.1).collect();
    let before = to_f32(&values(width * hidden, 10));
    // The projections, the values of pairs, sums over experts with the sums of the sizes of their terms, and gradients.
    let (want_a, want_b, [want_c, want_gelu], want_projection, want_sums, want_grads) = {
        let [x, dy] = [&x, &dy].map(|v| to_f64(v));
        let [gate, up, down] = weights.each_ref().map(|v| to_f64(v));
        let [da, db, c] = pairs.each_ref().map(|v| {
            to_f64(v)
                .into_iter()
                .enumerate()
                .map(|(at, x)| if on(at) { x } else { 0.0 })
                .collect::<Vec<f64>>()
        });
        let row = |x: &[f64], of: &[f64]| {
            product(TOKENS, width, hidden, |t, neuron, i| x[t * hidden + i] * of[neuron * hidden + i])
        };
        let (a, b) = (row(&x, &gate), row(&x, &up));
        let round = |x: f64| bf16::from_f64(x).to_f64();
        let projection = row(&dy, &down);
        let gated = [Activation::Silu, Activation::GeluTanh].map(|activation| -> Vec<f64> {
            let of = |at: usize| {
                let coefficient = f64::from(coefficients[at / width * n + at % width / w]);
                coefficient * value(activation, round(a[at])) * round(b[at])
            };
            (0..a.len()).map(of).collect()
        });
        let summed = |term: &dyn Fn(usize, usize, usize) -> f64| {
            let part =
                |t: usize, i: usize, e: usize| (e * w..(e + 1) * w).map(|m| term(t, i, m)).sum::<f64>();
            [product(TOKENS, hidden, n, part), product(TOKENS, hidden, n, |t, i, e| part(t, i, e).abs())]
        };
        let weight = |of: &[f64], with: &[f64]| {
            let mut sums =
                product(width, hidden, TOKENS, |neuron, i, t| of[t * width + neuron] * with[t * hidden + i]);
            sums.iter_mut().zip(&before).for_each(|(sum, &before)| *sum += f64::from(before));
            sums
        };
        let down = summed(&|t, i, m| c[t * width + m] * down[m * hidden + i]);
        let input = summed(&|t, i, m| {
            da[t * width + m] * gate[m * hidden + i] + db[t * width + m] * up[m * hidden + i]
        });
        let grads = [weight(&da, &x), weight(&db, &x), weight(&c, &dy)];
        (a, b, gated, projection, [down, input], grads)
    };

    let [x, dy] = &[&x, &dy].map(|v| gpu.upload_rows(v, hidden).unwrap());
    let weights = weights.each_ref().map(|v| gpu.upload(v).unwrap());
    let [gate, up, down] = &weights;
    let [da, db, c] = &pairs.each_ref().map(|v| gpu.upload_rows(v, width).unwrap());
    let coefficients = &gpu.upload_rows(&coefficients, n).unwrap();
    // Inactive pairs have no value: no op may read or write it.
    let nothing = || gpu.upload_rows(&vec![bf16::NAN; TOKENS * width], width).unwrap();
    let mut parts = gpu.upload(&vec![bf16::NAN; dims.parts()]).unwrap();
    for plain in [true, false] {
        PLAIN.set(plain);
        let what = format!("plain {plain}, {dims:?}, {counts:?}");
        // Rounding of the result, and of f32 sums.
        let near = |size: f64, terms: usize| size.abs() / 250.0 + 2e-6 * terms as f64;
        let check_pairs = |name: &str, got: &GpuBuf<bf16>, want: &[f64], tolerance: &dyn Fn(f64) -> f64| {
            let got = to_f32(&got.download().unwrap());
            assert!((0..got.len()).all(|at| on(at) || got[at].is_nan()), "{what}: {name} of inactive pairs");
            let (got, want): (Vec<f32>, Vec<f64>) =
                (0..got.len()).filter(|&at| on(at)).map(|at| (got[at], want[at])).unzip();
            check_close(&format!("{what}: {name}"), &got, &want, |i| tolerance(want[i]));
        };
        let [mut got_c, mut got_a, mut got_b] = [nothing(), nothing(), nothing()];
        let both = Some([&mut *got_a, &mut *got_b]);
        let activation = Activation::Silu;
        Up { c: &mut got_c, projections: both, x, gate, up, coefficients, lists, activation }.run().unwrap();
        check_pairs("a", &got_a, &want_a, &|size| near(size, hidden));
        check_pairs("b", &got_b, &want_b, &|size| near(size, hidden));
        // Projections may be rounded to a neighbour.
        check_pairs("c", &got_c, &want_c, &|size| size.abs() / 40.0 + 2e-5 * hidden as f64);
        let mut alone = nothing();
        Up { c: &mut alone, projections: None, x, gate, up, coefficients, lists, activation }.run().unwrap();
        let bits = |buf: &GpuBuf<bf16>| -> Vec<u16> {
            buf.download().unwrap().iter().map(|x| x.to_bits()).collect()
        };
        assert_eq!(bits(&alone), bits(&got_c), "{what}: c without its projections");
        let activation = Activation::GeluTanh;
        Up { c: &mut alone, projections: None, x, gate, up, coefficients, lists, activation }.run().unwrap();
        check_pairs("c of gelu", &alone, &want_gelu, &|size| size.abs() / 40.0 + 2e-5 * hidden as f64);

        let mut got = nothing();
        Project { out: &mut got, x: dy, weight: down, lists }.run().unwrap();
        check_pairs("projection", &got, &want_projection, &|size| near(size, hidden));

        let mut y = gpu.upload_rows(&vec![f32::NAN; TOKENS * hidden], hidden).unwrap();
        Down { y: &mut y, parts: &mut parts, c, weight: down, lists }.run().unwrap();
        let [sums, sizes] = &want_sums[0];
        check_close(&format!("{what}: down"), &y.download().unwrap(), sums, |i| near(sizes[i], width));

        let mut dx = gpu.upload_rows(&vec![f32::NAN; TOKENS * hidden], hidden).unwrap();
        BackwardInput { dx: &mut dx, parts: &mut parts, da, db, gate, up, lists }.run().unwrap();
        let [sums, sizes] = &want_sums[1];
        check_close(&format!("{what}: input"), &dx.download().unwrap(), sums, |i| near(sizes[i], 2 * width));

        let mut grads = [0; 3].map(|_| gpu.upload(&before).unwrap());
        let [dgate, dup, ddown] = &mut grads;
        BackwardWeights { dgate, dup, ddown, da, db, c, x, dy, lists }.run().unwrap();
        for ((name, got), want) in ["gate", "up", "down"].iter().zip(&grads).zip(&want_grads) {
            let what = format!("{what}: gradient of {name}");
            check_close(&what, &got.download().unwrap(), want, |_| 2e-6 * TOKENS as f64);
        }
    }
}

/// These kernels have run on an H100: that the model of a device gives their results says that it reads operands as one does.
#[test]
fn cuda_experts_run_on_the_processor() {
    let test = "cuda_experts_run_on_the_processor";
    let defines = experts::defines(4, false, Activation::Silu);
    let Some(program) = Program::new(test, &experts::SOURCE, "project down weights", &defines) else {
        return;
    };
    let (hidden, w, counts) = (136, 72, &[131, 0, 65][..]);
    let (n, width) = (counts.len(), counts.len() * w);
    let dims = Dims { tokens: TOKENS, hidden, intermediate: width, num_experts: n };
    let mask = mask(counts);
    let (mut offsets, mut list) = (vec![0u32], Vec::new());
    for e in 0..n {
        list.extend((0..TOKENS).filter(|t| mask[t * n + e] != 0).map(|t| t as u32));
        offsets.push(list.len() as u32);
    }
    let [x, dy] = [1, 2].map(|seed| values(TOKENS * hidden, seed));
    let weight = values(width * hidden, 3);
    let of_pairs = [6, 7, 8].map(|seed| values(TOKENS * width, seed));
    let mut emulator = Emulator::new();
    let [on_x, on_dy, on_weight] = [&x, &dy, &weight].map(|v| Arg::Ptr(emulator.upload(v).1));
    let [da, db, c] = of_pairs.each_ref().map(|v| Arg::Ptr(emulator.upload(v).1));
    let lists = [&offsets, &list].map(|v| Arg::Ptr(emulator.upload(v).1));
    let g = emulator.upload(&vec![bf16::NAN; TOKENS * width]);
    let parts = emulator.upload(&vec![bf16::NAN; dims.parts()]);
    let grads = [(); 3].map(|()| emulator.upload(&vec![1.0f32; width * hidden]));
    let [dgate, dup, ddown] = grads.map(|grad| Arg::Ptr(grad.1));
    let call = |entry, args: &[Arg]| experts::call(entry, args, lists, &dims, &defines, 3);
    let calls = [
        call("project", &[Arg::Ptr(g.1), on_dy, on_weight]),
        call("down", &[Arg::Ptr(parts.1), c, on_weight]),
        call("weights", &[dgate, dup, ddown, da, db, c, on_x, on_dy]),
    ];
    emulator.run(&program, 1, &calls.each_ref().map(Step::Call));

    let [x, dy, weight] = [&x, &dy, &weight].map(|v| to_f64(v));
    let [da, db, c] = of_pairs.each_ref().map(|v| to_f64(v));
    let on = |t: usize, neuron: usize| mask[t * n + neuron / w] != 0;
    let want = product(TOKENS, width, hidden, |t, m, i| dy[t * hidden + i] * weight[m * hidden + i]);
    let got = to_f32(&emulator.download::<bf16>(g));
    let pairs = (0..got.len()).filter(|at| on(at / width, at % width));
    let (got, want): (Vec<f32>, Vec<f64>) = pairs.map(|at| (got[at], want[at])).unzip();
    check_close("g", &got, &want, |i| want[i].abs() / 250.0 + 1e-3);
    let got = to_f32(&emulator.download::<bf16>(parts));
    for e in 0..n {
        for slot in offsets[e]..offsets[e + 1] {
            let (t, first) = (list[slot as usize] as usize, e * w);
            let want =
                product(1, hidden, w, |_, i, m| c[t * width + first + m] * weight[(first + m) * hidden + i]);
            let got = &got[slot as usize * hidden..(slot as usize + 1) * hidden];
            check_close("parts", got, &want, |i| want[i].abs() / 250.0 + 1e-3);
        }
    }
    for (grad, (of, with)) in grads.into_iter().zip([(&da, &x), (&db, &x), (&c, &dy)]) {
        let of = |t: usize, m: usize| if on(t, m) { of[t * width + m] } else { 0.0 };
        let want = product(width, hidden, TOKENS, |m, i, t| of(t, m) * with[t * hidden + i]);
        let want: Vec<f64> = want.iter().map(|sum| 1.0 + sum).collect();
        check_close("gradient", &emulator.download(grad), &want, |_| 2e-6 * TOKENS as f64);
    }
}
