//! The order in which the neurons of an expert are most like those of another: experts that were trained from one start keep it,
//! others may have it permuted.
//!
//! `P_jl = <gate_a[j], gate_b[l]> + <up_a[j], up_b[l]> + <down_a[j], down_b[l]>`, and the order `pi` has the largest
//! `sum_j P[j, pi(j)]`, which is that of the least squared distance of the rows.

use std::path::Path;

use dsmoe_core::calibrate::{LayerExperts, LayerStream};
use dsmoe_core::partition::assign;
use dsmoe_core::surgery::LayerSurgery;
use rayon::prelude::*;

use crate::error::Result;
use crate::method::Progress;

/// The widest expert whose order is found exactly, in time that grows with the cube of its width.
const EXACT: usize = 512;

/// Says that orders are not the best ones, where experts of these layers are merged and are too wide for that. `widths` are the
/// neurons of an expert of each layer.
pub(super) fn notice(widths: &[usize], layers: &[LayerSurgery]) -> Option<String> {
    let merges = |layer: &LayerSurgery| layer.experts.iter().any(|expert| expert.parts.len() > 1);
    let merged = widths.iter().zip(layers).filter(|(_, layer)| merges(layer));
    let widest = merged.map(|(&width, _)| width).max().filter(|&width| width > EXACT)?;
    Some(format!(
        "neurons are matched greedily, since experts of {widest} are wider than {EXACT}; the order may not be the best one"
    ))
}

/// Orders the neurons of all parts of new experts as those of the first part. Returns the number of parts whose neurons moved.
pub(super) fn align(
    model: &Path,
    layers: &mut [LayerSurgery],
    progress: &mut dyn FnMut(Progress),
) -> Result<usize> {
    let stream = LayerStream::open_experts(model, &[])?;
    let (count, mut moved) = (layers.len() as u64, 0);
    for (i, layer) in layers.iter_mut().enumerate() {
        progress(Progress { stage: "neurons", done: i as u64, total: count });
        let experts = stream.experts(i)?;
        for expert in &mut layer.experts {
            let Some((first, others)) = expert.parts.split_first_mut() else { continue };
            for part in others {
                part.neurons = order(&experts, [first.old, part.old]);
                moved += usize::from(part.neurons.is_some());
            }
        }
    }
    progress(Progress { stage: "neurons", done: count, total: count });
    Ok(moved)
}

/// Returns the order of the neurons of expert `b` that is most like expert `a`; none where it is the order that they have.
pub(super) fn order(experts: &LayerExperts, [a, b]: [usize; 2]) -> Option<Vec<u32>> {
    let width = experts.width();
    let profits = profits([experts.rows(a), experts.rows(b)], width);
    let order = match width <= EXACT {
        true => exact(&profits, width),
        false => greedy(&profits, width),
    };
    let profit = |of: &dyn Fn(usize) -> usize| (0..width).map(|j| profits[j * width + of(j)]).sum::<f64>();
    // A tie stays as it is.
    let gains = profit(&|j| order[j] as usize) > profit(&|j| j);
    gains.then_some(order)
}

/// Returns P `[width, width]`.
pub(super) fn profits([a, b]: [[&[f32]; 3]; 2], width: usize) -> Vec<f64> {
    let hidden = a[0].len() / width.max(1);
    let row = |matrix: &[f32], j: usize| -> Vec<f64> {
        matrix[j * hidden..][..hidden].iter().map(|&x| f64::from(x)).collect()
    };
    let profit = |j: usize| -> Vec<f64> {
        let mut sums = vec![0.0; width];
        for (a, b) in a.iter().zip(&b) {
            let a = row(a, j);
            for (sum, b) in sums.iter_mut().zip(b.chunks_exact(hidden)) {
                *sum += a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum::<f64>();
            }
        }
        sums
    };
    (0..width).into_par_iter().flat_map_iter(profit).collect()
}

/// Returns the order of the largest profit.
pub(super) fn exact(profits: &[f64], width: usize) -> Vec<u32> {
    let most = profits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let costs: Vec<f64> = profits.iter().map(|profit| most - profit).collect();
    assign(&costs, &vec![1; width]).into_iter().map(|l| l as u32).collect()
}

/// Takes the largest profit among unmatched neurons, again and again.
pub(super) fn greedy(profits: &[f64], width: usize) -> Vec<u32> {
    let mut pairs: Vec<u64> = (0..profits.len() as u64).collect();
    pairs.par_sort_unstable_by(|&a, &b| profits[b as usize].total_cmp(&profits[a as usize]).then(a.cmp(&b)));
    let (mut order, mut taken) = (vec![u32::MAX; width], vec![false; width]);
    for pair in pairs {
        let (j, l) = (pair as usize / width, pair as usize % width);
        if order[j] == u32::MAX && !taken[l] {
            order[j] = l as u32;
            taken[l] = true;
        }
    }
    order
}
