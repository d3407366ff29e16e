//! The definition of causal grouped attention, in f64: one query and head at a time.

use super::Dims;

/// One query of a batch item at one head.
struct Query<'a> {
    q: &'a [f64],
    /// Start of its head in q and out.
    at: usize,
    /// Start of key 0 of its head in k and v.
    base: usize,
    /// The first key it sees.
    first: usize,
    /// Softmax of its scores over the keys it sees.
    p: Vec<f64>,
    /// Derivative of each of these scores with respect to the scaled product.
    slopes: Vec<f64>,
    lse: f64,
}

fn queries<'a>(q: &'a [f64], k: &'a [f64], dims: Dims) -> impl Iterator<Item = Query<'a>> {
    let Dims { batch, queries, keys, heads, kv_heads, head_dim, scores } = dims;
    (0..batch * queries * heads).map(move |index| {
        let (b, i, h) = (index / heads / queries, index / heads % queries, index % heads);
        let base = (b * keys * kv_heads + h / (heads / kv_heads)) * head_dim;
        let q = &q[index * head_dim..][..head_dim];
        let position = i + keys - queries;
        let first = scores.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let (scores, slopes): (Vec<f64>, Vec<f64>) = (first..=position)
            .map(|j| {
                let k = &k[base + j * kv_heads * head_dim..][..head_dim];
                let s = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(scores.scale);
                let Some(cap) = scores.cap.map(f64::from) else { return (s, 1.0) };
                let t = (s / cap).tanh();
                (cap * t, 1.0 - t * t)
            })
            .unzip();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        let p = scores.iter().map(|s| (s - lse).exp()).collect();
        Query { q, at: index * head_dim, base, first, p, slopes, lse }
    })
}

/// Returns `(out, lse)`.
pub fn forward(q: &[f64], k: &[f64], v: &[f64], dims: Dims) -> (Vec<f64>, Vec<f64>) {
    let mut out = vec![0.0; q.len()];
    let mut lse = Vec::new();
    for query in queries(q, k, dims) {
        lse.push(query.lse);
        for (j, p) in query.p.iter().enumerate() {
            let v = &v[query.base + (query.first + j) * dims.kv_width()..][..dims.head_dim];
            for (out, v) in out[query.at..].iter_mut().zip(v) {
                *out += p * v;
            }
        }
    }
    (out, lse)
}

/// Returns `(dq, dk, dv)`. From `out = sum_j p_j v_j`: `dv_j += p_j dout` and `dp_j = <dout, v_j>`. From p = softmax(s):
/// `ds_j = p_j (dp_j - sum_l p_l dp_l)`. From `s_j = c tanh(z_j / c)`: `dz_j = ds_j (1 - tanh(z_j / c)^2)`, without a cap
/// `dz_j = ds_j`. From `z_j = scale <q, k_j>`: `dq += scale dz_j k_j` and `dk_j += scale dz_j q`.
pub fn backward(dout: &[f64], q: &[f64], k: &[f64], v: &[f64], dims: Dims) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let scale = f64::from(dims.scores.scale);
    for Query { q, at, base, first, p, slopes, .. } in queries(q, k, dims) {
        let dout = &dout[at..][..dims.head_dim];
        let key = |j: usize| base + (first + j) * dims.kv_width();
        let dp: Vec<f64> =
            (0..p.len()).map(|j| dout.iter().zip(&v[key(j)..]).map(|(dout, v)| dout * v).sum()).collect();
        let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        for j in 0..p.len() {
            let ds = p[j] * (dp[j] - mean) * slopes[j];
            for d in 0..dims.head_dim {
                dv[key(j) + d] += p[j] * dout[d];
                dq[at + d] += scale * ds * k[key(j) + d];
                dk[key(j) + d] += scale * ds * q[d];
            }
        }
    }
    (dq, dk, dv)
}
