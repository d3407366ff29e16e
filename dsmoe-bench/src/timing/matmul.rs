//! `dsmoe bench kernels`: times the products of a linear layer.

use std::cell::RefCell;

use anyhow::Result;
use dsmoe_kernels::Precision;
use dsmoe_kernels::linear::{self, Dims};
use dsmoe_kernels::matmul::{Mat, Packed};

use super::ceilings::Cost;
use super::checks::{check_memory, check_size};
use super::output::Output;
use super::row::{Row, bits};
use super::turns::{Task, take_turns};
use super::values::{bytes_in, f32_bytes, product, random};
use crate::cli::bench::{BOTH, Kernels};

/// Rows of x, columns of x, rows of w.
type Shape = [usize; 3];

/// The shapes that are measured by default.
const SHAPES: [Shape; 5] =
    [[512, 512, 512], [2048, 2048, 2048], [256, 2048, 8192], [1024, 288, 768], [1, 2048, 8192]];
/// The sizes that complete a given one.
const DEFAULT: Shape = [512, 2048, 8192];

fn shapes(args: &Kernels) -> Vec<Shape> {
    match [args.tokens, args.hidden, args.intermediate] {
        [None, None, None] => SHAPES.to_vec(),
        [tokens, hidden, intermediate] => {
            let [m, k, n] = DEFAULT;
            vec![[tokens.unwrap_or(m), hidden.unwrap_or(k), intermediate.unwrap_or(n)]]
        }
    }
}

pub(crate) fn check(args: &Kernels) -> Result<()> {
    for [tokens, hidden, intermediate] in shapes(args) {
        check_size("tokens", tokens.max(1))?;
        check_size("hidden", hidden)?;
        check_size("intermediate", intermediate)?;
        let [m, k, n] = [tokens, hidden, intermediate].map(|size| size as u128);
        // x and dx, w with its packed copy and gradient, y.
        check_memory(4 * (2 * m * k + 3 * n * k + m * n))?;
    }
    Ok(())
}

pub(crate) fn run(args: &Kernels, output: &mut Output<'_>) -> Result<()> {
    for shape in shapes(args) {
        for &precision in args.common.precisions(&BOTH) {
            let rows = measure(shape, precision, usize::from(args.common.repeats), output);
            output.extend(rows)?;
        }
    }
    Ok(())
}

fn measure([m, k, n]: Shape, precision: Precision, rounds: usize, output: &mut Output<'_>) -> Vec<Row> {
    let dims = Dims { rows: m, inputs: k, outputs: n, precision };
    let [x, w, dy] = [(m * k, 1), (n * k, 2), (m * n, 3)].map(|(len, seed)| random(len, 1.0, seed));
    let packed = Packed::new(precision, Mat::new(&w, n, k));
    let y = RefCell::new(vec![0.0; m * n]);
    let (mut dx, mut dw) = (vec![0.0; m * k], vec![0.0; n * k]);

    linear::Forward { y: &mut y.borrow_mut(), x: &x, w: &w, bias: None, dims }.run();
    let forward = bits(&[&y.borrow()]);
    linear::ForwardPacked { y: &mut y.borrow_mut(), x: &x, w: &packed, bias: None, rows: m }.run();
    let from_packed = bits(&[&y.borrow()]);
    linear::BackwardInput { dx: &mut dx, dy: &dy, w: &w, dims, add: false }.run();
    linear::BackwardWeight { dw: &mut dw, dy: &dy, x: &x, dims }.run();
    let hashes = [forward, from_packed, bits(&[&dx]), bits(&[&dw])];

    let mut tasks: [Task<'_>; 4] = [
        Box::new(|| linear::Forward { y: &mut y.borrow_mut(), x: &x, w: &w, bias: None, dims }.run()),
        Box::new(|| {
            linear::ForwardPacked { y: &mut y.borrow_mut(), x: &x, w: &packed, bias: None, rows: m }.run()
        }),
        Box::new(|| linear::BackwardInput { dx: &mut dx, dy: &dy, w: &w, dims, add: false }.run()),
        Box::new(|| linear::BackwardWeight { dw: &mut dw, dy: &dy, x: &x, dims }.run()),
    ];
    let times = take_turns(&mut tasks, rounds);
    let names = ["forward", "packed", "backward_input", "backward_weight"];
    let weights = product(&[n, k]);
    // The gradient of the weights is added to: read and written.
    let weight_bytes =
        [f32_bytes(weights), bytes_in(precision, weights), f32_bytes(weights), f32_bytes(2.0 * weights)];
    let rows = names.into_iter().zip(times).zip(weight_bytes).zip(hashes);
    rows.map(|(((name, seconds), weight_bytes), bits)| {
        let mut row = Row::new("matmul", name, m, k, precision);
        row.intermediate = Some(n);
        row.bits = bits;
        let bytes = if m == 0 { 0.0 } else { weight_bytes + f32_bytes(product(&[m, k]) + product(&[m, n])) };
        let cost = Cost { flops: 2.0 * product(&[m, k, n]), bytes };
        row.measured(seconds, cost, precision, &mut output.ceilings);
        row
    })
    .collect()
}
