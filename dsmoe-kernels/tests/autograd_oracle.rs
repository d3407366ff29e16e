//! Every op against reverse-mode differentiation by the `autograd` crate, which shares no code with it.
//!
//! The ops are written there with matrix products, elementwise functions of equal shapes, and constant matrices:
//! sums are products with ones, because the crate's gradients of broadcasts are wrong. Its `transpose` fails too,
//! so that a factor needed transposed enters transposed.

use autograd as ag;
use autograd::tensor_ops as T;
use dsmoe_kernels::testing::{assert_close, assert_close_f64, f64s, normals};
use dsmoe_kernels::{
    Activation, Isa, Precision, attention, cross_entropy, embedding, expert_ffn, linear, rms_norm, rope,
    swiglu,
};

const EXACT: f64 = 1e-12;
const TOLERANCE: f64 = 2e-6;

#[derive(Clone)]
struct Matrix {
    values: Vec<f64>,
    rows: usize,
    cols: usize,
}

impl Matrix {
    fn new(values: &[f64], rows: usize, cols: usize) -> Matrix {
        assert_eq!(values.len(), rows * cols);
        Matrix { values: values.to_vec(), rows, cols }
    }

    fn of(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Matrix {
        let values = (0..rows * cols).map(|k| f(k / cols, k % cols)).collect();
        Matrix { values, rows, cols }
    }

    fn constant(rows: usize, cols: usize, x: f64) -> Matrix {
        Matrix::of(rows, cols, |_, _| x)
    }

    fn t(&self) -> Matrix {
        Matrix::of(self.cols, self.rows, |i, j| self.values[j * self.cols + i])
    }
}

/// Returns y = f(leaves), and the gradient of `sum(dy * y)` for each of the first `count` leaves.
fn gradients(
    leaves: &[Matrix],
    count: usize,
    dy: &Matrix,
    f: impl for<'g> Fn(&[ag::Tensor<'g, f64>]) -> ag::Tensor<'g, f64>,
) -> (Vec<f64>, Vec<Matrix>) {
    let array = |m: &Matrix| {
        ag::ndarray::Array::from_shape_vec(ag::ndarray::IxDyn(&[m.rows, m.cols]), m.values.clone())
            .expect("shape")
    };
    ag::run(|ctx: &mut ag::Context<'_, '_, f64>| {
        let tensors: Vec<_> = leaves.iter().map(|m| T::convert_to_tensor(array(m), ctx)).collect();
        let y = f(&tensors);
        let loss = T::sum_all(y * T::convert_to_tensor(array(dy), ctx));
        let grads = T::grad(&[loss], &tensors[..count]);
        let values = |t: ag::Tensor<'_, f64>| -> Vec<f64> {
            t.eval(ctx).expect("the graph evaluates").iter().copied().collect()
        };
        let grads = grads.iter().zip(leaves).map(|(g, m)| Matrix::new(&values(*g), m.rows, m.cols)).collect();
        (values(y), grads)
    })
}

fn one_hot(ids: &[u32], width: usize) -> Matrix {
    Matrix::of(ids.len(), width, |t, id| if ids[t] as usize == id { 1.0 } else { 0.0 })
}

#[test]
fn embedding_agrees_with_autograd() {
    let (ids, vocab, hidden) = ([3, 0, 3, 5, 1], 7, 4);
    let (table, dout) = (normals(vocab * hidden, 1), normals(ids.len() * hidden, 2));
    let leaves = [Matrix::new(&f64s(&table), vocab, hidden), one_hot(&ids, vocab)];
    let dy = Matrix::new(&f64s(&dout), ids.len(), hidden);
    let (want, grads) = gradients(&leaves, 1, &dy, |l| T::matmul(l[1], l[0]));
    let (mut out, mut dtable) = (vec![f32::NAN; dout.len()], vec![0.0; table.len()]);
    embedding::Forward { out: &mut out, table: &table, ids: &ids, hidden, scale: 1.0 }.run();
    embedding::Backward { dtable: &mut dtable, dout: &dout, ids: &ids, hidden, scale: 1.0 }.run();
    assert_close("out", &out, &want, 0.0);
    assert_close("dtable", &dtable, &grads[0].values, TOLERANCE);
    let reference = embedding::reference::backward(&f64s(&dout), &ids, [vocab, hidden], 1.0);
    assert_close_f64("reference dtable", &reference, &grads[0].values, EXACT);
}

