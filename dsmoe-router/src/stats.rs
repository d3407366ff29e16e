//! Routing statistics over many batches.

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use crate::Routing;
use crate::counts::LogitCounts;

/// Counts of active experts per layer; batches are added, partial counts merged.
///
/// ```
/// use dsmoe_router::{RoutingStats, RoutingSummary, TokenRoutes, Routing};
/// use ndarray::array;
///
/// let mut stats = RoutingStats::new(1, 2).with_routes();
/// let routing = Routing::from_mask(array![[true, true], [false, true]].view(), |_, _| 1.0);
/// stats.add(0, &routing);
/// let summary: RoutingSummary = stats.summary();
/// assert_eq!((summary.active_ratio, summary.active_experts), (0.75, 1.5));
/// let TokenRoutes { active, .. } = &stats.routes().unwrap()[0];
/// assert_eq!(active[..], [true, true, false, true]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingStats {
    /// The largest of any layer.
    num_experts: usize,
    layers: Vec<LayerStats>,
    #[serde(skip)]
    trace: Option<Trace>,
    /// `[layers][n]`: sums of the coefficients of each expert.
    #[serde(skip)]
    coefficients: Option<Vec<Vec<f64>>>,
    #[serde(skip)]
    logits: Option<LogitCounts>,
    #[serde(skip)]
    routes: Option<Vec<TokenRoutes>>,
}

/// The experts of single tokens in one layer, in the order in which the tokens were added.
///
/// ```
/// use dsmoe_router::{Routing, RoutingStats, TokenRoutes};
/// use ndarray::array;
///
/// let mut stats = RoutingStats::new(1, 2).with_routes();
/// stats.add(0, &Routing::from_mask(array![[true, false], [true, true]].view(), |_, _| 0.5));
/// let TokenRoutes { active, coefficients } = &stats.routes().unwrap()[0];
/// // The second token, in a layer of two experts.
/// assert_eq!(active[2..4], [true, true]);
/// assert_eq!(coefficients[..2], [0.5, 0.0]);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenRoutes {
    /// `[T, n]`: whether a token runs an expert.
    pub active: Vec<bool>,
    /// `[T, n]`: what the expert's output is multiplied by; 0 where it does not run.
    pub coefficients: Vec<f32>,
}

impl TokenRoutes {
    fn add_behind_core(&mut self, core: usize, routing: &Routing) {
        let (n, first) = (core + routing.num_experts, self.active.len());
        let end = first + routing.num_tokens * n;
        self.active.resize(end, false);
        self.coefficients.resize(end, 0.0);
        for row in (first..end).step_by(n.max(1)) {
            self.active[row..row + core].fill(true);
            self.coefficients[row..row + core].fill(1.0);
        }
        for (expert, slots) in routing.offsets.windows(2).enumerate() {
            for slot in slots[0]..slots[1] {
                let at = first + routing.tokens[slot] as usize * n + core + expert;
                self.active[at] = true;
                self.coefficients[at] = routing.coefficients[slot];
            }
        }
    }
}

