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
    group.bench_function("add", |b| b.iter(|| add::Add { y: black_box(&mut y), x: &x }.run()));
    group.bench_function("rms_norm forward", |b| {
        b.iter(|| {
            rms_norm::Forward { y: &mut y, rstd: &mut rstd, x: black_box(&x), weight: &w, eps: 1e-5 }.run()
        });
    });
    group.bench_function("rms_norm backward", |b| {
        b.iter(|| {
            rms_norm::Backward {
                dx: &mut y,
                dweight: &mut dw,
                dy: black_box(&dy),
                x: &x,
                weight: &w,
                rstd: &rstd,
                add: false,
            }
            .run()
        });
    });
    group.bench_function("swiglu forward", |b| {
        b.iter(|| swiglu::Forward { c: &mut y, a: black_box(&x), b: &dy }.run())
    });
    group.bench_function("swiglu backward", |b| {
        b.iter(|| swiglu::Backward { da: &mut y, db: &mut z, dc: black_box(&dy), a: &x, b: &x }.run());
    });
    let table = rope::Table::new(64, 1e4, rope::Scaling::None, TOKENS);
    let args = rope::Args { table: &table, seq: TOKENS, start: 0, heads: HIDDEN / 64 };
    group.bench_function("rope", |b| {
        b.iter(|| rope::Forward { x: black_box(&mut y), stride: args.width(), args }.run())
    });
    let ids: Vec<u32> = (0..TOKENS as u32).map(|t| t * t % 2048).collect();
    let mut vocabulary = normals(2048 * HIDDEN, 4);
    group.bench_function("embedding forward", |b| {
        b.iter(|| {
            embedding::Forward { out: &mut y, table: black_box(&vocabulary), ids: &ids, hidden: HIDDEN }.run()
        });
    });
    group.bench_function("embedding backward", |b| {
        b.iter(|| {
            embedding::Backward { dtable: &mut vocabulary, dout: black_box(&dy), ids: &ids, hidden: HIDDEN }
                .run()
        });
    });
    let hyper = adamw::Hyper { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 10 };
    let mut squares = vec![1.0; n];
    group.bench_function("adamw", |b| {
        b.iter(|| {
            adamw::Step {
                param: &mut y,
                m: &mut z,
                v: &mut squares,
                grad: black_box(&dy),
                grad_scale: 1.0,
                hyper: &hyper,
            }
            .run()
        });
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
                b.iter(|| attention::Decode { out: &mut out, q: black_box(&q), k: &k, v: &v, dims }.run());
            });
            continue;
        }
        group.bench_function("forward", |b| {
            b.iter(|| {
                attention::Forward { out: &mut out, lse: &mut lse, q: black_box(&q), k: &k, v: &v, dims }
                    .run()
            });
        });
        let qkv = normals(batch * queries * dims.joined_width(), 5);
        let mut dqkv = qkv.clone();
        group.throughput(Throughput::Elements(flops * 5 / 2));
        attention::ForwardJoined { out: &mut out, lse: &mut lse, qkv: &qkv, dims }.run();
        group.bench_function("backward", |b| {
            b.iter(|| {
                attention::Backward {
                    dqkv: &mut dqkv,
                    dout: black_box(&dout),
                    out: &out,
                    qkv: &qkv,
                    lse: &lse,
                    dims,
                }
                .run()
            });
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
    group.bench_function("linear forward", |b| {
        b.iter(|| linear::Forward { y: &mut y, x: black_box(&x), w: &w, dims }.run())
    });
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
            cross_entropy::ForwardBackward {
                losses: &mut losses,
                dhidden: &mut y,
                dhead: &mut dhead,
                hidden_states: x,
                head: &head,
                targets: &targets,
                scale: 1.0,
                dims,
                scratch,
            }
            .run();
        });
    });
    let intermediate = 2 * HIDDEN;
    let [gate, up, down] = [4, 5, 6].map(|seed| normals(intermediate * HIDDEN, seed));
    let weights = expert_ffn::Weights { gate: &gate, up: &up, down: &down };
    let packed = expert_ffn::PackedWeights::new(Precision::F32, &weights, HIDDEN, intermediate, 1);
    let mut scratch = expert_ffn::Scratch::default();
    group.throughput(Throughput::Elements((6 * TOKENS * HIDDEN * intermediate) as u64));
    group.bench_function("dense ffn forward", |b| {
        b.iter(|| {
            let x = black_box(&x);
            expert_ffn::ForwardPacked {
                y: &mut y,
                x,
                weights: &packed,
                pairs: expert_ffn::Pairs::Dense,
                dims: expert_ffn::Dims::dense(TOKENS, packed.hidden(), packed.intermediate()),
                scratch: &mut scratch,
            }
            .run();
        });
    });
    group.finish();
}

criterion_group!(benches, elementwise, attentions, products);
criterion_main!(benches);
