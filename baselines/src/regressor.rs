//! A small network that learns rows from rows.
//!
//! ```text
//! y = W3 relu(W2 relu(W1 x + b1) + b2) + b3            start: uniform within 1 / sqrt(inputs of the matrix)
//! loss of a batch = (1 - l) mean (y - t)^2 + l (|Y| - |T|)^2     norms of the whole batch
//! ```
//! AdamW with PyTorch's defaults; batches in a new order every epoch.

use dsmoe_kernels::linear::{self, BackwardBias, BackwardInput, BackwardWeight, Dims};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::{Precision, adamw};

/// Rows of a batch.
const BATCH: usize = 64;
/// Matrices, each with its bias.
const LAYERS: usize = 3;
const WEIGHTS_STREAM: u64 = 0x7265_6772;
const ORDER_STREAM: u64 = 0x6f72_6465;

/// Settings of a fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fit {
    /// Passes over all rows.
    pub(crate) epochs: usize,
    /// Learning rate.
    pub(crate) lr: f64,
    /// Weight l of the difference of norms.
    pub(crate) penalty: f64,
    /// Seed of the start and of the order of rows.
    pub(crate) seed: u64,
}

/// Parameters of one matrix or bias, with AdamW's moments.
#[derive(Clone, Debug)]
struct Param {
    values: Vec<f32>,
    grad: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

/// The names of the matrices and the biases in a state.
const NAMES: [&str; 2 * LAYERS] = ["w1", "w2", "w3", "b1", "b2", "b3"];

/// The network.
#[derive(Clone, Debug)]
pub(crate) struct Regressor {
    /// Inputs, neurons of both hidden layers, outputs.
    widths: [usize; LAYERS + 1],
    weights: [Param; LAYERS],
    biases: [Param; LAYERS],
    steps: u64,
}

impl Param {
    fn new(len: usize, mut value: impl FnMut() -> f32) -> Param {
        let zeros = || vec![0.0; len];
        Param { values: (0..len).map(|_| value()).collect(), grad: zeros(), m: zeros(), v: zeros() }
    }

    fn update(&mut self, hyper: &adamw::Hyper) {
        let Param { values, grad, m, v } = self;
        adamw::Step { param: values, m, v, grad, grad_scale: 1.0, hyper }.run();
        grad.fill(0.0);
    }
}

/// A callback, called after each epoch with the network and the losses of all epochs so far.
type EachEpoch<'a, E> = &'a mut dyn FnMut(&Regressor, &[f64]) -> Result<(), E>;

impl Regressor {
    /// Makes a network of these widths.
    pub(crate) fn new(widths: [usize; LAYERS + 1], seed: u64) -> Regressor {
        let mut rng = Rng::new(seed, WEIGHTS_STREAM);
        let mut param = |inputs: usize, len: usize| {
            let bound = (inputs.max(1) as f32).sqrt().recip();
            Param::new(len, || bound * (2.0 * rng.uniform() - 1.0))
        };
        let mut layers = (0..LAYERS).map(|i| {
            let weight = param(widths[i], widths[i] * widths[i + 1]);
            (weight, param(widths[i], widths[i + 1]))
        });
        let mut next = || layers.next().expect("as many layers");
        let [(w1, b1), (w2, b2), (w3, b3)] = [(); LAYERS].map(|()| next());
        Regressor { widths, weights: [w1, w2, w3], biases: [b1, b2, b3], steps: 0 }
    }

    /// Returns the values of all parameters: each matrix and its bias, in order.
    #[cfg(test)]
    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.weights.iter_mut().zip(&mut self.biases).flat_map(|(w, b)| [&mut w.values, &mut b.values])
    }

    /// Returns the number of steps that it was trained.
    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    /// Returns what training changes but the steps, by name: values and moments of all parameters.
    pub(crate) fn state(&self) -> Vec<(String, &[f32])> {
        let mut state = Vec::with_capacity(3 * NAMES.len());
        for (name, param) in NAMES.iter().zip(self.weights.iter().chain(&self.biases)) {
            for (part, values) in [("", &param.values), (".m", &param.m), (".v", &param.v)] {
                state.push((format!("{name}{part}"), &values[..]));
            }
        }
        state
    }

    /// Takes a state after that many steps, whose tensors `read` returns by name; returns false, with the network half changed,
    /// if one has another length.
    pub(crate) fn restore<E>(
        &mut self,
        steps: u64,
        read: &mut dyn FnMut(&str) -> Result<Vec<f32>, E>,
    ) -> Result<bool, E> {
        self.steps = steps;
        for (name, param) in NAMES.iter().zip(self.weights.iter_mut().chain(&mut self.biases)) {
            for (part, values) in [("", &mut param.values), (".m", &mut param.m), (".v", &mut param.v)] {
                let found = read(&format!("{name}{part}"))?;
                if found.len() != values.len() {
                    return Ok(false);
                }
                *values = found;
            }
        }
        Ok(true)
    }

