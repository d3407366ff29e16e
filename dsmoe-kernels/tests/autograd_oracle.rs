//! The definition of every op, which its kernels are tested against, against reverse-mode differentiation by the `autograd`
//! crate, which shares no code with it.
//!
//! The ops are written there with matrix products, elementwise functions of equal shapes, and constant matrices:
//! sums are products with ones, because the crate's gradients of broadcasts are wrong. Its `transpose` fails too,
//! so that a factor needed transposed enters transposed.

use autograd as ag;
use autograd::tensor_ops as T;
use dsmoe_kernels::testing::{assert_close_f64, f64s, normals};
use dsmoe_kernels::{
    Activation, Precision, attention, cross_entropy, embedding, expert_ffn, linear, rms_norm, rope, swiglu,
};

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

/// Checks results of a definition by their names.
fn check<const N: usize>(names: [&str; N], got: [&[f64]; N], want: [&[f64]; N]) {
    for ((name, got), want) in names.into_iter().zip(got).zip(want) {
        assert_close_f64(name, got, want, 1e-12);
    }
}

fn random(n: usize, seed: u64) -> Vec<f64> {
    f64s(&normals(n, seed))
}

fn one_hot(ids: &[u32], width: usize) -> Matrix {
    Matrix::of(ids.len(), width, |t, id| if ids[t] as usize == id { 1.0 } else { 0.0 })
}

#[test]
fn embedding_agrees_with_autograd() {
    let (ids, vocab, hidden) = ([3, 0, 3, 5, 1], 7, 4);
    let (table, dout) = (random(vocab * hidden, 1), random(ids.len() * hidden, 2));
    let leaves = [Matrix::new(&table, vocab, hidden), one_hot(&ids, vocab)];
    let dy = Matrix::new(&dout, ids.len(), hidden);
    let (want, grads) = gradients(&leaves, 1, &dy, |l| T::matmul(l[1], l[0]));
    let out = embedding::reference::forward(&table, &ids, hidden, 1.0);
    let dtable = embedding::reference::backward(&dout, &ids, [vocab, hidden], 1.0);
    check(["out", "dtable"], [&out, &dtable], [&want, &grads[0].values]);
}

#[test]
fn rms_norm_agrees_with_autograd() {
    let (tokens, hidden, eps) = (5, 19, 1e-3);
    let (x, w, dout) = (random(tokens * hidden, 1), random(hidden, 2), random(tokens * hidden, 3));
    let leaves = [
        Matrix::new(&x, tokens, hidden),
        Matrix::new(&w, 1, hidden),
        Matrix::constant(hidden, hidden, 1.0 / hidden as f64),
        Matrix::constant(tokens, hidden, eps),
        Matrix::constant(tokens, 1, 1.0),
    ];
    let dy = Matrix::new(&dout, tokens, hidden);
    let (want, grads) = gradients(&leaves, 2, &dy, |l| {
        let [x, w, mean, eps, ones] = [l[0], l[1], l[2], l[3], l[4]];
        x / T::sqrt(T::matmul(x * x, mean) + eps) * T::matmul(ones, w)
    });
    let (y, rstd) = rms_norm::reference::forward(&x, &w, eps);
    let (dx, dw) = rms_norm::reference::backward(&dout, &x, &w, &rstd);
    check(["y", "dx", "dw"], [&y, &dx, &dw], [&want, &grads[0].values, &grads[1].values]);
}

