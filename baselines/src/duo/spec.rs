//! The `ffn` object of config.json for FFNs of type `duo`.

use std::path::Path;
use std::sync::Arc;

use dsmoe_core::config::Config;
use dsmoe_core::ffn::{Ffn, FfnReader, FfnSpec, Gated};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ffn::DuoFfn;

/// The `type`.
const KIND: &str = "duo";

/// An FFN of which a token takes the big or the small one, or skips both.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DuoSpec {
    /// Neurons of the small FFN.
    pub small: usize,
    /// Who chooses.
    pub stage: Stage,
    /// The probability of the big FFN in training with random routes.
    pub probability: f64,
    /// The share of tokens that take the big FFN: drawn in inference with random routes, and held in training with a router. Where
    /// tokens may skip, the share of the neurons of both FFNs that a token uses.
    pub share: f64,
    /// Divides the router's logits in training, unless a run sets another number.
    pub temperature: f64,
    /// True if the router may also choose to run neither.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip: bool,
}

/// Who chooses between the FFNs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Chance.
    Random,
    /// A router.
    Router,
}

impl DuoSpec {
    /// Returns the rows of the router.
    pub(super) fn ways(&self) -> usize {
        if self.skip { 3 } else { 2 }
    }

    /// Returns the number of experts of a layer. The big FFN is its one expert, in whose place tokens run the small one; where
    /// tokens may skip, both FFNs are experts.
    pub(super) fn experts(&self) -> usize {
        self.ways() - 1
    }

    /// Returns the field that is out of range, its value and what it may be.
    fn wrong(&self) -> Option<(&'static str, f64, &'static str)> {
        [
            ("probability", self.probability, 0.0..=1.0, "0 to 1"),
            ("share", self.share, 0.0..=1.0, "0 to 1"),
            ("temperature", self.temperature, 1e-3..=1e3, "0.001 to 1000"),
        ]
        .into_iter()
        .find(|(_, value, range, _)| !range.contains(value))
        .map(|(field, value, _, allowed)| (field, value, allowed))
    }
}

impl FfnSpec for DuoSpec {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn settings(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(map)) => map,
            _ => unreachable!("a struct of numbers and names is an object"),
        }
    }

    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
        Box::new(DuoFfn::of(Gated::of_layer(config, layer), *self))
    }

    fn num_experts(&self, _layer: usize) -> usize {
        self.experts()
    }

    fn active_experts(&self) -> Option<f64> {
        None
    }

    fn active_target(&self) -> Option<f64> {
        (self.stage == Stage::Router).then_some(self.share)
    }

    fn router_temperature(&self) -> Option<f64> {
        (self.stage == Stage::Router).then_some(self.temperature)
    }
}

/// Returns the settings of `spec` if it is of this type.
pub(super) fn spec_of(spec: &dyn FfnSpec) -> Option<DuoSpec> {
    DuoSpec::deserialize(&Value::Object(spec.settings())).ok().filter(|_| spec.kind() == KIND)
}

/// Reads FFNs of two sizes.
pub(crate) static READER: FfnReader = FfnReader { kind: KIND, read };

fn read(path: &Path, config: &Config, settings: &Map<String, Value>) -> dsmoe_core::Result<Arc<dyn FfnSpec>> {
    let again = "make the model again from its dense model";
    let wrong = |field: &str, problem: String| dsmoe_core::Error::field(path, field, problem, again);
    let spec = DuoSpec::deserialize(&Value::Object(settings.clone())).map_err(|cause| {
        let cause: String = cause.to_string().chars().take(200).filter(|c| !c.is_control()).collect();
        wrong("ffn", format!("is not of type {KIND}: {cause}"))
    })?;
    let least = config.layers().map(|shape| shape.intermediate).min().unwrap_or(0);
    if !(1..=least).contains(&spec.small) {
        return Err(wrong(
            "ffn.small",
            format!("is {}, and layers have {least} neurons or more", spec.small),
        ));
    }
    if let Some((field, value, allowed)) = spec.wrong() {
        return Err(wrong(&format!("ffn.{field}"), format!("is {value} and not {allowed}")));
    }
    if spec.skip && spec.stage == Stage::Random {
        return Err(wrong("ffn.skip", "is true, and only a router skips".to_owned()));
    }
    if has_biases(config) {
        return Err(wrong("ffn.type", format!("is {KIND}, and the FFNs of this model have biases")));
    }
    Ok(Arc::new(spec))
}

/// Returns whether FFNs have biases, which would belong to neither of the two.
pub(super) fn has_biases(config: &Config) -> bool {
    config.architecture.mlp_bias || config.architecture.output_bias
}
