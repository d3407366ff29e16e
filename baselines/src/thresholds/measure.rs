//! The weights that calibration tokens use with thresholds in place.

use dsmoe_core::Config;
use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights, Tap};
use dsmoe_core::kept::{LINEARS, LayerThresholds};

use crate::error::Result;
use crate::method::Job;
use crate::states::States;

/// Inputs of the linears of a layer: of q, k, v, o, gate, up and down.
pub(super) const INPUTS: [Input; LINEARS] = [
    Input::Attention,
    Input::Attention,
    Input::Attention,
    Input::Heads,
    Input::Ffn,
    Input::Ffn,
    Input::Neurons,
];
const UP: usize = 5;
/// The number of the first pass that measures shares, which follows the survey of what linears read.
const FIRST: usize = 1;

/// Sets the used shares of all layers to what calibration tokens use, and returns that of all linears. The number of the measurement
/// in its job names what it leaves when it is interrupted. `show` receives the number of layers that are done.
pub(super) fn used(
    job: &Job<'_>,
    layers: &mut [LayerThresholds],
    number: usize,
    show: &mut dyn FnMut(usize),
) -> Result<f64> {
    let mut stream = LayerStream::open(job.model, job.calibration)?;
    let tokens = (job.calibration.len() * stream.seq()) as f64;
    let name = format!("used-{number}");
    // The shares of finished layers, as bits.
    let part = job.partial.read::<Vec<[u64; LINEARS]>>(&name)?;
    let mut finished = part.map(|part| part.value).unwrap_or_default();
    finished.truncate(layers.len());
    let mut states = States::of(job.partial, FIRST + number);
    let passed = states.restore(&mut stream, finished.len())?;
    for (i, thresholds) in layers.iter_mut().enumerate() {
        let known = finished.get(i).map(|used| used.map(f64::from_bits));
        if i >= passed {
            show(i);
            let mut weights = stream.layer(i)?;
            weights.thresholds = Some(*thresholds);
            match known {
                Some(_) => stream.advance(&weights)?,
                None => {
                    thresholds.used = used_of(&mut stream, &weights, tokens)?;
                    finished.push(thresholds.used.map(f64::to_bits));
                    job.partial.keep(&name, &finished, &[])?;
                }
            }
            states.keep(i, &stream)?;
        }
        thresholds.used = known.unwrap_or(thresholds.used);
    }
    let (mut sum, mut all) = (0.0, 0.0);
    for (thresholds, weights) in layers.iter().zip(weights(stream.config())) {
        sum += thresholds.used.iter().zip(&weights).map(|(used, weights)| used * weights).sum::<f64>();
        all += weights.iter().sum::<f64>();
    }
    Ok(sum / all)
}

/// Passes the stream through a layer with thresholds, and returns the share of each linear's weights that its tokens use.
fn used_of(stream: &mut LayerStream, weights: &LayerWeights, tokens: f64) -> Result<[f64; LINEARS]> {
    let thresholds = weights.thresholds.unwrap_or(LayerThresholds::NONE);
    let mut kept = [0u64; LINEARS];
    stream.advance_seen(weights, &mut |tap: Tap<'_>| {
        for linear in (0..LINEARS).filter(|&linear| INPUTS[linear] == tap.input) {
            let threshold = thresholds.inputs[linear];
            kept[linear] += tap.x.iter().filter(|x| x.abs() > threshold).count() as u64;
        }
    })?;
    let widths = weights.linears.each_ref().map(|linear| linear.inputs);
    let mut used = [1.0; LINEARS];
    for linear in 0..LINEARS {
        if thresholds.inputs[linear] > 0.0 || linear == LINEARS - 1 && thresholds.gate > 0.0 {
            used[linear] = kept[linear] as f64 / (tokens * widths[linear] as f64);
        }
    }
    if thresholds.gate > 0.0 {
        // The rows of up are those of the neurons that down reads.
        used[UP] = used[LINEARS - 1];
    }
    Ok(used)
}

/// Returns the weights of all linears by layer.
pub(super) fn weights(config: &Config) -> Vec<[f64; LINEARS]> {
    (0..config.num_layers).map(|layer| config.linear_weights(layer).map(|weights| weights as f64)).collect()
}
