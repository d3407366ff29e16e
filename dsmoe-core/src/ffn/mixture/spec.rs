//! The FFNs that the settings of a mixture describe.

use dsmoe_router::mixture::MixtureConfig;
use serde_json::{Map, Value, json};

use super::MixtureFfn;
use crate::config::{Config, MixtureSpec};
use crate::ffn::{Ffn, FfnSpec, Gated};

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
