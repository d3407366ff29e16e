//! The weights that calibration tokens use with thresholds in place.

use dsmoe_core::Config;
use dsmoe_core::calibrate::{Input, LayerStream, Tap};
use dsmoe_core::kept::{LINEARS, LayerThresholds};

use crate::error::Result;
use crate::method::Job;

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

/// Sets the used shares of all layers to what calibration tokens use, and returns that of all linears.
pub(super) fn used(job: &Job<'_>, layers: &mut [LayerThresholds]) -> Result<f64> {
    let mut stream = LayerStream::open(job.model, job.calibration)?;
    let tokens = (job.calibration.len() * stream.seq()) as f64;
    for (i, thresholds) in layers.iter_mut().enumerate() {
        let mut weights = stream.layer(i)?;
        weights.thresholds = Some(*thresholds);
        let mut kept = [0u64; LINEARS];
        stream.advance_seen(&weights, &mut |tap: Tap<'_>| {
            for linear in (0..LINEARS).filter(|&linear| INPUTS[linear] == tap.input) {
                let threshold = thresholds.inputs[linear];
                kept[linear] += tap.x.iter().filter(|x| x.abs() > threshold).count() as u64;
            }
        })?;
        let widths = weights.linears.each_ref().map(|linear| linear.inputs);
        for linear in 0..LINEARS {
            let skips = thresholds.inputs[linear] > 0.0 || linear == LINEARS - 1 && thresholds.gate > 0.0;
            let share = kept[linear] as f64 / (tokens * widths[linear] as f64);
            thresholds.used[linear] = if skips { share } else { 1.0 };
        }
        if thresholds.gate > 0.0 {
            // The rows of up are those of the neurons that down reads.
            thresholds.used[UP] = thresholds.used[LINEARS - 1];
        }
    }
    let (mut sum, mut all) = (0.0, 0.0);
    for (thresholds, weights) in layers.iter().zip(weights(stream.config())) {
        sum += thresholds.used.iter().zip(&weights).map(|(used, weights)| used * weights).sum::<f64>();
        all += weights.iter().sum::<f64>();
    }
    Ok(sum / all)
}

/// Returns the weights of all linears by layer.
pub(super) fn weights(config: &Config) -> Vec<[f64; LINEARS]> {
    (0..config.num_layers).map(|layer| config.linear_weights(layer).map(|weights| weights as f64)).collect()
}