    fn dims(&self, layer: usize, rows: usize) -> Dims {
        Dims { rows, inputs: self.widths[layer], outputs: self.widths[layer + 1], precision: Precision::F32 }
    }

    /// Returns the values of every layer for rows `x` `[rows, inputs]`; the last are the outputs.
    fn values(&self, x: &[f32]) -> [Vec<f32>; LAYERS] {
        let rows = x.len() / self.widths[0];
        let mut all = [const { Vec::new() }; LAYERS];
        for layer in 0..LAYERS {
            let mut y = vec![0.0; rows * self.widths[layer + 1]];
            let x = if layer == 0 { x } else { &all[layer - 1] };
            let (w, bias) = (&self.weights[layer].values, Some(&self.biases[layer].values[..]));
            linear::Forward { y: &mut y, x, w, bias, dims: self.dims(layer, rows) }.run();
            if layer + 1 < LAYERS {
                y.iter_mut().for_each(|y| *y = y.max(0.0));
            }
            all[layer] = y;
        }
        all
    }

    /// Returns the outputs `[rows, outputs]` for rows `x` `[rows, inputs]`.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let [.., y] = self.values(x);
        y
    }

    /// Adds the gradient of a batch, and returns its loss.
    fn backward(&mut self, x: &[f32], targets: &[f32], penalty: f64) -> f64 {
        let rows = x.len() / self.widths[0];
        let values = self.values(x);
        let (loss, mut dy) = loss(&values[LAYERS - 1], targets, penalty);
        for layer in (0..LAYERS).rev() {
            let (dims, input) = (self.dims(layer, rows), if layer == 0 { x } else { &values[layer - 1] });
            BackwardWeight { dw: &mut self.weights[layer].grad, dy: &dy, x: input, dims }.run();
            BackwardBias { db: &mut self.biases[layer].grad, dy: &dy, dims }.run();
            if layer > 0 {
                let mut dx = vec![0.0; input.len()];
                BackwardInput { dx: &mut dx, dy: &dy, w: &self.weights[layer].values, dims, add: false }
                    .run();
                dx.iter_mut().zip(input).filter(|(_, x)| **x <= 0.0).for_each(|(dx, _)| *dx = 0.0);
                dy = dx;
            }
        }
        loss
    }

    /// Fits the network to `targets` `[rows, outputs]` of `inputs` `[rows, inputs]`, and returns the mean loss of every epoch.
    #[cfg(test)]
    pub(crate) fn fit(&mut self, inputs: &[f32], targets: &[f32], fit: Fit) -> Vec<f64> {
        let mut losses = Vec::new();
        let Ok(()) =
            self.fit_on::<std::convert::Infallible>([inputs, targets], fit, &mut losses, &mut |_, _| Ok(()));
        losses
    }

    /// Fits the network to `targets` `[rows, outputs]` of `inputs` `[rows, inputs]` from behind the epochs whose mean losses are in
    /// `losses`, and adds those of the others. After each of these, `each` sees the network and all losses.
    ///
    /// # Errors
    /// That of `each`.
    pub(crate) fn fit_on<E>(
        &mut self,
        [inputs, targets]: [&[f32]; 2],
        fit: Fit,
        losses: &mut Vec<f64>,
        each: EachEpoch<'_, E>,
    ) -> Result<(), E> {
        let [width, .., outputs] = self.widths;
        let rows = inputs.len() / width;
        let mut order: Vec<usize> = (0..rows).collect();
        let mut rng = Rng::new(fit.seed, ORDER_STREAM);
        let done = losses.len();
        for epoch in 0..fit.epochs {
            for i in (1..rows).rev() {
                order.swap(i, rng.below(i as u64 + 1) as usize);
            }
            if epoch < done {
                continue;
            }
            let (mut sum, mut batches) = (0.0, 0.0);
            for batch in order.chunks(BATCH) {
                let gather = |values: &[f32], width: usize| -> Vec<f32> {
                    batch.iter().flat_map(|row| &values[row * width..][..width]).copied().collect()
                };
                sum += self.backward(&gather(inputs, width), &gather(targets, outputs), fit.penalty);
                batches += 1.0;
                self.steps += 1;
                let hyper = adamw::Hyper {
                    lr: fit.lr,
                    beta1: 0.9,
                    beta2: 0.999,
                    eps: 1e-8,
                    weight_decay: 0.01,
                    step: self.steps,
                };
                self.weights.iter_mut().chain(&mut self.biases).for_each(|param| param.update(&hyper));
            }
            losses.push(sum / f64::max(batches, 1.0));
            each(self, losses)?;
        }
        Ok(())
    }
}

