use super::{
    BackwardBias, BackwardInput, BackwardWeight, Dims, Forward, ForwardPacked, ForwardPackedEach, reference,
};
use crate::Precision;
use crate::isa::Isa;
use crate::matmul::{Mat, Packed};
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals, sized,
};

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
    assert_close_f64("dx", &dx, &want_dx, 1e-8);
    assert_close_f64("dw", &dw, &want_dw, 1e-8);
    let b = f64s(&normals(4, 4));
    let loss_of_bias = |b: &[f64]| -> f64 {
        let y = reference::with_bias(&reference::forward(&x, &w, dims), b);
        y.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
    };
    let want_db = finite_differences(&b, 1e-5, loss_of_bias);
    assert_close_f64("db", &reference::backward_bias(&dy, dims), &want_db, 1e-8);
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    for &(rows, inputs, outputs) in sized::<&[_]>(
        &[(1, 1, 1), (1, 70, 33), (3, 129, 5), (4, 64, 300), (9, 31, 17), (0, 5, 5)],
        &[(1, 1, 1), (1, 20, 33), (3, 40, 5), (5, 17, 9), (0, 5, 5)],
    ) {
        let dims = Dims { rows, inputs, outputs, precision: Precision::F32 };
        let (x, w, dy) =
            (normals(rows * inputs, 1), normals(outputs * inputs, 2), normals(rows * outputs, 3));
        let want = reference::forward(&f64s(&x), &f64s(&w), dims);
        for isa in Isa::available() {
            let mut y = vec![f32::NAN; rows * outputs];
            Forward { y: &mut y, x: &x, w: &w, bias: None, dims }.run_on(isa);
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

#[test]
fn a_bias_is_added_to_every_row_and_summed_over_them_on_every_tier() {
    for &(rows, inputs, outputs) in sized::<&[_]>(
        &[(0, 3, 4), (1, 70, 33), (3, 129, 5), (9, 31, 17), (900, 8, 65), (50, 4, 5000)],
        &[(0, 3, 4), (1, 20, 33), (3, 9, 5), (20, 2, 12)],
    ) {
        let dims = Dims { rows, inputs, outputs, precision: Precision::F32 };
        let (x, w, dy) =
            (normals(rows * inputs, 1), normals(outputs * inputs, 2), normals(rows * outputs, 3));
        let bias: Vec<f32> = normals(outputs, 4).iter().map(|b| 100.0 * b).collect();
        let packed = Packed::new(Precision::F32, Mat::new(&w, outputs, inputs));
        let want_db: Vec<f64> = reference::backward_bias(&f64s(&dy), dims).iter().map(|x| x + 1.0).collect();
        for isa in Isa::available() {
            let name = format!("{} {dims:?}", isa.name());
            let [mut y, mut want] = [(); 2].map(|()| vec![f32::NAN; rows * outputs]);
            Forward { y: &mut want, x: &x, w: &w, bias: None, dims }.run_on(isa);
            want.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y += b);
            Forward { y: &mut y, x: &x, w: &w, bias: Some(&bias), dims }.run_on(isa);
            assert_eq!(y, want, "{name}");
            ForwardPacked { y: &mut want, x: &x, w: &packed, bias: None, rows }.run_on(isa);
            want.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y += b);
            ForwardPacked { y: &mut y, x: &x, w: &packed, bias: Some(&bias), rows }.run_on(isa);
            assert_eq!(y, want, "packed {name}");
            let mut db = vec![1.0; outputs];
            BackwardBias { db: &mut db, dy: &dy, dims }.run_on(isa);
            assert_close(&format!("db {name}"), &db, &want_db, 2e-6);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit_of_the_bias() {
    let (rows, inputs, outputs) = sized((700, 3, 500), (20, 2, 33));
    let dims = Dims { rows, inputs, outputs, precision: Precision::F32 };
    let (dy, x, w) = (normals(rows * outputs, 1), normals(rows * inputs, 2), normals(outputs * inputs, 3));
    assert_same_on_threads("linear bias", || {
        let (mut db, mut y) = (vec![0.0; outputs], vec![0.0; rows * outputs]);
        BackwardBias { db: &mut db, dy: &dy, dims }.run();
        Forward { y: &mut y, x: &x, w: &w, bias: Some(&db), dims }.run();
        (db, y)
    });
}

#[test]
#[should_panic(expected = "linear::Forward: bias of 2 values for 3 outputs")]
fn a_bias_of_another_length_is_refused() {
    let dims = Dims { rows: 1, inputs: 1, outputs: 3, precision: Precision::F32 };
    Forward { y: &mut [0.0; 3], x: &[0.0], w: &[0.0; 3], bias: Some(&[0.0; 2]), dims }.run();
}

#[test]
fn several_layers_of_one_input_are_those_layers() {
    const OUTPUTS: [usize; 3] = sized([70, 0, 33], [33, 0, 3]);
    for &(rows, inputs) in
        sized::<&[_]>(&[(1, 65), (3, 2100), (40, 31), (2, 0), (0, 7)], &[(1, 9), (3, 5), (2, 0), (0, 7)])
    {
        let x = normals(rows * inputs, 1);
        let ws = OUTPUTS.map(|outputs| normals(outputs * inputs, 2));
        let biases = OUTPUTS.map(|outputs| normals(outputs, 3));
        for (isa, precision) in Isa::available()
            .into_iter()
            .flat_map(|isa| [Precision::F32, Precision::Bf16].map(|precision| (isa, precision)))
        {
            let packed: [Packed; 3] =
                std::array::from_fn(|i| Packed::new(precision, Mat::new(&ws[i], OUTPUTS[i], inputs)));
            let biases = [Some(&biases[0][..]), None, Some(&biases[2][..])];
            let mut together = OUTPUTS.map(|outputs| vec![f32::NAN; rows * outputs]);
            let ys = together.each_mut().map(|y| &mut y[..]);
            ForwardPackedEach { ys, x: &x, ws: packed.each_ref(), biases, rows }.run_on(isa);
            for i in 0..3 {
                let mut alone = vec![f32::NAN; rows * OUTPUTS[i]];
                ForwardPacked { y: &mut alone, x: &x, w: &packed[i], bias: biases[i], rows }.run_on(isa);
                assert_eq!(together[i], alone, "{rows} rows of {inputs}, layer {i}, {}", isa.name());
            }
        }
    }
}

/// An answer must not depend on the texts that are computed beside it.
#[test]
fn the_rows_beside_a_row_do_not_change_a_bit() {
    const ALL: usize = sized(70, 6);
    for &(inputs, outputs) in sized::<&[_]>(&[(2100, 37), (40, 300)], &[(5, 33)]) {
        let (x, w) = (normals(ALL * inputs, 1), normals(outputs * inputs, 2));
        for (isa, precision) in Isa::available()
            .into_iter()
            .flat_map(|isa| [Precision::F32, Precision::Bf16].map(|precision| (isa, precision)))
        {
            let packed = Packed::new(precision, Mat::new(&w, outputs, inputs));
            let of = |rows: usize| {
                let [mut plain, mut y] = [(); 2].map(|()| vec![f32::NAN; rows * outputs]);
                let (x, dims) = (&x[..rows * inputs], Dims { rows, inputs, outputs, precision });
                Forward { y: &mut plain, x, w: &w, bias: None, dims }.run_on(isa);
                ForwardPacked { y: &mut y, x, w: &packed, bias: None, rows }.run_on(isa);
                (plain, y)
            };
            let all = of(ALL);
            for rows in [1, 2, 4, 5, 8, 9, 16, 33, 64].into_iter().filter(|rows| *rows < ALL) {
                let (plain, y) = of(rows);
                let name = format!("{rows} of {ALL} rows of {inputs}, {precision:?}, {}", isa.name());
                assert!(plain == all.0[..rows * outputs], "{name}");
                assert!(y == all.1[..rows * outputs] && y == plain, "packed, {name}");
            }
        }
    }
}
