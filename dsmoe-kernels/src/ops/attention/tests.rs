use super::{Backward, DECODE_QUERIES, Decode, Dims, Forward, ForwardJoined, Scores, reference};
use crate::isa::Isa;
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals, sized,
};

struct Problem {
    dims: Dims,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

impl Problem {
    fn new(dims: Dims) -> Problem {
        let queries = dims.batch * dims.queries * dims.width();
        let keys = dims.batch * dims.keys * dims.kv_width();
        Problem {
            dims,
            q: normals(queries, 1),
            k: normals(keys, 2),
            v: normals(keys, 3),
            dout: normals(queries, 4),
        }
    }

    /// Returns `[out, lse]`.
    fn forward(&self, isa: Isa) -> [Vec<f32>; 2] {
        let mut out = vec![f32::NAN; self.q.len()];
        let mut lse = vec![f32::NAN; self.q.len() / self.dims.head_dim];
        Forward { out: &mut out, lse: &mut lse, q: &self.q, k: &self.k, v: &self.v, dims: self.dims }
            .run_on(isa);
        [out, lse]
    }

    fn decode(&self, isa: Isa) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.q.len()];
        Decode { out: &mut out, q: &self.q, k: &self.k, v: &self.v, dims: self.dims }.run_on(isa);
        out
    }

    /// Returns `[out, lse]` of the joined form.
    fn forward_joined(&self, isa: Isa) -> [Vec<f32>; 2] {
        let mut out = vec![f32::NAN; self.q.len()];
        let mut lse = vec![f32::NAN; self.q.len() / self.dims.head_dim];
        let qkv = join([&self.q, &self.k, &self.v], self.dims);
        ForwardJoined { out: &mut out, lse: &mut lse, qkv: &qkv, dims: self.dims }.run_on(isa);
        [out, lse]
    }

    /// Returns dqkv.
    fn backward(&self, isa: Isa) -> Vec<f32> {
        let [out, lse] = self.forward_joined(isa);
        let qkv = join([&self.q, &self.k, &self.v], self.dims);
        let mut dqkv = vec![f32::NAN; qkv.len()];
        Backward { dqkv: &mut dqkv, dout: &self.dout, out: &out, qkv: &qkv, lse: &lse, dims: self.dims }
            .run_on(isa);
        dqkv
    }
}

/// Joins the columns of q, k and v in one matrix.
fn join<T: Copy>([q, k, v]: [&[T]; 3], dims: Dims) -> Vec<T> {
    let (width, kv_width) = (dims.width(), dims.kv_width());
    (0..dims.batch * dims.queries)
        .flat_map(|t| {
            let kv = t * kv_width..(t + 1) * kv_width;
            [&q[t * width..(t + 1) * width], &k[kv.clone()], &v[kv]].concat()
        })
        .collect()
}

fn dims(batch: usize, queries: usize, keys: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Dims {
    Dims { batch, queries, keys, heads, kv_heads, head_dim, scores: Scores::plain(head_dim) }
}

/// The variants of scores: plain, scaled, windows that end inside tiles and at their edges, caps.
fn variants(head_dim: usize) -> impl Iterator<Item = Scores> {
    let plain = Scores::plain(head_dim);
    let scaled = Scores { scale: 0.3, ..plain };
    let windows = [1, 2, 5, 33, 127, 128, 1000].map(|window| Scores { window: Some(window), ..plain });
    let capped = [0.5, 3.0].map(|cap| Scores { cap: Some(cap), ..scaled });
    let all = Scores { scale: 0.7, window: Some(20), cap: Some(1.5) };
    [plain, scaled, all].into_iter().chain(windows).chain(capped)
}

#[test]
fn the_reference_gradient_is_the_derivative() {
    for scores in variants(2) {
        check_reference_gradient(Dims { scores, ..sized(dims(2, 3, 5, 4, 2, 2), dims(1, 2, 3, 2, 1, 2)) });
    }
}

fn check_reference_gradient(dims: Dims) {
    let Problem { dims, q, k, v, dout } = Problem::new(dims);
    let [q, k, v, dout] = [q, k, v, dout].map(|x| f64s(&x));
    let loss = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
        reference::forward(q, k, v, dims).0.iter().zip(&dout).map(|(y, dy)| y * dy).sum()
    };
    let (dq, dk, dv) = reference::backward(&dout, &q, &k, &v, dims);
    assert_close_f64("dq", &dq, &finite_differences(&q, 1e-5, |q| loss(q, &k, &v)), 1e-9);
    assert_close_f64("dk", &dk, &finite_differences(&k, 1e-5, |k| loss(&q, k, &v)), 1e-9);
    assert_close_f64("dv", &dv, &finite_differences(&v, 1e-5, |v| loss(&q, &k, v)), 1e-9);
}

