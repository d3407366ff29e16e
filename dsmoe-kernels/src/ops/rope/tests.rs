use super::{Args, Backward, Forward, Scaling, Table, frequencies, reference};
use crate::isa::Isa;
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals,
};

const LLAMA3: Scaling = Scaling::Llama3 {
    factor: 8.0,
    low_freq_factor: 1.0,
    high_freq_factor: 4.0,
    original_max_position: 8192.0,
};

#[test]
fn the_reference_gradient_is_the_derivative() {
    let f = frequencies(6, 100.0, Scaling::None);
    let (x, dy) = (f64s(&normals(24, 1)), f64s(&normals(24, 2)));
    let loss = |x: &[f64]| -> f64 {
        reference::forward(x, &f, &[3, 11], 2).iter().zip(&dy).map(|(y, dy)| y * dy).sum()
    };
    let want = finite_differences(&x, 1e-3, loss);
    assert_close_f64("dx", &reference::backward(&dy, &f, &[3, 11], 2), &want, 1e-10);
}

#[test]
fn the_hand_example_comes_out() {
    // head_dim 4, theta 100: frequencies 1 and 0.1. Position 2 turns (x0, x2) by 2 and (x1, x3) by 0.2.
    let f = frequencies(4, 100.0, Scaling::None);
    assert_close_f64("frequencies", &f, &[1.0, 0.1], 1e-15);
    let y = reference::forward(&[1.0, 1.0, 0.0, 0.0], &f, &[2], 1);
    let want = [-0.416_146_836_5, 0.980_066_577_8, 0.909_297_426_8, 0.198_669_330_8];
    assert_close_f64("y", &y, &want, 1e-9);
}

#[test]
fn llama3_scaling_keeps_short_waves_and_stretches_long_ones() {
    let (plain, scaled) = (frequencies(128, 5e5, Scaling::None), frequencies(128, 5e5, LLAMA3));
    let wavelength = |f: f64| 2.0 * std::f64::consts::PI / f;
    let mut between = 0;
    for (f, g) in plain.iter().zip(&scaled) {
        match wavelength(*f) {
            short if short < 2048.0 => assert_eq!(f, g),
            long if long > 8192.0 => assert_eq!(f / 8.0, *g),
            _ => {
                between += 1;
                assert!(f / 8.0 < *g && g < f);
            }
        }
    }
    assert!(between > 0);
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    for (batch, seq, heads, head_dim, start) in
        [(0, 3, 1, 2, 0), (1, 1, 1, 2, 9), (2, 5, 3, 8, 0), (3, 7, 2, 80, 600), (2, 40, 5, 64, 250)]
    {
        for scaling in [Scaling::None, LLAMA3] {
            let table = Table::new(head_dim, 1e4, scaling, 700);
            assert_eq!(table.positions(), 700);
            let x = normals(batch * seq * heads * head_dim, 1);
            let f = frequencies(head_dim, 1e4, scaling);
            let positions: Vec<usize> = (0..batch * seq).map(|r| start + r % seq).collect();
            let want = reference::forward(&f64s(&x), &f, &positions, heads);
            let want_dx = reference::backward(&f64s(&x), &f, &positions, heads);
            for isa in Isa::available() {
                let args = Args { table: &table, seq, start, heads };
                let (mut y, mut dx) = (x.clone(), x.clone());
                Forward { x: &mut y, stride: args.width(), args }.run_on(isa);
                Backward { dx: &mut dx, stride: heads * head_dim, args }.run_on(isa);
                assert_close(&format!("y {} {head_dim}", isa.name()), &y, &want, 3e-7);
                assert_close(&format!("dx {} {head_dim}", isa.name()), &dx, &want_dx, 3e-7);
            }
        }
    }
}

#[test]
fn columns_past_the_heads_are_left_alone() {
    let (seq, heads, head_dim, stride) = (9, 3, 8, 31);
    let table = Table::new(head_dim, 1e4, Scaling::None, seq);
    let args = Args { table: &table, seq, start: 0, heads };
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
    let x = normals(2 * 300 * 4 * 32, 1);
    assert_same_on_threads("rope", || {
        let table = Table::new(32, 1e4, Scaling::None, 300);
        let mut y = x.clone();
        let args = Args { table: &table, seq: 300, start: 0, heads: 4 };
        Forward { x: &mut y, stride: args.width(), args }.run();
        y
    });
}

#[test]
#[should_panic(expected = "rope::Forward: position 10 of 10")]
fn a_position_past_the_table_is_refused() {
    let table = Table::new(2, 1e4, Scaling::None, 10);
    let args = Args { table: &table, seq: 2, start: 9, heads: 1 };
    Forward { x: &mut [0.0; 4], stride: args.width(), args }.run();
}
