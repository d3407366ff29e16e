use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::cuda::ops::matmul::{Form, Product};
use crate::matmul::reference::{matmul, transpose};

fn reference(a: &[f64], b: &[f64], [m, n, k]: [usize; 3], form: Form, before: &[f64]) -> Vec<f64> {
    let a = if form == Form::Tn { transpose(a, k, m) } else { a.to_vec() };
    let b = if form == Form::Nt { transpose(b, n, k) } else { b.to_vec() };
    matmul(&a, &b, m, k, n).iter().zip(before).map(|(product, before)| before + product).collect()
}

#[test]
fn cuda_gemm_is_the_product() {
    let Some(gpu) = gpu_or_skip("cuda_gemm_is_the_product") else { return };
    let shapes =
        [(1, 1, 1), (3, 5, 7), (64, 48, 32), (129, 96, 40), (33, 1, 17), (1, 200, 64), (63, 130, 257)];
    for (m, n, k) in shapes {
        let forms = [Form::Nn, Form::Nt, Form::Tn];
        for (form, add) in forms.into_iter().flat_map(|form| [(form, false), (form, true)]) {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let before = to_f32(&values(m * n, 3));
            let start: Vec<f64> = before.iter().map(|&x| if add { f64::from(x) } else { 0.0 }).collect();
            let want = reference(&to_f64(&a), &to_f64(&b), [m, n, k], form, &start);
            let what = format!("{m} x {n} x {k} {form:?}, add {add}");
            let (a_cols, b_cols) =
                (if form == Form::Tn { m } else { k }, if form == Form::Nt { k } else { n });
            let (a, b) = (&gpu.upload_rows(&a, a_cols).unwrap(), &gpu.upload_rows(&b, b_cols).unwrap());
            // Sums of k products of at most 1, in f32.
            let tolerance = |_| 2.0 * (k + 1) as f64 * f64::from(f32::EPSILON);
            for ours in [false, true] {
                let mut out = gpu.upload_rows(&before, n).unwrap();
                let product = Product { out: &mut out, a, b, form, add };
                if ours { product.plain() } else { product.run() }.unwrap();
                check_close(&format!("{what} f32, ours {ours}"), &out.download().unwrap(), &want, tolerance);
            }
            if !add {
                let mut out = gpu.zero_rows::<half::bf16>(m, n).unwrap();
                Product { out: &mut out, a, b, form, add }.run().unwrap();
                let got = to_f32(&out.download().unwrap());
                // Half a unit in the last of 8 bits.
                check_close(&format!("{what} bf16"), &got, &want, |i| tolerance(i) + want[i].abs() / 256.0);
            }
        }
    }
}

#[test]
fn cuda_gemm_gives_the_same_bits_twice() {
    let Some(gpu) = gpu_or_skip("cuda_gemm_gives_the_same_bits_twice") else { return };
    let [a, b] =
        &[(96, 1), (160, 2)].map(|(cols, seed)| gpu.upload_rows(&values(5000 * cols, seed), cols).unwrap());
    let run = || {
        let mut out = gpu.zeros::<f32>(96 * 160).unwrap();
        Product { out: &mut out, a, b, form: Form::Tn, add: false }.run().unwrap();
        out.download().unwrap()
    };
    assert_eq!(run(), run());
}
