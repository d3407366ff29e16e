//! How DSMoE can start better than in the paper, from calibration text: which neurons form an expert, and routers that know
//! which experts answer.
//!
//! ```text
//! per layer, tokens t of the calibration text, expert i
//!   s[t, i] = ln |V_i c_i(x_t)|                  what the expert adds to the residual stream
//!   w_i, m_i = ridge regression of s[:, i] on x
//!   z[t, i] = spread (w_i (x_t - mean x) + m_i - q) / deviation
//! ```
//! with q the value that the wanted share of all pairs exceeds: at the start the router opens that share, of the pairs that
//! matter most.

use std::path::Path;

use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights};
use dsmoe_core::convert::RouterValues;
use dsmoe_core::partition::check_divisible;
use dsmoe_kernels::matmul::{Mat, Matmul};
use dsmoe_kernels::{Precision, linear};

use crate::calibration;
use crate::error::{Error, Result};
use crate::experts::construction::clustering;
use crate::linalg::inverse_factor;
use crate::method::Progress;

/// FFN inputs that a router is fitted to; of more, an even choice.
const MOST_INPUTS: usize = 16_384;
/// Raises the diagonal of the inputs' covariance, in parts of its mean.
const RIDGE: f64 = 0.01;
/// Standard deviation of the logits at the start.
const SPREAD: f64 = 2.0;

