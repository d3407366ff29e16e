//! The ops of the kernels crate that are timed, apart from matrix products: one table for `dsmoe bench kernels` and for
//! the suite `kernels` of records.

use anyhow::Result;
use dsmoe_kernels::{Activation, Precision, adamw, add, attention, cross_entropy, rms_norm, rope, swiglu};

use super::ceilings::Cost;
use super::output::Output;
use super::row::Row;
use super::turns::{Task, take_turns};
use super::values::{f32_bytes, product, random};
use crate::cli::bench::Kernels;

const HEAD_DIM: usize = 64;
/// Query heads of each key and value head.
const KV_SHARE: usize = 4;
const EPS: f32 = 1e-5;

/// The sizes of `dsmoe bench kernels`.
const LARGE: Shape = Shape { tokens: 2048, hidden: 1024, vocab: 8192, seq: 512 };

/// The sizes that ops are timed at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) tokens: usize,
    pub(crate) hidden: usize,
    pub(crate) vocab: usize,
    pub(crate) seq: usize,
}

/// An op with the buffers that a call needs.
pub(crate) struct Op {
    pub(crate) name: &'static str,
    pub(crate) part: &'static str,
    /// Allocates the buffers, and returns the call.
    pub(crate) build: fn(Shape) -> Task<'static>,
    cost: fn(Shape) -> Cost,
}

