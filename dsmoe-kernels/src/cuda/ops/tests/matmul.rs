use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::cuda::ops::matmul::{Gemm, gemm_bf16, gemm_f32, plain};

fn reference(a: &[f64], b: &[f64], gemm: Gemm, before: &[f32]) -> Vec<f64> {
    let mut out: Vec<f64> = before.iter().map(|&x| if gemm.beta_one { f64::from(x) } else { 0.0 }).collect();
    for i in 0..gemm.m {
        for j in 0..gemm.n {
            for l in 0..gemm.k {
                let x = if gemm.a_transposed { a[l * gemm.lda + i] } else { a[i * gemm.lda + l] };
                let y = if gemm.b_transposed { b[j * gemm.ldb + l] } else { b[l * gemm.ldb + j] };
                out[i * gemm.ldc + j] += x * y;
            }
        }
    }
    out
}

#[test]
fn cuda_gemm_is_the_product() {
    let Some(gpu) = gpu_or_skip("cuda_gemm_is_the_product") else { return };
    let shapes =
        [(1, 1, 1), (3, 5, 7), (64, 48, 32), (129, 96, 40), (33, 1, 17), (1, 200, 64), (63, 130, 257)];
    for (m, n, k) in shapes {
        let forms = [Gemm::nn(m, n, k), Gemm::nt(m, n, k), Gemm::tn(m, n, k)];
        for (form, add) in forms.into_iter().flat_map(|form| [(form, false), (form, true)]) {
            let gemm = Gemm { beta_one: add, ..form };
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let before = to_f32(&values(m * n, 3));
            let want = reference(&to_f64(&a), &to_f64(&b), gemm, &before);
            let (da, db) = (gpu.upload(&a).unwrap(), gpu.upload(&b).unwrap());
            // Sums of k products of at most 1, in f32.
            let tolerance = |_| 2.0 * (k + 1) as f64 * f64::from(f32::EPSILON);
            for ours in [false, true] {
                let mut out = gpu.upload(&before).unwrap();
                match ours {
                    false => gemm_f32(&gpu, out.view_mut(), da.view(), db.view(), gemm).unwrap(),
                    true => plain(&gpu, out.view_mut(), da.view(), db.view(), gemm, true).unwrap(),
                }
                check_close(
                    &format!("{gemm:?} f32, ours {ours}"),
                    &out.download().unwrap(),
                    &want,
                    tolerance,
                );
            }
            if !add {
                let mut out = gpu.zeros::<half::bf16>(m * n).unwrap();
                gemm_bf16(&gpu, out.view_mut(), da.view(), db.view(), gemm).unwrap();
                let got = to_f32(&out.download().unwrap());
                // Half a unit in the last of 8 bits.
                check_close(&format!("{gemm:?} bf16"), &got, &want, |i| tolerance(i) + want[i].abs() / 256.0);
            }
        }
    }
}

#[test]
fn cuda_gemm_gives_the_same_bits_twice() {
    let Some(gpu) = gpu_or_skip("cuda_gemm_gives_the_same_bits_twice") else { return };
    let gemm = Gemm::tn(96, 160, 5000);
    let (a, b) = (gpu.upload(&values(96 * 5000, 1)).unwrap(), gpu.upload(&values(160 * 5000, 2)).unwrap());
    let run = || {
        let mut out = gpu.zeros::<f32>(96 * 160).unwrap();
        gemm_f32(&gpu, out.view_mut(), a.view(), b.view(), gemm).unwrap();
        out.download().unwrap()
    };
    assert_eq!(run(), run());
}
