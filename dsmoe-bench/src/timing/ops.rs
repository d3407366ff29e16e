//! `dsmoe bench kernels`: the ops that are no matrix product, and attention and the loss, which have some.

use anyhow::Result;
use dsmoe_kernels::{Precision, adamw, add, attention, cross_entropy, rms_norm, rope, swiglu};

use super::ceilings::Cost;
use super::output::Output;
use super::row::Row;
use super::turns::{Task, take_turns};
use super::values::{f32_bytes, product, random};
use crate::cli::bench::Kernels;

const TOKENS: usize = 2048;
const HIDDEN: usize = 1024;
const VOCAB: usize = 8192;
const SEQ: usize = 512;
const HEAD_DIM: usize = 64;
const KV_SHARE: usize = 4;

pub(crate) fn run(args: &Kernels, output: &mut Output<'_>) -> Result<()> {
    let rounds = usize::from(args.common.repeats);
    elementwise(rounds, output)?;
    attentions(rounds, output)?;
    loss(rounds, output)
}

/// Name, part, how many times `tokens * hidden` values are read or written, and the op.
type Op<'a> = (&'static str, &'static str, f64, Task<'a>);

fn elementwise(rounds: usize, output: &mut Output<'_>) -> Result<()> {
    let n = TOKENS * HIDDEN;
    let [a, b, dy, w] = [(n, 1), (n, 2), (n, 3), (HIDDEN, 4)].map(|(len, seed)| random(len, 1.0, seed));
    let [mut sum, mut normed, mut dnormed, mut rotated, mut c, mut da, mut db, mut weights, mut mean] =
        [(); 9].map(|()| vec![0.0; n]);
    let mut squares = vec![1.0; n];
    let (mut rstd, mut dw) = (vec![0.0; TOKENS], vec![0.0; HIDDEN]);
    let inverse = vec![1.0; TOKENS];
    let table = rope::Table::new(HEAD_DIM, 1e4, rope::Scaling::None, SEQ);
    let hyper = adamw::Hyper { lr: 1e-5, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 10 };
    let ops: [Op<'_>; 7] = [
        ("add", "sum", 3.0, Box::new(|| add::Sum { out: &mut sum, a: &a, b: &b }.run())),
        (
            "rms_norm",
            "forward",
            2.0,
            Box::new(|| {
                rms_norm::Forward { y: &mut normed, rstd: &mut rstd, x: &a, weight: &w, eps: 1e-5 }.run()
            }),
        ),
        (
            "rms_norm",
            "backward",
            3.0,
            Box::new(|| {
                rms_norm::Backward {
                    dx: &mut dnormed,
                    dweight: &mut dw,
                    dy: &dy,
                    x: &a,
                    weight: &w,
                    rstd: &inverse,
                    add: false,
                }
                .run()
            }),
        ),
        (
            "rope",
            "forward",
            2.0,
            Box::new(|| {
                let args = rope::Args { table: &table, seq: SEQ, start: 0, heads: HIDDEN / HEAD_DIM };
                rope::Forward { x: &mut rotated, stride: args.width(), args }.run();
            }),
        ),
        ("swiglu", "forward", 3.0, Box::new(|| swiglu::Forward { c: &mut c, a: &a, b: &b }.run())),
        (
            "swiglu",
            "backward",
            5.0,
            Box::new(|| swiglu::Backward { da: &mut da, db: &mut db, dc: &dy, a: &a, b: &b }.run()),
        ),
        (
            "adamw",
            "step",
            7.0,
            Box::new(|| {
                adamw::Step {
                    param: &mut weights,
                    m: &mut mean,
                    v: &mut squares,
                    grad: &dy,
                    grad_scale: 1.0,
                    hyper: &hyper,
                }
                .run()
            }),
        ),
    ];
    let (names, mut tasks): (Vec<_>, Vec<_>) =
        ops.into_iter().map(|(work, part, passes, task)| ((work, part, passes), task)).unzip();
    let times = take_turns(&mut tasks, rounds);
    let rows = names.into_iter().zip(times).map(|((work, part, passes), seconds)| {
        let mut row = Row::new(work, part, TOKENS, HIDDEN, Precision::F32);
        let cost = Cost { flops: 0.0, bytes: f32_bytes(passes * product(&[TOKENS, HIDDEN])) };
        row.measured(seconds, cost, Precision::F32, &mut output.ceilings);
        row
    });
    let rows = rows.collect();
    output.extend(rows)
}

