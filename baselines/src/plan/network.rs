//! A network with several heads on one backbone.
//!
//! ```text
//! h = relu(W2 relu(W1 x + b1) + b2)               backbone
//! y_m = V2_m relu(V1_m h + c1_m) + c2_m           head m
//! ```
//! Training as the authors' code does it: backbone and first head on all rows; that head starts anew, the backbone stays, and every
//! head is trained on a bootstrap sample of its own. A network of one head keeps what the first stage gave.

use dsmoe_kernels::linear::{self, BackwardBias, BackwardInput, BackwardWeight, Dims};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::{Precision, adamw};
use serde::{Deserialize, Serialize};

const WEIGHTS_STREAM: u64 = 0x656e_7365;
const ORDER_STREAM: u64 = 0x656e_736f;
const SAMPLE_STREAM: u64 = 0x656e_7362;

/// Settings of a fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    /// Passes over all rows, of each stage.
    pub epochs: usize,
    /// Rows of a step.
    pub batch: usize,
    /// Learning rate.
    pub lr: f64,
    /// Seed of the weights, of the order and of the samples.
    pub seed: u64,
}

impl Default for Fit {
    fn default() -> Fit {
        Fit { epochs: 30, batch: 32, lr: 1e-3, seed: 0 }
    }
}

/// The loss of a batch: from the outputs `[rows, outputs]` and the numbers of the rows to the mean loss and its gradient.
pub type Loss<'a> = &'a dyn Fn(&[f32], &[usize]) -> (f64, Vec<f32>);

/// A matrix `[outputs, inputs]` and a bias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Dense {
    inputs: usize,
    outputs: usize,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// Gradients and moments of a matrix and a bias while they are trained.
#[derive(Debug)]
struct Moving {
    grad: [Vec<f32>; 2],
    m: [Vec<f32>; 2],
    v: [Vec<f32>; 2],
}

impl Dense {
    fn new(inputs: usize, outputs: usize, rng: &mut Rng) -> Dense {
        // Glorot's uniform start, as Keras has it.
        let bound = (6.0 / (inputs + outputs).max(1) as f32).sqrt();
        let weight = (0..inputs * outputs).map(|_| bound * (2.0 * rng.uniform() - 1.0)).collect();
        Dense { inputs, outputs, weight, bias: vec![0.0; outputs] }
    }

    fn dims(&self, rows: usize) -> Dims {
        Dims { rows, inputs: self.inputs, outputs: self.outputs, precision: Precision::F32 }
    }

    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs.max(1);
        let mut y = vec![0.0; rows * self.outputs];
        let (w, bias) = (&self.weight[..], Some(&self.bias[..]));
        linear::Forward { y: &mut y, x, w, bias, dims: self.dims(rows) }.run();
        y
    }

    /// Adds the gradients of a batch, and returns that of its inputs.
    fn backward(&self, x: &[f32], dy: &[f32], moving: &mut Moving) -> Vec<f32> {
        let dims = self.dims(x.len() / self.inputs.max(1));
        let [weight, bias] = &mut moving.grad;
        BackwardWeight { dw: weight, dy, x, dims }.run();
        BackwardBias { db: bias, dy, dims }.run();
        let mut dx = vec![0.0; x.len()];
        BackwardInput { dx: &mut dx, dy, w: &self.weight, dims, add: false }.run();
        dx
    }

    fn update(&mut self, moving: &mut Moving, hyper: &adamw::Hyper) {
        let Moving { grad: [gw, gb], m: [mw, mb], v: [vw, vb] } = moving;
        for (param, grad, m, v) in [(&mut self.weight, gw, mw, vw), (&mut self.bias, gb, mb, vb)] {
            adamw::Step { param, m, v, grad, grad_scale: 1.0, hyper }.run();
            grad.fill(0.0);
        }
    }

    fn is_sound(&self) -> bool {
        self.weight.len() == self.inputs * self.outputs
            && self.bias.len() == self.outputs
            && self.weight.iter().chain(&self.bias).all(|x| x.is_finite())
    }
}