/// All timed ops.
pub(crate) const OPS: [Op; 11] = [
    Op {
        name: "add",
        part: "sum",
        build: |shape| {
            let ([a, b, _], mut y) = shape.rows();
            Box::new(move || add::Sum { out: &mut y, a: &a, b: &b }.run())
        },
        cost: |shape| shape.passes(3.0),
    },
    Op {
        name: "rms_norm",
        part: "forward",
        build: |shape| {
            let (([x, ..], mut y), weight) = (shape.rows(), random(shape.hidden, 1.0, 4));
            let mut rstd = vec![0.0; shape.tokens];
            Box::new(move || {
                let (y, rstd) = (&mut y[..], &mut rstd[..]);
                rms_norm::Forward { y, rstd, x: &x, weight: &weight, offset: 0.0, eps: EPS }.run();
            })
        },
        cost: |shape| shape.passes(2.0),
    },
    Op {
        name: "rms_norm",
        part: "backward",
        build: |shape| {
            let (([x, _, dy], mut dx), weight) = (shape.rows(), random(shape.hidden, 1.0, 4));
            let (mut dweight, rstd) = (vec![0.0; shape.hidden], vec![1.0; shape.tokens]);
            Box::new(move || {
                let (dx, dweight) = (&mut dx[..], &mut dweight[..]);
                let (dy, x, weight, rstd) = (&dy[..], &x[..], &weight[..], &rstd[..]);
                rms_norm::Backward { dx, dweight, dy, x, weight, offset: 0.0, rstd, add: false }.run();
            })
        },
        cost: |shape| shape.passes(3.0),
    },
    Op {
        name: "rope",
        part: "forward",
        build: |shape| {
            let (_, mut x) = shape.rows();
            let table = rope::Table::new(rope::reference::frequencies(HEAD_DIM, 1e4), 1.0, shape.seq);
            Box::new(move || {
                let heads = shape.hidden / HEAD_DIM;
                let args = rope::Args { table: &table, seq: shape.seq, start: 0, heads, head_dim: HEAD_DIM };
                rope::Forward { x: &mut x, stride: args.width(), args }.run();
            })
        },
        cost: |shape| shape.passes(2.0),
    },
    Op {
        name: "swiglu",
        part: "forward",
        build: |shape| {
            let ([a, b, _], mut c) = shape.rows();
            Box::new(move || swiglu::Forward { c: &mut c, a: &a, b: &b, activation: Activation::Silu }.run())
        },
        cost: |shape| shape.passes(3.0),
    },
    Op {
        name: "swiglu",
        part: "backward",
        build: |shape| {
            let ([a, b, dc], mut da) = shape.rows();
            let mut db = da.clone();
            Box::new(move || {
                let (da, db, activation) = (&mut da[..], &mut db[..], Activation::Silu);
                swiglu::Backward { da, db, dc: &dc, a: &a, b: &b, activation }.run();
            })
        },
        cost: |shape| shape.passes(5.0),
    },
    Op {
        name: "adamw",
        part: "step",
        build: |shape| {
            let ([grad, ..], mut param) = shape.rows();
            let (mut m, mut v) = (param.clone(), vec![1.0; param.len()]);
            let hyper =
                adamw::Hyper { lr: 1e-5, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 10 };
            Box::new(move || {
                let (param, m, v) = (&mut param[..], &mut m[..], &mut v[..]);
                adamw::Step { param, m, v, grad: &grad, grad_scale: 1.0, hyper: &hyper }.run();
            })
        },
        cost: |shape| shape.passes(7.0),
    },
    Op {
        name: "attention",
        part: "forward",
        build: |shape| {
            let Attention { dims, q, k, v, mut out, mut lse } = Attention::new(shape, shape.seq);
            Box::new(move || {
                attention::Forward { out: &mut out, lse: &mut lse, q: &q, k: &k, v: &v, dims }.run();
            })
        },
        cost: |shape| attention_cost(shape, shape.seq, 1.0),
    },
    Op {
        name: "attention",
        part: "backward",
        build: |shape| {
            let Attention { dims, q: dout, mut out, mut lse, .. } = Attention::new(shape, shape.seq);
            let qkv = random(dims.batch * dims.queries * dims.joined_width(), 1.0, 5);
            let mut dqkv = qkv.clone();
            attention::ForwardJoined { out: &mut out, lse: &mut lse, qkv: &qkv, dims }.run();
            Box::new(move || {
                let (dqkv, dout, out, qkv, lse) = (&mut dqkv[..], &dout[..], &out[..], &qkv[..], &lse[..]);
                attention::Backward { dqkv, dout, out, qkv, lse, dims }.run();
            })
        },
        cost: |shape| attention_cost(shape, shape.seq, 2.5),
    },
    Op {
        name: "attention",
        part: "decode",
        build: |shape| {
            let Attention { dims, q, k, v, mut out, .. } = Attention::new(shape, 1);
            Box::new(move || attention::Decode { out: &mut out, q: &q, k: &k, v: &v, dims }.run())
        },
        cost: |shape| attention_cost(shape, 1, 1.0),
    },
    Op {
        name: "cross_entropy",
        part: "forward_backward",
        build: |Shape { tokens, hidden, vocab, .. }| {
            let dims = cross_entropy::Dims { tokens, hidden, vocab };
            let [h, head] =
                [(tokens * hidden, 1), (vocab * hidden, 2)].map(|(len, seed)| random(len, 0.1, seed));
            let targets: Vec<u32> = (0..tokens as u32).map(|t| t * t % vocab as u32).collect();
            let (mut losses, mut dh, mut dhead) =
                (vec![0.0; tokens], vec![0.0; h.len()], vec![0.0; head.len()]);
            let mut scratch = cross_entropy::Scratch::default();
            Box::new(move || {
                cross_entropy::ForwardBackward {
                    losses: &mut losses,
                    dhidden: &mut dh,
                    dhead: &mut dhead,
                    hidden_states: &h,
                    head: &head,
                    targets: &targets,
                    teacher: None,
                    scale: 1.0,
                    logits: cross_entropy::Logits::default(),
                    dims,
                    scratch: &mut scratch,
                }
                .run();
            })
        },
        cost: |Shape { tokens, hidden, vocab, .. }| {
            let bytes = f32_bytes(2.0 * product(&[tokens, hidden]) + 3.0 * product(&[vocab, hidden]));
            Cost { flops: 6.0 * product(&[tokens, hidden, vocab]), bytes }
        },
    },
];