#[test]
fn the_hand_example_comes_out() {
    // Scores of the second query: (ln 3) and 0, so weights 3/4 and 1/4; the first query sees key 0 alone.
    let dims = dims(1, 2, 2, 1, 1, 1);
    let (out, lse) = reference::forward(&[5.0, 1.0], &[3f64.ln(), 0.0], &[4.0, 8.0], dims);
    assert_close_f64("out", &out, &[4.0, 5.0], 1e-15);
    assert_close_f64("lse", &lse, &[5.0 * 3f64.ln(), 4f64.ln()], 1e-15);
    // A window of one key: every query sees itself.
    let scores = Scores { window: Some(1), ..dims.scores };
    let (out, _) = reference::forward(&[5.0, 1.0], &[3.0, 7.0], &[4.0, 8.0], Dims { scores, ..dims });
    assert_close_f64("out of a window", &out, &[4.0, 8.0], 1e-15);
    // A cap of 2: scores of the second query 2 tanh(1) and 0.
    let scores = Scores { cap: Some(2.0), ..dims.scores };
    let (out, _) = reference::forward(&[5.0, 1.0], &[2.0, 0.0], &[4.0, 8.0], Dims { scores, ..dims });
    let weight = 1.0 / (1.0 + (-2.0 * 0.761_594_155_955_764_9_f64).exp());
    assert_close_f64("out of a cap", &out, &[4.0, 8.0 - 4.0 * weight], 1e-15);
}

/// Odd sizes, several tiles of queries and keys, every sharing of heads, and queries that continue a sequence. Miri takes seconds for
/// every head of keys, since rows are padded to 16 and keys to 8, so that there are few there.
fn problems() -> Vec<Problem> {
    if cfg!(miri) {
        let all = Scores { scale: 0.7, window: Some(2), cap: Some(1.5) };
        let shapes = [
            dims(0, 3, 3, 2, 1, 4),
            dims(2, 0, 3, 2, 1, 4),
            dims(1, 1, 1, 1, 1, 1),
            dims(1, 2, 9, 2, 1, 8),
            Dims { scores: all, ..dims(1, 3, 3, 2, 1, 4) },
        ];
        return shapes.map(Problem::new).into();
    }
    let shapes = [
        dims(0, 3, 3, 2, 1, 4),
        dims(2, 0, 3, 2, 1, 4),
        dims(1, 1, 1, 1, 1, 1),
        dims(2, 5, 5, 3, 3, 8),
        dims(3, 7, 12, 4, 2, 16),
        dims(1, 130, 130, 2, 2, 16),
        dims(2, 65, 200, 6, 2, 5),
        dims(1, 33, 90, 8, 1, 64),
        dims(1, 70, 70, 3, 1, 80),
        dims(1, 40, 129, 2, 1, 128),
        dims(1, 150, 150, 3, 1, 128),
        dims(1, 3, 70, 70, 1, 8),
        dims(1, 2, 600, 20, 2, 20),
        dims(1, 2, 67, 2, 1, 8),
    ];
    let decodes = (1..=DECODE_QUERIES).flat_map(|queries| {
        [8, 20, 64, 80, 128].map(|head_dim| dims(2, queries, 66 + queries, 6, 3, head_dim))
    });
    let windowed = [
        dims(2, 5, 5, 3, 3, 8),
        dims(3, 7, 12, 4, 2, 16),
        dims(1, 300, 300, 2, 1, 8),
        dims(2, 65, 400, 6, 2, 5),
        dims(2, 4, 290, 6, 3, 20),
    ];
    let varied = windowed
        .into_iter()
        .flat_map(|dims| variants(dims.head_dim).skip(1).map(move |scores| Dims { scores, ..dims }));
    shapes.into_iter().chain(decodes).chain(varied).map(Problem::new).collect()
}

#[test]
fn forward_backward_and_decode_agree_with_the_reference_on_every_tier() {
    for problem in problems() {
        let Problem { dims, q, k, v, dout } = &problem;
        let [q, k, v, dout] = [q, k, v, dout].map(|x| f64s(x));
        let (want_out, want_lse) = reference::forward(&q, &k, &v, *dims);
        let (want_dq, want_dk, want_dv) = reference::backward(&dout, &q, &k, &v, *dims);
        for isa in Isa::available() {
            let name = format!("{} {dims:?}", isa.name());
            let [out, lse] = problem.forward(isa);
            assert_close(&format!("out {name}"), &out, &want_out, 1e-6);
            assert_close(&format!("lse {name}"), &lse, &want_lse, 1e-6);
            if dims.queries == dims.keys {
                assert_eq!(problem.forward_joined(isa), [out, lse], "{name}");
                let want = join([&want_dq, &want_dk, &want_dv], *dims);
                assert_close(&format!("dqkv {name}"), &problem.backward(isa), &want, 2e-6);
            }
            if dims.queries <= DECODE_QUERIES {
                assert_close(&format!("decode {name}"), &problem.decode(isa), &want_out, 1e-6);
            }
        }
    }
}

#[test]
fn any_chunking_of_the_queries_gives_the_same_rows() {
    for scores in [Scores::plain(16), Scores { scale: 0.25, window: Some(sized(40, 2)), cap: Some(5.0) }] {
        check_chunks(Dims { scores, ..sized(dims(1, 150, 150, 4, 2, 16), dims(1, 5, 5, 2, 1, 4)) });
    }
}

