//! Shares of inputs to skip, by layer and linear, from one pass over the dense model.

use std::collections::BTreeMap;

use dsmoe_core::calibrate::{Down, Input, LayerStream, LayerWeights, Tap};
use dsmoe_core::kept::{LINEARS, LayerThresholds};
use dsmoe_kernels::{Precision, swiglu};

use super::measure::{INPUTS, weights};
use super::quantile::{Magnitudes, Table};
use super::settings::{Choose, Settings};
use crate::error::{Error, Result};
use crate::method::{Job, Progress};
use crate::neurons::at;

/// Largest share of inputs that a linear skips.
const MOST_SKIPPED: f64 = 0.98;
/// Of the calibration text this part, the last, measures errors of layers.
const HELD_BACK: usize = 4;

/// The shares of inputs that a layer skips.
pub(super) struct LayerShares {
    /// Quantiles of the magnitudes that each linear reads.
    inputs: [Table; LINEARS],
    /// Quantiles of the magnitudes of gates.
    gates: Option<Table>,
    /// Share of inputs that each linear skips, and of neurons; of these one is 0.
    skipped: [f64; LINEARS],
    neurons: f64,
    /// Weights of each linear.
    weights: [f64; LINEARS],
}

impl LayerShares {
    /// Returns the largest factor that leaves the ratios of the shares.
    pub(super) fn most(&self) -> f64 {
        let largest = self.skipped.iter().copied().fold(self.neurons, f64::max);
        if largest > 0.0 { 1.0 / largest } else { f64::MAX }
    }

    /// Returns the thresholds that skip `factor` times the shares.
    pub(super) fn thresholds(&self, factor: f64) -> LayerThresholds {
        let share = |share: f64| (share * factor).min(MOST_SKIPPED);
        LayerThresholds {
            inputs: std::array::from_fn(|i| self.inputs[i].threshold(share(self.skipped[i]))),
            gate: self.gates.as_ref().map_or(0.0, |gates| gates.threshold(share(self.neurons))),
            ..LayerThresholds::NONE
        }
    }

    /// Returns the weights that it skips.
    fn skipped_weights(&self) -> f64 {
        let by_inputs: f64 =
            self.skipped.iter().zip(&self.weights).map(|(share, weights)| share * weights).sum();
        by_inputs + self.neurons * (self.weights[5] + self.weights[6])
    }
}

/// Returns the factor of the shares that skips the share `skipped` of all weights, if inputs stayed as they are.
pub(super) fn factor(layers: &[LayerShares], skipped: f64) -> f64 {
    let (of_layers, all) = layers.iter().fold((0.0, 0.0), |(sum, all), layer| {
        (sum + layer.skipped_weights(), all + layer.weights.iter().sum::<f64>())
    });
    skipped * all / of_layers
}