#[test]
fn rms_norm_agrees_with_autograd() {
    let (tokens, hidden, eps) = (5, 19, 1e-3f32);
    let (x, w, dout) = (normals(tokens * hidden, 1), normals(hidden, 2), normals(tokens * hidden, 3));
    let leaves = [
        Matrix::new(&f64s(&x), tokens, hidden),
        Matrix::new(&f64s(&w), 1, hidden),
        Matrix::constant(hidden, hidden, 1.0 / hidden as f64),
        Matrix::constant(tokens, hidden, f64::from(eps)),
        Matrix::constant(tokens, 1, 1.0),
    ];
    let dy = Matrix::new(&f64s(&dout), tokens, hidden);
    let (want, grads) = gradients(&leaves, 2, &dy, |l| {
        let [x, w, mean, eps, ones] = [l[0], l[1], l[2], l[3], l[4]];
        x / T::sqrt(T::matmul(x * x, mean) + eps) * T::matmul(ones, w)
    });
    let (y, rstd) = rms_norm::reference::forward(&f64s(&x), &f64s(&w), f64::from(eps));
    let (dx, dw) = rms_norm::reference::backward(&f64s(&dout), &f64s(&x), &f64s(&w), &rstd);
    assert_close_f64("reference y", &y, &want, EXACT);
    assert_close_f64("reference dx", &dx, &grads[0].values, EXACT);
    assert_close_f64("reference dw", &dw, &grads[1].values, EXACT);
    for isa in Isa::available() {
        let [mut y, mut dx] = [(); 2].map(|()| vec![f32::NAN; x.len()]);
        let (mut rstd, mut dw) = (vec![f32::NAN; tokens], vec![0.0; hidden]);
        rms_norm::Forward { y: &mut y, rstd: &mut rstd, x: &x, weight: &w, offset: 0.0, eps }.run_on(isa);
        rms_norm::Backward {
            dx: &mut dx,
            dweight: &mut dw,
            dy: &dout,
            x: &x,
            weight: &w,
            offset: 0.0,
            rstd: &rstd,
            add: false,
        }
        .run_on(isa);
        assert_close("y", &y, &want, TOLERANCE);
        assert_close("dx", &dx, &grads[0].values, TOLERANCE);
        assert_close("dw", &dw, &grads[1].values, TOLERANCE);
    }
}

#[test]
fn linear_agrees_with_autograd() {
    let dims = linear::Dims { rows: 6, inputs: 9, outputs: 5, precision: Precision::F32 };
    let (x, w, dout) = (normals(54, 1), normals(45, 2), normals(30, 3));
    let leaves = [Matrix::new(&f64s(&x), 6, 9), Matrix::new(&f64s(&w), 5, 9).t()];
    let (want, grads) = gradients(&leaves, 2, &Matrix::new(&f64s(&dout), 6, 5), |l| T::matmul(l[0], l[1]));
    let want_dw = grads[1].t().values;
    let (dx, dw) = linear::reference::backward(&f64s(&dout), &f64s(&x), &f64s(&w), dims);
    assert_close_f64("reference y", &linear::reference::forward(&f64s(&x), &f64s(&w), dims), &want, EXACT);
    assert_close_f64("reference dx", &dx, &grads[0].values, EXACT);
    assert_close_f64("reference dw", &dw, &want_dw, EXACT);
    let (mut y, mut dx, mut dw) = (vec![f32::NAN; 30], vec![f32::NAN; 54], vec![0.0; 45]);
    linear::Forward { y: &mut y, x: &x, w: &w, bias: None, dims }.run();
    linear::BackwardInput { dx: &mut dx, dy: &dout, w: &w, dims, add: false }.run();
    linear::BackwardWeight { dw: &mut dw, dy: &dout, x: &x, dims }.run();
    assert_close("y", &y, &want, TOLERANCE);
    assert_close("dx", &dx, &grads[0].values, TOLERANCE);
    assert_close("dw", &dw, &want_dw, TOLERANCE);
}

