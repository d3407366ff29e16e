//! The text, the settings and the sizes of a start.

use dsmoe_router::RouterConfig;

use super::settings::{BUDGETS, RIDGE_TOKENS, StartSettings};
use crate::allocation::{Costs, choose, proportional};
use crate::error::{Error, Result};

/// A start from calibration text.
///
/// ```
/// use dsmoe_core::convert::start::{Start, StartSettings, start};
/// use dsmoe_router::{GateValue, RouterConfig};
/// # use dsmoe_core::init::{LlamaSizes, init};
/// # let work = tempfile::tempdir()?;
/// # let (dense, moe) = (work.path().join("dense"), work.path().join("moe"));
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [64, 16, 64, 2, 2, 1, 64];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # init(&sizes.config()?, &dense, &Default::default(), &mut |_| {})?;
/// # let sequences: Vec<Vec<u32>> = (0..8).map(|i| (0..64).map(|t| (3 + 5 * i + t * t) % 64).collect()).collect();
///
/// // 8 sequences of 64 tokens; half of the experts run, as they are.
/// let router = RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(8) };
/// let settings = StartSettings { massive: 0, ..StartSettings::default() };
/// let options = Start { sequences, active: 0.5, router, settings, seed: 0, force: false };
/// let started = start(&dense, &moe, &options, &mut |_| {})?;
/// assert_eq!((started.report.num_experts, started.shares), (8, vec![0.5; 2]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// Token ids of sequences of one length.
    pub sequences: Vec<Vec<u32>>,
    /// The share of experts that run, the core included.
    pub active: f64,
    /// The settings of the gates, with the number of experts.
    pub router: RouterConfig,
    /// The parts that are fitted, and their settings.
    pub settings: StartSettings,
    /// Seed of the experts' clusters.
    pub seed: u64,
    /// Replace an output directory that is not empty.
    pub force: bool,
}

/// Sizes and shares of all layers.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) num_experts: usize,
    /// Experts of each layer's core.
    pub(super) cores: Vec<usize>,
    /// The shares that thresholds are stored for, ascending, that of the start among them.
    pub(super) budgets: Vec<f64>,
    /// The place of the start's share in `budgets`.
    pub(super) chosen: usize,
    /// Experts of each layer that run, mean over tokens and the core included, for each budget.
    open: Vec<Vec<f64>>,
    /// If true, the fit takes the budgets in turn, one per sequence.
    elastic: bool,
    /// Sequences that routers and projections are fitted to; the others place the thresholds.
    pub(super) fitted: usize,
    pub(super) sequences: usize,
    /// Number of the threshold-placing sequences that have copies, one for every other budget. The copies follow all
    /// sequences.
    copied: usize,
}

impl Plan {
    /// Plans layers that are all alike, but for the core of the first.
    pub(super) fn of(start: &Start, num_layers: usize) -> Result<Plan> {
        let (num_experts, active) = (start.router.num_experts, start.active);
        if !(active > 0.0 && active <= 1.0) {
            return Err(Error::argument(
                format!("an active share of {active}"),
                "use a share above 0 and up to 1",
            ));
        }
        let core = |layer: usize| {
            let core = (start.settings.core_of(layer) * active * num_experts as f64 + 1e-9) as usize;
            core.min(num_experts - 1)
        };
        let cores: Vec<usize> = (0..num_layers).map(core).collect();
        let of_core = cores.iter().sum::<usize>() as f64 / (num_layers * num_experts).max(1) as f64;
        let above_core = || BUDGETS.into_iter().filter(|&budget| budget > of_core).collect();
        let mut budgets: Vec<f64> = start.settings.budgets.clone().unwrap_or_else(above_core);
        budgets.push(active);
        if let Some(wrong) = budgets.iter().find(|&&budget| !(budget > of_core && budget <= 1.0)) {
            let problem =
                format!("a budget of {wrong} is not above the share of the core, {of_core:.4}, and up to 1");
            return Err(Error::argument(problem, "leave it out, or make the core smaller"));
        }
        budgets.sort_by(f64::total_cmp);
        budgets.dedup();
        let chosen = budgets.iter().position(|&budget| budget == active).unwrap_or(0);
        let open = budgets.iter().map(|budget| vec![budget * num_experts as f64; num_layers]).collect();
        let sequences = start.sequences.len();
        let fitted = if sequences > 1 { sequences - sequences.div_ceil(8) } else { sequences };
        let elastic = start.settings.elastic;
        Ok(Plan { num_experts, cores, budgets, chosen, open, elastic, fitted, sequences, copied: 0 })
    }

