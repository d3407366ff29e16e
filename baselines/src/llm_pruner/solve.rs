//! The sizes that meet a budget.
//!
//! ```text
//! neurons left      int(D (1 - p))                              key/value heads left  KV - (KV hd - int(KV hd (1 - p))) div hd
//! channels left     int(d (1 - p))
//! ```
//!
//! (LLM-Pruner's meta pruner: what is removed is counted in rows, and heads go whole.)

use std::ops::RangeInclusive;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::LayerShape;

use crate::error::{Error, Result};
use crate::method::Budget;

/// The share by which a budget may lie outside the reach.
const TOLERANCE: f64 = 0.01;

/// The share of heads and of neurons that goes from each pruned layer; equal unless heads are kept, or the budget lies
/// in the gap that a whole head leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ratios {
    pub(crate) heads: f64,
    pub(crate) neurons: f64,
}

/// The sizes of a model after block pruning.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BlockSizes {
    pub(crate) ratios: Ratios,
    pub(crate) shapes: Vec<LayerShape>,
    pub(crate) total: f64,
}

/// The sizes of a model after channel pruning.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChannelSizes {
    pub(crate) ratio: f64,
    pub(crate) hidden: usize,
    pub(crate) total: f64,
}

/// Counts the neurons or channels left of `count` at a ratio; at least one.
fn left(count: usize, ratio: f64) -> usize {
    ((count as f64 * (1.0 - ratio)) as usize).max(1)
}

/// Counts the heads left of `heads` at a ratio; at least one.
fn heads_left(heads: usize, head_dim: usize, ratio: f64) -> usize {
    let rows = heads * head_dim;
    let pruned = rows - (rows as f64 * (1.0 - ratio)) as usize;
    (heads - pruned / head_dim).max(1)
}

/// The layers pruned unless told otherwise: the paper's 4..29 of 32, scaled to the depth; all layers where that leaves
/// none.
pub(crate) fn default_layers(num_layers: usize) -> RangeInclusive<usize> {
    let (first, end) = (num_layers.div_ceil(8), num_layers * 30 / 32);
    if first < end { first..=end - 1 } else { 0..=num_layers - 1 }
}

/// The shapes of all layers when `layers` are pruned.
fn pruned_shapes(config: &Config, layers: &RangeInclusive<usize>, ratios: Ratios) -> Vec<LayerShape> {
    let shape = |i| {
        let shape = config.layer(i);
        if !layers.contains(&i) {
            return shape;
        }
        let num_kv_heads = heads_left(shape.num_kv_heads, config.head_dim, ratios.heads);
        let num_heads = shape.num_heads / shape.num_kv_heads * num_kv_heads;
        LayerShape { num_heads, num_kv_heads, intermediate: left(shape.intermediate, ratios.neurons) }
    };
    (0..config.num_layers).map(shape).collect()
}

/// Counts the parameters of the model of `config` after a `change`.
fn total(config: &Config, change: impl FnOnce(&mut Config)) -> f64 {
    let mut config = config.clone();
    change(&mut config);
    Accounting::of(&config).total as f64
}

fn total_of_shapes(config: &Config, shapes: Vec<LayerShape>) -> f64 {
    total(config, |config| config.set_layers(shapes))
}

fn total_of_hidden(config: &Config, hidden: usize) -> f64 {
    total(config, |config| config.set_hidden(hidden))
}

