//! The settings of top-k FFNs whose layers have different numbers of experts.

use std::sync::Arc;

use dsmoe_core::config::Config;
use dsmoe_core::ffn::{Ffn, FfnSpec, Gated};
use dsmoe_router::topk::TopKConfig;
use serde_json::{Map, Value, json};

use super::ffn::TopkMoeFfn;
use super::kind::KIND;
use super::spec::TopkSpec;

/// The key of the numbers of experts of layers, residual ones left out.
pub(super) const EXPERTS_KEY: &str = "experts_per_layer";

/// FFNs of type top-k whose layers have different numbers of experts to choose from, and the same beside them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TopkLayers {
    /// The settings of the layer of most experts.
    most: TopkSpec,
    /// The experts to choose from of every layer, residual ones left out.
    experts: Vec<usize>,
}

impl TopkLayers {
    /// Returns the settings of layers of so many experts to choose from: those of `most` in the layer of most.
    pub(super) fn of(most: TopkSpec, experts: Vec<usize>) -> TopkLayers {
        TopkLayers { most, experts }
    }

    /// Returns the settings of a layer.
    pub(super) fn layer(&self, layer: usize) -> TopkSpec {
        self.most.with_experts(self.experts[layer])
    }

    /// Returns the fewest experts that a layer has to choose from.
    pub(super) fn fewest(&self) -> usize {
        self.experts.iter().copied().min().unwrap_or(0)
    }
}

/// Returns `spec` with so many experts of every layer to choose from.
pub(super) fn with_experts(spec: &TopkSpec, experts: &[usize]) -> Arc<dyn FfnSpec> {
    let most = experts.iter().copied().max().unwrap_or(spec.router.num_experts);
    let of_most = spec.with_experts(most);
    match experts.iter().all(|&experts| experts == most) {
        true => Arc::new(of_most),
        false => Arc::new(TopkLayers::of(of_most, experts.to_vec())),
    }
}

impl FfnSpec for TopkLayers {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = self.most.settings();
        settings.insert(EXPERTS_KEY.to_owned(), json!(self.experts));
        settings
    }

    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
        Box::new(TopkMoeFfn::of_layers(Gated::of_layer(config, layer), Arc::new(self.clone()), layer))
    }

    fn num_experts(&self, layer: usize) -> usize {
        self.layer(layer).all_experts()
    }

    fn top_k(&self) -> Option<usize> {
        self.most.top_k()
    }

    fn with_top_k(&self, top_k: usize) -> Option<Arc<dyn FfnSpec>> {
        let most = TopkSpec { router: TopKConfig { top_k, ..self.most.router }, ..self.most };
        Some(Arc::new(TopkLayers { most, experts: self.experts.clone() }))
    }

    fn with_experts(&self, counts: &[usize]) -> Option<Arc<dyn FfnSpec>> {
        Some(with_experts(&self.most, counts))
    }

    fn active_experts(&self) -> Option<f64> {
        FfnSpec::active_experts(&self.most)
    }

    fn blocks(&self, layer: usize) -> Option<usize> {
        Some(self.num_experts(layer))
    }
}
