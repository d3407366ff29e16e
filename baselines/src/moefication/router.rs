//! The router of one layer, `s = tanh(x A^T / |x|) B^T`, trained to predict which experts score most.
//!
//! ```text
//! start    A = the experts' centers, B = identity: experts by the direction of the input
//! target   t_e = score_e / the token's largest score
//! loss     mean over tokens and experts of softplus(s) - t s       (binary cross-entropy with logits)
//! share    mean over tokens of (sum of t over the k largest s) / (sum of t)
//! ```
//! Adam, learning rate 0.01, batches of 512. Every tenth token is held out; the epoch with the largest share of it is
//! kept, the start included. (The reference divides by the largest score of a batch, which makes a target depend on
//! its batch, and lets the few tokens with huge values flatten those of all others.)

use dsmoe_kernels::adamw::{self, Hyper};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;

use crate::topk::{Gate, GateActs, GateGrads, GateWeights, NetworkBackward};

const BATCH: usize = 512;
const LEARNING_RATE: f64 = 0.01;
/// One token of so many is held out.
const HELD_OUT: usize = 10;

/// Inputs of a layer's FFN and scores of its experts.
pub(super) struct Examples {
    /// `[tokens, hidden]`
    pub(super) inputs: Vec<f32>,
    /// `[tokens, experts]`, at least 0.
    pub(super) scores: Vec<f32>,
}

/// Options of the training.
#[derive(Clone, Copy)]
pub(super) struct Training {
    pub(super) top_k: usize,
    pub(super) epochs: usize,
    pub(super) seed: u64,
}

/// Some of the examples, with targets in place of scores.
struct Part {
    inputs: Vec<f32>,
    targets: Vec<f32>,
}

/// Trains A and B of `gate`; returns them and the share of held-out scores that the `top_k` chosen experts capture.
/// `centers` is `[experts, hidden]`.
pub(super) fn train(
    gate: &Gate,
    examples: &Examples,
    centers: Vec<f32>,
    training: Training,
) -> (Vec<Vec<f32>>, f64) {
    let (hidden, n) = (gate.hidden, gate.num_experts);
    let (learned, held_out) = split(examples, hidden, n);
    let mut params = [centers, identity(n)];
    let mut moments = [0, 1].map(|i| [0, 1].map(|_: usize| vec![0.0; params[i].len()]));
    let mut best = (params.to_vec(), captured(gate, &params, &held_out, training.top_k));

    let mut rng = Rng::new(training.seed, u64::from_be_bytes(*b"moerout\0"));
    let mut order: Vec<usize> = (0..learned.targets.len() / n).collect();
    let (mut z, mut acts) = (Buf::default(), GateActs::default());
    let (mut x, mut dz, mut unused) = (Vec::new(), Vec::new(), Vec::new());
    let mut step = 0;
    for _ in 0..training.epochs {
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i as u64 + 1) as usize);
        }
        for batch in order.chunks(BATCH) {
            x.clear();
            batch.iter().for_each(|&t| x.extend_from_slice(&learned.inputs[t * hidden..][..hidden]));
            let weights = GateWeights { a: &params[0], b: &params[1], noise: &[] };
            gate.forward(&mut z, &mut acts, &x, weights, false);
            // forward: loss = mean of softplus(s) - t s
            let targets = batch.iter().flat_map(|&t| &learned.targets[t * n..][..n]);
            let scale = 1.0 / z.len() as f32;
            dz.clear();
            dz.extend(z.iter().zip(targets).map(|(s, t)| scale * (1.0 / (1.0 + (-s).exp()) - t)));
            let mut grads = [0, 1].map(|i: usize| vec![0.0; params[i].len()]);
            let [da, db] = &mut grads;
            unused.resize(x.len(), 0.0);
            let (dx, grads_of) = (&mut unused[..], GateGrads { a: da, b: db, noise: &mut [] });
            let (dz, acts, x) = (&dz, &acts, &x);
            gate.backward(NetworkBackward { dx, grads: grads_of, dz, draw: None, acts, x, weights });
            step += 1;
            let (beta1, beta2, eps, weight_decay) = (0.9, 0.999, 1e-8, 0.0);
            let hyper = Hyper { lr: LEARNING_RATE, beta1, beta2, eps, weight_decay, step };
            for ((param, [m, v]), grad) in params.iter_mut().zip(&mut moments).zip(&grads) {
                adamw::Step { param, m, v, grad, grad_scale: 1.0, hyper: &hyper }.run();
            }
        }
        let share = captured(gate, &params, &held_out, training.top_k);
        if share > best.1 {
            best = (params.to_vec(), share);
        }
    }
    best
}

