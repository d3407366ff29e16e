//! The FFNs that the settings of a mixture describe.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::MixtureFfn;
use crate::config::mixture::KIND;
use crate::config::{Config, MixtureSpec};
use crate::ffn::{Ffn, FfnSpec, Gated};

impl FfnSpec for MixtureSpec {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn settings(&self) -> Map<String, Value> {
        self.to_settings()
    }

    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
        let of_layer = Gated::of_layer(config, layer);
        let gated = Gated { intermediate: self.neurons(layer), bias: false, output_bias: false, ..of_layer };
        // The loss of a model is a mean over its layers, and their FFNs are summed up.
        let balance_weight = self.balance_weight / config.num_layers as f64;
        Box::new(MixtureFfn::new(gated, Arc::new(self.clone()), layer, balance_weight))
    }

    fn num_experts(&self, layer: usize) -> usize {
        self.experts[layer]
    }

    fn as_mixture(&self) -> Option<&MixtureSpec> {
        Some(self)
    }

    fn top_k(&self) -> Option<usize> {
        Some(self.top_k)
    }

    fn with_top_k(&self, top_k: usize) -> Option<Arc<dyn FfnSpec>> {
        Some(Arc::new(MixtureSpec { top_k, ..self.clone() }))
    }

    fn active_experts(&self) -> Option<f64> {
        let active: usize = self.experts.iter().map(|&experts| experts.min(self.top_k)).sum();
        Some(active as f64 / self.experts.len() as f64)
    }
}
