use super::{Backward, Forward, reference};
use crate::isa::Isa;
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals,
};

#[test]
fn the_reference_gradient_is_the_derivative() {
    let (a, b, dc) = (f64s(&normals(9, 1)), f64s(&normals(9, 2)), f64s(&normals(9, 3)));
    let loss = |a: &[f64], b: &[f64]| -> f64 {
        reference::forward(a, b).iter().zip(&dc).map(|(c, dc)| c * dc).sum()
    };
    let (da, db) = reference::backward(&dc, &a, &b);
    assert_close_f64("da", &da, &finite_differences(&a, 1e-5, |a| loss(a, &b)), 1e-9);
    assert_close_f64("db", &db, &finite_differences(&b, 1e-5, |b| loss(&a, b)), 1e-9);
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    for n in [0, 1, 15, 16, 33, 20_001] {
        let (a, b, dc) = (normals(n, 1), normals(n, 2), normals(n, 3));
        let want = reference::forward(&f64s(&a), &f64s(&b));
        let (want_da, want_db) = reference::backward(&f64s(&dc), &f64s(&a), &f64s(&b));
        for isa in Isa::available() {
            let [mut c, mut da, mut db] = [(); 3].map(|()| vec![f32::NAN; n]);
            Forward { c: &mut c, a: &a, b: &b }.run_on(isa);
            Backward { da: &mut da, db: &mut db, dc: &dc, a: &a, b: &b }.run_on(isa);
            assert_close(&format!("c {} {n}", isa.name()), &c, &want, 3e-7);
            assert_close(&format!("da {} {n}", isa.name()), &da, &want_da, 3e-7);
            assert_close(&format!("db {} {n}", isa.name()), &db, &want_db, 3e-7);
        }
    }
}

#[test]
fn large_inputs_saturate_and_nan_stays() {
    for isa in Isa::available() {
        let mut c = [0.0; 3];
        Forward { c: &mut c, a: &[200.0, -200.0, f32::NAN], b: &[2.0, 2.0, 2.0] }.run_on(isa);
        assert!(c[0] == 400.0 && c[1].abs() < 1e-30 && c[2].is_nan(), "{c:?}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let n = 100_000;
    let (a, b, dc) = (normals(n, 1), normals(n, 2), normals(n, 3));
    assert_same_on_threads("swiglu", || {
        let [mut c, mut da, mut db] = [(); 3].map(|()| vec![0.0; n]);
        Forward { c: &mut c, a: &a, b: &b }.run();
        Backward { da: &mut da, db: &mut db, dc: &dc, a: &a, b: &b }.run();
        [c, da, db]
    });
}