fn attentions(rounds: usize, output: &mut Output<'_>) -> Result<()> {
    let (heads, kv_heads) = (HIDDEN / HEAD_DIM, HIDDEN / HEAD_DIM / KV_SHARE);
    for (batch, queries, keys) in [(TOKENS / SEQ, SEQ, SEQ), (1, 1, SEQ)] {
        let dims = attention::Dims { batch, queries, keys, heads, kv_heads, head_dim: HEAD_DIM };
        let (rows, columns) = (batch * queries * HIDDEN, batch * keys * kv_heads * HEAD_DIM);
        let [q, k, v, dout] =
            [(rows, 1), (columns, 2), (columns, 3), (rows, 4)].map(|(len, seed)| random(len, 1.0, seed));
        let (mut out, mut lse) = (vec![0.0; rows], vec![0.0; batch * queries * heads]);
        // Training has queries, keys and values in one matrix.
        let qkv = random(if queries == keys { batch * queries * dims.joined_width() } else { 0 }, 1.0, 5);
        let (mut result, mut saved, mut dqkv) = (out.clone(), lse.clone(), qkv.clone());
        if queries == keys {
            attention::ForwardJoined { out: &mut result, lse: &mut saved, qkv: &qkv, dims }.run();
        }
        let parts: Vec<(&'static str, f64, Task<'_>)> = if queries == 1 {
            vec![(
                "decode",
                1.0,
                Box::new(|| attention::Decode { out: &mut out, q: &q, k: &k, v: &v, dims }.run()),
            )]
        } else {
            vec![
                (
                    "forward",
                    1.0,
                    Box::new(|| {
                        attention::Forward { out: &mut out, lse: &mut lse, q: &q, k: &k, v: &v, dims }.run()
                    }),
                ),
                (
                    "backward",
                    2.5,
                    Box::new(|| {
                        attention::Backward {
                            dqkv: &mut dqkv,
                            dout: &dout,
                            out: &result,
                            qkv: &qkv,
                            lse: &saved,
                            dims,
                        }
                        .run()
                    }),
                ),
            ]
        };
        // Position i sees i + 1 of as many keys.
        let visible = if queries == 1 { keys as f64 } else { product(&[keys, keys + 1]) / 2.0 };
        let flops = 4.0 * visible * product(&[batch, heads, HEAD_DIM]);
        let values = (2 * rows + 2 * columns) as f64;
        let (names, mut tasks): (Vec<_>, Vec<_>) =
            parts.into_iter().map(|(part, times, task)| ((part, times), task)).unzip();
        let times = take_turns(&mut tasks, rounds);
        let rows = names.into_iter().zip(times).map(|((part, passes), seconds)| {
            let mut row = Row::new("attention", part, batch * queries, HIDDEN, Precision::F32);
            (row.heads, row.kv_heads, row.seq, row.batch) =
                (Some(heads), Some(kv_heads), Some(keys), Some(batch));
            let cost = Cost { flops: passes * flops, bytes: f32_bytes(passes * values) };
            row.measured(seconds, cost, Precision::F32, &mut output.ceilings);
            row
        });
        let rows = rows.collect();
        output.extend(rows)?;
    }
    Ok(())
}

fn loss(rounds: usize, output: &mut Output<'_>) -> Result<()> {
    let dims = cross_entropy::Dims { tokens: TOKENS, hidden: HIDDEN, vocab: VOCAB };
    let [h, head] = [(TOKENS * HIDDEN, 1), (VOCAB * HIDDEN, 2)].map(|(len, seed)| random(len, 0.1, seed));
    let targets: Vec<u32> = (0..TOKENS as u32).map(|t| t * t % VOCAB as u32).collect();
    let (mut losses, mut dh, mut dhead) = (vec![0.0; TOKENS], vec![0.0; h.len()], vec![0.0; head.len()]);
    let scratch = &mut cross_entropy::Scratch::default();
    let mut tasks: [Task<'_>; 1] = [Box::new(|| {
        cross_entropy::ForwardBackward {
            losses: &mut losses,
            dhidden: &mut dh,
            dhead: &mut dhead,
            hidden_states: &h,
            head: &head,
            targets: &targets,
            scale: 1.0,
            dims,
            scratch,
        }
        .run();
    })];
    let times = take_turns(&mut tasks, rounds);
    let mut row = Row::new("cross_entropy", "forward_backward", TOKENS, HIDDEN, Precision::F32);
    row.vocab = Some(VOCAB);
    let bytes = f32_bytes(2.0 * product(&[TOKENS, HIDDEN]) + 3.0 * product(&[VOCAB, HIDDEN]));
    let cost = Cost { flops: 6.0 * product(&[TOKENS, HIDDEN, VOCAB]), bytes };
    row.measured(times[0], cost, Precision::F32, &mut output.ceilings);
    output.extend(vec![row])
}
