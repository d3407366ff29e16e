//! The router of one layer, trained on calibration text to predict which experts score most.
//!
//! ```text
//! t           the token's scores over the largest of them
//! loss        mean over tokens, Ranking also over experts, of
//!   Ranking   sum_i softplus(z_i) - t_i z_i       binary cross-entropy with logits (MoEfication)
//!   Student   sum_i p_i ln(p_i / g_i)             p = softmax(z) and the goal g, in logarithms within 1e-7..1 - 1e-7
//!   Teacher   sum_i g_i ln(g_i / p_i)
//! dz          Ranking sigmoid(z) - t,  Student p_j (ln(p_j / g_j) - loss),  Teacher p - g
//! goal g      softmax(t), or t / sum of t
//! share       mean over tokens of (sum of t over the k largest z) / (sum of t)
//! ```
//! Adam. Every tenth token is held out; the epoch with the largest share of it is kept, the start included. (MoEfication's
//! reference divides by the largest score of a batch, which makes a target depend on its batch, and lets the few tokens
//! with huge values flatten those of all others.)

use dsmoe_kernels::adamw::{self, Hyper};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;

use super::gate::{Gate, GateActs, NetworkBackward};

/// One token of so many is held out.
pub(crate) const HELD_OUT: usize = 10;
/// The least probability, and the distance of the largest from 1, in a divergence.
const CLIP: f64 = 1e-7;

/// Inputs of a layer's FFN and scores of its experts.
pub(crate) struct Examples {
    /// `[tokens, hidden]`
    pub(crate) inputs: Vec<f32>,
    /// `[tokens, experts]`, at least 0.
    pub(crate) scores: Vec<f32>,
}

/// Options of the training.
#[derive(Clone, Copy)]
pub(crate) struct Training {
    pub(crate) top_k: usize,
    pub(crate) epochs: usize,
    /// Tokens of a step.
    pub(crate) batch: usize,
    pub(crate) learning_rate: f64,
    pub(crate) loss: Loss,
    pub(crate) seed: u64,
}

/// The loss that a router is trained with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Cross-entropy of each expert's score.
    Ranking,
    /// The divergence of the goal from the router's distribution, or of that from the goal.
    Divergence { from: Direction, goal: Goal },
}

/// The distribution that stands before the bar in a divergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The router's.
    Student,
    /// The goal.
    Teacher,
}

/// The distribution that a router learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// The softmax of the scores.
    Softmax,
    /// Each score's share of their sum.
    Share,
}

impl Goal {
    fn of(self, scores: &[f32]) -> Vec<f64> {
        let scores = scores.iter().map(|&t| f64::from(t));
        let weights: Vec<f64> = match self {
            Goal::Softmax => scores.map(f64::exp).collect(),
            Goal::Share => scores.collect(),
        };
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / sum).collect()
    }
}

impl Loss {
    /// Returns the loss of one token of logits `z` and scores `t`, and sets its gradient `dz`.
    pub(crate) fn of(self, dz: &mut [f32], z: &[f32], t: &[f32]) -> f64 {
        match self {
            Loss::Ranking => {
                let mut loss = 0.0;
                for ((dz, &z), &t) in dz.iter_mut().zip(z).zip(t) {
                    *dz = 1.0 / (1.0 + (-z).exp()) - t;
                    let z = f64::from(z);
                    loss += z.max(0.0) + (-z.abs()).exp().ln_1p() - f64::from(t) * z;
                }
                loss
            }
            Loss::Divergence { from, goal } => {
                let p = softmax(z);
                let clip = |x: f64| x.clamp(CLIP, 1.0 - CLIP);
                let logs = p.iter().zip(goal.of(t)).map(|(&p, g)| (p, g, (clip(p) / clip(g)).ln()));
                let logs: Vec<(f64, f64, f64)> = logs.collect();
                match from {
                    Direction::Student => {
                        let loss = logs.iter().map(|(p, _, log)| p * log).sum();
                        dz.iter_mut()
                            .zip(&logs)
                            .for_each(|(dz, (p, _, log))| *dz = (p * (log - loss)) as f32);
                        loss
                    }
                    Direction::Teacher => {
                        dz.iter_mut().zip(&logs).for_each(|(dz, (p, g, _))| *dz = (p - g) as f32);
                        logs.iter().map(|(_, g, log)| -g * log).sum()
                    }
                }
            }
        }
    }
}