/// Active experts of single tokens.
#[derive(Clone, Debug, Default, PartialEq)]
struct Trace {
    /// Count of each token, summed over layers.
    active: Vec<u32>,
    /// First token of the present batch.
    batch: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct LayerStats {
    /// `[n]`: tokens of each expert.
    load: Vec<u64>,
    /// `[n]`: what each expert counts in shares; none if all count 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sizes: Option<Vec<u64>>,
    /// `[n + 1]`: tokens by their number of active experts.
    histogram: Vec<u64>,
}

/// Shares that [`RoutingStats`] gives, by layer and overall, in 0..=1; all are 0 without tokens.
///
/// ```
/// use dsmoe_router::{Routing, RoutingStats, RoutingSummary};
/// use ndarray::array;
///
/// let mut stats = RoutingStats::new(1, 2);
/// stats.add(0, &Routing::from_mask(array![[true, false], [false, false]].view(), |_, _| 1.0));
/// let summary: RoutingSummary = stats.summary();
/// assert_eq!((summary.tokens, summary.active_ratio, summary.zero_active_share), (2, 0.25, 0.5));
/// assert_eq!(summary.load_per_layer[0], [0.5, 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoutingSummary {
    /// Tokens seen by the first layer.
    pub tokens: u64,
    /// Active share of all (token, layer, expert) triples, by the sizes of experts where they differ
    /// ([`RoutingStats::with_sizes`]).
    pub active_ratio: f64,
    /// Active experts per token, mean over layers; where sizes differ, as many experts of the mean size.
    pub active_experts: f64,
    /// Share of (token, layer) pairs without an active expert.
    pub zero_active_share: f64,
    /// Active share of each layer.
    pub active_ratio_per_layer: Vec<f64>,
    /// Share of tokens without an active expert in each layer.
    pub zero_active_share_per_layer: Vec<f64>,
    /// `[layers][n + 1]`: share of tokens with 0, 1, ... n active experts.
    pub active_histogram_per_layer: Vec<Vec<f64>>,
    /// `[layers][n]`: share of tokens that run each expert.
    pub load_per_layer: Vec<Vec<f64>>,
    /// Entropy of the load of each layer over that of an even load: 1 even, 0 one expert alone (or none at all).
    pub load_entropy_per_layer: Vec<f64>,
}

impl RoutingStats {
    /// Makes statistics without tokens.
    pub fn new(num_layers: usize, num_experts: usize) -> RoutingStats {
        RoutingStats::of_layers(std::iter::repeat_n(num_experts, num_layers))
    }

    /// Makes statistics without tokens of layers with those numbers of experts.
    pub fn of_layers(experts: impl IntoIterator<Item = usize>) -> RoutingStats {
        let layer = |n| LayerStats { load: vec![0; n], histogram: vec![0; n + 1], sizes: None };
        let layers: Vec<LayerStats> = experts.into_iter().map(layer).collect();
        let num_experts = layers.iter().map(|layer| layer.load.len()).max().unwrap_or(0);
        RoutingStats { num_experts, layers, trace: None, coefficients: None, logits: None, routes: None }
    }

    /// Sets the sizes of the experts of every layer, by which shares count them; none where they are alike.
    ///
    /// # Panics
    /// A layer has another number of experts.
    ///
    /// ```
    /// use dsmoe_router::{Routing, RoutingStats};
    /// use ndarray::array;
    ///
    /// // Of an expert of 3 neurons and one of 1, a token runs the first, and one the second.
    /// let mut stats = RoutingStats::new(1, 2).with_sizes([Some(vec![3, 1])]);
    /// stats.add(0, &Routing::from_mask(array![[true, false], [false, true]].view(), |_, _| 1.0));
    /// assert_eq!((stats.summary().active_ratio, stats.summary().active_experts), (0.5, 1.0));
    /// ```
    #[must_use]
    pub fn with_sizes(mut self, sizes: impl IntoIterator<Item = Option<Vec<u64>>>) -> RoutingStats {
        for (layer, sizes) in self.layers.iter_mut().zip(sizes) {
            let fits = sizes.as_ref().is_none_or(|sizes| sizes.len() == layer.load.len());
            assert!(fits, "routing stats: sizes of experts");
            layer.sizes = sizes;
        }
        self
    }

    /// Makes it keep the active experts of every token too. Batches must then come layer by layer from the first, as a
    /// forward pass adds them.
    #[must_use]
    pub fn traced(mut self) -> RoutingStats {
        self.trace = Some(Trace::default());
        self
    }

    /// Makes it sum the coefficients of every expert too.
    #[must_use]
    pub fn weighted(mut self) -> RoutingStats {
        self.coefficients = Some(self.no_coefficients());
        self
    }

    /// Makes it count the logits of the routers too.
    #[must_use]
    pub fn with_logits(mut self) -> RoutingStats {
        self.logits = Some(LogitCounts::new(self.layers.len()));
        self
    }