#[test]
fn linear_agrees_with_autograd() {
    let dims = linear::Dims { rows: 6, inputs: 9, outputs: 5, precision: Precision::F32 };
    let (x, w, dout) = (random(54, 1), random(45, 2), random(30, 3));
    let leaves = [Matrix::new(&x, 6, 9), Matrix::new(&w, 5, 9).t()];
    let (want, grads) = gradients(&leaves, 2, &Matrix::new(&dout, 6, 5), |l| T::matmul(l[0], l[1]));
    let want_dw = grads[1].t().values;
    let (dx, dw) = linear::reference::backward(&dout, &x, &w, dims);
    let y = linear::reference::forward(&x, &w, dims);
    check(["y", "dx", "dw"], [&y, &dx, &dw], [&want, &grads[0].values, &want_dw]);
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
    let (x, dout) = (random(n, 1), random(n, 2));
    let leaves = [Matrix::new(&x, 1, n), rotation];
    let (want, grads) = gradients(&leaves, 1, &Matrix::new(&dout, 1, n), |l| T::matmul(l[0], l[1]));
    let frequencies = rope::reference::frequencies(head_dim, theta);
    let positions: Vec<usize> = (0..2 * seq).map(|r| start + r % seq).collect();
    let rotation = rope::reference::Rotation {
        frequencies: &frequencies,
        factor: 1.0,
        positions: &positions,
        heads,
        head_dim,
    };
    let (y, dx) = (rotation.forward(&x), rotation.backward(&dout));
    check(["y", "dx"], [&y, &dx], [&want, &grads[0].values]);
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
        let [q, dout] = [1, 2].map(|seed| random(queries * width, seed));
        let [k, v] = [3, 4].map(|seed| random(keys * kv_width, seed));
        let select = |width: usize, head: usize| {
            Matrix::of(width, head_dim, |i, j| if i == head * head_dim + j { 1.0 } else { 0.0 })
        };
        let mut leaves = vec![
            Matrix::new(&q, queries, width),
            Matrix::new(&k, keys, kv_width).t(),
            Matrix::new(&v, keys, kv_width),
            Matrix::of(queries, keys, |i, j| if j + queries <= i + keys { 1.0 } else { 0.0 }),
            Matrix::constant(keys, keys, 1.0),
            Matrix::constant(queries, keys, f64::from(dims.scores.scale)),
        ];
        for head in 0..heads {
            let kv = select(kv_width, head / (heads / kv_heads));
            leaves.extend([select(width, head), kv.t(), kv, select(width, head).t()]);
        }
        let dy = Matrix::new(&dout, queries, width);
        let (want, grads) = gradients(&leaves, 3, &dy, attention_graph);
        let want_dk = grads[1].t().values;
        let (out, _) = attention::reference::forward(&q, &k, &v, dims);
        let (dq, dk, dv) = attention::reference::backward(&dout, &q, &k, &v, dims);
        let wanted: [&[f64]; 4] = [&want, &grads[0].values, &want_dk, &grads[2].values];
        check(["out", "dq", "dk", "dv"], [&out, &dq, &dk, &dv], wanted);
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
    let [a, b, dc] = [1, 2, 3].map(|seed| random(n, seed));
    let constant = |value| Matrix::constant(1, n, value);
    let leaves = [
        Matrix::new(&a, 1, n),
        Matrix::new(&b, 1, n),
        constant(0.5),
        constant(std::f64::consts::FRAC_2_PI.sqrt()),
        constant(0.044_715),
        constant(1.0),
    ];
    let dy = Matrix::new(&dc, 1, n);
    let (want, grads) = gradients(&leaves, 2, &dy, |l| {
        let [a, b, half, factor, cubic, one] = [l[0], l[1], l[2], l[3], l[4], l[5]];
        match activation {
            Activation::Silu => a * T::sigmoid(a) * b,
            Activation::GeluTanh => half * a * (one + T::tanh(factor * (a + cubic * a * a * a))) * b,
        }
    });
    let (da, db) = swiglu::reference::backward(&dc, &a, &b, activation);
    let c = swiglu::reference::forward(&a, &b, activation);
    check(["c", "da", "db"], [&c, &da, &db], [&want, &grads[0].values, &grads[1].values]);
}

