//! `dsmoe bench kernels`: times the products of a linear layer.

use std::rc::Rc;

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
        // x and dx, w with its packed copy and gradient, y twice and its gradient.
        check_memory(4 * (2 * m * k + 3 * n * k + 3 * m * n))?;
    }
    Ok(())
}

pub(crate) fn run(args: &Kernels, output: &mut Output<'_>) -> Result<()> {
    output.each(&shapes(args), args.common.precisions(&BOTH), |shape, precision, output| {
        Ok(measure(shape, precision, usize::from(args.common.repeats), output))
    })
}

/// A product of a linear layer.
#[derive(Clone, Copy)]
pub(crate) enum Layout {
    Forward,
    Packed,
    BackwardInput,
    BackwardWeight,
}

const LAYOUTS: [(&str, Layout); 4] = [
    ("forward", Layout::Forward),
    ("packed", Layout::Packed),
    ("backward_input", Layout::BackwardInput),
    ("backward_weight", Layout::BackwardWeight),
];

/// x, w and the gradient of y, shared by the products of a shape.
type Inputs = Rc<[Vec<f32>; 3]>;

pub(crate) fn inputs([m, k, n]: Shape) -> Inputs {
    Rc::new([(m * k, 1), (n * k, 2), (m * n, 3)].map(|(len, seed)| random(len, 1.0, seed)))
}

/// A product with its memory.
pub(crate) struct Product {
    layout: Layout,
    dims: Dims,
    inputs: Inputs,
    packed: Option<Packed>,
    out: Vec<f32>,
}

impl Product {
    pub(crate) fn new(layout: Layout, [m, k, n]: Shape, precision: Precision, inputs: &Inputs) -> Product {
        let packed =
            matches!(layout, Layout::Packed).then(|| Packed::new(precision, Mat::new(&inputs[1], n, k)));
        let len = match layout {
            Layout::Forward | Layout::Packed => m * n,
            Layout::BackwardInput => m * k,
            Layout::BackwardWeight => n * k,
        };
        let dims = Dims { rows: m, inputs: k, outputs: n, precision };
        Product { layout, dims, inputs: Rc::clone(inputs), packed, out: vec![0.0; len] }
    }

    pub(crate) fn run(&mut self) {
        let Product { layout, dims, inputs, packed, out } = self;
        let ([x, w, dy], dims) = (&**inputs, *dims);
        match (layout, packed) {
            (Layout::Packed, Some(w)) => {
                linear::ForwardPacked { y: out, x, w, bias: None, rows: dims.rows }.run()
            }
            (Layout::Forward | Layout::Packed, _) => linear::Forward { y: out, x, w, bias: None, dims }.run(),
            (Layout::BackwardInput, _) => linear::BackwardInput { dx: out, dy, w, dims, add: false }.run(),
            (Layout::BackwardWeight, _) => linear::BackwardWeight { dw: out, dy, x, dims }.run(),
        }
    }
}

fn measure(shape: Shape, precision: Precision, rounds: usize, output: &mut Output<'_>) -> Vec<Row> {
    let ([m, k, n], inputs) = (shape, inputs(shape));
    let mut products = LAYOUTS.map(|(_, layout)| Product::new(layout, shape, precision, &inputs));
    let hashes = products.each_mut().map(|product| {
        product.run();
        bits(&[&product.out])
    });
    let mut tasks = products.each_mut().map(|product| -> Task<'_> { Box::new(|| product.run()) });
    let times = take_turns(&mut tasks, rounds);
    let rows = LAYOUTS.into_iter().zip(times).zip(hashes);
    rows.map(|(((name, layout), seconds), bits)| {
        let mut row = Row::new("matmul", name, m, k, precision);
        row.intermediate = Some(n);
        row.bits = bits;
        let weights = product(&[n, k]);
        let weight_bytes = match layout {
            Layout::Forward | Layout::BackwardInput => f32_bytes(weights),
            Layout::Packed => bytes_in(precision, weights),
            // The gradient of the weights is added to: read and written.
            Layout::BackwardWeight => f32_bytes(2.0 * weights),
        };
        let bytes = if m == 0 { 0.0 } else { weight_bytes + f32_bytes(product(&[m, k]) + product(&[m, n])) };
        let cost = Cost { flops: 2.0 * product(&[m, k, n]), bytes };
        row.measured(seconds, cost, precision, &mut output.ceilings);
        row
    })
    .collect()
}