#[test]
fn rope_agrees_with_autograd() {
    let (seq, start, heads, head_dim, theta) = (3, 4, 2, 6, 50.0f64);
    let n = 2 * seq * heads * head_dim;
    // x as one row, times one rotation matrix for all: value i of the pair (i, i + half) of row r is turned by
    // p theta^(-2i / head_dim), p the position of r.
    let rotation = Matrix::of(n, n, |from, to| {
        let (i, j, half) = (from % head_dim, to % head_dim, head_dim / 2);
        if from / head_dim != to / head_dim || i % half != j % half {
            return 0.0;
        }
        let position = (start + to / (heads * head_dim) % seq) as f64;
        let angle = position / theta.powf(2.0 * (i % half) as f64 / head_dim as f64);
        match (i < half, j < half) {
            (true, true) | (false, false) => angle.cos(),
            (true, false) => angle.sin(),
            (false, true) => -angle.sin(),
        }
    });
    let (x, dout) = (normals(n, 1), normals(n, 2));
    let leaves = [Matrix::new(&f64s(&x), 1, n), rotation];
    let (want, grads) = gradients(&leaves, 1, &Matrix::new(&f64s(&dout), 1, n), |l| T::matmul(l[0], l[1]));
    let frequencies = rope::reference::frequencies(head_dim, theta);
    let table = rope::Table::new(frequencies.clone(), 1.0, start + seq);
    let args = rope::Args { table: &table, seq, start, heads, head_dim };
    for isa in Isa::available() {
        let (mut y, mut dx) = (x.clone(), dout.clone());
        rope::Forward { x: &mut y, stride: args.width(), args }.run_on(isa);
        rope::Backward { dx: &mut dx, stride: heads * head_dim, args }.run_on(isa);
        assert_close("y", &y, &want, TOLERANCE);
        assert_close("dx", &dx, &grads[0].values, TOLERANCE);
    }
    let positions: Vec<usize> = (0..2 * seq).map(|r| start + r % seq).collect();
    let rotation = rope::reference::Rotation {
        frequencies: &frequencies,
        factor: 1.0,
        positions: &positions,
        heads,
        head_dim,
    };
    assert_close_f64("reference y", &rotation.forward(&f64s(&x)), &want, EXACT);
    assert_close_f64("reference dx", &rotation.backward(&f64s(&dout)), &grads[0].values, EXACT);
}

/// Attention of one sequence; k enters transposed. Leaves: q, k^T, v, mask, ones, 1 / sqrt(head_dim), then per
/// head the matrices that select its columns of q, its rows of k^T, its columns of v, and that put it in its
/// place.
fn attention_graph<'g>(l: &[ag::Tensor<'g, f64>]) -> ag::Tensor<'g, f64> {
    let [q, kt, v, mask, ones, scale] = [l[0], l[1], l[2], l[3], l[4], l[5]];
    let heads = l[6..].chunks(4).map(|select| {
        let scores = T::matmul(T::matmul(q, select[0]), T::matmul(select[1], kt));
        let e = T::exp(scores * scale) * mask;
        let p = e / T::matmul(e, ones);
        T::matmul(T::matmul(p, T::matmul(v, select[2])), select[3])
    });
    heads.reduce(|a, b| a + b).expect("there are heads")
}

/// Joins the columns of matrices with these widths in one matrix.
fn joined(parts: [(&Vec<f64>, usize); 3], rows: usize) -> Vec<f64> {
    (0..rows)
        .flat_map(|t| parts.into_iter().flat_map(move |(x, width)| &x[t * width..(t + 1) * width]))
        .copied()
        .collect()
}

