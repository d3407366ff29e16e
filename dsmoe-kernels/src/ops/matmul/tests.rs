use super::{Mat, matmul, reference};
use crate::testing::{assert_close, f64s, normals, with_threads};

const SHAPES: [(usize, usize, usize); 10] = [
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
];

#[test]
fn all_layouts_agree_with_the_reference() {
    for (m, k, n) in SHAPES {
        let (a, b, c0) = (normals(m * k, 1), normals(k * n, 2), normals(m * n, 3));
        let want = reference::matmul(&f64s(&a), &f64s(&b), m, k, n);
        let added: Vec<f64> = want.iter().zip(f64s(&c0)).map(|(x, y)| x + y).collect();
        let transposed = |x: &[f32], r, c| {
            reference::transpose(&f64s(x), r, c).into_iter().map(|x| x as f32).collect::<Vec<_>>()
        };
        let (at, bt) = (transposed(&a, m, k), transposed(&b, k, n));
        for (layout, a, b) in [
            ("nn", Mat::new(&a, m, k), Mat::new(&b, k, n)),
            ("nt", Mat::new(&a, m, k), Mat::new(&bt, n, k).t()),
            ("tn", Mat::new(&at, k, m).t(), Mat::new(&b, k, n)),
        ] {
            let mut c = c0.clone();
            matmul(&mut c, a, b, false);
            assert_close(&format!("{layout} {m}x{k}x{n}"), &c, &want, 3e-6 * (k as f64).sqrt());
            let mut c = c0.clone();
            matmul(&mut c, a, b, true);
            assert_close(&format!("{layout} {m}x{k}x{n} +="), &c, &added, 3e-6 * (k as f64).sqrt());
        }
    }
}

#[test]
fn strided_rows_are_read_in_place() {
    let wide = normals(5 * 12, 4);
    let b = normals(7 * 3, 5);
    let narrow: Vec<f32> = wide.chunks(12).flat_map(|row| row[..7].to_vec()).collect();
    let (mut got, mut want) = (vec![0.0; 15], vec![0.0; 15]);
    matmul(&mut got, Mat::with_stride(&wide, 5, 7, 12), Mat::new(&b, 7, 3), false);
    matmul(&mut want, Mat::new(&narrow, 5, 7), Mat::new(&b, 7, 3), false);
    assert_eq!(got, want);
}

#[test]
fn an_empty_inner_dimension_gives_zero() {
    let mut c = vec![1.0; 6];
    matmul(&mut c, Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), true);
    assert_eq!(c, [1.0; 6]);
    matmul(&mut c, Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), false);
    assert_eq!(c, [0.0; 6]);
}

#[test]
fn threads_do_not_change_a_bit() {
    for (m, k, n) in [(200, 300, 400), (30, 256, 2000), (2000, 64, 48)] {
        let (a, b) = (normals(m * k, 1), normals(k * n, 2));
        let run = |threads| {
            with_threads(threads, || {
                let mut c = vec![0.0; m * n];
                matmul(&mut c, Mat::new(&a, m, k), Mat::new(&b, k, n), false);
                c
            })
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert!(run(threads) == one, "{m}x{k}x{n} on {threads} threads");
        }
    }
}