/// Returns the loss of a batch of outputs, and its gradient.
fn loss(y: &[f32], t: &[f32], penalty: f64) -> (f64, Vec<f32>) {
    let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let square: f64 = y.iter().zip(t).map(|(y, t)| f64::from(y - t).powi(2)).sum();
    let (of_y, of_t, count) = (norm(y), norm(t), y.len().max(1) as f64);
    let loss = (1.0 - penalty) * square / count + penalty * (of_y - of_t).powi(2);
    // The norm has no slope at 0.
    let along = if of_y > 0.0 { 2.0 * penalty * (of_y - of_t) / of_y } else { 0.0 };
    let to_target = 2.0 * (1.0 - penalty) / count;
    let grad = y.iter().zip(t).map(|(&y, &t)| (to_target * f64::from(y - t) + along * f64::from(y)) as f32);
    (loss, grad.collect())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use dsmoe_kernels::testing::{
        assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals,
    };

    use super::*;

    #[test]
    fn the_gradient_is_the_derivative_of_the_loss() {
        let (y, t) = (f64s(&normals(6, 1)), normals(6, 2));
        let of = |y: &[f64]| loss(&y.iter().map(|&y| y as f32).collect::<Vec<_>>(), &t, 0.3).0;
        let (_, grad) = loss(&normals(6, 1), &t, 0.3);
        assert_close_f64("dy", &f64s(&grad), &finite_differences(&y, 1e-2, of), 1e-4);
        let (value, grad) = loss(&[0.0; 2], &[3.0, 4.0], 0.5);
        assert!((value - (0.5 * 12.5 + 0.5 * 25.0)).abs() < 1e-9);
        assert_eq!(grad, [-1.5, -2.0]);
        let mut net = Regressor::new([3, 4, 5, 2], 1);
        let (x, t) = (normals(9, 3), normals(6, 4));
        net.backward(&x, &t, 0.1);
        let grads: Vec<Vec<f32>> =
            net.weights.iter().zip(&net.biases).flat_map(|(w, b)| [w.grad.clone(), b.grad.clone()]).collect();
        for (i, grad) in grads.iter().enumerate() {
            let at = f64s(net.clone().params_mut().nth(i).unwrap());
            let want = finite_differences(&at, 1e-2, |values| {
                let mut net = net.clone();
                *net.params_mut().nth(i).unwrap() = values.iter().map(|&x| x as f32).collect();
                loss(&net.forward(&x), &t, 0.1).0
            });
            assert_close_f64(&format!("parameter {i}"), &f64s(grad), &want, 2e-3);
        }
    }

    #[test]
    fn it_learns_a_linear_map_alike_on_any_number_of_threads() {
        let x = normals(400 * 3, 1);
        let t: Vec<f32> = x.chunks(3).flat_map(|x| [x[0] - x[1], 0.5 * x[2]]).collect();
        let fit = Fit { epochs: 60, lr: 3e-3, penalty: 5e-4, seed: 3 };
        let run = || {
            let mut net = Regressor::new([3, 32, 32, 2], 7);
            let losses = net.fit(&x, &t, fit);
            (losses, net.forward(&x[..30]))
        };
        let (losses, _) = run();
        assert!(losses[59] < 0.01 * losses[0], "{losses:?}");
        assert_same_on_threads("regressor", run);
    }

    #[test]
    fn a_fit_that_continues_has_the_bits_of_a_whole_one() {
        let (x, t) = (normals(200 * 3, 1), normals(200 * 2, 2));
        let fit = Fit { epochs: 5, lr: 3e-3, penalty: 5e-4, seed: 3 };
        let mut whole = Regressor::new([3, 8, 8, 2], 7);
        let losses = whole.fit(&x, &t, fit);
        // It stops behind its second epoch, and another network takes what is left of it.
        let mut kept = None;
        let mut first = Vec::new();
        let mut broken = Regressor::new([3, 8, 8, 2], 7);
        let stopped = broken.fit_on([&x, &t], fit, &mut first, &mut |net, losses| {
            let owned = |(name, values): (String, &[f32])| (name, values.to_vec());
            kept = Some((net.steps(), net.state().into_iter().map(owned).collect::<Vec<_>>()));
            if losses.len() == 2 { Err("stopped") } else { Ok(()) }
        });
        assert_eq!((stopped, first.len()), (Err("stopped"), 2));
        let (steps, state) = kept.unwrap();
        let mut read = |wanted: &str| {
            let found = state.iter().find(|(name, _)| name == wanted);
            Ok::<_, Infallible>(found.unwrap().1.clone())
        };
        let mut second = Regressor::new([3, 8, 8, 2], 99);
        let Ok(fits) = second.restore(steps, &mut read);
        assert!(fits);
        let Ok(()) = second.fit_on::<Infallible>([&x, &t], fit, &mut first, &mut |_, _| Ok(()));
        assert_eq!(first, losses);
        assert_eq!(second.forward(&x), whole.forward(&x));
        let Ok(fits) = Regressor::new([3, 8, 9, 2], 1).restore(steps, &mut read);
        assert!(!fits);
    }
}
