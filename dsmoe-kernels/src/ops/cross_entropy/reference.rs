//! The definition of the loss, in f64.

use super::{Dims, IGNORE};
use crate::linear;

/// Returns `z - logsumexp(z)` of one row of logits.
pub fn log_softmax(z: &[f64]) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let shift = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
    z.iter().map(|z| z - shift).collect()
}

/// Returns `losses[t] = -log_softmax(h[t] W^T)[targets[t]]`, 0 where the target is [`IGNORE`].
pub fn forward(h: &[f64], head: &[f64], targets: &[u32], dims: Dims) -> Vec<f64> {
    let logits = linear::reference::forward(h, head, linear_dims(dims));
    let rows = logits.chunks(dims.vocab).zip(targets);
    rows.map(|(z, &target)| if target == IGNORE { 0.0 } else { -log_softmax(z)[target as usize] }).collect()
}

/// Returns `(dh, dW)` of `scale * sum of losses`: with `loss = logsumexp(z) - z_target`, `dz = softmax(z) - onehot`; then
/// the linear layer's backward.
pub fn backward(h: &[f64], head: &[f64], targets: &[u32], scale: f64, dims: Dims) -> (Vec<f64>, Vec<f64>) {
    let mut dz = linear::reference::forward(h, head, linear_dims(dims));
    for (z, &target) in dz.chunks_mut(dims.vocab).zip(targets) {
        let log_p = log_softmax(z);
        for (k, (z, log_p)) in z.iter_mut().zip(log_p).enumerate() {
            let onehot = if k == target as usize { 1.0 } else { 0.0 };
            *z = if target == IGNORE { 0.0 } else { scale * (log_p.exp() - onehot) };
        }
    }
    linear::reference::backward(&dz, h, head, linear_dims(dims))
}

fn linear_dims(dims: Dims) -> linear::Dims {
    linear::Dims {
        rows: dims.tokens,
        inputs: dims.hidden,
        outputs: dims.vocab,
        precision: crate::Precision::F32,
    }
}