    /// Makes it keep which experts every token runs in every layer, too.
    #[must_use]
    pub fn with_routes(mut self) -> RoutingStats {
        self.routes = Some(vec![TokenRoutes::default(); self.layers.len()]);
        self
    }

    /// Returns the experts of every token, one entry for each layer; none unless [`RoutingStats::with_routes`]. Tokens that were
    /// counted elsewhere ([`RoutingStats::add_counts`], [`RoutingStats::merge`]) are not among them.
    pub fn routes(&self) -> Option<&[TokenRoutes]> {
        self.routes.as_deref()
    }

    /// Returns the counted logits; none unless [`RoutingStats::with_logits`].
    pub fn logits(&self) -> Option<&LogitCounts> {
        self.logits.as_ref()
    }

    /// Returns the counted logits, to add what was counted elsewhere; none unless [`RoutingStats::with_logits`].
    pub fn logits_mut(&mut self) -> Option<&mut LogitCounts> {
        self.logits.as_mut()
    }

    /// Counts the logits `[T, routed experts]` of one batch in `layer`, whose first `core` experts have none; nothing
    /// unless [`RoutingStats::with_logits`].
    ///
    /// # Panics
    /// No such layer.
    pub fn add_logits(&mut self, layer: usize, core: usize, logits: ArrayView2<'_, f32>) {
        if let Some(counts) = &mut self.logits {
            counts.add(layer, core, logits);
        }
    }

    fn no_coefficients(&self) -> Vec<Vec<f64>> {
        self.layers.iter().map(|layer| vec![0.0; layer.load.len()]).collect()
    }

    /// Returns the mean coefficient of each expert over all tokens, 0 for those that did not run it,
    /// `[layers][n]`; none unless [`RoutingStats::weighted`], without tokens, and once counts without coefficients were
    /// added ([`RoutingStats::add_counts`], [`RoutingStats::merge`]).
    pub fn mean_coefficients(&self) -> Option<Vec<Vec<f64>>> {
        let mean = |(sums, layer): (&Vec<f64>, &LayerStats)| {
            let tokens = layer.tokens();
            (tokens > 0).then(|| sums.iter().map(|sum| sum / tokens as f64).collect())
        };
        self.coefficients.as_ref()?.iter().zip(&self.layers).map(mean).collect()
    }

    /// Returns the active experts of each token, summed over layers, in the order in which they were added; empty
    /// unless [`RoutingStats::traced`]. Merging leaves it as it is.
    pub fn active_of_tokens(&self) -> &[u32] {
        self.trace.as_ref().map_or(&[], |trace| &trace.active)
    }

    /// Adds the tokens of one batch in `layer`.
    ///
    /// # Panics
    /// No such layer; `routing` has another number of experts.
    pub fn add(&mut self, layer: usize, routing: &Routing) {
        self.add_behind_core(layer, 0, routing);
    }

