//! LESA's prediction of layers between others.

use std::collections::BTreeMap;

use dsmoe_core::calibrate::LayerStream;
use serde::Serialize;

use super::basis::{Basis, Sum};
use super::options::{GrowOptions, NewLayer, Space};
use crate::error::{Error, Result};
use crate::method::Progress;
use crate::regressor::{Fit, Regressor};

/// Neurons of the network's hidden layers.
const HIDDEN: usize = 256;
const LEARNING_RATE: f64 = 1e-3;
/// Kinds of matrices of a layer.
const KINDS: usize = 7;

/// The training result of the network for one kind of matrix.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fitted {
    /// The kind, e.g. `mlp.up_proj`.
    pub matrix: String,
    /// Rows that the network was trained on.
    pub rows: usize,
    /// Mean loss of the first epoch.
    pub first_loss: f64,
    /// Mean loss of the last epoch.
    pub last_loss: f64,
    /// Squared error on the rows that were learnt, over that of predicting zeros.
    pub relative_error: f64,
}

/// Matrices of new layers, by the layer that they are behind: q, k, v, o, gate, up, down.
pub(super) type Predicted = BTreeMap<usize, [Vec<f32>; KINDS]>;

/// Predicts the matrices of all new layers of `layers`.
pub(super) fn predict(
    stream: &LayerStream,
    layers: &[NewLayer],
    options: &GrowOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Predicted, Vec<Fitted>)> {
    let gaps: Vec<usize> = layers
        .iter()
        .filter_map(|layer| match *layer {
            NewLayer::Behind(gap) => Some(gap),
            NewLayer::Old(_) => None,
        })
        .collect();
    let mut predicted: Predicted = gaps.iter().map(|&gap| (gap, [const { Vec::new() }; KINDS])).collect();
    let mut fits = Vec::with_capacity(KINDS);
    for kind in 0..KINDS {
        let mut show = |epochs: usize| {
            let (done, total) = ((kind * options.epochs + epochs) as u64, (KINDS * options.epochs) as u64);
            progress(Progress { stage: "fitting", done, total });
        };
        show(0);
        let matrices = Matrices::read(stream, kind, options.space)?;
        let fit =
            Fit { epochs: options.epochs, lr: LEARNING_RATE, penalty: options.penalty, seed: options.seed };
        let (net, fitted) = matrices.fit(kind, fit, &mut show)?;
        for &gap in &gaps {
            let new = matrices.between(gap, &|x| net.forward(x));
            if !new.iter().all(|w| w.is_finite()) {
                let help = "use fewer epochs, or another seed";
                return Err(Error::numeric(&matrices.name, "has a prediction that is not finite", help));
            }
            predicted.get_mut(&gap).expect("a gap to fill")[kind] = new;
        }
        fits.push(fitted);
    }
    Ok((predicted, fits))
}

/// One kind of matrix in all layers, as rows that a network learns.
pub(super) struct Matrices {
    name: String,
    cols: usize,
    /// None where the rows are those of the weights.
    basis: Option<Basis>,
    /// `[rows, cols]` of every layer.
    layers: Vec<Vec<f32>>,
}

fn f32s(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

impl Matrices {
    fn read(stream: &LayerStream, kind: usize, space: Space) -> Result<Matrices> {
        let mut layers = Vec::with_capacity(stream.config().num_layers);
        let (mut name, mut rows) = (String::new(), 0);
        for i in 0..stream.config().num_layers {
            let mut weights = stream.layer(i)?;
            let linear = &mut weights.linears[kind];
            let (of_layer, _) = linear.name.rsplit_once('.').unwrap_or((&linear.name, ""));
            name = of_layer.splitn(4, '.').last().unwrap_or(of_layer).to_owned();
            rows = linear.outputs;
            layers.push(linear.weight.to_vec());
        }
        Matrices::of(name, rows, layers, space)
    }

    /// Takes the matrices `layers` `[rows, cols]`.
    pub(super) fn of(name: String, rows: usize, layers: Vec<Vec<f32>>, space: Space) -> Result<Matrices> {
        let cols = layers.first().map_or(0, |weight| weight.len() / rows);
        if space == Space::Weights {
            return Ok(Matrices { name, cols, basis: None, layers });
        }
        let mut sum = Sum::new(rows);
        layers.iter().for_each(|weight| sum.add(weight));
        let basis = sum.basis(&name)?;
        let layers = layers.iter().map(|weight| f32s(&basis.rows_of(weight))).collect();
        Ok(Matrices { name, cols, basis: Some(basis), layers })
    }

    /// Returns the rows of two layers side by side.
    fn pairs(&self, lower: usize, upper: usize) -> Vec<f32> {
        let rows = self.layers[lower].chunks_exact(self.cols).zip(self.layers[upper].chunks_exact(self.cols));
        rows.flat_map(|(lower, upper)| lower.iter().chain(upper)).copied().collect()
    }

    fn fit(&self, kind: usize, fit: Fit, show: &mut dyn FnMut(usize)) -> Result<(Regressor, Fitted)> {
        let inner = 1..self.layers.len() - 1;
        let inputs: Vec<f32> = inner.clone().flat_map(|i| self.pairs(i - 1, i + 1)).collect();
        let targets: Vec<f32> = self.layers[inner].concat();
        // Kinds start differently.
        let seed = fit.seed.wrapping_mul(KINDS as u64).wrapping_add(kind as u64);
        let mut net = Regressor::new([2 * self.cols, HIDDEN, HIDDEN, self.cols], seed);
        let losses = net.fit(&inputs, &targets, Fit { seed, ..fit }, show);
        let (mut error, mut all) = (0.0, 0.0);
        for (x, t) in inputs.chunks(2 * self.cols * HIDDEN).zip(targets.chunks(self.cols * HIDDEN)) {
            for (y, &t) in net.forward(x).iter().zip(t) {
                error += f64::from(y - t).powi(2);
                all += f64::from(t).powi(2);
            }
        }
        let relative_error = if all > 0.0 { error / all } else { 0.0 };
        let (first_loss, last_loss) = (losses[0], losses[losses.len() - 1]);
        if !last_loss.is_finite() || !relative_error.is_finite() {
            let help = "use fewer epochs, or another seed";
            return Err(Error::numeric(&self.name, "has rows that the network does not learn", help));
        }
        let rows = targets.len() / self.cols;
        Ok((net, Fitted { matrix: self.name.clone(), rows, first_loss, last_loss, relative_error }))
    }

    /// Returns the matrix `[rows, cols]` of a layer behind layer `gap`, whose rows `net` gives.
    pub(super) fn between(&self, gap: usize, net: &dyn Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
        let rows = net(&self.pairs(gap, gap + 1));
        match &self.basis {
            None => rows,
            Some(basis) => f32s(&basis.matrix(&rows.iter().map(|&x| f64::from(x)).collect::<Vec<_>>())),
        }
    }
}
