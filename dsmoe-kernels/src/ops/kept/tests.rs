use super::{Columns, FEW_ROWS, Forward, ForwardRows, Kept, PickedRows, Scratch, mask, reference};
use crate::Precision;
use crate::isa::Isa;
use crate::linear;
use crate::matmul::{Mat, Packed};
use crate::testing::{assert_close, assert_same_on_threads, f64s, normals, sized};

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Rounds as the weights and inputs of that precision are.
fn rounded(values: &[f32], precision: Precision) -> Vec<f32> {
    let round = |x: &f32| if precision == Precision::Bf16 { half::bf16::from_f32(*x).to_f32() } else { *x };
    values.iter().map(round).collect()
}

#[test]
fn values_by_hand() {
    // theta 1.5 keeps 3 and 2 of (3, 1, 0.5, -2); W has the rows (1, 10, 100, 1000) and (1, 1, 1, 1).
    let x = [3.0, 1.0, 0.5, -2.0];
    let w = Columns::new(Precision::F32, Mat::new(&[1.0, 10.0, 100.0, 1000.0, 1.0, 1.0, 1.0, 1.0], 2, 4));
    let (mut y, mut scratch) = ([f32::NAN; 2], Scratch::default());
    let kept = Forward {
        ys: [&mut y],
        x: &x,
        ws: [&w],
        thresholds: [1.5],
        biases: [Some(&[0.5, 0.0])],
        rows: 1,
        scratch: &mut scratch,
    }
    .run();
    assert_eq!((y, kept), ([-1996.5, 1.0], [2]));
    // A value at the threshold is not kept, and a NaN is.
    let mut y = [0.0; 3];
    assert_eq!(mask(&mut y, &[1.5, -1.6, f32::NAN], 1.5), 2);
    assert!(y[0] == 0.0 && y[1] == -1.6 && y[2].is_nan());
}

#[test]
fn products_agree_with_the_reference_on_every_tier() {
    for (rows, inputs, outputs) in [
        (1, 1, 1),
        (1, sized(70, 20), 33),
        (3, sized(129, 7), 65),
        (1, sized(576, 9), sized(200, 2)),
        (FEW_ROWS, sized(37, 5), sized(130, 7)),
        (FEW_ROWS + 1, sized(64, 5), sized(70, 33)),
        (0, 5, 5),
        (1, 40, 0),
    ] {
        let (x, w, bias) = (normals(rows * inputs, 1), normals(outputs * inputs, 2), normals(outputs, 3));
        for (isa, precision) in Isa::available().into_iter().flat_map(|isa| PRECISIONS.map(|p| (isa, p))) {
            let columns = Columns::new(precision, Mat::new(&w, outputs, inputs));
            let weights = f64s(&rounded(&w, precision));
            let mut scratch = Scratch::default();
            for threshold in [0.0, 0.7, 100.0] {
                let name = format!("{} {precision} {rows} x [{outputs}, {inputs}], {threshold}", isa.name());
                let mut y = vec![f32::NAN; rows * outputs];
                let kept = Forward {
                    ys: [&mut y],
                    x: &x,
                    ws: [&columns],
                    thresholds: [threshold],
                    biases: [Some(&bias)],
                    rows,
                    scratch: &mut scratch,
                }
                .run_on(isa);
                // The comparison precedes the rounding.
                let masked: Vec<f32> =
                    x.iter().map(|&x| if x.abs() <= threshold { 0.0 } else { x }).collect();
                let want = reference::forward(&f64s(&rounded(&masked, precision)), &weights, inputs, 0.0);
                let want: Vec<f64> =
                    want.iter().zip(bias.iter().cycle()).map(|(y, b)| y + f64::from(*b)).collect();
                assert_close(&name, &y, &want, 3e-6 * (inputs as f64).sqrt());
                assert_eq!(kept, [masked.iter().filter(|x| **x != 0.0).count()], "{name}");
            }
        }
    }
}

#[test]
fn several_layers_with_their_own_thresholds_are_those_layers() {
    const OUTPUTS: [usize; 3] = sized([70, 130, 3], [7, 33, 3]);
    let (inputs, thresholds) = (sized(90, 6), [0.5, 0.5, 1.2]);
    for rows in [1, 2, sized(9, 5)] {
        let x = normals(rows * inputs, 4);
        for precision in PRECISIONS {
            let ws = OUTPUTS.map(|outputs| {
                Columns::new(precision, Mat::new(&normals(outputs * inputs, 5), outputs, inputs))
            });
            let mut together = OUTPUTS.map(|outputs| vec![f32::NAN; rows * outputs]);
            let mut scratch = Scratch::default();
            let counts = Forward {
                ys: together.each_mut().map(|y| &mut y[..]),
                x: &x,
                ws: ws.each_ref(),
                thresholds,
                biases: [None; 3],
                rows,
                scratch: &mut scratch,
            }
            .run();
            for i in 0..3 {
                let mut alone = vec![f32::NAN; rows * OUTPUTS[i]];
                let count = Forward {
                    ys: [&mut alone],
                    x: &x,
                    ws: [&ws[i]],
                    thresholds: [thresholds[i]],
                    biases: [None],
                    rows,
                    scratch: &mut scratch,
                }
                .run();
                assert_eq!(
                    (&together[i], [counts[i]]),
                    (&alone, count),
                    "{rows} rows, layer {i}, {precision}"
                );
            }
        }
    }
}

