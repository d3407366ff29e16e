use super::{BackwardInput, BackwardWeight, Dims, Forward, reference};
use crate::Precision;
use crate::isa::Isa;
use crate::testing::{assert_close, f64s, finite_differences, normals};

#[test]
fn the_reference_gradient_is_the_derivative() {
    let dims = Dims { rows: 2, inputs: 3, outputs: 4, precision: Precision::F32 };
    let (x, w, dy) = (f64s(&normals(6, 1)), f64s(&normals(12, 2)), f64s(&normals(8, 3)));
    let loss = |x: &[f64], w: &[f64]| -> f64 {
        reference::forward(x, w, dims).iter().zip(&dy).map(|(y, dy)| y * dy).sum()
    };
    let (dx, dw) = reference::backward(&dy, &x, &w, dims);
    let want_dx = finite_differences(&x, 1e-5, |x| loss(x, &w));
    let want_dw = finite_differences(&w, 1e-5, |w| loss(&x, w));
    crate::testing::assert_close_f64("dx", &dx, &want_dx, 1e-8);
    crate::testing::assert_close_f64("dw", &dw, &want_dw, 1e-8);
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    for (rows, inputs, outputs) in [(1, 1, 1), (1, 70, 33), (3, 129, 5), (4, 64, 300), (9, 31, 17), (0, 5, 5)]
    {
        let dims = Dims { rows, inputs, outputs, precision: Precision::F32 };
        let (x, w, dy) =
            (normals(rows * inputs, 1), normals(outputs * inputs, 2), normals(rows * outputs, 3));
        let want = reference::forward(&f64s(&x), &f64s(&w), dims);
        for isa in Isa::available() {
            let mut y = vec![f32::NAN; rows * outputs];
            Forward { y: &mut y, x: &x, w: &w, dims }.run_on(isa);
            assert_close(&format!("y {} {dims:?}", isa.name()), &y, &want, 3e-6 * (inputs as f64).sqrt());
        }
        let (want_dx, want_dw) = reference::backward(&f64s(&dy), &f64s(&x), &f64s(&w), dims);
        let mut dx = vec![f32::NAN; rows * inputs];
        BackwardInput { dx: &mut dx, dy: &dy, w: &w, dims, add: false }.run();
        assert_close("dx", &dx, &want_dx, 3e-6 * (outputs as f64).sqrt());
        let doubled: Vec<f64> = want_dx.iter().map(|x| 2.0 * x).collect();
        BackwardInput { dx: &mut dx, dy: &dy, w: &w, dims, add: true }.run();
        assert_close("dx added", &dx, &doubled, 6e-6 * (outputs as f64).sqrt());
        let mut dw = vec![1.0; outputs * inputs];
        BackwardWeight { dw: &mut dw, dy: &dy, x: &x, dims }.run();
        let want_dw: Vec<f64> = want_dw.iter().map(|x| x + 1.0).collect();
        assert_close("dw", &dw, &want_dw, 3e-6 * (rows.max(1) as f64).sqrt());
    }
}
