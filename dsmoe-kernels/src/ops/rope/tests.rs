use super::reference::{Rotation, frequencies};
use super::{Args, Backward, Forward, Table};
use crate::isa::Isa;
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals, sized,
};

#[test]
fn the_reference_gradient_is_the_derivative() {
    for (head_dim, factor) in [(6, 1.0), (8, 1.3)] {
        let f = frequencies(6, 100.0);
        let rotation = Rotation { frequencies: &f, factor, positions: &[3, 11], heads: 2, head_dim };
        let (x, dy) = (f64s(&normals(4 * head_dim, 1)), f64s(&normals(4 * head_dim, 2)));
        let loss = |x: &[f64]| -> f64 { rotation.forward(x).iter().zip(&dy).map(|(y, dy)| y * dy).sum() };
        let want = finite_differences(&x, 1e-3, loss);
        assert_close_f64("dx", &rotation.backward(&dy), &want, 1e-10);
    }
}

#[test]
fn the_hand_example_comes_out() {
    // Four rotated values, base 100: frequencies 1 and 0.1. Position 2 turns (x0, x2) by 2 and (x1, x3) by 0.2, and
    // leaves the rest of the head alone.
    let f = frequencies(4, 100.0);
    assert_close_f64("frequencies", &f, &[1.0, 0.1], 1e-15);
    let rotation = Rotation { frequencies: &f, factor: 0.5, positions: &[2], heads: 1, head_dim: 5 };
    let want = [-0.416_146_836_5, 0.980_066_577_8, 0.909_297_426_8, 0.198_669_330_8, 3.0];
    let want = [want[0] / 2.0, want[1] / 2.0, want[2] / 2.0, want[3] / 2.0, want[4]];
    assert_close_f64("y", &rotation.forward(&[1.0, 1.0, 0.0, 0.0, 3.0]), &want, 1e-9);
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    let shapes = [
        (0, 3, 1, 2, 2, 0),
        (1, 1, 1, 2, 2, 9),
        (2, 5, 3, 8, 8, 0),
        (2, 5, 3, 9, 6, 0),
        sized((3, 7, 2, 80, 80, 600), (1, 3, 2, 20, 20, 600)),
        sized((3, 7, 2, 80, 60, 600), (1, 3, 2, 20, 12, 600)),
        (1, 4, 2, 12, 0, 3),
        sized((2, 40, 5, 64, 64, 250), (1, 12, 2, 16, 16, 250)),
    ];
    for (batch, seq, heads, head_dim, width, start) in shapes {
        for factor in [1.0, 1.375] {
            let f = frequencies(width, 1e4);
            let table = Table::new(f.clone(), factor, 700);
            assert_eq!(table.positions(), 700);
            let x = normals(batch * seq * heads * head_dim, 1);
            let positions: Vec<usize> = (0..batch * seq).map(|r| start + r % seq).collect();
            let rotation = Rotation { frequencies: &f, factor, positions: &positions, heads, head_dim };
            let (want, want_dx) = (rotation.forward(&f64s(&x)), rotation.backward(&f64s(&x)));
            for isa in Isa::available() {
                let args = Args { table: &table, seq, start, heads, head_dim };
                let (mut y, mut dx) = (x.clone(), x.clone());
                Forward { x: &mut y, stride: args.width(), args }.run_on(isa);
                Backward { dx: &mut dx, stride: heads * head_dim, args }.run_on(isa);
                assert_close(&format!("y {} {head_dim} {width}", isa.name()), &y, &want, 3e-7);
                assert_close(&format!("dx {} {head_dim} {width}", isa.name()), &dx, &want_dx, 3e-7);
            }
        }
    }
}

#[test]
fn columns_past_the_heads_are_left_alone() {
    let (seq, heads, head_dim, stride) = (9, 3, 8, 31);
    let table = Table::new(frequencies(head_dim, 1e4), 1.0, seq);
    let args = Args { table: &table, seq, start: 0, heads, head_dim };
    let x = normals(2 * seq * stride, 1);
    let columns = |x: &[f32]| -> Vec<f32> { x.chunks(stride).flat_map(|x| x[..24].to_vec()).collect() };
    let rest = |x: &[f32]| -> Vec<f32> { x.chunks(stride).flat_map(|x| x[24..].to_vec()).collect() };
    let mut want = columns(&x);
    Forward { x: &mut want, stride: args.width(), args }.run();
    let mut y = x.clone();
    Forward { x: &mut y, stride, args }.run();
    assert_eq!((columns(&y), rest(&y)), (want, rest(&x)));
    Backward { dx: &mut y, stride, args }.run();
    assert_close("back", &y, &f64s(&x), 1e-6);
}

#[test]
fn threads_do_not_change_a_bit() {
    let (seq, heads, head_dim) = sized((300, 4, 32), (12, 2, 16));
    let x = normals(2 * seq * heads * head_dim, 1);
    assert_same_on_threads("rope", || {
        let table = Table::new(frequencies(head_dim, 1e4), 1.0, seq);
        let mut y = x.clone();
        let args = Args { table: &table, seq, start: 0, heads, head_dim };
        Forward { x: &mut y, stride: args.width(), args }.run();
        y
    });
}

#[test]
#[should_panic(expected = "rope::Forward: position 10 of 10")]
fn a_position_past_the_table_is_refused() {
    let table = Table::new(frequencies(2, 1e4), 1.0, 10);
    let args = Args { table: &table, seq: 2, start: 9, heads: 1, head_dim: 2 };
    Forward { x: &mut [0.0; 4], stride: args.width(), args }.run();
}

#[test]
#[should_panic(expected = "rope::Backward: 2 frequencies for heads of 3")]
fn a_table_wider_than_a_head_is_refused() {
    let table = Table::new(frequencies(4, 1e4), 1.0, 10);
    let args = Args { table: &table, seq: 1, start: 0, heads: 1, head_dim: 3 };
    Backward { dx: &mut [0.0; 3], stride: args.width(), args }.run();
}