impl Moving {
    fn of(dense: &Dense) -> Moving {
        let zeros = || [vec![0.0; dense.weight.len()], vec![0.0; dense.bias.len()]];
        Moving { grad: zeros(), m: zeros(), v: zeros() }
    }
}

fn relu(mut values: Vec<f32>) -> Vec<f32> {
    values.iter_mut().for_each(|x| *x = x.max(0.0));
    values
}

/// Runs layers with a ReLU between them, and behind the last one where `last` says so; returns the outputs of all.
fn run(layers: &[Dense], x: &[f32], last: bool) -> Vec<Vec<f32>> {
    let mut all: Vec<Vec<f32>> = Vec::with_capacity(layers.len());
    for (i, layer) in layers.iter().enumerate() {
        let y = layer.forward(all.last().map_or(x, |x| &x[..]));
        all.push(if last || i + 1 < layers.len() { relu(y) } else { y });
    }
    all
}

/// Adds the gradients of layers that gave `values` for `x`, and returns that of the inputs. `last` as in [`run`].
fn back(
    layers: &[Dense],
    (x, values): (&[f32], &[Vec<f32>]),
    mut dy: Vec<f32>,
    moving: &mut [Moving],
    last: bool,
) -> Vec<f32> {
    for (i, layer) in layers.iter().enumerate().rev() {
        if last || i + 1 < layers.len() {
            dy.iter_mut().zip(&values[i]).filter(|(_, y)| **y <= 0.0).for_each(|(dy, _)| *dy = 0.0);
        }
        let input = if i == 0 { x } else { &values[i - 1] };
        dy = layer.backward(input, &dy, &mut moving[i]);
    }
    dy
}

/// The network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ensemble {
    backbone: Vec<Dense>,
    heads: Vec<Vec<Dense>>,
}

/// The neurons of a hidden layer of a head.
const HEAD_WIDTH: usize = 40;

impl Ensemble {
    /// Makes a network with hidden layers of these widths in its backbone, and so many heads.
    ///
    /// # Panics
    /// A width is 0, or there is no head.
    pub fn new(inputs: usize, hidden: [usize; 2], outputs: usize, heads: usize, seed: u64) -> Ensemble {
        assert!(inputs > 0 && outputs > 0 && heads > 0 && !hidden.contains(&0), "ensemble: a width is 0");
        let mut rng = Rng::new(seed, WEIGHTS_STREAM);
        let backbone =
            vec![Dense::new(inputs, hidden[0], &mut rng), Dense::new(hidden[0], hidden[1], &mut rng)];
        let heads = (0..heads).map(|head| Ensemble::head(hidden[1], outputs, seed, head)).collect();
        Ensemble { backbone, heads }
    }

    fn head(inputs: usize, outputs: usize, seed: u64, head: usize) -> Vec<Dense> {
        let mut rng = Rng::new(seed, WEIGHTS_STREAM + 1 + head as u64);
        vec![Dense::new(inputs, HEAD_WIDTH, &mut rng), Dense::new(HEAD_WIDTH, outputs, &mut rng)]
    }

    /// Returns the number of heads.
    pub fn heads(&self) -> usize {
        self.heads.len()
    }

    /// Returns the number of inputs.
    pub fn inputs(&self) -> usize {
        self.backbone[0].inputs
    }

    /// Returns whether a network that was read fits together and is finite.
    pub fn is_sound(&self, inputs: usize, outputs: usize) -> bool {
        let [first, second] = &self.backbone[..] else { return false };
        let fits = |layers: &[Dense], ends: [usize; 2]| {
            let chained = layers.windows(2).all(|pair| pair[0].outputs == pair[1].inputs);
            let ends_fit = layers.first().zip(layers.last());
            let ends_fit = ends_fit.is_some_and(|(a, b)| [a.inputs, b.outputs] == ends);
            chained && ends_fit && layers.iter().all(Dense::is_sound)
        };
        let middle = second.outputs;
        fits(&self.backbone, [inputs, middle])
            && first.outputs == second.inputs
            && !self.heads.is_empty()
            && self.heads.iter().all(|head| head.len() == 2 && fits(head, [middle, outputs]))
    }

