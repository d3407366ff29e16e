//! The budgets of a run: the share that each micro-batch runs at, and the thresholds that reach it.

use dsmoe_core::config::{Budget as StoredBudget, MoeConfig};
use dsmoe_core::model::{Batch, Workspace};
use dsmoe_core::{Inference, Model};
use dsmoe_kernels::cross_entropy::IGNORE;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::{Knot, ThresholdController};

use crate::config::{Budget, TrainConfig};
use crate::error::{Error, Result};

/// Largest distance between two stored budgets of a range; thresholds are interpolated between them.
const SPACING: f64 = 0.125;
/// Largest deviation of a layer's budget from that of its micro-batch, as a share of the range.
const JITTER: f64 = 0.25;
/// Shares that are one budget.
const SAME: f64 = 1e-3;
/// Micro-batches after which the least and the largest budget come again.
const CYCLE: u64 = 8;
/// Tokens that the thresholds of a target are fitted to, and those of each budget of a range.
const FIT_TOKENS: [usize; 2] = [32_768, 16_384];
/// Parts of that text that the budgets beside a target are fitted to.
const PARTS_BESIDE_TARGET: usize = 4;
/// Passes, each over a part of the text: thresholds change what later layers read, so the first one is not exact.
const FIT_PASSES: usize = 2;
/// Tokens of a forward pass of it.
const BATCH_TOKENS: usize = 1024;
/// Separates the draws of budgets from other uses of the seed.
const DRAWS: u64 = 0x6275_6467;

/// Returns the budgets of the layers in micro-batch `index` of a run, drawn from a range.
///
/// The least budget comes in a quarter of the micro-batches and the largest in an eighth: what lies between the ends is
/// also learned from them, and at the largest a model that was cut from its teacher has the least to learn. The others
/// are uniform, and each layer deviates from its micro-batch, so that no layer relies on the share of another.
pub(crate) fn draw([low, high]: [f64; 2], layers: usize, seed: u64, index: u64) -> Vec<f64> {
    match index % CYCLE {
        0 | 4 => return vec![low; layers],
        2 => return vec![high; layers],
        _ => {}
    }
    let mut rng = Rng::new(seed ^ DRAWS, index);
    let span = high - low;
    let middle = low + span * f64::from(rng.uniform());
    let mut of_layer = || middle + JITTER * span * (2.0 * f64::from(rng.uniform()) - 1.0);
    (0..layers).map(|_| of_layer().clamp(low, high)).collect()
}

/// Returns the mean.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Returns the controller of the thresholds of `model`, from where its gates are now; `ramp` is that of
/// [`ThresholdController::new`]. Under a target it also has the other budgets that the model stores, which are fitted to
/// the trained model at the end.
pub(crate) fn controller(model: &Model, config: &TrainConfig, ramp: u64) -> Result<ThresholdController> {
    let wrong =
        || Error::field("active_target", "set", "a model with experts, or no target for a dense model");
    let moe = model.config().moe.as_ref().ok_or_else(wrong)?;
    let shares = match config.budget() {
        Budget::Target(share) => {
            let mut shares: Vec<f64> = moe.parts.budgets.iter().map(|budget| budget.active).collect();
            shares.retain(|stored| (stored - share).abs() > SAME);
            shares.push(share);
            shares.sort_by(f64::total_cmp);
            shares
        }
        Budget::Range(low, high) => {
            let parts = ((high - low) / SPACING).ceil().max(1.0);
            (0..=parts as usize).map(|i| low + (high - low) * i as f64 / parts).collect()
        }
        Budget::Weight(_) => return Err(wrong()),
    };
    let knot = |active: f64| Knot { active, bars: bars_at(moe, active, model.config().num_layers) };
    Ok(ThresholdController::new(shares.into_iter().map(knot).collect(), ramp)?)
}

/// Returns the thresholds of a model at a share: those of the nearest budget, or its only one.
fn bars_at(moe: &MoeConfig, active: f64, layers: usize) -> Vec<f64> {
    let budgets = &moe.parts.budgets;
    match (budgets.first(), budgets.last()) {
        (Some(first), Some(last)) => {
            let within = active.clamp(first.active, last.active);
            let bars = moe.thresholds_for(within).unwrap_or_else(|_| first.thresholds.clone());
            bars.into_iter().map(f64::from).collect()
        }
        _ => vec![moe.router.threshold_logit(); layers],
    }
}