    /// Adds the tokens of one batch in `layer`, whose first `core` experts every token runs with coefficient 1;
    /// `routing` is that of the others.
    ///
    /// # Panics
    /// No such layer; `routing` is not of all experts but the first `core`.
    pub fn add_behind_core(&mut self, layer: usize, core: usize, routing: &Routing) {
        assert_eq!(core + routing.num_experts, self.layers[layer].load.len(), "routing stats: experts");
        let tokens = routing.num_tokens;
        if let Some(trace) = &mut self.trace {
            if layer == 0 {
                trace.batch = trace.active.len();
                trace.active.resize(trace.batch + routing.active_counts().len(), 0);
            }
            let batch = &mut trace.active[trace.batch..];
            let counts = routing.active_counts().map(|count| (core + count) as u32);
            batch.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        if let Some(sums) = &mut self.coefficients {
            let (always, routed) = sums[layer].split_at_mut(core);
            always.iter_mut().for_each(|sum| *sum += tokens as f64);
            for (sum, slots) in routed.iter_mut().zip(routing.offsets.windows(2)) {
                let of_expert = &routing.coefficients[slots[0]..slots[1]];
                *sum += of_expert.iter().map(|&coefficient| f64::from(coefficient)).sum::<f64>();
            }
        }
        if let Some(routes) = &mut self.routes {
            routes[layer].add_behind_core(core, routing);
        }
        let layer = &mut self.layers[layer];
        let counts = std::iter::repeat_n(tokens, core).chain(routing.counts());
        for (load, count) in layer.load.iter_mut().zip(counts) {
            *load += count as u64;
        }
        for active in routing.active_counts() {
            layer.histogram[core + active] += 1;
        }
    }

    /// Returns the number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Returns the number of experts of a layer, the largest where layers differ.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Adds what was counted elsewhere, as on a GPU: tokens by expert `[n]`, and by their number of active experts
    /// `[n + 1]`.
    ///
    /// # Panics
    /// The counts are of another number of experts, or `layer` is not a layer.
    pub fn add_counts(&mut self, layer: usize, load: &[u64], histogram: &[u64]) {
        self.coefficients = None;
        let layer = &mut self.layers[layer];
        let (wanted, found) = (layer.load.len(), (load.len(), histogram.len()));
        assert_eq!(found, (wanted, wanted + 1), "routing stats: loads and counts for {wanted} experts");
        layer.load.iter_mut().zip(load).for_each(|(a, b)| *a += b);
        layer.histogram.iter_mut().zip(histogram).for_each(|(a, b)| *a += b);
    }

    /// Adds what was counted elsewhere of a layer whose first `core` experts every token runs: tokens by routed expert, and by
    /// their number of active routed experts.
    ///
    /// # Panics
    /// The counts are of another number of experts, or `layer` is not a layer.
    pub fn add_counts_behind_core(&mut self, layer: usize, core: usize, load: &[u64], histogram: &[u64]) {
        let tokens = histogram.iter().sum();
        let behind = |first: u64, counts: &[u64]| -> Vec<u64> {
            std::iter::repeat_n(first, core).chain(counts.iter().copied()).collect()
        };
        self.add_counts(layer, &behind(tokens, load), &behind(0, histogram));
    }

    /// Returns all counts of tokens in one order, for [`RoutingStats::add_all`].
    pub fn counts(&self) -> impl Iterator<Item = u64> + '_ {
        self.layers.iter().flat_map(|layer| layer.load.iter().chain(&layer.histogram)).copied()
    }

    /// Adds what [`RoutingStats::counts`] returned elsewhere.
    ///
    /// # Panics
    /// The counts are of other layers or experts.
    pub fn add_all(&mut self, counts: &[u64]) {
        let experts: Vec<usize> = self.layers.iter().map(|layer| layer.load.len()).collect();
        let all: usize = experts.iter().map(|n| 2 * n + 1).sum();
        assert_eq!(counts.len(), all, "routing stats: counts");
        let mut rest = counts;
        for (layer, n) in experts.into_iter().enumerate() {
            let (of_layer, others) = rest.split_at(2 * n + 1);
            let (load, histogram) = of_layer.split_at(n);
            self.add_counts(layer, load, histogram);
            rest = others;
        }
    }

    /// Returns whether `other` has the same layers and experts, so that [`RoutingStats::merge`] takes it.
    pub fn is_like(&self, other: &RoutingStats) -> bool {
        let shape = |stats: &RoutingStats| -> Vec<(usize, usize)> {
            stats.layers.iter().map(|layer| (layer.load.len(), layer.histogram.len())).collect()
        };
        self.num_experts == other.num_experts && shape(self) == shape(other)
    }

    /// Adds the counts of `other`.
    ///
    /// # Panics
    /// `other` has another number of layers or experts.
    pub fn merge(&mut self, other: &RoutingStats) {
        assert_eq!(self.layers.len(), other.layers.len(), "routing stats: layers");
        for (i, layer) in other.layers.iter().enumerate() {
            self.add_counts(i, &layer.load, &layer.histogram);
        }
        if let (Some(to), Some(from)) = (&mut self.logits, &other.logits) {
            to.merge(from);
        }
    }

