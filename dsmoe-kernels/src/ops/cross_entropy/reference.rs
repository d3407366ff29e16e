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

    /// Returns the logits `[T, vocab]`.
    pub fn logits_alone(self) -> Vec<f64> {
        self.logits().0
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

/// A teacher of the definition: its logits `[T, vocab]` and the weight of its divergence.
#[derive(Clone, Copy, Debug)]
pub struct Teacher<'a> {
    /// u `[T, vocab]`
    pub logits: &'a [f64],
    /// w
    pub weight: f64,
}

impl Problem<'_> {
    /// Returns `divergences[t] = sum over k of p_k (ln p_k - ln q_k)`, 0 where the target is [`IGNORE`].
    pub fn divergences(self, teacher: Teacher<'_>) -> Vec<f64> {
        let (logits, _) = self.logits();
        let vocab = self.dims.vocab;
        let rows = logits.chunks(vocab).zip(teacher.logits.chunks(vocab)).zip(self.targets);
        rows.map(|((z, u), &target)| {
            if target == IGNORE {
                return 0.0;
            }
            let pairs = log_softmax(u).into_iter().zip(log_softmax(z));
            pairs.map(|(log_p, log_q)| log_p.exp() * (log_p - log_q)).sum()
        })
        .collect()
    }

    /// Returns the sum over tokens of `(1 - w) losses + w divergences`.
    pub fn distilled(self, teacher: Teacher<'_>) -> f64 {
        let pairs = self.forward().into_iter().zip(self.divergences(teacher));
        pairs.map(|(loss, divergence)| (1.0 - teacher.weight) * loss + teacher.weight * divergence).sum()
    }

    /// Returns `(dh, dW)` of `scale * distilled`. Of a token's divergence `dz_k = q_k sum p - p_k = q_k - p_k`, so that
    /// `dz = q - (1 - w) onehot - w p`.
    pub fn distilled_backward(self, scale: f64, teacher: Teacher<'_>) -> (Vec<f64>, Vec<f64>) {
        let (mut dz, slopes) = self.logits();
        let (vocab, w) = (self.dims.vocab, teacher.weight);
        let rows = dz.chunks_mut(vocab).zip(slopes.chunks(vocab)).zip(teacher.logits.chunks(vocab));
        for (((z, slopes), u), &target) in rows.zip(self.targets) {
            let (log_q, log_p) = (log_softmax(z), log_softmax(u));
            for (k, (z, slope)) in z.iter_mut().zip(slopes).enumerate() {
                let onehot = if k == target as usize { 1.0 } else { 0.0 };
                let gradient = log_q[k].exp() - (1.0 - w) * onehot - w * log_p[k].exp();
                *z = if target == IGNORE { 0.0 } else { scale * slope * gradient };
            }
        }
        linear::reference::backward(&dz, self.h, self.head, linear_dims(self.dims))
    }
}

/// The most likely tokens of a teacher of the definition.
#[derive(Clone, Copy, Debug)]
pub struct TopTeacher<'a> {
    /// `[T, K]`
    pub ids: &'a [u32],
    /// `[T, K + 1]`, normed by the definition; the last is of all other tokens together.
    pub log_p: &'a [f64],
    /// w
    pub weight: f64,
}

impl TopTeacher<'_> {
    /// Returns ids and probabilities of row `t` of `rows`.
    fn row(&self, t: usize, rows: usize) -> (&[u32], Vec<f64>) {
        let top = self.ids.len() / rows;
        let log_p = log_softmax(&self.log_p[t * (top + 1)..][..top + 1]);
        (&self.ids[t * top..][..top], log_p.into_iter().map(f64::exp).collect())
    }
}

impl Problem<'_> {
    /// Returns the divergences of the outcomes "one of the tokens" and "another".
    pub fn top_divergences(self, teacher: TopTeacher<'_>) -> Vec<f64> {
        let (logits, _) = self.logits();
        let rows = logits.chunks(self.dims.vocab).zip(self.targets).enumerate();
        rows.map(|(t, (z, &target))| {
            if target == IGNORE {
                return 0.0;
            }
            let (ids, p) = teacher.row(t, self.dims.tokens);
            let q: Vec<f64> = log_softmax(z).into_iter().map(f64::exp).collect();
            let others = (0..q.len()).filter(|k| !ids.contains(&(*k as u32))).map(|k| q[k]).sum::<f64>();
            let q = ids.iter().map(|&id| q[id as usize]).chain([others]);
            p.iter().zip(q).map(|(&p, q)| if p > 0.0 { p * (p / q).ln() } else { 0.0 }).sum()
        })
        .collect()
    }

    /// Returns the sum over tokens of `(1 - w) losses + w divergences`.
    pub fn top_distilled(self, teacher: TopTeacher<'_>) -> f64 {
        let pairs = self.forward().into_iter().zip(self.top_divergences(teacher));
        pairs.map(|(loss, divergence)| (1.0 - teacher.weight) * loss + teacher.weight * divergence).sum()
    }

    /// Returns `(dh, dW)` of `scale * top_distilled`.
    pub fn top_distilled_backward(self, scale: f64, teacher: TopTeacher<'_>) -> (Vec<f64>, Vec<f64>) {
        let (mut dz, slopes) = self.logits();
        let (vocab, w) = (self.dims.vocab, teacher.weight);
        let rows = dz.chunks_mut(vocab).zip(slopes.chunks(vocab)).zip(self.targets).enumerate();
        for (t, ((z, slopes), &target)) in rows {
            let (ids, p) = teacher.row(t, self.dims.tokens);
            let q: Vec<f64> = log_softmax(z).into_iter().map(f64::exp).collect();
            let place = |k: usize| ids.iter().position(|&id| id as usize == k);
            let others: f64 = (0..vocab).filter(|&k| place(k).is_none()).map(|k| q[k]).sum();
            for k in 0..vocab {
                let onehot = if k == target as usize { 1.0 } else { 0.0 };
                // The probability that the teacher gives to k: of those of all others the student's part.
                let p_k = place(k).map_or_else(|| p[ids.len()] * q[k] / others, |at| p[at]);
                let gradient = q[k] - (1.0 - w) * onehot - w * p_k;
                z[k] = if target == IGNORE { 0.0 } else { scale * slopes[k] * gradient };
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
