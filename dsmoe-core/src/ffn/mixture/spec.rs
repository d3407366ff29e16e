//! The settings of the FFNs of a mixture of experts.

use dsmoe_router::mixture::MixtureConfig;
use serde_json::{Map, Value, json};

use super::MixtureFfn;
use crate::config::Config;
use crate::ffn::{Ffn, FfnSpec, Gated};

/// n experts of one width, of which a router gives every token k, and an expert that all tokens run beside them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixtureSpec {
    /// The number of experts, k, and the rule of the coefficients.
    pub router: MixtureConfig,
    /// Neurons of an expert.
    pub width: usize,
    /// Neurons of the expert that every token runs, times the sigmoid of a gate of its own; none without it.
    pub shared: Option<usize>,
    /// Weight of the balance loss, which is a mean over layers.
    pub balance_weight: f64,
}

impl MixtureSpec {
    /// Returns the neurons of all experts that are chosen from.
    pub fn neurons(&self) -> usize {
        self.router.num_experts * self.width
    }
}

impl FfnSpec for MixtureSpec {
    fn kind(&self) -> &'static str {
        "mixture"
    }

    fn settings(&self) -> Map<String, Value> {
        let MixtureConfig { num_experts, top_k, renormalise } = self.router;
        let mut map = Map::new();
        let mut set = |key: &str, value: Value| map.insert(key.to_owned(), value);
        set("num_experts", json!(num_experts));
        set("top_k", json!(top_k));
        set("renormalise", json!(renormalise));
        set("expert_width", json!(self.width));
        if let Some(width) = self.shared {
            set("shared_width", json!(width));
        }
        set("balance_weight", json!(self.balance_weight));
        map
    }

    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
        let of_layer = Gated::of_layer(config, layer);
        let gated = Gated { intermediate: self.neurons(), bias: false, output_bias: false, ..of_layer };
        // The loss of a model is a mean over its layers, and their FFNs are summed up.
        let balance_weight = self.balance_weight / config.num_layers as f64;
        Box::new(MixtureFfn::new(gated, *self, balance_weight))
    }

    fn num_experts(&self) -> usize {
        self.router.num_experts
    }

    fn active_experts(&self) -> Option<f64> {
        Some(self.router.top_k as f64)
    }
}
