//! Time of every op, for a person at a desk: `cargo bench -p dsmoe-kernels -- attention`.
//!
//! Elements are values read or, for products and attention, floating-point operations.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::normals;
use dsmoe_kernels::{
    adamw, add, attention, cross_entropy, embedding, expert_ffn, linear, rms_norm, rope, swiglu,
};

const TOKENS: usize = 512;
const HIDDEN: usize = 1024;

fn elementwise(c: &mut Criterion) {
    let n = TOKENS * HIDDEN;
    let [x, dy, w] = [(n, 1), (n, 2), (HIDDEN, 3)].map(|(n, seed)| normals(n, seed));
    let [mut y, mut z] = [(); 2].map(|()| vec![0.0; n]);
    let (mut rstd, mut dw) = (vec![0.0; TOKENS], vec![0.0; HIDDEN]);
    let mut group = c.benchmark_group("elementwise");
    group.throughput(Throughput::Elements(n as u64));
    group.bench_function("add", |b| b.iter(|| add::add(black_box(&mut y), &x)));
    group.bench_function("rms_norm forward", |b| {
        b.iter(|| rms_norm::forward(&mut y, &mut rstd, black_box(&x), &w, 1e-5, HIDDEN));
    });
    group.bench_function("rms_norm backward", |b| {
        b.iter(|| rms_norm::backward(&mut y, &mut dw, black_box(&dy), &x, &w, &rstd, HIDDEN));
    });
    group.bench_function("swiglu forward", |b| b.iter(|| swiglu::forward(&mut y, black_box(&x), &dy)));
    group.bench_function("swiglu backward", |b| {
        b.iter(|| swiglu::backward(&mut y, &mut z, black_box(&dy), &x, &x));
    });
    let table = rope::Table::new(64, 1e4, rope::Scaling::None, TOKENS);
    let args = rope::Args { table: &table, seq: TOKENS, start: 0, heads: HIDDEN / 64 };
    group.bench_function("rope", |b| b.iter(|| rope::forward(black_box(&mut y), args)));
    let ids: Vec<u32> = (0..TOKENS as u32).map(|t| t * t % 2048).collect();
    let mut vocabulary = normals(2048 * HIDDEN, 4);
    group.bench_function("embedding forward", |b| {
        b.iter(|| embedding::forward(&mut y, black_box(&vocabulary), &ids, HIDDEN));
    });
    group.bench_function("embedding backward", |b| {
        b.iter(|| embedding::backward(&mut vocabulary, black_box(&dy), &ids, HIDDEN));
    });
    let hyper = adamw::Hyper { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 10 };
    let mut squares = vec![1.0; n];
    group.bench_function("adamw", |b| {
        b.iter(|| adamw::step(&mut y, &mut z, &mut squares, black_box(&dy), 1.0, &hyper));
    });
    group.bench_function("sum_of_squares", |b| b.iter(|| adamw::sum_of_squares(black_box(&x))));
    group.finish();
}

fn attentions(c: &mut Criterion) {
    for (name, batch, queries, keys, heads, kv_heads, head_dim) in [
        ("small heads", 16, 128, 128, 8, 4, 16),
        ("long", 1, 1024, 1024, 32, 8, 64),
        ("decode", 1, 1, 1024, 32, 8, 64),
    ] {
        let dims = attention::Dims { batch, queries, keys, heads, kv_heads, head_dim };
        let (rows, columns) = (batch * queries * heads * head_dim, batch * keys * kv_heads * head_dim);
        let [q, dout] = [1, 2].map(|seed| normals(rows, seed));
        let [k, v] = [3, 4].map(|seed| normals(columns, seed));
        let (mut out, mut lse) = (vec![0.0; rows], vec![0.0; batch * queries * heads]);
        let visible = (0..queries).map(|i| i + 1 + keys - queries).sum::<usize>();
        let flops = (4 * batch * heads * visible * head_dim) as u64;
        let mut group = c.benchmark_group(format!("attention {name}"));
        group.throughput(Throughput::Elements(flops));
        if queries <= attention::DECODE_QUERIES {
            group.bench_function("decode", |b| {
                b.iter(|| attention::decode(&mut out, black_box(&q), &k, &v, dims));
            });
            continue;
        }
        group.bench_function("forward", |b| {
            b.iter(|| attention::forward(&mut out, &mut lse, black_box(&q), &k, &v, dims));
        });
        let qkv = normals(batch * queries * dims.joined_width(), 5);
        let mut dqkv = qkv.clone();
        group.throughput(Throughput::Elements(flops * 5 / 2));
        attention::forward_joined(&mut out, &mut lse, &qkv, dims);
        group.bench_function("backward", |b| {
            b.iter(|| attention::backward(&mut dqkv, black_box(&dout), &out, &qkv, &lse, dims));
        });
        group.finish();
    }
}

fn products(c: &mut Criterion) {
    let dims = linear::Dims { rows: TOKENS, inputs: HIDDEN, outputs: HIDDEN, precision: Precision::F32 };
    let [x, w] = [(TOKENS * HIDDEN, 1), (HIDDEN * HIDDEN, 2)].map(|(n, seed)| normals(n, seed));
    let mut y = vec![0.0; TOKENS * HIDDEN];
    let mut group = c.benchmark_group("products");
    group.throughput(Throughput::Elements((2 * TOKENS * HIDDEN * HIDDEN) as u64));
    group.bench_function("linear forward", |b| b.iter(|| linear::forward(&mut y, black_box(&x), &w, dims)));
    let vocab = 4096;
    let dims = cross_entropy::Dims { tokens: TOKENS, hidden: HIDDEN, vocab };
    let head = normals(vocab * HIDDEN, 3);
    let targets: Vec<u32> = (0..TOKENS as u32).map(|t| t * t % vocab as u32).collect();
    let (mut losses, mut dhead) = (vec![0.0; TOKENS], vec![0.0; vocab * HIDDEN]);
    let scratch = &mut cross_entropy::Scratch::default();
    group.throughput(Throughput::Elements((6 * TOKENS * HIDDEN * vocab) as u64));
    group.bench_function("cross_entropy forward_backward", |b| {
        b.iter(|| {
            let x = black_box(&x);
            cross_entropy::forward_backward(
                &mut losses,
                &mut y,
                &mut dhead,
                x,
                &head,
                &targets,
                1.0,
                dims,
                scratch,
            );
        });
    });
    let intermediate = 2 * HIDDEN;
    let [gate, up, down] = [4, 5, 6].map(|seed| normals(intermediate * HIDDEN, seed));
    let weights = expert_ffn::Weights { gate: &gate, up: &up, down: &down };
    let packed = expert_ffn::PackedWeights::new(Precision::F32, &weights, HIDDEN, intermediate, 1);
    let mut scratch = expert_ffn::Scratch::new();
    group.throughput(Throughput::Elements((6 * TOKENS * HIDDEN * intermediate) as u64));
    group.bench_function("dense ffn forward", |b| {
        b.iter(|| {
            let x = black_box(&x);
            expert_ffn::forward_dense_packed(&mut y, x, &packed, TOKENS, &mut scratch);
        });
    });
    group.finish();
}

criterion_group!(benches, elementwise, attentions, products);
criterion_main!(benches);