    /// Returns the outputs of every head for rows `x` `[rows, inputs]`.
    pub fn forward(&self, x: &[f32]) -> Vec<Vec<f32>> {
        let h = run(&self.backbone, x, true).pop().unwrap_or_default();
        self.heads.iter().map(|head| run(head, &h, false).pop().unwrap_or_default()).collect()
    }

    /// Fits the network to rows `x` `[rows, inputs]` under `loss`. Returns the mean loss of the last epoch of every head. `show`
    /// receives how many passes are done, and says whether to go on; returns nothing where it does not.
    pub fn fit(
        &mut self,
        x: &[f32],
        loss: Loss<'_>,
        fit: Fit,
        show: &mut dyn FnMut(usize) -> bool,
    ) -> Option<Vec<f64>> {
        let rows: Vec<usize> = (0..x.len() / self.inputs()).collect();
        let mut first = 0.0;
        let mut order = Order::new(&rows, fit, 0);
        let mut moving: Vec<Moving> = self.backbone.iter().chain(&self.heads[0]).map(Moving::of).collect();
        for epoch in 0..fit.epochs {
            first = order.epoch(|batch, hyper| self.step_all(x, batch, loss, (&mut moving, hyper)));
            if !show(epoch + 1) {
                return None;
            }
        }
        if self.heads.len() == 1 {
            return Some(vec![first]);
        }
        let h = run(&self.backbone, x, true).pop().unwrap_or_default();
        let (width, outputs) = (self.backbone[1].outputs, self.heads[0][1].outputs);
        let mut losses = Vec::new();
        for number in 0..self.heads.len() {
            // Other streams than the first head had.
            self.heads[number] = Ensemble::head(width, outputs, fit.seed, self.heads.len() + number);
            let mut rng = Rng::new(fit.seed, SAMPLE_STREAM + number as u64);
            let sample: Vec<usize> = (0..rows.len()).map(|_| rng.below(rows.len() as u64) as usize).collect();
            let mut order = Order::new(&sample, fit, 1 + number as u64);
            let mut moving: Vec<Moving> = self.heads[number].iter().map(Moving::of).collect();
            let mut last = 0.0;
            for epoch in 0..fit.epochs {
                let head = &mut self.heads[number];
                last = order
                    .epoch(|batch, hyper| step_head(head, (&h, width), batch, loss, (&mut moving, hyper)));
                if !show((number + 1) * fit.epochs + epoch + 1) {
                    return None;
                }
            }
            losses.push(last);
        }
        Some(losses)
    }

    /// Takes a step with the backbone and the first head, and returns its loss.
    fn step_all(
        &mut self,
        x: &[f32],
        batch: &[usize],
        loss: Loss<'_>,
        (moving, hyper): (&mut [Moving], &adamw::Hyper),
    ) -> f64 {
        let x = gather(x, self.inputs(), batch);
        let h = run(&self.backbone, &x, true);
        let of_head = run(&self.heads[0], &h[1], false);
        let (loss, dy) = loss(&of_head[1], batch);
        let (of_backbone, own) = moving.split_at_mut(2);
        let dh = back(&self.heads[0], (&h[1], &of_head), dy, own, false);
        back(&self.backbone, (&x, &h), dh, of_backbone, true);
        let layers = self.backbone.iter_mut().chain(&mut self.heads[0]);
        layers.zip(moving).for_each(|(layer, moving)| layer.update(moving, hyper));
        loss
    }
}

/// Takes a step with one head alone, on the backbone's outputs `h` of that width, and returns its loss.
fn step_head(
    head: &mut [Dense],
    (h, width): (&[f32], usize),
    batch: &[usize],
    loss: Loss<'_>,
    (moving, hyper): (&mut [Moving], &adamw::Hyper),
) -> f64 {
    let h = gather(h, width, batch);
    let values = run(head, &h, false);
    let (loss, dy) = loss(&values[1], batch);
    back(head, (&h, &values), dy, moving, false);
    head.iter_mut().zip(moving).for_each(|(layer, moving)| layer.update(moving, hyper));
    loss
}