#[test]
fn many_rows_without_a_threshold_have_the_bits_of_the_linear_layer() {
    let (rows, inputs, outputs) = sized((12, 70, 100), (5, 9, 33));
    let (x, w) = (normals(rows * inputs, 1), normals(outputs * inputs, 2));
    for precision in PRECISIONS {
        let (columns, packed) = (
            Columns::new(precision, Mat::new(&w, outputs, inputs)),
            Packed::new(precision, Mat::new(&w, outputs, inputs)),
        );
        let (mut y, mut want) = (vec![f32::NAN; rows * outputs], vec![f32::NAN; rows * outputs]);
        let scratch = &mut Scratch::default();
        Forward { ys: [&mut y], x: &x, ws: [&columns], thresholds: [0.0], biases: [None], rows, scratch }
            .run();
        linear::ForwardPacked { y: &mut want, x: &x, w: &packed, bias: None, rows }.run();
        assert_eq!(y, want, "{precision}");
    }
}

#[test]
fn picked_rows_agree_with_the_reference_on_every_tier() {
    for &(inputs, outputs) in
        sized::<&[_]>(&[(1, 1), (70, 33), (64, 129), (576, 20), (5, 0)], &[(1, 1), (20, 33), (70, 5), (5, 0)])
    {
        let (x, w, gates, bias) =
            (normals(inputs, 1), normals(outputs * inputs, 2), normals(outputs, 3), normals(outputs, 4));
        for (isa, precision) in Isa::available().into_iter().flat_map(|isa| PRECISIONS.map(|p| (isa, p))) {
            let picked = PickedRows::new(precision, Mat::new(&w, outputs, inputs));
            let (wx, ww) = (f64s(&rounded(&x, precision)), f64s(&rounded(&w, precision)));
            let mut kept = Kept::default();
            kept.list(&gates, 0.4, precision);
            let mut y = vec![f32::NAN; outputs];
            ForwardRows { y: &mut y, x: &x, w: &picked, bias: Some(&bias), kept: &kept }.run_on(isa);
            let want = reference::rows(&wx, &ww, &f64s(&gates), f64::from(0.4f32));
            let want: Vec<f64> = (0..outputs)
                .map(|j| if gates[j].abs() <= 0.4 { 0.0 } else { want[j] + f64::from(bias[j]) })
                .collect();
            let name = format!("{} {precision} [{outputs}, {inputs}]", isa.name());
            assert_close(&name, &y, &want, 3e-6 * (inputs as f64).sqrt());
            let mut all = vec![f32::NAN; 2 * outputs];
            let twice = [&x[..], &x[..]].concat();
            picked.forward_all(&mut all, &twice, None, &mut Scratch::default());
            let want = reference::forward(&f64s(&rounded(&twice, precision)), &ww, inputs, 0.0);
            assert_close(&format!("all, {name}"), &all, &want, 3e-6 * (inputs as f64).sqrt());
        }
    }
}

#[test]
fn pieces_of_rows_make_the_whole_matrix() {
    let (outputs, inputs) = (150, sized(37, 7));
    let (w, x) = (normals(outputs * inputs, 1), normals(inputs, 2));
    for precision in PRECISIONS {
        let mut pieces = Columns::zeros(precision, outputs, inputs);
        for rows in [0..7, 7..100, 100..150] {
            pieces.set_rows(
                rows.start,
                Mat::new(&w[rows.start * inputs..rows.end * inputs], rows.len(), inputs),
            );
        }
        let whole = Columns::new(precision, Mat::new(&w, outputs, inputs));
        let y = [&pieces, &whole].map(|w| {
            let (mut y, mut scratch) = (vec![f32::NAN; outputs], Scratch::default());
            let scratch = &mut scratch;
            Forward { ys: [&mut y], x: &x, ws: [w], thresholds: [0.1], biases: [None], rows: 1, scratch }
                .run();
            y
        });
        assert_eq!(y[0], y[1], "{precision}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (inputs, outputs) = sized((900, 1000), (20, 150));
    let (x, w) = (normals(inputs, 1), normals(outputs * inputs, 2));
    let columns = Columns::new(Precision::Bf16, Mat::new(&w, outputs, inputs));
    assert_same_on_threads("kept", || {
        let (mut y, scratch) = (vec![0.0; outputs], &mut Scratch::default());
        Forward { ys: [&mut y], x: &x, ws: [&columns], thresholds: [0.5], biases: [None], rows: 1, scratch }
            .run();
        y
    });
}

#[test]
#[should_panic(expected = "kept::Forward: x 2, y 3 values for 1 rows of [3, 1]")]
fn wrong_lengths_are_refused() {
    let w = Columns::zeros(Precision::F32, 3, 1);
    let scratch = &mut Scratch::default();
    Forward {
        ys: [&mut [0.0; 3]],
        x: &[0.0; 2],
        ws: [&w],
        thresholds: [0.0],
        biases: [None],
        rows: 1,
        scratch,
    }
    .run();
}
