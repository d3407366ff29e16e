use super::{Activation, Backward, Forward, reference};
use crate::isa::Isa;
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals, sized,
};

const ACTIVATIONS: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

#[test]
fn the_hand_examples_come_out() {
    let at = |activation| [-1.0, 0.0, 0.5, 2.0].map(|x| reference::value(activation, x));
    let silu = [-0.268_941_421_37, 0.0, 0.311_229_665_60, 1.761_594_155_96];
    assert_close_f64("silu", &at(Activation::Silu), &silu, 1e-10);
    let gelu = [-0.158_808_009_36, 0.0, 0.345_714_009_83, 1.954_597_694_09];
    assert_close_f64("gelu", &at(Activation::GeluTanh), &gelu, 1e-10);
}

#[test]
fn the_reference_gradient_is_the_derivative() {
    for activation in ACTIVATIONS {
        check_reference_gradient(activation);
    }
}

fn check_reference_gradient(activation: Activation) {
    let (a, b, dc) = (f64s(&normals(9, 1)), f64s(&normals(9, 2)), f64s(&normals(9, 3)));
    let loss = |a: &[f64], b: &[f64]| -> f64 {
        reference::forward(a, b, activation).iter().zip(&dc).map(|(c, dc)| c * dc).sum()
    };
    let (da, db) = reference::backward(&dc, &a, &b, activation);
    assert_close_f64("da", &da, &finite_differences(&a, 1e-5, |a| loss(a, &b)), 1e-9);
    assert_close_f64("db", &db, &finite_differences(&b, 1e-5, |b| loss(&a, b)), 1e-9);
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    let sizes = [0, 1, 15, 16, 33, sized(20_001, 81)];
    for (n, activation) in sizes.into_iter().flat_map(|n| ACTIVATIONS.map(|a| (n, a))) {
        let (a, b, dc) = (normals(n, 1), normals(n, 2), normals(n, 3));
        let want = reference::forward(&f64s(&a), &f64s(&b), activation);
        let (want_da, want_db) = reference::backward(&f64s(&dc), &f64s(&a), &f64s(&b), activation);
        for isa in Isa::available() {
            let [mut c, mut da, mut db] = [(); 3].map(|()| vec![f32::NAN; n]);
            Forward { c: &mut c, a: &a, b: &b, activation }.run_on(isa);
            Backward { da: &mut da, db: &mut db, dc: &dc, a: &a, b: &b, activation }.run_on(isa);
            assert_close(&format!("c {} {n}", isa.name()), &c, &want, 3e-7);
            assert_close(&format!("da {} {n}", isa.name()), &da, &want_da, 3e-7);
            assert_close(&format!("db {} {n}", isa.name()), &db, &want_db, 3e-7);
        }
    }
}

#[test]
fn large_inputs_saturate_and_nan_stays() {
    for (isa, activation) in Isa::available().into_iter().flat_map(|isa| ACTIVATIONS.map(|a| (isa, a))) {
        let (mut c, mut da, mut db) = ([0.0; 3], [0.0; 5], [0.0; 5]);
        Forward { c: &mut c, a: &[200.0, -200.0, f32::NAN], b: &[2.0; 3], activation }.run_on(isa);
        assert!(c[0] == 400.0 && c[1].abs() < 1e-30 && c[2].is_nan(), "{c:?}");
        let a = [1e20, 30.0, -30.0, -200.0, f32::NAN];
        Backward { da: &mut da, db: &mut db, dc: &[1.0; 5], a: &a, b: &[2.0; 5], activation }.run_on(isa);
        assert!(
            da[..2] == [2.0; 2] && da[2].abs() < 1e-10 && da[3].abs() < 1e-30 && da[4].is_nan(),
            "{da:?}"
        );
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (n, activation) = (sized(100_000, 100), Activation::GeluTanh);
    let (a, b, dc) = (normals(n, 1), normals(n, 2), normals(n, 3));
    assert_same_on_threads("swiglu", || {
        let [mut c, mut da, mut db] = [(); 3].map(|()| vec![0.0; n]);
        Forward { c: &mut c, a: &a, b: &b, activation }.run();
        Backward { da: &mut da, db: &mut db, dc: &dc, a: &a, b: &b, activation }.run();
        [c, da, db]
    });
}