    /// Returns whether it keeps the active experts of every token.
    pub fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    /// Adds the active experts of the next tokens, summed over layers, that were counted elsewhere; nothing unless
    /// [`RoutingStats::traced`].
    pub fn add_active_of_tokens(&mut self, active: &[u32]) {
        if let Some(trace) = &mut self.trace {
            trace.batch = trace.active.len();
            trace.active.extend_from_slice(active);
        }
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        if self.trace.is_some() {
            self.trace = Some(Trace::default());
        }
        if self.coefficients.is_some() {
            self.coefficients = Some(self.no_coefficients());
        }
        if let Some(counts) = &mut self.logits {
            counts.clear();
        }
        if let Some(routes) = &mut self.routes {
            routes.fill(TokenRoutes::default());
        }
        for layer in &mut self.layers {
            layer.load.fill(0);
            layer.histogram.fill(0);
        }
    }

    /// Returns the active share of all (token, layer, expert) triples, by the sizes of experts where they differ; 0 without tokens.
    pub fn active_ratio(&self) -> f64 {
        ratio(self.routed(), self.layers.iter().map(LayerStats::pairs).sum())
    }

    /// Returns the entropy of the load of every layer in nats: ln n if all n experts run for as many tokens, 0 if one runs alone or
    /// none does.
    ///
    /// ```
    /// use dsmoe_router::{Routing, RoutingStats};
    /// use ndarray::array;
    ///
    /// let mut stats = RoutingStats::new(1, 2);
    /// stats.add(0, &Routing::from_mask(array![[true, false], [false, true]].view(), |_, _| 1.0));
    /// assert!((stats.load_entropies()[0] - 2f64.ln()).abs() < 1e-12);
    /// ```
    pub fn load_entropies(&self) -> Vec<f64> {
        self.layers.iter().map(LayerStats::entropy).collect()
    }

    fn routed(&self) -> u64 {
        self.layers.iter().map(LayerStats::routed).sum()
    }

    /// Computes shares and entropies.
    pub fn summary(&self) -> RoutingSummary {
        let tokens: u64 = self.layers.iter().map(LayerStats::tokens).sum();
        let zero: u64 = self.layers.iter().map(|layer| layer.histogram[0]).sum();
        let per_layer = |f: &dyn Fn(&LayerStats) -> f64| self.layers.iter().map(f).collect::<Vec<_>>();
        let shares = |layer: &LayerStats, counts: &[u64]| {
            counts.iter().map(|&count| ratio(count, layer.tokens())).collect::<Vec<_>>()
        };
        let active_ratio = self.active_ratio();
        let experts: usize = self.layers.iter().map(|layer| layer.load.len()).sum();
        let active_experts = match self.layers.iter().any(|layer| layer.sizes.is_some()) {
            true => active_ratio * experts as f64 / self.layers.len() as f64,
            false => ratio(self.routed(), tokens),
        };
        RoutingSummary {
            tokens: self.layers.first().map_or(0, LayerStats::tokens),
            active_ratio,
            active_experts,
            zero_active_share: ratio(zero, tokens),
            active_ratio_per_layer: per_layer(&|layer| ratio(layer.routed(), layer.pairs())),
            zero_active_share_per_layer: per_layer(&|layer| ratio(layer.histogram[0], layer.tokens())),
            active_histogram_per_layer: self.layers.iter().map(|l| shares(l, &l.histogram)).collect(),
            load_per_layer: self.layers.iter().map(|layer| shares(layer, &layer.load)).collect(),
            load_entropy_per_layer: per_layer(&LayerStats::load_entropy),
        }
    }
}

impl LayerStats {
    fn tokens(&self) -> u64 {
        self.histogram.iter().sum()
    }

    /// Returns the number of active pairs of a token and an expert, by the sizes of experts.
    fn routed(&self) -> u64 {
        match &self.sizes {
            None => self.load.iter().sum(),
            Some(sizes) => self.load.iter().zip(sizes).map(|(load, size)| load * size).sum(),
        }
    }