fn softmax(z: &[f32]) -> Vec<f64> {
    let most = z.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let weights: Vec<f64> = z.iter().map(|&z| f64::from(z - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// Some of the examples, with targets in place of scores.
struct Part {
    inputs: Vec<f32>,
    targets: Vec<f32>,
}

/// Trains `gate` from `start`, its tensors; returns them and the share of held-out scores that the `top_k` chosen experts
/// capture. `show` receives the number of epochs that are done.
pub(crate) fn train(
    gate: &Gate,
    examples: &Examples,
    start: Vec<Vec<f32>>,
    training: Training,
    show: &mut dyn FnMut(usize),
) -> (Vec<Vec<f32>>, f64) {
    let (hidden, n) = (gate.hidden, gate.num_experts);
    let (learned, held_out) = split(examples, hidden, n);
    let mut params = start;
    let mut moments: Vec<[Vec<f32>; 2]> =
        params.iter().map(|p| [0, 1].map(|_: usize| vec![0.0; p.len()])).collect();
    let mut best = (params.clone(), captured(gate, &params, &held_out, training.top_k));

    let mut rng = Rng::new(training.seed, u64::from_be_bytes(*b"moerout\0"));
    let mut order: Vec<usize> = (0..learned.targets.len() / n).collect();
    let (mut z, mut acts) = (Buf::default(), GateActs::default());
    let (mut x, mut dz, mut unused) = (Vec::new(), Vec::new(), Vec::new());
    let mut step = 0;
    for epoch in 0..training.epochs {
        show(epoch);
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i as u64 + 1) as usize);
        }
        for batch in order.chunks(training.batch) {
            x.clear();
            batch.iter().for_each(|&t| x.extend_from_slice(&learned.inputs[t * hidden..][..hidden]));
            gate.forward(&mut z, &mut acts, &x, gate.weights(&params), false);
            // forward: loss = mean over the batch
            dz.resize(z.len(), 0.0);
            for ((dz, z), &t) in dz.chunks_exact_mut(n).zip(z.chunks_exact(n)).zip(batch) {
                training.loss.of(dz, z, &learned.targets[t * n..][..n]);
            }
            let terms = if training.loss == Loss::Ranking { dz.len() } else { batch.len() };
            let scale = 1.0 / terms as f32;
            dz.iter_mut().for_each(|dz| *dz *= scale);
            let mut grads: Vec<Vec<f32>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
            unused.resize(x.len(), 0.0);
            let (dx, weights) = (&mut unused[..], gate.weights(&params));
            let (dz, acts, x) = (&dz[..], &acts, &x);
            gate.backward(NetworkBackward {
                dx,
                grads: gate.grads(&mut grads),
                dz,
                draw: None,
                acts,
                x,
                weights,
            });
            step += 1;
            let (beta1, beta2, eps, weight_decay) = (0.9, 0.999, 1e-8, 0.0);
            let hyper = Hyper { lr: training.learning_rate, beta1, beta2, eps, weight_decay, step };
            for ((param, [m, v]), grad) in params.iter_mut().zip(&mut moments).zip(&grads) {
                adamw::Step { param, m, v, grad, grad_scale: 1.0, hyper: &hyper }.run();
            }
        }
        let share = captured(gate, &params, &held_out, training.top_k);
        if share > best.1 {
            best = (params.clone(), share);
        }
    }
    best
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
fn captured(gate: &Gate, params: &[Vec<f32>], part: &Part, top_k: usize) -> f64 {
    let n = gate.num_experts;
    let (mut z, mut acts) = (Buf::default(), GateActs::default());
    gate.forward(&mut z, &mut acts, &part.inputs, gate.weights(params), false);
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

    fn train(
        gate: &Gate,
        examples: &Examples,
        start: Vec<Vec<f32>>,
        training: Training,
    ) -> (Vec<Vec<f32>>, f64) {
        let mut shown = Vec::new();
        let found = super::train(gate, examples, start, training, &mut |epochs| shown.push(epochs));
        assert_eq!(shown, (0..training.epochs).collect::<Vec<_>>());
        found
    }

    const HIDDEN: usize = 8;
    const EXPERTS: usize = 4;

    fn gate() -> Gate {
        let network = GateNetwork::Mlp;
        let spec = GateSpec { network, normalize: true, noise: false, bias: false, hidden: None };
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

    fn identity(n: usize) -> Vec<f32> {
        (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect()
    }

    fn training(epochs: usize) -> Training {
        Training { top_k: 1, epochs, batch: 512, learning_rate: 0.01, loss: Loss::Ranking, seed: 0 }
    }

    fn start() -> Vec<Vec<f32>> {
        vec![centers(), identity(EXPERTS)]
    }

    fn centers() -> Vec<f32> {
        (0..EXPERTS * HIDDEN).map(|i| if i / HIDDEN == i % HIDDEN { 1.0 } else { 0.0 }).collect()
    }

    #[test]
    fn the_start_ranks_the_cluster_of_the_input_first() {
        let (params, share) = train(&gate(), &examples(|direction| direction), start(), training(0));
        assert_eq!(params, start());
        // 1 of 1 + 3 * 0.02.
        assert!((share - 1.0 / 1.06).abs() < 1e-5, "{share}");
    }

    #[test]
    fn what_the_start_gets_wrong_is_learned() {
        let examples = examples(|direction| (direction + 1) % EXPERTS);
        let (_, before) = train(&gate(), &examples, start(), training(0));
        assert!(before < 0.03, "{before}");
        let (params, after) = train(&gate(), &examples, start(), training(200));
        assert!(after > 0.94, "{after}");
        assert_eq!((params, after), train(&gate(), &examples, start(), training(200)));
    }

    fn divergence(from: Direction, goal: Goal) -> Loss {
        Loss::Divergence { from, goal }
    }

    #[test]
    fn divergences_by_hand() {
        // Two of four experts; softmax(1, 1, 0, 0) = (e, e, 1, 1) / (2 e + 2).
        let labels = [1.0, 1.0, 0.0, 0.0];
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{got} {want}");
        let goal = Goal::Softmax.of(&labels);
        near(goal[0], 0.365_529);
        near(goal[3], 0.134_471);
        let student = divergence(Direction::Student, Goal::Softmax);
        let mut dz = [0.0; 4];
        near(student.of(&mut dz, &[0.0; 4], &labels), 0.120_115);
        near(student.of(&mut dz, &[2.0, 1.0, 0.0, 0.0], &labels), 0.122_893);
        for (got, want) in dz.iter().zip([0.237_835, -0.137_021, -0.050_407, -0.050_407]) {
            near(f64::from(*got), want);
        }
        // ln 2 from an even share of two of four, towards the even distribution.
        let teacher = divergence(Direction::Teacher, Goal::Share);
        near(teacher.of(&mut dz, &[0.0; 4], &labels), std::f64::consts::LN_2);
        assert_eq!(dz, [-0.25, -0.25, 0.25, 0.25]);
    }

    #[test]
    fn gradients_are_differences_of_the_losses() {
        use dsmoe_kernels::testing::{assert_close, f64s, finite_differences};
        let labels = [0.0, 1.0, 0.5, 0.0, 1.0];
        let z = normals(5, 3);
        for loss in [
            Loss::Ranking,
            divergence(Direction::Student, Goal::Softmax),
            divergence(Direction::Student, Goal::Share),
            divergence(Direction::Teacher, Goal::Softmax),
            divergence(Direction::Teacher, Goal::Share),
        ] {
            let mut dz = [0.0; 5];
            loss.of(&mut dz, &z, &labels);
            // Wide steps: the logits are f32.
            let want = finite_differences(&f64s(&z), 4e-3, |z| {
                let z: Vec<f32> = z.iter().map(|&z| z as f32).collect();
                loss.of(&mut [0.0; 5], &z, &labels)
            });
            assert_close(&format!("{loss:?}"), &dz, &want, 1e-3);
        }
    }

    #[test]
    fn a_divergence_teaches_what_a_ranking_does() {
        let examples = examples(|direction| (direction + 1) % EXPERTS);
        for from in [Direction::Student, Direction::Teacher] {
            let loss = divergence(from, Goal::Softmax);
            let (_, after) = train(&gate(), &examples, start(), Training { loss, ..training(200) });
            assert!(after > 0.94, "{from:?} {after}");
        }
    }

    #[test]
    fn tokens_without_scores_are_left_out() {
        let mut examples = examples(|direction| direction);
        examples.scores[..EXPERTS].fill(0.0);
        let (learned, held_out) = split(&examples, HIDDEN, EXPERTS);
        assert_eq!((learned.targets.len(), held_out.targets.len()), (359 * EXPERTS, 40 * EXPERTS));
    }
}
