//! The definition of the loss, in f64.

use super::{Dims, IGNORE, Logits};
use crate::linear;

/// Returns `z - logsumexp(z)` of one row of logits.
pub fn log_softmax(z: &[f64]) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let shift = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
    z.iter().map(|z| z - shift).collect()
}

/// The operands of the definition.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// `[T, hidden]`
    pub h: &'a [f64],
    /// `[vocab, hidden]`
    pub head: &'a [f64],
    /// `[T]`
    pub targets: &'a [u32],
    /// The settings of the logits.
    pub logits: Logits,
    /// The sizes.
    pub dims: Dims,
}

impl Problem<'_> {
    /// Returns the logits, and the derivative of each with respect to its product of `h` and `head`.
    fn logits(self) -> (Vec<f64>, Vec<f64>) {
        let scale = f64::from(self.logits.scale);
        let products = linear::reference::forward(self.h, self.head, linear_dims(self.dims));
        products
            .into_iter()
            .map(|z| {
                let Some(cap) = self.logits.cap.map(f64::from) else { return (scale * z, scale) };
                let t = (scale * z / cap).tanh();
                (cap * t, scale * (1.0 - t * t))
            })
            .unzip()
    }

    /// Returns `losses[t] = -log_softmax(z[t])[targets[t]]`, 0 where the target is [`IGNORE`].
    pub fn forward(self) -> Vec<f64> {
        let (logits, _) = self.logits();
        let rows = logits.chunks(self.dims.vocab).zip(self.targets);
        rows.map(|(z, &target)| if target == IGNORE { 0.0 } else { -log_softmax(z)[target as usize] })
            .collect()
    }

    /// Returns `(dh, dW)` of `scale * sum of losses`: with `loss = logsumexp(z) - z_target`, `dz = softmax(z) - onehot`; times
    /// the derivative of the logits; then the linear layer's backward.
    pub fn backward(self, scale: f64) -> (Vec<f64>, Vec<f64>) {
        let (mut dz, slopes) = self.logits();
        let vocab = self.dims.vocab;
        for ((z, slopes), &target) in dz.chunks_mut(vocab).zip(slopes.chunks(vocab)).zip(self.targets) {
            let log_p = log_softmax(z);
            for (k, ((z, log_p), slope)) in z.iter_mut().zip(log_p).zip(slopes).enumerate() {
                let onehot = if k == target as usize { 1.0 } else { 0.0 };
                *z = if target == IGNORE { 0.0 } else { scale * slope * (log_p.exp() - onehot) };
            }
        }
        linear::reference::backward(&dz, self.h, self.head, linear_dims(self.dims))
    }
}

fn linear_dims(dims: Dims) -> linear::Dims {
    linear::Dims {
        rows: dims.tokens,
        inputs: dims.hidden,
        outputs: dims.vocab,
        precision: crate::Precision::F32,
    }
}
