//! LESA's prediction of layers between others.

use std::collections::BTreeMap;

use dsmoe_core::calibrate::LayerStream;
use serde::{Deserialize, Serialize};

use super::basis::{Basis, Sum};
use super::options::{GrowOptions, NewLayer, Space};
use crate::error::{Error, Result};
use crate::method::Progress;
use crate::partial::{Pace, Partial};
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

/// A finished fit as a part of the work: numbers as bits.
#[derive(Serialize, Deserialize)]
struct KeptFit {
    matrix: String,
    rows: usize,
    first_loss: u64,
    last_loss: u64,
    relative_error: u64,
}

/// A network on its way: its steps, and the bits of the losses of its epochs.
#[derive(Serialize, Deserialize)]
struct KeptNet {
    steps: u64,
    losses: Vec<u64>,
}

/// The names of the parts of a kind.
fn fit_of(kind: usize) -> String {
    format!("fit-{kind}")
}

fn net_of(kind: usize) -> String {
    format!("net-{kind}")
}

fn matrix_of(kind: usize, gap: usize) -> String {
    format!("matrix-{kind}-behind-{gap}")
}

/// The tensor of a part that is one matrix.
const MATRIX: &str = "matrix";

/// Matrices of new layers, by the layer that they are behind: q, k, v, o, gate, up, down.
pub(super) type Predicted = BTreeMap<usize, [Vec<f32>; KINDS]>;

/// Returns the finished matrices of a kind in the layers behind `gaps`, and their fit; none unless all of them are kept.
fn finished(partial: &Partial, kind: usize, gaps: &[usize]) -> Result<Option<(Vec<Vec<f32>>, Fitted)>> {
    let Some(kept) = partial.read::<KeptFit>(&fit_of(kind))? else { return Ok(None) };
    let mut matrices = Vec::with_capacity(gaps.len());
    for &gap in gaps {
        let Some(part) = partial.read::<()>(&matrix_of(kind, gap))? else { return Ok(None) };
        matrices.push(part.tensor(MATRIX)?);
    }
    let KeptFit { matrix, rows, .. } = kept.value;
    let [first_loss, last_loss, relative_error] =
        [kept.value.first_loss, kept.value.last_loss, kept.value.relative_error].map(f64::from_bits);
    Ok(Some((matrices, Fitted { matrix, rows, first_loss, last_loss, relative_error })))
}

/// Predicts the matrices of all new layers of `layers`. Finished kinds and the network on its way are parts of `partial`.
pub(super) fn predict(
    stream: &LayerStream,
    layers: &[NewLayer],
    (options, partial): (&GrowOptions, &Partial),
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
        if let Some((matrices, fitted)) = finished(partial, kind, &gaps)? {
            for (gap, matrix) in gaps.iter().zip(matrices) {
                predicted.get_mut(gap).expect("a gap to fill")[kind] = matrix;
            }
            fits.push(fitted);
            continue;
        }
        let matrices = Matrices::read(stream, kind, options.space)?;
        let fit =
            Fit { epochs: options.epochs, lr: LEARNING_RATE, penalty: options.penalty, seed: options.seed };
        let (net, fitted) = matrices.fit(kind, (fit, partial), &mut show)?;
        for &gap in &gaps {
            let new = matrices.between(gap, &|x| net.forward(x));
            if !new.iter().all(|w| w.is_finite()) {
                let help = "use fewer epochs, or another seed";
                return Err(Error::numeric(&matrices.name, "has a prediction that is not finite", help));
            }
            partial.keep(&matrix_of(kind, gap), &(), &[(MATRIX, &new)])?;
            predicted.get_mut(&gap).expect("a gap to fill")[kind] = new;
        }
        // Whoever finds the fit finds the matrices.
        let kept = KeptFit {
            matrix: fitted.matrix.clone(),
            rows: fitted.rows,
            first_loss: fitted.first_loss.to_bits(),
            last_loss: fitted.last_loss.to_bits(),
            relative_error: fitted.relative_error.to_bits(),
        };
        partial.keep(&fit_of(kind), &kept, &[])?;
        partial.forget(&net_of(kind))?;
        fits.push(fitted);
    }
    Ok((predicted, fits))
}

/// Returns the network of a kind that an interrupted work has begun to fit, and the losses of its epochs. `net` is a new one.
fn begun(partial: &Partial, kind: usize, mut net: Regressor) -> Result<Option<(Regressor, Vec<f64>)>> {
    let Some(part) = partial.read::<KeptNet>(&net_of(kind))? else { return Ok(None) };
    let losses = part.value.losses.iter().map(|&bits| f64::from_bits(bits)).collect();
    let fits = net.restore(part.value.steps, &mut |name| part.tensor(name))?;
    Ok(fits.then_some((net, losses)))
}

/// Keeps the network of a kind behind an epoch.
fn keep(partial: &Partial, kind: usize, net: &Regressor, losses: &[f64]) -> Result<()> {
    let state = net.state();
    let tensors: Vec<(&str, &[f32])> = state.iter().map(|(name, values)| (&**name, *values)).collect();
    let losses = losses.iter().map(|loss| loss.to_bits()).collect();
    partial.keep(&net_of(kind), &KeptNet { steps: net.steps(), losses }, &tensors)
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

    fn fit(
        &self,
        kind: usize,
        (fit, partial): (Fit, &Partial),
        show: &mut dyn FnMut(usize),
    ) -> Result<(Regressor, Fitted)> {
        let inner = 1..self.layers.len() - 1;
        let inputs: Vec<f32> = inner.clone().flat_map(|i| self.pairs(i - 1, i + 1)).collect();
        let targets: Vec<f32> = self.layers[inner].concat();
        // Kinds start differently.
        let seed = fit.seed.wrapping_mul(KINDS as u64).wrapping_add(kind as u64);
        let new = || Regressor::new([2 * self.cols, HIDDEN, HIDDEN, self.cols], seed);
        let (mut net, mut losses) = match begun(partial, kind, new())? {
            Some(begun) if begun.1.len() <= fit.epochs => begun,
            _ => (new(), Vec::new()),
        };
        let mut pace = Pace::new();
        net.fit_on([&inputs, &targets], Fit { seed, ..fit }, &mut losses, &mut |net, losses| {
            show(losses.len());
            if losses.len() < fit.epochs && pace.is_due() { keep(partial, kind, net, losses) } else { Ok(()) }
        })?;
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