fn identity(n: usize) -> Vec<f32> {
    (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect()
}

/// Splits examples in a part to learn from and a held-out part.
fn split(examples: &Examples, hidden: usize, n: usize) -> (Part, Part) {
    let [mut learned, mut held_out] = [0, 1].map(|_| Part { inputs: Vec::new(), targets: Vec::new() });
    let tokens = examples.inputs.chunks_exact(hidden).zip(examples.scores.chunks_exact(n));
    for (t, (x, scores)) in tokens.enumerate() {
        let largest = scores.iter().fold(0.0f32, |a, &b| a.max(b));
        // A token without scores has no target.
        if largest > 0.0 && largest.is_finite() {
            let part = if t % HELD_OUT == HELD_OUT - 1 { &mut held_out } else { &mut learned };
            part.inputs.extend_from_slice(x);
            part.targets.extend(scores.iter().map(|score| score / largest));
        }
    }
    (learned, held_out)
}

/// The mean over tokens of the share of their targets that the `top_k` largest logits have; 0 without tokens.
fn captured(gate: &Gate, [a, b]: &[Vec<f32>; 2], part: &Part, top_k: usize) -> f64 {
    let n = gate.num_experts;
    let (mut z, mut acts) = (Buf::default(), GateActs::default());
    gate.forward(&mut z, &mut acts, &part.inputs, GateWeights { a, b, noise: &[] }, false);
    let mut order: Vec<usize> = Vec::with_capacity(n);
    let rows = z.chunks_exact(n).zip(part.targets.chunks_exact(n));
    let shares = rows.map(|(z, targets)| {
        order.clear();
        order.extend(0..n);
        order.sort_unstable_by(|&i, &j| z[j].total_cmp(&z[i]).then(i.cmp(&j)));
        let chosen: f64 = order[..top_k].iter().map(|&e| f64::from(targets[e])).sum();
        chosen / targets.iter().map(|&t| f64::from(t)).sum::<f64>()
    });
    let total: f64 = shares.sum();
    total / (part.targets.len() / n).max(1) as f64
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;

    use super::*;
    use crate::topk::{GateNetwork, GateSpec};

    const HIDDEN: usize = 8;
    const EXPERTS: usize = 4;

    fn gate() -> Gate {
        let spec = GateSpec { network: GateNetwork::Mlp, normalize: true, noise: false };
        Gate { spec, hidden: HIDDEN, num_experts: EXPERTS }
    }

    /// Inputs near one of four directions each, where expert `of(direction)` scores most.
    fn examples(of: impl Fn(usize) -> usize) -> Examples {
        let mut inputs = normals(400 * HIDDEN, 1);
        let mut scores = vec![0.1; 400 * EXPERTS];
        for (t, x) in inputs.chunks_exact_mut(HIDDEN).enumerate() {
            x.iter_mut().for_each(|x| *x *= 0.05);
            x[t % EXPERTS] += 3.0;
            scores[t * EXPERTS + of(t % EXPERTS)] = 5.0;
        }
        Examples { inputs, scores }
    }

    fn centers() -> Vec<f32> {
        (0..EXPERTS * HIDDEN).map(|i| if i / HIDDEN == i % HIDDEN { 1.0 } else { 0.0 }).collect()
    }

    #[test]
    fn the_start_ranks_the_cluster_of_the_input_first() {
        let training = Training { top_k: 1, epochs: 0, seed: 0 };
        let (params, share) = train(&gate(), &examples(|direction| direction), centers(), training);
        assert_eq!(params, [centers(), identity(EXPERTS)]);
        // 1 of 1 + 3 * 0.02.
        assert!((share - 1.0 / 1.06).abs() < 1e-5, "{share}");
    }

    #[test]
    fn what_the_start_gets_wrong_is_learned() {
        let examples = examples(|direction| (direction + 1) % EXPERTS);
        let training = Training { top_k: 1, epochs: 0, seed: 0 };
        let (_, before) = train(&gate(), &examples, centers(), training);
        assert!(before < 0.03, "{before}");
        let training = Training { epochs: 200, ..training };
        let (params, after) = train(&gate(), &examples, centers(), training);
        assert!(after > 0.94, "{after}");
        assert_eq!((params, after), train(&gate(), &examples, centers(), training));
    }

    #[test]
    fn tokens_without_scores_are_left_out() {
        let mut examples = examples(|direction| direction);
        examples.scores[..EXPERTS].fill(0.0);
        let (learned, held_out) = split(&examples, HIDDEN, EXPERTS);
        assert_eq!((learned.targets.len(), held_out.targets.len()), (359 * EXPERTS, 40 * EXPERTS));
    }
}