#[test]
fn attention_agrees_with_autograd() {
    for (queries, keys, heads, kv_heads, head_dim) in [(7, 7, 4, 2, 6), (3, 8, 3, 1, 4), (6, 6, 2, 2, 8)] {
        let dims = attention::Dims {
            batch: 1,
            queries,
            keys,
            heads,
            kv_heads,
            head_dim,
            scores: attention::Scores::plain(head_dim),
        };
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let [q, dout] = [1, 2].map(|seed| normals(queries * width, seed));
        let [k, v] = [3, 4].map(|seed| normals(keys * kv_width, seed));
        let select = |width: usize, head: usize| {
            Matrix::of(width, head_dim, |i, j| if i == head * head_dim + j { 1.0 } else { 0.0 })
        };
        let mut leaves = vec![
            Matrix::new(&f64s(&q), queries, width),
            Matrix::new(&f64s(&k), keys, kv_width).t(),
            Matrix::new(&f64s(&v), keys, kv_width),
            Matrix::of(queries, keys, |i, j| if j + queries <= i + keys { 1.0 } else { 0.0 }),
            Matrix::constant(keys, keys, 1.0),
            Matrix::constant(queries, keys, f64::from(dims.scores.scale)),
        ];
        for head in 0..heads {
            let kv = select(kv_width, head / (heads / kv_heads));
            leaves.extend([select(width, head), kv.t(), kv, select(width, head).t()]);
        }
        let dy = Matrix::new(&f64s(&dout), queries, width);
        let (want, grads) = gradients(&leaves, 3, &dy, attention_graph);
        let want_dk = grads[1].t().values;
        let (out, _) = attention::reference::forward(&f64s(&q), &f64s(&k), &f64s(&v), dims);
        let (dq, dk, dv) =
            attention::reference::backward(&f64s(&dout), &f64s(&q), &f64s(&k), &f64s(&v), dims);
        assert_close_f64("reference out", &out, &want, EXACT);
        assert_close_f64("reference dq", &dq, &grads[0].values, EXACT);
        assert_close_f64("reference dk", &dk, &want_dk, EXACT);
        assert_close_f64("reference dv", &dv, &grads[2].values, EXACT);
        for isa in Isa::available() {
            let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; queries * heads]);
            attention::Forward { out: &mut out, lse: &mut lse, q: &q, k: &k, v: &v, dims }.run_on(isa);
            assert_close("out", &out, &want, TOLERANCE);
            if queries == keys {
                let parts = [(&f64s(&q), width), (&f64s(&k), kv_width), (&f64s(&v), kv_width)];
                let qkv: Vec<f32> = joined(parts, queries).iter().map(|&x| x as f32).collect();
                let mut dqkv = vec![f32::NAN; qkv.len()];
                attention::ForwardJoined { out: &mut out, lse: &mut lse, qkv: &qkv, dims }.run_on(isa);
                attention::Backward { dqkv: &mut dqkv, dout: &dout, out: &out, qkv: &qkv, lse: &lse, dims }
                    .run_on(isa);
                let parts = [(&grads[0].values, width), (&want_dk, kv_width), (&grads[2].values, kv_width)];
                assert_close("joined out", &out, &want, TOLERANCE);
                assert_close("dqkv", &dqkv, &joined(parts, queries), TOLERANCE);
            }
        }
    }
}

#[test]
fn swiglu_agrees_with_autograd() {
    for activation in [Activation::Silu, Activation::GeluTanh] {
        check_swiglu(activation);
    }
}

fn check_swiglu(activation: Activation) {
    let n = 37;
    let [a, b, dc] = [1, 2, 3].map(|seed| normals(n, seed));
    let constant = |value| Matrix::constant(1, n, value);
    let leaves = [
        Matrix::new(&f64s(&a), 1, n),
        Matrix::new(&f64s(&b), 1, n),
        constant(0.5),
        constant(std::f64::consts::FRAC_2_PI.sqrt()),
        constant(0.044_715),
        constant(1.0),
    ];
    let dy = Matrix::new(&f64s(&dc), 1, n);
    let (want, grads) = gradients(&leaves, 2, &dy, |l| {
        let [a, b, half, factor, cubic, one] = [l[0], l[1], l[2], l[3], l[4], l[5]];
        match activation {
            Activation::Silu => a * T::sigmoid(a) * b,
            Activation::GeluTanh => half * a * (one + T::tanh(factor * (a + cubic * a * a * a))) * b,
        }
    });
    let (da, db) = swiglu::reference::backward(&f64s(&dc), &f64s(&a), &f64s(&b), activation);
    assert_close_f64(
        "reference c",
        &swiglu::reference::forward(&f64s(&a), &f64s(&b), activation),
        &want,
        EXACT,
    );
    assert_close_f64("reference da", &da, &grads[0].values, EXACT);
    assert_close_f64("reference db", &db, &grads[1].values, EXACT);
    for isa in Isa::available() {
        let [mut c, mut da, mut db] = [(); 3].map(|()| vec![f32::NAN; n]);
        swiglu::Forward { c: &mut c, a: &a, b: &b, activation }.run_on(isa);
        swiglu::Backward { da: &mut da, db: &mut db, dc: &dc, a: &a, b: &b, activation }.run_on(isa);
        assert_close("c", &c, &want, TOLERANCE);
        assert_close("da", &da, &grads[0].values, TOLERANCE);
        assert_close("db", &db, &grads[1].values, TOLERANCE);
    }
}

