use half::bf16;

use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::Activation;
use crate::cuda::ops::ffn::{Activate, Backward};
use crate::swiglu::reference::{slope, value};

#[test]
fn cuda_ffn_is_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_ffn_is_the_reference") else { return };
    for (tokens, intermediate, n) in [(0, 8, 2), (1, 5, 5), (63, 96, 3), (129, 100, 4), (17, 64, 1)] {
        for (all_pairs, activation) in
            [(false, Activation::Silu), (true, Activation::Silu), (false, Activation::GeluTanh)]
        {
            let [a, b, g] = [1, 2, 3].map(|seed| values(tokens * intermediate, seed));
            let mut rng = crate::rng::Rng::new(4, 0);
            let coefficients: Vec<f32> =
                (0..tokens * n).map(|_| if rng.uniform() < 0.5 { 0.0 } else { rng.uniform() }).collect();
            let w = intermediate / n;
            let (mut want_c, mut want_a, mut want_b) = (Vec::new(), Vec::new(), Vec::new());
            let mut dk = vec![0.0f64; tokens * n];
            let (af, bf, gf) = (to_f64(&a), to_f64(&b), to_f64(&g));
            for at in 0..tokens * intermediate {
                let pair = at / intermediate * n + at % intermediate / w;
                let k = f64::from(coefficients[pair]);
                let u = value(activation, af[at]);
                if k != 0.0 || all_pairs {
                    dk[pair] += u * bf[at] * gf[at];
                }
                want_c.push(k * u * bf[at]);
                want_a.push(k * gf[at] * bf[at] * slope(activation, af[at]));
                want_b.push(k * gf[at] * u);
            }
            let what = format!("{tokens} x {intermediate}, {n} experts, {activation:?}");
            let [a, b, g] = &[&a, &b, &g].map(|x| gpu.upload_rows(x, intermediate).unwrap());
            let k = &gpu.upload_rows(&coefficients, n).unwrap();
            let zeros = || gpu.zero_rows::<bf16>(tokens, intermediate).unwrap();
            let (mut got_c, mut got_a, mut got_b, mut again) = (zeros(), zeros(), zeros(), zeros());
            let mut got_k = gpu.zero_rows::<f32>(tokens, n).unwrap();
            let coefficients = Some(&**k);
            Activate { c: &mut got_c, a, b, coefficients, activation }.run().unwrap();
            let (da, db, c, dcoefficients) = (&mut got_a, &mut got_b, &mut again, Some(&mut *got_k));
            Backward { da, db, c, dcoefficients, g, a, b, coefficients, all_pairs, activation }
                .run()
                .unwrap();
            for (name, got, want) in [
                ("c", &got_c, &want_c),
                ("da", &got_a, &want_a),
                ("db", &got_b, &want_b),
                ("c", &again, &want_c),
            ] {
                let got = to_f32(&got.download().unwrap());
                check_close(&format!("{what}: {name}"), &got, want, |i| want[i].abs() / 250.0 + 1e-7);
            }
            check_close("dcoefficients", &got_k.download().unwrap(), &dk, |_| 1e-6 * w as f64 + 1e-6);
        }
    }
}