fn gather(values: &[f32], width: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|row| &values[row * width..][..width]).copied().collect()
}

/// The order of rows, in a new one every epoch, and the steps that were taken.
struct Order {
    rows: Vec<usize>,
    rng: Rng,
    fit: Fit,
    steps: u64,
}

impl Order {
    fn new(rows: &[usize], fit: Fit, stage: u64) -> Order {
        Order { rows: rows.to_vec(), rng: Rng::new(fit.seed, ORDER_STREAM + stage), fit, steps: 0 }
    }

    /// Takes the steps of one epoch, and returns the mean of their losses.
    fn epoch(&mut self, mut step: impl FnMut(&[usize], &adamw::Hyper) -> f64) -> f64 {
        for i in (1..self.rows.len()).rev() {
            self.rows.swap(i, self.rng.below(i as u64 + 1) as usize);
        }
        let (mut sum, mut count) = (0.0, 0.0);
        for batch in self.rows.chunks(self.fit.batch.max(1)) {
            self.steps += 1;
            let hyper = adamw::Hyper {
                lr: self.fit.lr,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-7,
                weight_decay: 0.0,
                step: self.steps,
            };
            sum += step(batch, &hyper);
            count += 1.0;
        }
        sum / f64::max(count, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{
        assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals,
    };

    use super::*;

    fn squares(targets: &[f32], outputs: usize) -> impl Fn(&[f32], &[usize]) -> (f64, Vec<f32>) + '_ {
        move |y, rows| {
            let wanted = gather(targets, outputs, rows);
            let differences: Vec<f64> = y.iter().zip(&wanted).map(|(y, t)| f64::from(y - t)).collect();
            let count = y.len() as f64;
            let loss = differences.iter().map(|d| d * d).sum::<f64>() / count;
            (loss, differences.iter().map(|d| (2.0 * d / count) as f32).collect())
        }
    }

    #[test]
    fn the_gradients_are_the_derivatives_of_the_loss() {
        let mut net = Ensemble::new(3, [5, 4], 2, 1, 3);
        // A unit without an input lies on the kink of ReLU as long as its bias is 0.
        for (seed, layer) in (3..).zip(net.backbone.iter_mut().chain(&mut net.heads[0])) {
            layer.bias = normals(layer.bias.len(), seed);
        }
        let (x, t) = (normals(12, 1), normals(8, 2));
        let loss = squares(&t, 2);
        let rows = [0, 1, 2, 3];
        let of = |net: &Ensemble| loss(&net.forward(&x)[0], &rows).0;
        let mut moving: Vec<Moving> = net.backbone.iter().chain(&net.heads[0]).map(Moving::of).collect();
        let h = run(&net.backbone, &x, true);
        let y = run(&net.heads[0], &h[1], false);
        let (_, dy) = loss(&y[1], &rows);
        let (of_backbone, own) = moving.split_at_mut(2);
        let dh = back(&net.heads[0], (&h[1], &y), dy, own, false);
        back(&net.backbone, (&x, &h), dh, of_backbone, true);
        for (i, moving) in moving.iter().enumerate() {
            let at = if i < 2 { &net.backbone[i] } else { &net.heads[0][i - 2] };
            for (part, values) in [&at.weight, &at.bias].into_iter().enumerate() {
                let want = finite_differences(&f64s(values), 5e-4, |values| {
                    let mut net = net.clone();
                    let layer = if i < 2 { &mut net.backbone[i] } else { &mut net.heads[0][i - 2] };
                    let to = if part == 0 { &mut layer.weight } else { &mut layer.bias };
                    *to = values.iter().map(|&x| x as f32).collect();
                    of(&net)
                });
                assert_close_f64(&format!("layer {i}, {part}"), &f64s(&moving.grad[part]), &want, 3e-3);
            }
        }
    }

    #[test]
    fn heads_are_trained_on_a_frozen_backbone_alike_on_any_number_of_threads() {
        let x = normals(600, 1);
        let t: Vec<f32> = x.chunks(3).flat_map(|x| [x[0] - x[1], 0.5 * x[2]]).collect();
        let fit = Fit { epochs: 20, lr: 3e-3, ..Fit::default() };
        let run = |heads: usize| {
            let mut net = Ensemble::new(3, [32, 32], 2, heads, 7);
            let losses = net.fit(&x, &squares(&t, 2), fit, &mut |_| true).unwrap();
            (net, losses)
        };
        let (one, losses) = run(1);
        assert!(losses[0] < 0.05, "{losses:?}");
        let (three, losses) = run(3);
        assert!(losses.iter().all(|loss| *loss < 0.1), "{losses:?}");
        // The heads of the second stage leave the backbone as the first one made it.
        assert_eq!(three.backbone, one.backbone);
        assert_ne!(three.heads[0], three.heads[1]);
        assert_ne!(three.heads[0], one.heads[0]);
        assert!(three.is_sound(3, 2) && !three.is_sound(4, 2) && !three.is_sound(3, 1));
        assert_same_on_threads("ensemble", || run(2).0.forward(&x[..30]));
        let read: Ensemble = serde_json::from_str(&serde_json::to_string(&three).unwrap()).unwrap();
        assert_eq!(read, three);
        assert!(Ensemble::new(3, [4, 4], 2, 2, 1).fit(&x, &squares(&t, 2), fit, &mut |_| false).is_none());
    }

    /// The numbers that the script gives a tensor.
    fn formula(seed: usize, count: usize) -> Vec<f32> {
        (0..count).map(|i| (((i * 7919 + seed * 104_729) % 10_007) as f64 / 10_007.0 - 0.5) as f32).collect()
    }

    #[test]
    fn forward_loss_and_steps_are_those_of_pytorch() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/plan.json");
        let wanted: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let numbers = |key: &str| -> Vec<f64> {
            wanted[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let mut net = Ensemble::new(12, [7, 6], 2, 1, 0);
        for (i, layer) in net.backbone.iter_mut().chain(&mut net.heads[0]).enumerate() {
            layer.weight = formula(10 + i, layer.weight.len());
            layer.bias = formula(20 + i, layer.bias.len());
        }
        let x: Vec<f32> = formula(1, 96).iter().map(|x| x + 0.5).collect();
        let y: Vec<f64> = formula(2, 16).iter().map(|&y| f64::from(y) + 0.5).collect();
        let y: Vec<f64> = y.into_iter().map(|y| if y < 0.4 { 0.0 } else { y.clamp(0.0, 1.0) }).collect();
        assert_close_f64("before", &f64s(&net.forward(&x)[0]), &numbers("before"), 1e-5);
        let losses = std::cell::RefCell::new(Vec::new());
        let loss = |out: &[f32], rows: &[usize]| {
            let (mut sum, mut grad) = (0.0, Vec::new());
            for (out, row) in out.chunks(2).zip(rows) {
                let p: Vec<f64> = out.iter().map(|&x| 1.0 / (1.0 + (-f64::from(x)).exp())).collect();
                let (loss, slopes) = super::super::offload::loss(&p, &y[2 * row..2 * row + 2]);
                sum += loss / rows.len() as f64;
                let slope = |(s, p): (&f64, &f64)| (s * p * (1.0 - p) / rows.len() as f64) as f32;
                grad.extend(slopes.iter().zip(&p).map(slope));
            }
            losses.borrow_mut().push(sum);
            (sum, grad)
        };
        let fit = Fit { epochs: 5, batch: 8, lr: 1e-2, seed: 0 };
        net.fit(&x, &loss, fit, &mut |_| true).unwrap();
        assert_close_f64("losses", &losses.borrow(), &numbers("losses"), 1e-5);
        assert_close_f64("after", &f64s(&net.forward(&x)[0]), &numbers("after"), 1e-4);
    }
}