#[test]
fn cross_entropy_agrees_with_autograd() {
    let dims = cross_entropy::Dims { tokens: 6, hidden: 5, vocab: 21 };
    let targets = [20, 0, cross_entropy::IGNORE, 7, 7, 3];
    let scale = 0.3f32;
    let (h, head) = (normals(30, 1), normals(105, 2));
    // An ignored target has no one-hot entry, and no weight in the sum.
    let scored = |t: usize| targets[t] != cross_entropy::IGNORE;
    let leaves = [
        Matrix::new(&f64s(&h), 6, 5),
        Matrix::new(&f64s(&head), 21, 5).t(),
        one_hot(&targets, 21),
        Matrix::constant(21, 1, 1.0),
        Matrix::of(6, 1, |t, _| if scored(t) { 1.0 } else { 0.0 }),
    ];
    let dy = Matrix::constant(6, 1, f64::from(scale));
    let (want, grads) = gradients(&leaves, 2, &dy, |l| {
        let [h, head, onehot, ones, scored] = [l[0], l[1], l[2], l[3], l[4]];
        let logits = T::matmul(h, head);
        (T::ln(T::matmul(T::exp(logits), ones)) - T::matmul(logits * onehot, ones)) * scored
    });
    let want_dhead = grads[1].t().values;
    let logits = cross_entropy::Logits::default();
    let (wide_h, wide_head) = (f64s(&h), f64s(&head));
    let problem =
        cross_entropy::reference::Problem { h: &wide_h, head: &wide_head, targets: &targets, logits, dims };
    let (dh, dhead) = problem.backward(f64::from(scale));
    assert_close_f64("reference losses", &problem.forward(), &want, EXACT);
    assert_close_f64("reference dh", &dh, &grads[0].values, EXACT);
    assert_close_f64("reference dhead", &dhead, &want_dhead, EXACT);
    for isa in Isa::available() {
        let (mut losses, mut dh, mut dhead) = ([f32::NAN; 6], [f32::NAN; 30], [0.0; 105]);
        let scratch = &mut cross_entropy::Scratch::new(Precision::F32);
        cross_entropy::ForwardBackward {
            losses: &mut losses,
            dhidden: &mut dh,
            dhead: &mut dhead,
            hidden_states: &h,
            head: &head,
            targets: &targets,
            scale,
            logits,
            dims,
            scratch,
        }
        .run_on(isa);
        assert_close("losses", &losses, &want, TOLERANCE);
        assert_close("dh", &dh, &grads[0].values, TOLERANCE);
        assert_close("dhead", &dhead, &want_dhead, TOLERANCE);
    }
}