/// Passes the calibration text through the dense model, and returns every layer's shares; `skipped` is that of all weights.
pub(super) fn survey(
    job: &Job<'_>,
    settings: &Settings,
    skipped: f64,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<LayerShares>> {
    let mut stream = LayerStream::open(job.model, job.calibration)?;
    let (layers, all) = (stream.config().num_layers, weights(stream.config()));
    let mut found = Vec::with_capacity(layers);
    for (i, of_layer) in all.into_iter().enumerate() {
        at(progress, "layers", i, layers);
        let mut weights = stream.layer(i)?;
        let (inputs, gates) = tables(&mut stream, &weights, settings.choose == Choose::Cats)?;
        let (mut shares, mut neurons) = ([0.0; LINEARS], 0.0);
        match settings.choose {
            Choose::Cats => neurons = 1.0,
            Choose::Teal => shares = greedy(&mut stream, &mut weights, &inputs, (settings.step, skipped)),
            Choose::Uniform | Choose::Search => shares = [1.0; LINEARS],
        }
        found.push(LayerShares { inputs, gates, skipped: shares, neurons, weights: of_layer });
        weights.thresholds = None;
        stream.advance(&weights)?;
    }
    at(progress, "layers", layers, layers);
    Ok(found)
}

/// Returns the quantiles of what the linears of a layer read, and of its gates.
fn tables(
    stream: &mut LayerStream,
    weights: &LayerWeights,
    with_gates: bool,
) -> Result<([Table; LINEARS], Option<Table>)> {
    let tokens = stream.states().len() / stream.config().hidden;
    let [.., heads, gate, _, down] = &weights.linears;
    let (hidden, neurons) = (gate.inputs, down.inputs);
    let widths = [
        (Input::Attention, hidden),
        (Input::Heads, heads.inputs),
        (Input::Ffn, hidden),
        (Input::Neurons, neurons),
    ];
    let mut found: Vec<Magnitudes> =
        widths.iter().map(|&(_, width)| Magnitudes::new(tokens, width)).collect();
    let mut gates = with_gates.then(|| Magnitudes::new(tokens, neurons));
    let linear = Down::new(Precision::F32, &gate.weight, hidden, gate.bias.as_deref());
    let activation = stream.config().architecture.activation;
    let (mut values, mut ones, mut finite) = (Vec::new(), Vec::new(), true);
    stream.forward(weights, &mut |tap: Tap<'_>| {
        let site = Input::ALL.iter().position(|&input| input == tap.input).expect("one of four");
        finite &= tap.x.iter().all(|x| x.is_finite());
        found[site].add(tap.x, widths[site].1);
        if let (Input::Ffn, Some(gates)) = (tap.input, &mut gates) {
            values.resize(tap.x.len() / hidden * neurons, 0.0f32);
            ones.resize(values.len(), 1.0f32);
            linear.forward(&mut values, tap.x);
            let a = values.clone();
            swiglu::Forward { c: &mut values, a: &a, b: &ones, activation }.run();
            gates.add(&values, neurons);
        }
    })?;
    if !finite {
        let help = "check the model with eval";
        return Err(Error::numeric(
            format!("layer {}", weights.layer),
            "has inputs that are not finite",
            help,
        ));
    }
    let by_site: BTreeMap<usize, Table> = found.into_iter().map(Magnitudes::table).enumerate().collect();
    let of = |input: Input| Input::ALL.iter().position(|&other| other == input).expect("one of four");
    Ok((INPUTS.map(|input| by_site[&of(input)].clone()), gates.map(Magnitudes::table)))
}

/// Returns the share of inputs that each linear of a layer skips: again and again the linear loses inputs of as many
/// weights as `step` over the number of linears says whose loss moves the layer's output least, until the share `skipped` of
/// the layer's weights is skipped.
fn greedy(
    stream: &mut LayerStream,
    weights: &mut LayerWeights,
    tables: &[Table; LINEARS],
    (step, skipped): (f64, f64),
) -> [f64; LINEARS] {
    let sequences = stream.states().len() / (stream.config().hidden * stream.seq()).max(1);
    let first = sequences - sequences.div_ceil(HELD_BACK);
    let is_seen = move |sequence: usize| sequence >= first;
    let mut dense = Vec::new();
    stream.outputs_of(weights, &is_seen, &mut |_, y| dense.extend_from_slice(y));
    let sizes = weights.linears.each_ref().map(|linear| (linear.outputs * linear.inputs) as f64);
    let all: f64 = sizes.iter().sum();
    let steps = sizes.map(|size| step * all / (LINEARS as f64 * size));
    let mut shares = [0.0; LINEARS];
    let skips = |shares: &[f64; LINEARS]| {
        shares.iter().zip(sizes).map(|(share, size)| share * size).sum::<f64>() / all
    };
    while skips(&shares) < skipped {
        let mut best: Option<(f64, [f64; LINEARS])> = None;
        for linear in 0..LINEARS {
            let mut trial = shares;
            trial[linear] += steps[linear];
            if trial[linear] > MOST_SKIPPED {
                continue;
            }
            let inputs = std::array::from_fn(|i| tables[i].threshold(trial[i]));
            weights.thresholds = Some(LayerThresholds { inputs, ..LayerThresholds::NONE });
            let (mut error, mut at) = (0.0, 0);
            stream.outputs_of(weights, &is_seen, &mut |_, y| {
                let of_sequence = y.iter().zip(&dense[at..]).map(|(y, dense)| f64::from(y - dense).powi(2));
                error += of_sequence.sum::<f64>();
                at += y.len();
            });
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, trial));
            }
        }
        match best {
            Some((_, trial)) => shares = trial,
            None => break,
        }
    }
    shares
}