/// Stores the thresholds in `model`, and opens its gates as the default budget says: the `target`, or of a range the
/// share that the model was made for. A model with one threshold for all layers keeps this form.
pub(crate) fn store(model: &mut Model, controller: &ThresholdController, target: Option<f64>) -> Result<()> {
    let knots = controller.knots();
    let moe = model.config().moe.as_ref();
    if let ([Knot { bars, .. }], Some(moe)) = (knots, moe)
        && moe.parts.budgets.is_empty()
        && bars.iter().all(|bar| bar == &bars[0])
    {
        return Ok(model.set_threshold((1.0 / (1.0 + (-bars[0]).exp())) as f32)?);
    }
    let (low, high) = (knots[0].active, knots[knots.len() - 1].active);
    let made_for = target.or_else(|| moe.and_then(|moe| moe.active_target)).unwrap_or(low);
    let stored = |knot: &Knot| StoredBudget {
        active: knot.active,
        thresholds: knot.bars.iter().map(|&bar| bar as f32).collect(),
    };
    Ok(model.set_budgets(knots.iter().map(stored).collect(), made_for.clamp(low, high))?)
}

/// Returns the mean threshold of the target, or of the least share of a range.
pub(crate) fn threshold_of(controller: &ThresholdController, target: Option<f64>) -> f64 {
    let knots = controller.knots();
    let is_target = |knot: &&Knot| target.is_some_and(|target| (knot.active - target).abs() <= SAME);
    mean(&knots.iter().find(is_target).unwrap_or(&knots[0]).bars)
}

/// Returns the number of tokens that [`fit`] reads, under a `target` or for a range.
pub(crate) fn fit_tokens(target: Option<f64>) -> usize {
    FIT_TOKENS[usize::from(target.is_none())]
}

/// Fits the thresholds of every budget to a text: the share of the text that they open is the budget's. The text is of
/// sequences of `seq` tokens; the budgets beside a `target` take a part of it. `goes_on` is asked before every pass, with the
/// tokens that were read, of all that will be; where it returns false, so does this, and `controller` is of no use.
pub(crate) fn fit(
    controller: &mut ThresholdController,
    model: &mut Inference,
    (ids, seq): (&[u32], usize),
    target: Option<f64>,
    goes_on: &mut dyn FnMut(usize, usize) -> Result<bool>,
) -> Result<bool> {
    let (layers, mut workspace) = (model.config().num_layers, Workspace::default());
    let batch = (BATCH_TOKENS / seq).max(1) * seq;
    let (targets, mut losses) = (vec![IGNORE; batch], vec![0.0; batch]);
    let sequences = ids.len() / seq;
    let shares: Vec<f64> = controller.knots().iter().map(|knot| knot.active).collect();
    // The budgets that are fitted, and the sequences of each.
    let fitted: Vec<(usize, usize)> = shares
        .into_iter()
        .enumerate()
        .filter(|(_, active)| !controller.opens_all(*active))
        .map(|(at, active)| {
            let is_beside = target.is_some_and(|target| (active - target).abs() > SAME);
            (at, (sequences / if is_beside { PARTS_BESIDE_TARGET } else { 1 }).max(1))
        })
        .collect();
    let all = fitted.iter().map(|(_, whole)| whole * seq).sum();
    let mut done = 0;
    for (at, whole) in fitted {
        for text in ids[..whole * seq].chunks(whole.div_ceil(FIT_PASSES) * seq) {
            let Some(stats) = model.new_stats() else { return Ok(true) };
            let mut stats = stats.with_logits();
            let bars: Vec<f32> = controller.knots()[at].bars.iter().map(|&bar| bar as f32).collect();
            debug_assert_eq!(bars.len(), layers);
            model.set_thresholds(&bars)?;
            for inputs in text.chunks(batch) {
                if !goes_on(done, all)? {
                    return Ok(false);
                }
                let of = Batch { inputs, targets: &targets[..inputs.len()], seq };
                model.score(&mut losses[..inputs.len()], of, Some(&mut stats), &mut workspace)?;
                done += inputs.len();
            }
            if let Some(counts) = stats.logits() {
                controller.fit(at, counts);
            }
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_cover_the_range_with_both_ends_and_differ_by_layer() {
        let all: Vec<Vec<f64>> = (0..800).map(|index| draw([0.25, 1.0], 6, 1, index)).collect();
        let count = |value: f64| all.iter().filter(|draw| draw.iter().all(|&b| b == value)).count();
        assert!((200..=210).contains(&count(0.25)) && (100..=110).contains(&count(1.0)));
        assert!(all.iter().flatten().all(|b| (0.25..=1.0).contains(b)));
        let random = || all.iter().filter(|draw| draw.iter().any(|b| b != &draw[0]));
        assert!(random().count() > 480);
        let means: Vec<f64> = random().map(|draw| mean(draw)).collect();
        let (below, above) =
            (means.iter().filter(|m| **m < 0.5).count(), means.iter().filter(|m| **m > 0.75).count());
        assert!(below > 100 && above > 100 && (mean(&means) - 0.625).abs() < 0.03, "{below} {above}");
        assert_eq!(draw([0.25, 1.0], 6, 1, 7), all[7]);
        assert_ne!(draw([0.25, 1.0], 6, 2, 7), all[7]);
        assert_eq!(draw([0.5, 0.5], 2, 1, 7), [0.5, 0.5]);
    }
}