    /// Adds to `sequences` copies of some that place thresholds, for each budget but that of the start.
    pub(super) fn copy_held(&mut self, sequences: &mut Vec<Vec<u32>>) {
        let (held, others) = (self.sequences - self.fitted, self.budgets.len() - 1);
        let seq = sequences.first().map_or(1, Vec::len);
        self.copied = (COPIED_TOKENS / (others * seq).max(1)).clamp(usize::from(held > 0), held);
        for _ in 0..others {
            sequences.extend_from_within(self.fitted..self.fitted + self.copied);
        }
    }

    /// Returns the plan with other budgets, which sequences take in turn.
    pub(super) fn at(self, budgets: &[f64]) -> Plan {
        let experts = self.num_experts as f64;
        let open = budgets.iter().map(|budget| vec![budget * experts; self.cores.len()]).collect();
        Plan { budgets: budgets.to_vec(), chosen: budgets.len() / 2, open, elastic: true, ..self }
    }

    /// Gives every layer its own share of the budgets and its own core, by what numbers of experts cost when the layer alone
    /// has them. The cores keep their sum.
    pub(super) fn allot(&mut self, costs: &[Vec<(usize, f64)>], settings: &StartSettings) {
        let size = self.num_experts;
        let chosen = self.budgets[self.chosen];
        let least = vec![(LEAST * chosen * size as f64) as usize; costs.len()];
        self.open[self.chosen] = allotted(costs, &least, size, chosen);
        let weights: Vec<f64> =
            self.open[self.chosen].iter().enumerate().map(|(l, open)| settings.core_of(l) * open).collect();
        let cores = self.cores.iter().sum();
        self.cores = proportional(&weights, &vec![size - 1; costs.len()], cores);
        for (place, &budget) in self.budgets.iter().enumerate().filter(|(place, _)| *place != self.chosen) {
            self.open[place] = allotted(costs, &self.cores, size, budget);
        }
    }

    /// Returns the share of the experts of each layer that runs at the share of the start.
    pub(super) fn shares(&self) -> impl Iterator<Item = f64> {
        self.open[self.chosen].iter().map(|open| open / self.num_experts as f64)
    }

    /// Returns the place of the budget at which a sequence passes the layers.
    pub(super) fn budget_of(&self, sequence: usize) -> usize {
        let copy = sequence.checked_sub(self.sequences);
        match copy.map(|copy| copy / self.copied.max(1)) {
            Some(other) => other + usize::from(other >= self.chosen),
            None if self.elastic && sequence < self.fitted && self.fitted < self.sequences => {
                sequence % self.budgets.len()
            }
            None => self.chosen,
        }
    }

    /// Returns whether a sequence is fitted to.
    pub(super) fn is_fitted(&self, sequence: usize) -> bool {
        sequence < self.fitted
    }

    /// Returns whether a sequence places thresholds, those of its budget.
    pub(super) fn is_held(&self, sequence: usize) -> bool {
        sequence >= self.fitted || self.fitted == self.sequences
    }

    /// Returns whether a sequence measures the layers at the share of the start.
    pub(super) fn is_measured(&self, sequence: usize) -> bool {
        self.is_held(sequence) && sequence < self.sequences
    }

    /// Returns a ridge that is `share` of the diagonal at [`RIDGE_TOKENS`] tokens, for the fitted sequences of `seq` tokens.
    pub(super) fn ridge(&self, share: f64, seq: usize) -> f64 {
        share * RIDGE_TOKENS as f64 / (self.fitted * (seq - 1)).max(1) as f64
    }

    /// Returns the number of routed experts of a layer.
    pub(super) fn routed(&self, layer: usize) -> usize {
        self.num_experts - self.cores[layer]
    }

    /// Returns the share of a layer's routed experts that each budget leaves to run.
    pub(super) fn routed_shares(&self, layer: usize) -> impl Iterator<Item = f64> {
        let (core, routed) = (self.cores[layer] as f64, self.routed(layer) as f64);
        self.open.iter().map(move |open| ((open[layer] - core) / routed).clamp(0.0, 1.0))
    }
}

/// Tokens of all copies, about.
const COPIED_TOKENS: usize = 16_384;
/// The least share of its part of the start's share that a layer gets.
const LEAST: f64 = 0.5;

/// Returns the experts of each layer that run, `budget` of them on average.
fn allotted(costs: &[Vec<(usize, f64)>], least: &[usize], size: usize, budget: f64) -> Vec<f64> {
    let total = budget * (size * costs.len()) as f64;
    let of_layer =
        |(known, &least): (&Vec<(usize, f64)>, &usize)| Costs { known: known.clone(), size, least };
    let layers: Vec<Costs> = costs.iter().zip(least).map(of_layer).collect();
    let whole = choose(&layers, (total + 1e-9) as usize);
    let mut open: Vec<f64> = whole.iter().map(|&open| open as f64).collect();
    // The remaining fraction of an expert goes to the first layer with room.
    let left = (total - open.iter().sum::<f64>()).max(0.0);
    if let Some(first) = open.iter_mut().find(|open| **open + left <= size as f64) {
        *first += left;
    }
    open
}