    /// Returns the number of pairs of a token and an expert, active or not, by the sizes of experts.
    fn pairs(&self) -> u64 {
        self.tokens() * self.sizes.as_ref().map_or(self.load.len() as u64, |sizes| sizes.iter().sum())
    }

    /// Returns the entropy of the load, nats.
    fn entropy(&self) -> f64 {
        let all: u64 = self.load.iter().sum();
        let shares = self.load.iter().map(|&load| ratio(load, all)).filter(|&p| p > 0.0);
        shares.map(|p| -p * p.ln()).sum()
    }

    /// Returns the entropy of the load over that of an even load.
    fn load_entropy(&self) -> f64 {
        match self.load.len() {
            0 | 1 => 1.0,
            n => self.entropy() / (n as f64).ln(),
        }
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    fn routing(mask: ndarray::Array2<bool>) -> Routing {
        Routing::from_mask(mask.view(), |_, _| 1.0)
    }

    #[test]
    fn counts_by_hand() {
        let mut stats = RoutingStats::new(2, 2);
        stats.add(0, &routing(array![[true, false], [true, true], [false, false], [true, false]]));
        stats.add(1, &routing(array![[true, true], [true, true], [true, true], [true, true]]));
        let summary = stats.summary();
        assert_eq!((summary.tokens, summary.zero_active_share), (4, 1.0 / 8.0));
        assert_eq!((summary.active_ratio, summary.active_experts), (12.0 / 16.0, 1.5));
        assert_eq!(summary.active_ratio_per_layer, [0.5, 1.0]);
        assert_eq!(summary.zero_active_share_per_layer, [0.25, 0.0]);
        assert_eq!(summary.active_histogram_per_layer, [[0.25, 0.5, 0.25], [0.0, 0.0, 1.0]]);
        assert_eq!(summary.load_per_layer, [[0.75, 0.25], [1.0, 1.0]]);
        assert!((summary.load_entropy_per_layer[0] - 0.811_278).abs() < 1e-6);
        assert_eq!(summary.load_entropy_per_layer[1], 1.0);
        let counts: Vec<u64> = stats.counts().collect();
        let mut twice = stats.clone();
        twice.add_all(&counts);
        let mut merged = stats.clone();
        merged.merge(&stats);
        assert_eq!(twice.counts().collect::<Vec<_>>(), merged.counts().collect::<Vec<_>>());
        assert_eq!(twice.counts().sum::<u64>(), 2 * counts.iter().sum::<u64>());
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["active_ratio_per_layer"][1], 1.0);
    }

    #[test]
    fn layers_may_have_different_numbers_of_experts() {
        let mut stats = RoutingStats::of_layers([1, 3]).weighted();
        stats.add(0, &routing(array![[true], [false]]));
        stats.add(1, &routing(array![[true, false, true], [false, true, false]]));
        let summary = stats.summary();
        assert_eq!((summary.active_experts, summary.active_ratio), (1.0, 4.0 / 8.0));
        assert_eq!(summary.active_ratio_per_layer, [0.5, 0.5]);
        assert_eq!(summary.load_per_layer, [vec![0.5], vec![0.5, 0.5, 0.5]]);
        assert_eq!(stats.mean_coefficients().unwrap(), [vec![0.5], vec![0.5, 0.5, 0.5]]);
        let mut added = RoutingStats::of_layers([1, 3]);
        added.add_all(&stats.counts().collect::<Vec<_>>());
        assert_eq!(added.summary(), summary);
        assert!(added.is_like(&stats) && !added.is_like(&RoutingStats::new(2, 3)));
    }

