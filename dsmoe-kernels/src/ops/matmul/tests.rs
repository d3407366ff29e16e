use super::{Mat, Matmul, MatmulPacked, Packed, Precision, reference};
use crate::isa::Isa;
use crate::testing::{assert_close, f64s, normals, sized, with_threads};

const SHAPES: &[(usize, usize, usize)] = sized::<&[_]>(
    &[
        (1, 1, 1),
        (3, 5, 2),
        (1, 64, 33),
        (17, 1, 9),
        (16, 16, 16),
        (65, 31, 130),
        (128, 96, 64),
        (7, 200, 1000),
        (300, 40, 30),
        (0, 4, 3),
        (29, 700, 45),
        (5, 4200, 40),
    ],
    &[(1, 1, 1), (3, 5, 2), (4, 2, 3), (0, 4, 3), (2, 17, 34)],
);

/// Rounds an operand to `precision`.
fn rounded(x: &[f32], precision: Precision) -> Vec<f64> {
    match precision {
        Precision::F32 => f64s(x),
        Precision::Bf16 => x.iter().map(|&x| half::bf16::from_f32(x).to_f64()).collect(),
    }
}

fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    reference::transpose(&f64s(x), rows, cols).into_iter().map(|x| x as f32).collect()
}

#[test]
fn all_layouts_agree_with_the_reference_on_every_tier() {
    for &(m, k, n) in SHAPES {
        let (a, b, c0) = (normals(m * k, 1), normals(k * n, 2), normals(m * n, 3));
        let (at, bt) = (transposed(&a, m, k), transposed(&b, k, n));
        for precision in [Precision::F32, Precision::Bf16] {
            let want = reference::matmul(&rounded(&a, precision), &rounded(&b, precision), m, k, n);
            let added: Vec<f64> = want.iter().zip(f64s(&c0)).map(|(x, y)| x + y).collect();
            for (layout, a, b) in [
                ("nn", Mat::new(&a, m, k), Mat::new(&b, k, n)),
                ("nt", Mat::new(&a, m, k), Mat::new(&bt, n, k).t()),
                ("tn", Mat::new(&at, k, m).t(), Mat::new(&b, k, n)),
                ("tt", Mat::new(&at, k, m).t(), Mat::new(&bt, n, k).t()),
            ] {
                for isa in Isa::available() {
                    let name = format!("{layout} {m}x{k}x{n} {precision} {}", isa.name());
                    let mut c = c0.clone();
                    Matmul { c: &mut c, a, b, accumulate: false, precision }.run_on(isa);
                    assert_close(&name, &c, &want, 3e-6 * (k as f64).sqrt());
                    let mut c = c0.clone();
                    Matmul { c: &mut c, a, b, accumulate: true, precision }.run_on(isa);
                    assert_close(&format!("{name} +="), &c, &added, 3e-6 * (k as f64).sqrt());
                }
            }
        }
    }
}

#[test]
fn packed_weights_give_the_same_bits_as_packing_on_the_way() {
    for &(m, k, n) in SHAPES {
        let (a, w) = (normals(m * k, 1), normals(n * k, 2));
        for precision in [Precision::F32, Precision::Bf16] {
            let packed = Packed::new(precision, Mat::new(&w, n, k));
            for isa in Isa::available() {
                let (mut got, mut want) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
                let (a, b) = (Mat::new(&a, m, k), Mat::new(&w, n, k).t());
                MatmulPacked { c: &mut got, a, w: &packed }.run_on(isa);
                Matmul { c: &mut want, a, b, accumulate: false, precision }.run_on(isa);
                assert!(got == want, "{m}x{k}x{n} {precision} {}", isa.name());
            }
        }
    }
}

#[test]
fn packed_rows_come_back_and_can_be_set_in_pieces() {
    let (n, k) = (75, 9);
    let w = normals(n * k, 1);
    for precision in [Precision::F32, Precision::Bf16] {
        let whole = Packed::new(precision, Mat::new(&w, n, k));
        let mut pieces = Packed::zeros(precision, n, k);
        for (first, end) in [(0, 32), (32, 40), (40, 41), (41, 75)] {
            pieces.set_rows(first, Mat::new(&w[first * k..end * k], end - first, k));
        }
        for packed in [&whole, &pieces] {
            for (j, want) in w.chunks(k).enumerate() {
                let mut row = vec![f32::NAN; k];
                packed.row(j, &mut row);
                assert_eq!(f64s(&row), rounded(want, precision), "{precision} row {j}");
            }
        }
    }
}

#[test]
fn rounding_keeps_what_is_not_finite() {
    let a = [f32::NAN, f32::INFINITY, -f32::NAN, 1.0 + f32::EPSILON];
    let identity: Vec<f32> = (0..16).map(|i| f32::from(i % 5 == 0)).collect();
    for isa in Isa::available() {
        for (i, want) in [f32::NAN, f32::INFINITY, f32::NAN, 1.0].into_iter().enumerate() {
            let mut c = [0.0];
            let (row, col) = (Mat::new(&a[i..=i], 1, 1), Mat::new(&identity[..1], 1, 1));
            Matmul { c: &mut c, a: row, b: col, accumulate: false, precision: Precision::Bf16 }.run_on(isa);
            assert!(c[0] == want || (c[0].is_nan() && want.is_nan()), "{} {want}: {}", isa.name(), c[0]);
        }
    }
}

#[test]
fn strided_rows_are_read_in_place() {
    let wide = normals(5 * 12, 4);
    let b = normals(7 * 3, 5);
    let narrow: Vec<f32> = wide.chunks(12).flat_map(|row| row[..7].to_vec()).collect();
    let [got, want] = [Mat::with_stride(&wide, 5, 7, 12), Mat::new(&narrow, 5, 7)].map(|a| {
        let (mut c, b) = (vec![0.0; 15], Mat::new(&b, 7, 3));
        Matmul { c: &mut c, a, b, accumulate: false, precision: Precision::F32 }.run();
        c
    });
    assert_eq!(got, want);
}

#[test]
fn an_empty_inner_dimension_gives_zero() {
    let (a, b) = (Mat::new(&[], 2, 0), Mat::new(&[], 0, 3));
    for (accumulate, want) in [(true, 1.0), (false, 0.0)] {
        let mut c = vec![1.0; 6];
        Matmul { c: &mut c, a, b, accumulate, precision: Precision::F32 }.run();
        assert_eq!(c, [want; 6]);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    // The small ones have several blocks of columns and of rows.
    for &(m, k, n) in
        sized::<&[_]>(&[(200, 300, 400), (30, 256, 2000), (2000, 64, 48)], &[(2, 17, 70), (60, 2, 9)])
    {
        let (a, b) = (normals(m * k, 1), normals(k * n, 2));
        let run = |threads| {
            with_threads(threads, || {
                let (mut c, a, b) = (vec![0.0; m * n], Mat::new(&a, m, k), Mat::new(&b, k, n));
                Matmul { c: &mut c, a, b, accumulate: false, precision: Precision::F32 }.run();
                c
            })
        };
        let one = run(1);
        for &threads in sized::<&[_]>(&[2, 3, 7], &[2, 3]) {
            assert!(run(threads) == one, "{m}x{k}x{n} on {threads} threads");
        }
    }
}