/// The sizes nearest to the budget. One ratio is bisected for heads and neurons; where the step of a whole head
/// prevents it, the ratio of neurons is bisected alone.
///
/// # Errors
/// The budget is out of reach of these layers.
pub(crate) fn block(
    config: &Config,
    budget: Budget,
    layers: &RangeInclusive<usize>,
    heads: bool,
) -> Result<BlockSizes> {
    let dense = Accounting::of(config).total;
    let target = budget.params(dense);
    let shapes = |ratios| pruned_shapes(config, layers, ratios);
    let total = |ratios| total_of_shapes(config, shapes(ratios));
    let joint = |ratio| Ratios { heads: if heads { ratio } else { 0.0 }, neurons: ratio };
    let [low, high] = bisect(target, |ratio| total(joint(ratio)));
    let mut candidates = vec![joint(high), joint(low)];
    let kv_heads = |ratio| shapes(joint(ratio)).iter().map(|shape| shape.num_kv_heads).sum::<usize>();
    if kv_heads(low) != kv_heads(high) {
        for heads in [low, high] {
            let sides = bisect(target, |neurons| total(Ratios { heads, neurons }));
            candidates.extend(sides.map(|neurons| Ratios { heads, neurons }));
        }
    }
    let distance = |ratios: &Ratios| (total(*ratios) - target).abs();
    let nearest = candidates.into_iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
    let ratios = nearest.expect("two candidates");
    check_reach(budget, target, [total(joint(1.0)), dense as f64], || {
        let what = if heads { "heads and neurons" } else { "neurons" };
        let place = format!("{what} of layers {}..{}", layers.start(), layers.end());
        (place, "widen layers, set heads to true, or give a budget within reach")
    })?;
    let same = |a: Ratios, b: Ratios| shapes(a) == shapes(b);
    let ratios = match ratios.heads == ratios.neurons {
        true => joint(shortest(ratios.neurons, |ratio| same(joint(ratio), ratios))),
        false => Ratios {
            heads: shortest(ratios.heads, |heads| same(Ratios { heads, ..ratios }, ratios)),
            neurons: shortest(ratios.neurons, |neurons| same(Ratios { neurons, ..ratios }, ratios)),
        },
    };
    Ok(BlockSizes { ratios, shapes: shapes(ratios), total: total(ratios) })
}

/// The width of the residual stream nearest to the budget, of the multiples of `multiple`.
///
/// # Errors
/// The budget is out of reach.
pub(crate) fn channel(config: &Config, budget: Budget, multiple: usize) -> Result<ChannelSizes> {
    let dense = Accounting::of(config).total;
    let target = budget.params(dense);
    let width = |ratio| match ratio == 0.0 {
        true => config.hidden,
        false => (left(config.hidden, ratio) / multiple).max(1) * multiple,
    };
    let total = |ratio| total_of_hidden(config, width(ratio));
    let [low, high] = bisect(target, total);
    let distance = |ratio: f64| (total(ratio) - target).abs();
    let ratio = if distance(low) < distance(high) { low } else { high };
    check_reach(budget, target, [total(1.0), dense as f64], || {
        (format!("{multiple} to {} channels", config.hidden), "give a budget within reach")
    })?;
    let hidden = width(ratio);
    let ratio = shortest(ratio, |ratio| width(ratio) == hidden);
    Ok(ChannelSizes { ratio, hidden, total: total_of_hidden(config, hidden) })
}

/// An error when the target is outside `least..=most`, the dense model; `explain` says what reaches that, and what helps.
fn check_reach(
    budget: Budget,
    target: f64,
    [least, most]: [f64; 2],
    explain: impl FnOnce() -> (String, &'static str),
) -> Result<()> {
    if target * (1.0 + TOLERANCE) >= least && target * (1.0 - TOLERANCE) <= most {
        return Ok(());
    }
    let (what, help) = explain();
    let problem = format!("is out of reach of {what}; {help}");
    Err(Error::out_of_reach(budget, problem, [least, most], most as u64))
}

/// The ratios on both sides of the step where `total`, which never grows with the ratio, crosses the target; an end of
/// 0..=1 twice when it does not.
fn bisect(target: f64, total: impl Fn(f64) -> f64) -> [f64; 2] {
    let (mut low, mut high) = (0.0, 1.0);
    if total(low) <= target {
        return [low; 2];
    }
    if total(high) >= target {
        return [high; 2];
    }
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if total(middle) >= target { low = middle } else { high = middle }
    }
    [low, high]
}

/// The ratio of the fewest decimals beside this one that does the same.
fn shortest(ratio: f64, same: impl Fn(f64) -> bool) -> f64 {
    let beside = |digits: i32| {
        let unit = 10f64.powi(digits);
        [(ratio * unit).floor() / unit, (ratio * unit).ceil() / unit]
    };
    (0..=12).flat_map(beside).find(|&beside| same(beside)).unwrap_or(ratio)
}

#[cfg(test)]
mod tests {
    use dsmoe_core::init::preset;

    use super::*;