    #[test]
    fn entropies_of_loads_by_hand() {
        let even = |n: usize| {
            let mut stats = RoutingStats::new(1, n);
            stats.add(0, &Routing::from_mask(ndarray::Array2::from_elem((5, n), true).view(), |_, _| 1.0));
            stats.load_entropies()[0]
        };
        for n in [1, 2, 8, 60] {
            assert!((even(n) - (n as f64).ln()).abs() < 1e-12, "{n}: {}", even(n));
        }
        // Loads 3, 1 and 0: -(3/4 ln 3/4 + 1/4 ln 1/4); one expert alone; none.
        let mut stats = RoutingStats::new(3, 3);
        stats.add(
            0,
            &routing(array![
                [true, false, false],
                [true, true, false],
                [false, false, false],
                [true, false, false]
            ]),
        );
        stats.add(1, &routing(array![[false, true, false], [false, true, false]]));
        stats.add(2, &routing(array![[false, false, false]]));
        let found = stats.load_entropies();
        assert!((found[0] - 0.562_335_144_618_808_1).abs() < 1e-12, "{found:?}");
        assert_eq!(found[1..], [0.0, 0.0]);
        assert_eq!(stats.summary().load_entropy_per_layer[0], found[0] / 3f64.ln());
    }

    #[test]
    fn experts_count_by_their_sizes() {
        let mask = array![[true, false], [true, false], [false, true], [false, false]];
        let mut stats = RoutingStats::new(2, 2).with_sizes([Some(vec![16, 1]), None]);
        (0..2).for_each(|layer| stats.add(layer, &routing(mask.clone())));
        let summary = stats.summary();
        assert_eq!(summary.active_ratio_per_layer, [33.0 / 68.0, 3.0 / 8.0]);
        assert_eq!(summary.active_ratio, 36.0 / 76.0);
        assert_eq!(summary.active_experts, 2.0 * 36.0 / 76.0);
        // Loads and their entropy count tokens.
        assert_eq!(summary.load_per_layer, [[0.5, 0.25], [0.5, 0.25]]);
        assert_eq!(summary.load_entropy_per_layer[0], summary.load_entropy_per_layer[1]);
        assert_eq!(summary.zero_active_share, 0.25);
        let mut alike = RoutingStats::new(1, 2).with_sizes([Some(vec![5, 5])]);
        let mut plain = RoutingStats::new(1, 2);
        [&mut alike, &mut plain].into_iter().for_each(|stats| stats.add(0, &routing(mask.clone())));
        assert_eq!(alike.summary(), plain.summary());
        // Sizes are kept in files, and files without them are read.
        let text = serde_json::to_string(&stats).unwrap();
        assert_eq!(serde_json::from_str::<RoutingStats>(&text).unwrap(), stats);
        assert!(!serde_json::to_string(&plain).unwrap().contains("sizes"));
    }

    #[test]
    fn routes_of_tokens_by_hand() {
        let mut stats = RoutingStats::new(2, 3).with_routes();
        let half =
            |mask: ndarray::Array2<bool>| Routing::from_mask(mask.view(), |_, expert| 0.5 + expert as f32);
        stats.add_behind_core(0, 1, &half(array![[true, false], [false, false]]));
        stats.add(1, &half(array![[false, false, true], [true, true, false]]));
        stats.add_behind_core(0, 1, &half(array![[true, true]]));
        let routes = stats.routes().unwrap();
        assert_eq!(routes[0].active, [true, true, false, true, false, false, true, true, true]);
        assert_eq!(routes[0].coefficients, [1.0, 0.5, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5, 1.5]);
        assert_eq!(routes[1].coefficients, [0.0, 0.0, 2.5, 0.5, 1.5, 0.0]);
        assert_eq!(
            routes[0].active.iter().filter(|active| **active).count() as u64,
            stats.counts().take(3).sum::<u64>()
        );
        stats.clear();
        assert_eq!(stats.routes().unwrap(), [TokenRoutes::default(), TokenRoutes::default()]);
        assert!(RoutingStats::new(1, 1).routes().is_none());
    }