#[test]
fn cross_entropy_agrees_with_autograd() {
    let dims = cross_entropy::Dims { tokens: 6, hidden: 5, vocab: 21 };
    let targets = [20, 0, cross_entropy::IGNORE, 7, 7, 3];
    let scale = 0.3;
    let (h, head) = (random(30, 1), random(105, 2));
    // An ignored target has no one-hot entry, and no weight in the sum.
    let scored = |t: usize| targets[t] != cross_entropy::IGNORE;
    let leaves = [
        Matrix::new(&h, 6, 5),
        Matrix::new(&head, 21, 5).t(),
        one_hot(&targets, 21),
        Matrix::constant(21, 1, 1.0),
        Matrix::of(6, 1, |t, _| if scored(t) { 1.0 } else { 0.0 }),
    ];
    let dy = Matrix::constant(6, 1, scale);
    let (want, grads) = gradients(&leaves, 2, &dy, |l| {
        let [h, head, onehot, ones, scored] = [l[0], l[1], l[2], l[3], l[4]];
        let logits = T::matmul(h, head);
        (T::ln(T::matmul(T::exp(logits), ones)) - T::matmul(logits * onehot, ones)) * scored
    });
    let want_dhead = grads[1].t().values;
    let logits = cross_entropy::Logits::default();
    let problem = cross_entropy::reference::Problem { h: &h, head: &head, targets: &targets, logits, dims };
    let (dh, dhead) = problem.backward(scale);
    let wanted: [&[f64]; 3] = [&want, &grads[0].values, &want_dhead];
    check(["losses", "dh", "dhead"], [&problem.forward(), &dh, &dhead], wanted);
}

#[test]
fn the_expert_ffn_agrees_with_autograd() {
    let dims = expert_ffn::Dims { num_experts: 3, ..expert_ffn::Dims::dense(12, 10, 21, Activation::Silu) };
    let expert_ffn::Dims { tokens, hidden, intermediate, num_experts: n, .. } = dims;
    let [x, dy] = [1, 5].map(|seed| random(tokens * hidden, seed));
    let [gate, up, down] = [2, 3, 4].map(|seed| random(intermediate * hidden, seed));
    // Token 2 has no expert; the others have one to three.
    let mask: Vec<bool> =
        (0..tokens * n).map(|pair| pair / 3 != 2 && !(pair * 7).is_multiple_of(3 + pair % 2)).collect();
    let coef: Vec<f64> = random(tokens * n, 6).iter().map(|z| 0.25 + z.abs()).collect();
    let width = dims.expert_width();
    // The straight-through rule's gradient is the one at coefficients that the mask scales in value alone: inactive
    // coefficients enter as 0, and their derivative is taken there. The last leaf spreads an expert's coefficient over its
    // neurons.
    let leaves = [
        Matrix::new(&x, tokens, hidden),
        Matrix::new(&gate, intermediate, hidden).t(),
        Matrix::new(&up, intermediate, hidden).t(),
        Matrix::new(&down, intermediate, hidden),
        Matrix::of(tokens, n, |t, i| if mask[t * n + i] { coef[t * n + i] } else { 0.0 }),
        Matrix::of(n, intermediate, |i, j| if j / width == i { 1.0 } else { 0.0 }),
    ];
    let (want, grads) = gradients(&leaves, 5, &Matrix::new(&dy, tokens, hidden), |l| {
        let [x, gate, up, down, coef, spread] = [l[0], l[1], l[2], l[3], l[4], l[5]];
        let (a, b) = (T::matmul(x, gate), T::matmul(x, up));
        T::matmul(T::matmul(coef, spread) * (a * T::sigmoid(a) * b), down)
    });
    let [dx, dgate, dup, ddown, dcoef] = &grads[..] else { panic!("five gradients") };
    let wanted = [dx, &dgate.t(), &dup.t(), ddown, dcoef].map(|grad| grad.values.clone());

    let layer = {
        let (x, gate, up, down, mask, coef) = (&x, &gate, &up, &down, &mask, &coef);
        expert_ffn::reference::Layer { x, gate, up, down, biases: None, mask, coef, dims }
    };
    let y = expert_ffn::reference::forward(layer);
    let got = expert_ffn::reference::backward(&dy, layer);
    let [dx, dgate, dup, ddown, dcoef] = wanted.each_ref().map(|values| &values[..]);
    check(
        ["y", "dx", "dgate", "dup", "ddown", "dcoef"],
        [&y, &got.dx, &got.dgate, &got.dup, &got.ddown, &got.dcoef],
        [&want, dx, dgate, dup, ddown, dcoef],
    );
}
