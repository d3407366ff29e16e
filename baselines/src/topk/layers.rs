//! The settings of top-k FFNs whose layers have different numbers of experts, or gates that share experts.

use std::sync::Arc;

use dsmoe_core::config::{Config, lists_of_maps};
use dsmoe_core::ffn::{Ffn, FfnSpec, Gated};
use dsmoe_router::expert_map::ExpertMap;
use dsmoe_router::topk::TopKConfig;
use serde_json::{Map, Value, json};

use super::ffn::TopkMoeFfn;
use super::kind::KIND;
use super::spec::TopkSpec;

/// The key of the numbers of experts of layers, residual ones left out.
const EXPERTS_KEY: &str = "experts_per_layer";
/// The key of the experts of gates.
const MAP_KEY: &str = "expert_map";

/// FFNs of type top-k whose layers have different numbers of experts to choose from, or gates that share experts, and the same beside
/// them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TopkLayers {
    /// The settings of the layer of most experts, if each of them had a gate of its own.
    most: TopkSpec,
    /// The experts to choose from of every layer, residual ones left out.
    experts: Vec<usize>,
    /// The expert of every gate, layer by layer; none where each expert has a gate of its own.
    maps: Option<Vec<Arc<ExpertMap>>>,
}

impl TopkLayers {
    /// Returns the settings of layers of so many experts to choose from: those of `most` in the layer of most.
    pub(super) fn of(most: TopkSpec, experts: Vec<usize>, maps: Option<Vec<Arc<ExpertMap>>>) -> TopkLayers {
        TopkLayers { most, experts, maps }
    }

    /// Returns the settings of the gates of a layer: as many as it has experts to choose from, where each has its own.
    pub(super) fn layer(&self, layer: usize) -> TopkSpec {
        self.most.with_experts(self.gates(layer))
    }

    /// Returns the expert of every gate of a layer; none where each expert has a gate of its own.
    pub(super) fn map(&self, layer: usize) -> Option<&Arc<ExpertMap>> {
        self.maps.as_ref().map(|maps| &maps[layer])
    }

    /// Returns the number of gates of a layer.
    fn gates(&self, layer: usize) -> usize {
        self.map(layer).map_or(self.experts[layer], |map| map.num_gates())
    }

    /// Returns the fewest gates that a layer has.
    pub(super) fn fewest(&self) -> usize {
        (0..self.experts.len()).map(|layer| self.gates(layer)).min().unwrap_or(0)
    }

    fn is_even(&self) -> bool {
        self.experts.iter().all(|&experts| experts == self.most.router.num_experts)
    }
}

/// Returns `spec` with so many experts of every layer to choose from, and gates that share them by `maps`.
pub(super) fn with_experts(
    spec: &TopkSpec,
    experts: &[usize],
    maps: Option<Vec<Arc<ExpertMap>>>,
) -> Arc<dyn FfnSpec> {
    let most = experts.iter().copied().max().unwrap_or(spec.router.num_experts);
    let layers = TopkLayers::of(spec.with_experts(most), experts.to_vec(), maps);
    match layers.is_even() && layers.maps.is_none() {
        true => Arc::new(layers.most),
        false => Arc::new(layers),
    }
}

impl FfnSpec for TopkLayers {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = self.most.settings();
        if !self.is_even() {
            settings.insert(EXPERTS_KEY.to_owned(), json!(self.experts));
        }
        if let Some(maps) = &self.maps {
            settings.insert(MAP_KEY.to_owned(), json!(lists_of_maps(maps)));
        }
        settings
    }

    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
        Box::new(TopkMoeFfn::of_layers(Gated::of_layer(config, layer), Arc::new(self.clone()), layer))
    }

    fn num_experts(&self, layer: usize) -> usize {
        self.experts[layer] + self.most.router.num_residual
    }

    fn top_k(&self) -> Option<usize> {
        self.most.top_k()
    }

    fn with_top_k(&self, top_k: usize) -> Option<Arc<dyn FfnSpec>> {
        let most = TopkSpec { router: TopKConfig { top_k, ..self.most.router }, ..self.most };
        Some(Arc::new(TopkLayers { most, ..self.clone() }))
    }

    fn with_experts(&self, counts: &[usize], maps: Option<Vec<Arc<ExpertMap>>>) -> Option<Arc<dyn FfnSpec>> {
        Some(with_experts(&self.most, counts, maps))
    }

    fn active_experts(&self) -> Option<f64> {
        // Gates that are open may run one expert.
        let TopKConfig { top_k, num_residual, .. } = self.most.router;
        let active: usize = self.experts.iter().map(|&experts| experts.min(top_k) + num_residual).sum();
        Some(active as f64 / self.experts.len() as f64)
    }

    fn blocks(&self, layer: usize) -> Option<usize> {
        Some(self.num_experts(layer))
    }
}