    #[test]
    fn counts_from_elsewhere_are_those_of_a_routing() {
        let (mut counted, mut added) = (RoutingStats::new(2, 2), RoutingStats::new(2, 2));
        counted.add(1, &routing(array![[true, false], [true, true], [false, false]]));
        added.add_counts(1, &[2, 1], &[1, 1, 1]);
        assert_eq!(added, counted);
        let (mut counted, mut added) = (RoutingStats::new(1, 5), RoutingStats::new(1, 5));
        counted.add_behind_core(0, 3, &routing(array![[true, false], [true, true], [false, false]]));
        added.add_counts_behind_core(0, 3, &[2, 1], &[1, 1, 1]);
        assert_eq!(added, counted);
        let added = RoutingStats::new(2, 2);
        assert_eq!(added.num_experts(), 2);
    }

    #[test]
    fn single_tokens_are_traced_on_demand() {
        let mut stats = RoutingStats::new(2, 2).traced();
        for (a, b) in [([true, false], [true, true]), ([false, false], [true, false])] {
            stats.add(0, &routing(array![a, b]));
            stats.add(1, &routing(array![a, b]));
        }
        assert_eq!(stats.active_of_tokens(), [2, 4, 0, 2]);
        stats.add_active_of_tokens(&[3, 0]);
        assert_eq!(stats.active_of_tokens(), [2, 4, 0, 2, 3, 0]);
        stats.add(0, &routing(array![[true, true]]));
        assert_eq!(stats.active_of_tokens(), [2, 4, 0, 2, 3, 0, 2]);
        stats.clear();
        assert!(stats.active_of_tokens().is_empty());
        assert!(RoutingStats::new(1, 2).active_of_tokens().is_empty());
    }

    #[test]
    fn coefficients_are_means_over_all_tokens() {
        let mask = array![[true, false], [true, true], [false, false], [true, false]];
        let weighted = Routing::from_mask(mask.view(), |token, expert| (token + 10 * expert) as f32);
        let mut stats = RoutingStats::new(1, 2).weighted();
        assert_eq!(stats.mean_coefficients(), None);
        stats.add(0, &weighted);
        stats.add(0, &weighted);
        assert_eq!(stats.mean_coefficients(), Some(vec![vec![1.0, 2.75]]));
        stats.clear();
        stats.add(0, &routing(array![[true, false]]));
        assert_eq!(stats.mean_coefficients(), Some(vec![vec![1.0, 0.0]]));
        assert_eq!(RoutingStats::new(1, 2).mean_coefficients(), None);
        stats.add_counts(0, &[1, 0], &[0, 1, 0]);
        assert_eq!(stats.mean_coefficients(), None);
    }

    #[test]
    fn a_core_is_counted_as_experts_that_every_token_runs() {
        let mask = array![[true, false], [true, true], [false, false]];
        let routed = Routing::from_mask(mask.view(), |token, expert| (token + expert) as f32);
        let padded = array![[true, true, false], [true, true, true], [true, false, false]];
        let with_core = Routing::from_mask(padded.view(), |token, expert| match expert {
            0 => 1.0,
            expert => (token + expert - 1) as f32,
        });
        let of = |core: usize, routing: &Routing| {
            let mut stats = RoutingStats::new(1, 3).traced().weighted();
            stats.add_behind_core(0, core, routing);
            stats
        };
        assert_eq!(of(1, &routed), of(0, &with_core));
        assert_eq!(of(1, &routed).summary().active_ratio, 6.0 / 9.0);
    }

    #[test]
    fn merging_parts_is_adding_all() {
        let (a, b) = (routing(array![[true, false, true]]), routing(array![[false, false, false]]));
        let of = |routings: &[&Routing]| {
            let mut stats = RoutingStats::new(1, 3);
            routings.iter().for_each(|routing| stats.add(0, routing));
            stats
        };
        let (whole, mut first) = (of(&[&a, &b]), of(&[&a]));
        first.merge(&of(&[&b]));
        assert_eq!(first, whole);
        first.clear();
        assert_eq!(first, RoutingStats::new(1, 3));
    }

    #[test]
    fn nothing_seen_is_zero_not_nan() {
        let summary = RoutingStats::new(1, 4).summary();
        assert_eq!((summary.active_ratio, summary.zero_active_share), (0.0, 0.0));
        assert_eq!(summary.load_entropy_per_layer, [0.0]);
    }
}