/// Makes the error for a fit without a finite solution.
pub(super) fn not_finite(layer: usize) -> Error {
    Error::Calibration {
        problem: format!("layer {layer} cannot be fitted: the FFN's values are not finite"),
        help: "use an undamaged model".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_router::GateValue;

    use super::*;

    fn planned(active: f64, settings: StartSettings, layers: usize) -> Plan {
        let router = RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(8) };
        let sequences = vec![vec![0; 4]; 16];
        Plan::of(&Start { sequences, active, router, settings, seed: 0, force: false }, layers).unwrap()
    }

    #[test]
    fn sequences_take_turns_over_the_budgets() {
        let settings = |elastic| StartSettings {
            core: 0.25,
            budgets: Some(vec![0.25, 0.5, 1.0]),
            elastic,
            ..StartSettings::default()
        };
        let plan = planned(0.5, settings(true), 1);
        assert_eq!((&plan.cores[..], plan.chosen, plan.budgets.clone()), (&[1][..], 1, vec![0.25, 0.5, 1.0]));
        assert_eq!((plan.fitted, plan.is_held(13), plan.is_held(14)), (14, false, true));
        let turns = |plan: Plan| (10..16).map(move |sequence| plan.budget_of(sequence)).collect::<Vec<_>>();
        assert_eq!(turns(plan.clone()), [1, 2, 0, 1, 1, 1]);
        assert_eq!(turns(planned(0.5, settings(false), 1)), [1; 6]);
        assert_eq!(plan.routed_shares(0).collect::<Vec<_>>(), [1.0 / 7.0, 3.0 / 7.0, 1.0]);
        // By default there are no budgets that the core alone exceeds.
        let plan = planned(0.5, StartSettings { budgets: None, ..StartSettings::default() }, 1);
        assert_eq!(plan.budgets, [0.25, 0.375, 0.5, 0.75, 1.0]);
        let settings = StartSettings { core_first: 0.5, budgets: None, ..StartSettings::default() };
        assert_eq!(planned(0.5, settings, 1).budgets, [0.375, 0.5, 0.75, 1.0]);
    }

    #[test]
    fn every_budget_has_text_that_places_its_thresholds() {
        let settings =
            StartSettings { core: 0.25, budgets: Some(vec![0.25, 0.5, 1.0]), ..StartSettings::default() };
        let mut plan = planned(0.5, settings, 1);
        let mut sequences: Vec<Vec<u32>> = (0..16).map(|i| vec![i; 4]).collect();
        plan.copy_held(&mut sequences);
        let copies: Vec<u32> = sequences[16..].iter().map(|ids| ids[0]).collect();
        assert_eq!(copies, [14, 15, 14, 15]);
        assert_eq!((14..20).map(|i| plan.budget_of(i)).collect::<Vec<_>>(), [1, 1, 0, 0, 2, 2]);
        assert!((14..20).all(|i| plan.is_held(i) && !plan.is_fitted(i)));
        assert_eq!((14..20).filter(|&i| plan.is_measured(i)).count(), 2);
        // Long text is not copied whole.
        let mut long: Vec<Vec<u32>> = vec![vec![0; 6_000]; 16];
        plan.copy_held(&mut long);
        assert_eq!((long.len(), plan.budget_of(16), plan.budget_of(17)), (18, 0, 2));
    }

    #[test]
    fn layers_that_cost_more_run_more() {
        let settings = StartSettings {
            budgets: Some(vec![0.4, 0.75, 1.0]),
            core_first: 0.25,
            ..StartSettings::default()
        };
        let mut plan = planned(0.5, settings.clone(), 4);
        assert_eq!(plan.cores, [1, 2, 2, 2]);
        assert!(plan.shares().all(|share| share == 0.5));
        let curve = |factor: f64| vec![(3, factor * 0.4), (5, factor * 0.15)];
        plan.allot(&[curve(8.0), curve(1.0), curve(1.0), curve(0.1)], &settings);
        let shares: Vec<f64> = plan.shares().collect();
        assert!(shares.is_sorted_by(|a, b| a >= b) && shares[0] > shares[3], "{shares:?}");
        assert_eq!(plan.cores.iter().sum::<usize>(), 7);
        for (budget, open) in plan.budgets.iter().zip(&plan.open) {
            assert!((open.iter().sum::<f64>() - budget * 32.0).abs() < 1e-9, "{budget}: {open:?}");
            let fits = open.iter().zip(&plan.cores).all(|(open, &core)| (core as f64..=8.0).contains(open));
            assert!(fits, "{budget}: {open:?} on {:?}", plan.cores);
        }
    }
}