    #[test]
    fn ratios_leave_what_the_reference_leaves() {
        assert_eq!(11_008 - left(11_008, 0.25), 2752);
        assert_eq!(left(11_008, 0.5312), 5160);
        assert_eq!(heads_left(32, 128, 0.5312), 15);
        assert_eq!((heads_left(8, 64, 0.8389), heads_left(8, 64, 0.5593)), (2, 4));
        assert_eq!((left(7, 0.0), heads_left(3, 4, 0.0)), (7, 3));
        assert_eq!((left(7, 1.0), heads_left(3, 4, 1.0)), (1, 1));
    }

    #[test]
    fn the_papers_block_budgets_are_solved() {
        for (model, layers, ratio, [neurons, kv_heads], total) in [
            ("llama-2-7b", 4..=29, 0.5312, [5160, 15], 3_943_108_608.0),
            ("llama-3.2-1b", 3..=12, 0.8389, [1319, 2], 734_894_080.0),
            ("llama-3.2-1b", 0..=14, 0.5593, [3610, 4], 734_894_080.0),
        ] {
            let config = preset(model).unwrap();
            let shapes = pruned_shapes(&config, &layers, Ratios { heads: ratio, neurons: ratio });
            let [first, last] = [layers.start(), layers.end()].map(|&layer| shapes[layer]);
            assert_eq!((first.intermediate, first.num_kv_heads, first), (neurons, kv_heads, last));
            assert_eq!(total_of_shapes(&config, shapes.clone()), total);
            let found = block(&config, Budget::Params(total), &layers, true).unwrap();
            assert_eq!((found.total, &found.shapes), (total, &shapes), "{:?}", found.ratios);
            if model == "llama-2-7b" {
                assert_eq!(found.ratios, Ratios { heads: 0.5312, neurons: 0.5312 });
            }
        }
    }

    #[test]
    fn the_papers_channel_budgets_are_solved() {
        let found = |model, budget| channel(&preset(model).unwrap(), Budget::Params(budget), 1).unwrap();
        let seven = found("llama-2-7b", 3.95e9);
        assert_eq!((seven.hidden, seven.total), (2401, 3_949_935_521.0));
        assert_eq!((left(4096, 0.4138), left(4096, seven.ratio)), (2401, 2401));
        let one = found("llama-3.2-1b", 733_161_375.0);
        assert_eq!((one.hidden, one.total), (1215, 733_161_375.0));
        assert_eq!(left(2048, 0.4067), 1215);
        let config = preset("llama-3.2-1b").unwrap();
        let rounded = channel(&config, Budget::Params(733_161_375.0), 32).unwrap();
        assert_eq!((rounded.hidden, rounded.total), (1216, total_of_hidden(&config, 1216)));
        assert_eq!(channel(&config, Budget::Share(1.0), 100).unwrap().hidden, 2048);
    }

    #[test]
    fn every_budget_in_reach_is_met_to_a_neuron() {
        let config = preset("tiny").unwrap();
        let (layers, dense) = (1..=2, Accounting::of(&config).total as f64);
        let neuron = 2.0 * 3.0 * config.hidden as f64;
        for heads in [true, false] {
            let all = Ratios { heads: f64::from(u8::from(heads)), neurons: 1.0 };
            let least = total_of_shapes(&config, pruned_shapes(&config, &layers, all));
            for i in 0..=40 {
                let target = least + (dense - least) * f64::from(i) / 40.0;
                let found = block(&config, Budget::Params(target), &layers, heads).unwrap();
                assert!((found.total - target).abs() <= neuron / 2.0, "{target}: {found:?}");
            }
        }
        assert_eq!(block(&config, Budget::Share(1.0), &layers, true).unwrap().total, dense);
        let error = block(&config, Budget::Share(0.1), &layers, true).unwrap_err().to_string();
        assert!(
            error.contains("reach of heads and neurons of layers 1..2") && error.contains("widen layers"),
            "{error}"
        );
        let error = channel(&config, Budget::Params(2.0 * dense), 1).unwrap_err().to_string();
        assert!(error.contains("(100.0%) of the dense model"), "{error}");
    }

    #[test]
    fn the_papers_layers_scale_with_the_depth() {
        let layers = [32, 16, 5, 4, 2, 1].map(default_layers);
        assert_eq!(layers, [4..=29, 2..=14, 1..=3, 1..=2, 0..=1, 0..=0]);
    }
}