impl Shape {
    /// Three inputs and an output of elementwise ops.
    fn rows(self) -> ([Vec<f32>; 3], Vec<f32>) {
        let len = self.tokens * self.hidden;
        ([1, 2, 3].map(|seed| random(len, 1.0, seed)), vec![0.0; len])
    }

    /// The cost of `passes` reads or writes of all values of a tensor [tokens, hidden].
    fn passes(self, passes: f64) -> Cost {
        Cost { flops: 0.0, bytes: f32_bytes(passes * product(&[self.tokens, self.hidden])) }
    }

    /// The dimensions of an attention with `queries` queries of each sequence; a single query has one sequence.
    fn attention(self, queries: usize) -> attention::Dims {
        let heads = self.hidden / HEAD_DIM;
        let batch = if queries == 1 { 1 } else { self.tokens / self.seq };
        let (keys, kv_heads, head_dim) = (self.seq, heads / KV_SHARE, HEAD_DIM);
        let scores = attention::Scores::plain(head_dim);
        attention::Dims { batch, queries, keys, heads, kv_heads, head_dim, scores }
    }
}

/// The buffers of an attention.
struct Attention {
    dims: attention::Dims,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl Attention {
    fn new(shape: Shape, queries: usize) -> Attention {
        let dims = shape.attention(queries);
        let (rows, columns) = attention_sizes(dims);
        let [q, k, v] = [(rows, 1), (columns, 2), (columns, 3)].map(|(len, seed)| random(len, 1.0, seed));
        let lse = vec![0.0; dims.batch * queries * dims.heads];
        Attention { dims, q, k, v, out: vec![0.0; rows], lse }
    }
}

/// Returns the number of values of the queries, and of the keys.
fn attention_sizes(dims: attention::Dims) -> (usize, usize) {
    let width = |heads: usize| heads * dims.head_dim;
    (dims.batch * dims.queries * width(dims.heads), dims.batch * dims.keys * width(dims.kv_heads))
}

fn attention_cost(shape: Shape, queries: usize, passes: f64) -> Cost {
    let dims = shape.attention(queries);
    let (rows, columns) = attention_sizes(dims);
    // Position i sees i + 1 of as many keys.
    let visible = if queries == 1 { dims.keys as f64 } else { product(&[dims.keys, dims.keys + 1]) / 2.0 };
    let flops = 4.0 * visible * product(&[dims.batch, dims.heads, dims.head_dim]);
    Cost { flops: passes * flops, bytes: f32_bytes(passes * (2 * rows + 2 * columns) as f64) }
}

/// Times all ops; those of one kind take turns.
pub(crate) fn run(args: &Kernels, output: &mut Output<'_>) -> Result<()> {
    let elementwise = |op: &Op| op.name != "attention" && op.name != "cross_entropy";
    for kind in
        OPS.chunk_by(|a, b| a.name == b.name && a.part != "backward" || elementwise(a) && elementwise(b))
    {
        let mut tasks: Vec<Task<'_>> = kind.iter().map(|op| (op.build)(LARGE)).collect();
        let times = take_turns(&mut tasks, usize::from(args.common.repeats));
        let rows = kind.iter().zip(times).map(|(op, seconds)| {
            let mut row = Row::new(op.name, op.part, LARGE.tokens, LARGE.hidden, Precision::F32);
            match op.name {
                "attention" => {
                    let dims = LARGE.attention(if op.part == "decode" { 1 } else { LARGE.seq });
                    row.tokens = dims.batch * dims.queries;
                    (row.heads, row.kv_heads) = (Some(dims.heads), Some(dims.kv_heads));
                    (row.seq, row.batch) = (Some(dims.keys), Some(dims.batch));
                }
                "cross_entropy" => row.vocab = Some(LARGE.vocab),
                _ => {}
            }
            row.measured(seconds, (op.cost)(LARGE), Precision::F32, &mut output.ceilings);
            row
        });
        let rows = rows.collect();
        output.extend(rows)?;
    }
    Ok(())
}