fn check_chunks(dims: Dims) {
    let whole = Problem::new(dims);
    let [out, _] = whole.forward(Isa::current());
    let (width, kv_width) = (dims.width(), dims.kv_width());
    for &(first, end) in
        sized::<&[_]>(&[(0, 1), (0, 150), (10, 90), (149, 150), (63, 65)], &[(0, 1), (1, 4), (4, 5)])
    {
        let part = Problem {
            dims: Dims { queries: end - first, keys: end, ..whole.dims },
            q: whole.q[first * width..end * width].to_vec(),
            k: whole.k[..end * kv_width].to_vec(),
            v: whole.v[..end * kv_width].to_vec(),
            dout: Vec::new(),
        };
        let want = f64s(&out[first * width..end * width]);
        let [got, _] = part.forward(Isa::current());
        assert_close(&format!("{first}..{end}"), &got, &want, 1e-6);
        if end - first <= DECODE_QUERIES {
            assert_close(&format!("decode {first}..{end}"), &part.decode(Isa::current()), &want, 1e-6);
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let len = sized(100, 6);
    let mut problem = Problem::new(dims(1, len, len, 2, 1, 8));
    problem.q.iter_mut().for_each(|q| *q *= 1e4);
    let [q, k, v] = [&problem.q, &problem.k, &problem.v].map(|x| f64s(x));
    let (want, _) = reference::forward(&q, &k, &v, problem.dims);
    for isa in Isa::available() {
        // A softmax this sharp turns the rounding of a score into a relative error of its weight.
        let [out, lse] = problem.forward(isa);
        assert!(out.iter().chain(&lse).all(|x| x.is_finite()));
        assert_close(isa.name(), &out, &want, 2e-2);
        assert!(problem.backward(isa).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_nan_reaches_every_query_that_sees_it() {
    let len = sized(100, 9);
    for &key in sized::<&[_]>(&[0, 5, 69, 99], &[0, 8]) {
        for in_value in [false, true] {
            let mut problem = Problem::new(dims(1, len, len, 1, 1, 8));
            let at = if in_value { &mut problem.v } else { &mut problem.k };
            at[key * 8 + 3] = f32::NAN;
            for isa in Isa::available() {
                let [out, _] = problem.forward(isa);
                for (i, out) in out.chunks(8).enumerate().skip(key) {
                    let got = if in_value { out[3] } else { out[0] };
                    assert!(got.is_nan(), "{} key {key}, query {i}", isa.name());
                }
                let mut last = Problem::new(dims(1, 1, len, 1, 1, 8));
                (last.k, last.v) = (problem.k.clone(), problem.v.clone());
                assert!(last.decode(isa)[3].is_nan(), "{} decode, key {key}", isa.name());
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let windowed = Scores { scale: 0.25, window: Some(40), cap: Some(5.0) };
    let problems = [
        dims(3, 70, 70, 4, 2, 16),
        Dims { scores: windowed, ..dims(3, 170, 170, 4, 2, 16) },
        dims(1, 200, 300, 4, 4, 32),
        dims(2, 2, 900, 8, 4, 64),
    ];
    // Two heads of keys are two tasks of the forward and the backward pass, and decoding has four.
    let small = [dims(1, 2, 2, 2, 2, 4)];
    for &dims in sized::<&[Dims]>(&problems, &small) {
        let problem = Problem::new(dims);
        assert_same_on_threads("attention", || {
            let isa = Isa::current();
            let decoded = if dims.queries <= DECODE_QUERIES { problem.decode(isa) } else { Vec::new() };
            let gradient = if dims.queries == dims.keys { problem.backward(isa) } else { Vec::new() };
            (problem.forward(isa), gradient, decoded)
        });
    }
}

#[test]
#[should_panic(expected = "attention::Forward: q and its like [8, 8], k and its like [4, 4] values")]
fn fewer_keys_than_queries_are_refused() {
    Problem::new(dims(1, 2, 1, 1, 1, 4)).forward(Isa::Scalar);
}

#[test]
fn keys_behind_the_window_are_not_read() {
    let scores = Scores { window: Some(9), ..Scores::plain(8) };
    for &(queries, seen_from) in sized::<&[_]>(&[(1, 291), (3, 289), (60, 232)], &[(1, 291), (3, 289)]) {
        let mut problem = Problem::new(Dims { scores, ..dims(1, queries, 300, 2, 1, 8) });
        let clean = problem.forward(Isa::current());
        // A tile starts at a multiple of 8 keys.
        let hidden = seen_from / 8 * 8 * 8;
        problem.k[..hidden].fill(f32::NAN);
        problem.v[..hidden].fill(f32::NAN);
        assert_eq!(problem.forward(Isa::current()), clean);
        if queries <= DECODE_QUERIES {
            assert!(problem.decode(Isa::current()).iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
#[should_panic(expected = "attention::Forward: window and cap have to be positive")]
fn an_empty_window_is_refused() {
    let scores = Scores { window: Some(0), ..Scores::plain(4) };
    Problem::new(Dims { scores, ..dims(1, 2, 2, 1, 1, 4) }).forward(Isa::Scalar);
}