/// The neurons of every layer of the dense model in `dir`, one expert after the other: balanced k-means on the rows of
/// `gate_proj`.
///
/// # Errors
/// The model cannot be read or cut into that many experts.
pub(crate) fn neurons_by_cluster(
    dir: &Path,
    num_experts: usize,
    seed: u64,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Vec<u32>>> {
    let stream = LayerStream::open(dir, &[])?;
    let config = stream.config();
    let total = config.num_layers as u64;
    let of_layer = |i: usize| {
        progress(Progress { stage: "experts", done: i as u64, total });
        let [.., gate, _, _] = stream.layer(i)?.linears;
        check_divisible(gate.outputs, num_experts, None)?;
        Ok(clustering(gate.weight.to_vec(), gate.inputs, num_experts, seed).0)
    };
    (0..config.num_layers).map(of_layer).collect()
}

/// Routers of the dense model in `dir`, cut into experts of the neurons in `orders` (in blocks as they come without it),
/// that open the share `active` of the pairs of `sequences`.
///
/// # Errors
/// The model cannot be read or cut into that many experts; sequences that differ in length or have fewer than 256 tokens in
/// all; values that are not finite.
pub(crate) fn calibrated_routers(
    dir: &Path,
    orders: Option<&[Vec<u32>]>,
    num_experts: usize,
    active: f64,
    sequences: &[Vec<u32>],
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<RouterValues>> {
    let inputs = calibration::check_for_routers(sequences)?;
    let mut stream = LayerStream::open(dir, sequences)?;
    let layers = stream.config().num_layers;
    let mut routers = Vec::with_capacity(layers);
    for i in 0..layers {
        progress(Progress { stage: "routers", done: i as u64, total: layers as u64 });
        let weights = stream.layer(i)?;
        let intermediate = weights.linears[4].outputs;
        check_divisible(intermediate, num_experts, None)?;
        let order = orders.map_or_else(|| (0..intermediate as u32).collect(), |orders| orders[i].clone());
        let (x, scores) = examples(&mut stream, &weights, &order, num_experts, inputs);
        let fit = fit(&x, &scores, num_experts, active);
        routers.push(fit.ok_or_else(|| Error::Numeric {
            place: format!("layer {i}"),
            problem: "its router cannot be fitted: the FFN's values are not finite".to_owned(),
            help: "check the model with eval".to_owned(),
        })?);
        stream.advance(&weights);
    }
    Ok(routers)
}

/// What a layer's FFN reads `[tokens, hidden]`, and the logarithm of the norm of what each expert then writes
/// `[tokens, num_experts]`, for an even choice of the calibration tokens.
fn examples(
    stream: &mut LayerStream,
    weights: &LayerWeights,
    order: &[u32],
    num_experts: usize,
    tokens: usize,
) -> (Vec<f32>, Vec<f64>) {
    let (hidden, intermediate) = (stream.config().hidden, order.len());
    let width = intermediate / num_experts;
    let (every, seq) = (tokens.div_ceil(MOST_INPUTS), stream.seq());
    let down = &weights.linears[6].weight;
    let columns = |neurons: &[u32]| -> Vec<f32> {
        let row = |row: usize| neurons.iter().map(move |&j| down[row * intermediate + j as usize]);
        (0..hidden).flat_map(row).collect()
    };
    let experts: Vec<(&[u32], Vec<f32>)> =
        order.chunks_exact(width).map(|neurons| (neurons, columns(neurons))).collect();
    let (mut x, mut scores) = (Vec::new(), Vec::new());
    stream.forward(weights, &mut |tap| {
        let first = tap.sequence * seq;
        let chosen: Vec<usize> = (0..seq).filter(|t| (first + t).is_multiple_of(every)).collect();
        match tap.input {
            Input::Ffn => chosen.iter().for_each(|t| x.extend_from_slice(&tap.x[t * hidden..][..hidden])),
            Input::Neurons => {
                let at = scores.len();
                scores.resize(at + chosen.len() * num_experts, 0.0);
                let dims = linear::Dims {
                    rows: chosen.len(),
                    inputs: width,
                    outputs: hidden,
                    precision: Precision::F32,
                };
                let mut y = vec![0.0; chosen.len() * hidden];
                for (i, (neurons, down)) in experts.iter().enumerate() {
                    let value = |t: usize, j: u32| tap.x[t * intermediate + j as usize];
                    let values: Vec<f32> =
                        chosen.iter().flat_map(|&t| neurons.iter().map(move |&j| value(t, j))).collect();
                    linear::Forward { y: &mut y, x: &values, w: down, dims }.run();
                    for (t, y) in y.chunks_exact(hidden).enumerate() {
                        let square: f64 = y.iter().map(|&y| f64::from(y) * f64::from(y)).sum();
                        scores[at + t * num_experts + i] =
                            0.5 * square.max(f64::from(f32::MIN_POSITIVE)).ln();
                    }
                }
            }
            Input::Attention | Input::Heads => {}
        }
    });
    (x, scores)
}

/// The router; nothing if values are not finite.
fn fit(x: &[f32], scores: &[f64], num_experts: usize, active: f64) -> Option<RouterValues> {
    let tokens = scores.len() / num_experts;
    let hidden = x.len() / tokens;
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / tokens as f64;
    let middle: Vec<f64> =
        (0..hidden).map(|c| mean(&mut x.iter().skip(c).step_by(hidden).map(|&x| x.into()))).collect();
    let means: Vec<f64> =
        (0..num_experts).map(|i| mean(&mut scores.iter().skip(i).step_by(num_experts).copied())).collect();
    let centred = |(at, &x): (usize, &f32)| (f64::from(x) - middle[at % hidden]) as f32;
    let x: Vec<f32> = x.iter().enumerate().map(centred).collect();
    let targets: Vec<f32> =
        scores.iter().enumerate().map(|(at, s)| (s - means[at % num_experts]) as f32).collect();

    // (X^T X / tokens + ridge) W^T = X^T S / tokens
    let x = Mat::new(&x, tokens, hidden);
    let mut covariance = vec![0.0; hidden * hidden];
    Matmul { c: &mut covariance, a: x.t(), b: x, accumulate: false, precision: Precision::F32 }.run();
    let mut products = vec![0.0; hidden * num_experts];
    Matmul {
        c: &mut products,
        a: x.t(),
        b: Mat::new(&targets, tokens, num_experts),
        accumulate: false,
        precision: Precision::F32,
    }
    .run();
    let trace: f64 = covariance.iter().step_by(hidden + 1).map(|&v| f64::from(v)).sum();
    let ridge = (RIDGE * trace / hidden as f64).max(f64::from(f32::MIN_POSITIVE)) as f32;
    covariance.iter_mut().step_by(hidden + 1).for_each(|v| *v += ridge);
    let factor = inverse_factor(covariance, hidden).ok()?;
    let factor = Mat::new(&factor, hidden, hidden);
    let (mut half, mut solved) = (vec![0.0; hidden * num_experts], vec![0.0; hidden * num_experts]);
    Matmul {
        c: &mut half,
        a: factor.t(),
        b: Mat::new(&products, hidden, num_experts),
        accumulate: false,
        precision: Precision::F32,
    }
    .run();
    Matmul {
        c: &mut solved,
        a: factor,
        b: Mat::new(&half, hidden, num_experts),
        accumulate: false,
        precision: Precision::F32,
    }
    .run();

    let mut predicted = vec![0.0; tokens * num_experts];
    Matmul {
        c: &mut predicted,
        a: x,
        b: Mat::new(&solved, hidden, num_experts),
        accumulate: false,
        precision: Precision::F32,
    }
    .run();
    let predicted: Vec<f64> =
        predicted.iter().enumerate().map(|(at, &z)| f64::from(z) + means[at % num_experts]).collect();
    let centre = predicted.iter().sum::<f64>() / predicted.len() as f64;
    let variance = predicted.iter().map(|z| (z - centre).powi(2)).sum::<f64>() / predicted.len() as f64;
    let mut sorted = predicted;
    sorted.sort_by(f64::total_cmp);
    let open = ((active * sorted.len() as f64).round() as usize).min(sorted.len());
    // Between the last that is shut and the first that is open.
    let quantile = match sorted.len() - open {
        0 => sorted[0] - 1.0,
        at if open == 0 => sorted[at - 1] + 1.0,
        at => 0.5 * (sorted[at - 1] + sorted[at]),
    };
    // Experts that all say the same everywhere leave nothing to spread.
    let scale = if variance > 0.0 { SPREAD / variance.sqrt() } else { 1.0 };
    let weight: Vec<f32> = (0..num_experts * hidden)
        .map(|at| (scale * f64::from(solved[at % hidden * num_experts + at / hidden])) as f32)
        .collect();
    let bias: Vec<f32> = (0..num_experts)
        .map(|i| {
            let shift: f64 = (0..hidden).map(|c| f64::from(weight[i * hidden + c]) * middle[c]).sum();
            (scale * (means[i] - quantile) - shift) as f32
        })
        .collect();
    weight.iter().chain(&bias).all(|v| v.is_finite()).then_some(RouterValues { weight, bias })
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;

    use super::*;

    /// Scores that are a linear function of the inputs are found, and the share is opened exactly.
    #[test]
    fn a_linear_truth_is_fitted_and_the_share_opened() {
        let (tokens, hidden, experts) = (600, 12, 4);
        let mut x = normals(tokens * hidden, 1);
        x.iter_mut().step_by(hidden).for_each(|x| *x += 3.0);
        let truth = normals(experts * hidden, 2);
        let score = |t: usize, i: usize| -> f64 {
            let dot = (0..hidden).map(|c| f64::from(x[t * hidden + c]) * f64::from(truth[i * hidden + c]));
            dot.sum::<f64>() + i as f64
        };
        let scores: Vec<f64> = (0..tokens * experts).map(|at| score(at / experts, at % experts)).collect();
        for active in [0.0, 0.25, 0.375, 1.0] {
            let router = fit(&x, &scores, experts, active).unwrap();
            let logit = |t: usize, i: usize| -> f64 {
                let row = &router.weight[i * hidden..][..hidden];
                let dot = row.iter().zip(&x[t * hidden..]).map(|(w, x)| f64::from(*w) * f64::from(*x));
                dot.sum::<f64>() + f64::from(router.bias[i])
            };
            let pairs: Vec<(f64, f64)> =
                (0..tokens * experts).map(|at| (logit(at / experts, at % experts), scores[at])).collect();
            let open = pairs.iter().filter(|(z, _)| *z > 0.0).count();
            let want = (active * pairs.len() as f64).round() as usize;
            assert!(open.abs_diff(want) <= 1, "{open} {want}");
            // What is open are the largest, but for what the ridge bends.
            let mut sorted: Vec<f64> = scores.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let right = pairs.iter().filter(|(z, s)| *z > 0.0 && *s >= sorted[want.max(1) - 1]).count();
            assert!(right as f64 >= 0.97 * open as f64, "{right} of {open}");
        }
        assert!(fit(&vec![f32::NAN; 600 * 12], &scores, experts, 0.5).is_none());
    }
}
