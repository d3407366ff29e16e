use super::{Add, Scale, Sum, reference};
use crate::isa::Isa;
use crate::testing::{assert_close, assert_same_on_threads, f64s, normals, sized};

#[test]
fn sums_are_exact_to_rounding_on_every_tier() {
    for n in [0, 1, 7, 16, 33, sized(40_000, 150)] {
        let (a, b) = (normals(n, 1), normals(n, 2));
        let want: Vec<f32> = reference::sum(&f64s(&a), &f64s(&b), 1.0).iter().map(|&x| x as f32).collect();
        for isa in Isa::available() {
            let mut y = a.clone();
            Add { y: &mut y, x: &b, scale: 1.0 }.run_on(isa);
            assert_eq!(y, want, "{} {n}", isa.name());
            let mut out = vec![f32::NAN; n];
            Sum { out: &mut out, a: &a, b: &b }.run_on(isa);
            assert_eq!(out, want, "{} {n}", isa.name());
        }
    }
}

#[test]
fn scaled_sums_agree_with_the_reference_on_every_tier() {
    for n in [0, 1, 7, 16, 33, sized(40_000, 150)] {
        let (a, b) = (normals(n, 1), normals(n, 2));
        let scaled: Vec<f32> = b.iter().map(|b| 0.22 * b).collect();
        let want = reference::sum(&f64s(&a), &f64s(&b), f64::from(0.22_f32));
        for isa in Isa::available() {
            let (mut y, mut product) = (a.clone(), vec![f32::NAN; n]);
            Add { y: &mut y, x: &b, scale: 0.22 }.run_on(isa);
            assert_close(&format!("{} {n}", isa.name()), &y, &want, 1e-7);
            Scale { y: &mut product, x: &b, scale: 0.22 }.run_on(isa);
            assert_eq!(product, scaled, "{} {n}", isa.name());
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let n = sized(100_000, 200);
    let (a, b) = (normals(n, 1), normals(n, 2));
    assert_same_on_threads("add", || {
        let mut out = vec![0.0; a.len()];
        Sum { out: &mut out, a: &a, b: &b }.run();
        out
    });
}

#[test]
#[should_panic(expected = "add::Add: y 2 values, x 3")]
fn other_lengths_are_refused() {
    Add { y: &mut [0.0; 2], x: &[0.0; 3], scale: 1.0 }.run();
}