#[test]
fn the_expert_ffn_agrees_with_autograd() {
    let dims = expert_ffn::Dims { tokens: 12, hidden: 10, intermediate: 21, num_experts: 3, all_pairs: true };
    let expert_ffn::Dims { tokens, hidden, intermediate, num_experts: n, .. } = dims;
    let [x, dy] = [1, 5].map(|seed| normals(tokens * hidden, seed));
    let [gate, up, down] = [2, 3, 4].map(|seed| normals(intermediate * hidden, seed));
    // Token 2 has no expert; the others have one to three.
    let mask: Vec<bool> =
        (0..tokens * n).map(|pair| pair / 3 != 2 && !(pair * 7).is_multiple_of(3 + pair % 2)).collect();
    let coef: Vec<f32> = normals(tokens * n, 6).iter().map(|z| 0.25 + z.abs()).collect();
    let [x64, dy64, gate64, up64, down64, coef64] = [&x, &dy, &gate, &up, &down, &coef].map(|v| f64s(v));
    let width = dims.expert_width();
    // The straight-through rule's gradient is the one at coefficients that the mask scales in value alone: inactive
    // coefficients enter as 0, and their derivative is taken there. The last leaf spreads an expert's coefficient over its
    // neurons.
    let leaves = [
        Matrix::new(&x64, tokens, hidden),
        Matrix::new(&gate64, intermediate, hidden).t(),
        Matrix::new(&up64, intermediate, hidden).t(),
        Matrix::new(&down64, intermediate, hidden),
        Matrix::of(tokens, n, |t, i| if mask[t * n + i] { coef64[t * n + i] } else { 0.0 }),
        Matrix::of(n, intermediate, |i, j| if j / width == i { 1.0 } else { 0.0 }),
    ];
    let (want, grads) = gradients(&leaves, 5, &Matrix::new(&dy64, tokens, hidden), |l| {
        let [x, gate, up, down, coef, spread] = [l[0], l[1], l[2], l[3], l[4], l[5]];
        let (a, b) = (T::matmul(x, gate), T::matmul(x, up));
        T::matmul(T::matmul(coef, spread) * (a * T::sigmoid(a) * b), down)
    });
    let [dx, dgate, dup, ddown, dcoef] = &grads[..] else { panic!("five gradients") };
    let wanted = [dx, &dgate.t(), &dup.t(), ddown, dcoef].map(|grad| grad.values.clone());
    let names = ["dx", "dgate", "dup", "ddown", "dcoef"];

    let layer = {
        let (x, gate, up, down, mask, coef) = (&x64, &gate64, &up64, &down64, &mask, &coef64);
        expert_ffn::reference::Layer { x, gate, up, down, mask, coef, dims }
    };
    assert_close_f64("reference y", &expert_ffn::reference::forward(layer), &want, EXACT);
    let got = expert_ffn::reference::backward(&dy64, layer);
    for ((name, got), want) in
        names.iter().zip([got.dx, got.dgate, got.dup, got.ddown, got.dcoef]).zip(&wanted)
    {
        assert_close_f64(&format!("reference {name}"), &got, want, EXACT);
    }

    let by_expert: Vec<(usize, usize)> =
        (0..n).flat_map(|i| (0..tokens).map(move |t| (i, t))).filter(|(i, t)| mask[t * n + i]).collect();
    let mut slots: Vec<u32> = (0..by_expert.len() as u32).collect();
    slots.sort_by_key(|&slot| by_expert[slot as usize].1);
    let routes = expert_ffn::Routes {
        offsets: &(0..=n).map(|e| by_expert.iter().filter(|(i, _)| *i < e).count()).collect::<Vec<_>>(),
        tokens: &by_expert.iter().map(|(_, t)| *t as u32).collect::<Vec<_>>(),
        coefficients: &by_expert.iter().map(|(i, t)| coef[t * n + i]).collect::<Vec<_>>(),
        token_offsets: &(0..=tokens)
            .map(|end| by_expert.iter().filter(|(_, t)| *t < end).count())
            .collect::<Vec<_>>(),
        slots: &slots,
    };
    let (pairs, weights) =
        (expert_ffn::Pairs::Routed(&routes), &expert_ffn::Weights { gate: &gate, up: &up, down: &down });
    let (scratch, saved) = (&mut expert_ffn::Scratch::default(), &mut expert_ffn::Saved::default());
    let mut y = vec![f32::NAN; x.len()];
    let packed = expert_ffn::PackedWeights::new(Precision::F32, weights, hidden, intermediate, n);
    expert_ffn::ForwardPacked { y: &mut y, x: &x, weights: &packed, pairs, dims, scratch }.run();
    assert_close("y", &y, &want, TOLERANCE);
    y.fill(f32::NAN);
    expert_ffn::ForwardTrain { y: &mut y, saved, x: &x, weights, pairs, dims, scratch }.run();
    assert_close("y of training", &y, &want, TOLERANCE);
    let (mut dx, mut dcoef) = (vec![f32::NAN; x.len()], vec![f32::NAN; tokens * n]);
    let [mut dgate, mut dup, mut ddown] = [(); 3].map(|()| vec![0.0; gate.len()]);
    expert_ffn::Backward {
        dx: &mut dx,
        dcoefficients: Some(&mut dcoef),
        grads: expert_ffn::WeightGrads { gate: &mut dgate, up: &mut dup, down: &mut ddown },
        dy: &dy,
        saved,
        x: &x,
        weights,
        pairs,
        dims,
        scratch,
    }
    .run();
    for ((name, got), want) in names.iter().zip([dx, dgate, dup, ddown, dcoef]).zip(&wanted) {
        assert_close(name, &got, want, TOLERANCE);
    }
}
