use super::{Hyper, Step, reference, sum_of_squares};
use crate::isa::Isa;
use crate::testing::{assert_close, assert_close_f64, assert_same_on_threads, f64s, normals, sized};

const HYPER: Hyper = Hyper { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };

#[test]
fn the_hand_example_comes_out() {
    // The first step's moments, corrected, are g and g^2: p - lr p wd - lr g / (|g| + eps).
    let (mut p, mut m, mut v) = ([2.0, -1.0, 3.0], [0.0; 3], [0.0; 3]);
    reference::step(&mut p, &mut m, &mut v, &[4.0, -0.5, 0.0], 0.5, &HYPER);
    assert_close_f64("p", &p, &[2.0 - 2e-4 - 1e-3, -1.0 + 1e-4 + 1e-3, 3.0 - 3e-4], 1e-10);
    assert_close_f64("m", &m, &[0.2, -0.025, 0.0], 1e-15);
    assert_close_f64("v", &v, &[0.2, 0.003_125, 0.0], 1e-15);
}

#[test]
fn twenty_steps_agree_with_the_reference_on_every_tier() {
    for n in [0, 1, 17, sized(30_000, 80)] {
        let start = normals(n, 1);
        for isa in Isa::available() {
            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; n], vec![0.0; n]);
            let (mut want_p, mut want_m, mut want_v) = (f64s(&p), vec![0.0; n], vec![0.0; n]);
            for number in 1..=20 {
                let grad = normals(n, 1 + number);
                let hyper = Hyper { step: number, ..HYPER };
                Step { param: &mut p, m: &mut m, v: &mut v, grad: &grad, grad_scale: 0.25, hyper: &hyper }
                    .run_on(isa);
                reference::step(&mut want_p, &mut want_m, &mut want_v, &f64s(&grad), 0.25, &hyper);
            }
            assert_close(&format!("p {} {n}", isa.name()), &p, &want_p, 1e-6);
            assert_close(&format!("m {} {n}", isa.name()), &m, &want_m, 2e-7);
            assert_close(&format!("v {} {n}", isa.name()), &v, &want_v, 2e-7);
        }
    }
}

#[test]
fn the_bias_correction_survives_many_steps() {
    let (mut p, mut m, mut v) = ([1.0], [0.5], [0.25]);
    let hyper = Hyper { step: 5_000_000_000, weight_decay: 0.0, ..HYPER };
    Step { param: &mut p, m: &mut m, v: &mut v, grad: &[0.5], grad_scale: 1.0, hyper: &hyper }.run();
    assert_close("p", &p, &[1.0 - 1e-3], 1e-7);
}

#[test]
fn squares_are_summed_in_f64() {
    for n in [0, 1, 9, sized(50_000, 1000)] {
        let x = normals(n, 1);
        let want: f64 = f64s(&x).iter().map(|x| x * x).sum();
        assert_close_f64("sum", &[sum_of_squares(&x)], &[want], 1e-13);
    }
    assert!(sum_of_squares(&[3e30, 4e30]).sqrt() > 4.99e30);
    assert!(sum_of_squares(&[1.0, f32::NAN]).is_nan());
}

#[test]
fn threads_do_not_change_a_bit() {
    let n = sized(200_001, 201);
    let (grad, start) = (normals(n, 1), normals(n, 2));
    assert_same_on_threads("adamw", || {
        let (mut p, mut m, mut v) = (start.clone(), start.clone(), vec![0.5; start.len()]);
        Step { param: &mut p, m: &mut m, v: &mut v, grad: &grad, grad_scale: 1.0, hyper: &HYPER }.run();
        (p, m, v, sum_of_squares(&grad))
    });
}
