//! This pass measures the cost of budgets for each layer, before the fit. It cuts one layer at a time, on the dense model's
//! stream, and takes the divergence of the final output.

use std::path::Path;
use std::sync::Arc;

use dsmoe_kernels::comm::Communicator;

use super::layer::Layer;
use super::plan::{Plan, Start};
use crate::calibrate::{Down, FfnTap, LayerStream};
use crate::convert::ConvertProgress;
use crate::divergence::{Alone, Change};
use crate::error::Result;

/// Tokens that a layer is fitted to when it is cut alone, at most.
const MOST_TOKENS: usize = 8192;
/// Tokens whose final output is compared.
const OUTPUTS: usize = 1024;
/// The least number of experts that is measured, as a share of the wanted one.
const FEW: f64 = 0.6;
/// The largest one leaves this part of the experts closed that the wanted one closes.
const CLOSED: f64 = 0.65;

/// Returns numbers of experts of each layer, ascending, and the divergence that each causes alone.
pub(super) fn of_layers(
    comm: &Arc<dyn Communicator>,
    model: &Path,
    options: &Start,
    plan: &Plan,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<Vec<Vec<(usize, f64)>>> {
    let layers = plan.cores.len();
    let sequences = some(&options.sequences[..plan.fitted]);
    let held: Vec<Vec<u32>> =
        (0..plan.sequences).filter(|&i| plan.is_held(i)).map(|i| options.sequences[i].clone()).collect();
    let sizes = sizes(options.active, plan.num_experts);
    let shares: Vec<f64> = sizes.iter().map(|&size| size as f64 / plan.num_experts as f64).collect();
    let alone = Start { sequences, ..options.clone() };
    let cut = Plan::of(&alone, layers)?.at(&shares);
    let mut stream = LayerStream::open_on(comm, model, &alone.sequences)?;
    let precision = stream.checkpoint().precision();
    stream = stream.in_precision(precision);
    let mut copies = Alone::open_on(comm, model, &held, OUTPUTS, precision)?;
    for i in 0..layers {
        progress(ConvertProgress { stage: "budgets of layers", done: i as u64, total: layers as u64 });
        let weights = stream.layer(i)?;
        let layer = Layer::fit(&mut stream, &weights, &cut, &alone)?;
        let layer = &layer;
        let change = |budget: usize| -> Box<Change<'_>> {
            Box::new(move |y: &mut [f32], tap: FfnTap<'_>| {
                layer.forward(y, tap, budget);
            })
        };
        copies.layer(&weights, &mut (0..sizes.len()).map(change).collect::<Vec<_>>())?;
        let dense = Down::of(precision, &weights);
        stream.join_ffn(&weights, &mut |y, tap| dense.forward(y, tap.neurons))?;
    }
    let divergences = copies.divergences()?;
    let of_layer = |costs: &[f64]| sizes.iter().copied().zip(costs.iter().copied()).collect();
    Ok(divergences.chunks_exact(sizes.len()).map(of_layer).collect())
}

/// Returns an even choice of as many sequences as a layer that is cut alone is fitted to.
fn some(sequences: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let every = tokens.div_ceil(MOST_TOKENS).max(1);
    sequences.iter().step_by(every).cloned().collect()
}

/// Returns the numbers of experts that are measured, ascending and without all of them.
fn sizes(active: f64, num_experts: usize) -> Vec<usize> {
    let shares = [FEW * active, active, 1.0 - CLOSED * (1.0 - active)];
    let mut sizes: Vec<usize> = shares
        .iter()
        .map(|share| (share * num_experts as f64).round() as usize)
        .filter(|size| (1..num_experts).contains(size))
        .collect();
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_numbers_of_experts_are_measured() {
        assert_eq!(sizes(0.375, 96), [22, 36, 57]);
        assert_eq!(sizes(0.75, 96), [43, 72, 80]);
        assert_eq!(sizes(0.5, 2), [1]);
        assert_eq!(sizes(1.0, 8), [5]);
        let text = vec![vec![0; 256]; 448];
        assert_eq!(some(&text).len(), 32);
        assert_eq!(some(&text[..3]).len(), 3);
    }
}
