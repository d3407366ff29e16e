//! The `ffn` object of config.json for FFNs of type `topk`.

use std::path::Path;
use std::sync::Arc;

use dsmoe_core::config::{Config, experts_of_layers, maps_of_layers};
use dsmoe_core::ffn::{Ffn, FfnReader, FfnSpec, Gated};
use dsmoe_router::expert_map::ExpertMap;
use dsmoe_router::topk::{Scores, TopKConfig};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ffn::TopkMoeFfn;
use super::layers::{TopkLayers, with_experts};
use super::spec::{GateNetwork, GateSpec, TopkSpec};

/// The `type`.
pub(super) const KIND: &str = "topk";
/// The most rows of a gate's first matrix that a file is believed.
const MOST_GATE_ROWS: usize = 1 << 16;

/// [`TopkSpec`] as it is stored; `num_experts` are those to choose from, and as many gates where none share one.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    num_experts: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    experts_per_layer: Option<Vec<usize>>,
    top_k: usize,
    num_residual: usize,
    scores: Scores,
    score_scale: f64,
    gate: GateNetwork,
    normalize: bool,
    noise: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    bias: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gate_hidden: Option<usize>,
    balance_weight: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expert_map: Option<Vec<Vec<u32>>>,
}

impl TopkSpec {
    fn stored(&self) -> Stored {
        let TopKConfig { num_experts, top_k, num_residual, scores, score_scale } = self.router;
        let GateSpec { network, normalize, noise, bias, hidden } = self.gate;
        Stored {
            num_experts,
            experts_per_layer: None,
            top_k,
            num_residual,
            scores,
            // The shortest decimal of the f32, not the many digits of its f64.
            score_scale: score_scale.to_string().parse().unwrap_or(f64::from(score_scale)),
            gate: network,
            normalize,
            noise,
            bias,
            gate_hidden: hidden,
            balance_weight: self.balance_weight,
            expert_map: None,
        }
    }

    fn of(stored: &Stored) -> dsmoe_router::Result<TopkSpec> {
        let wrong = dsmoe_router::Error::range;
        let score_scale = stored.score_scale as f32;
        if !(score_scale.is_finite() && score_scale > 0.0) {
            return Err(wrong("score_scale", stored.score_scale, "a positive number"));
        }
        let &Stored { num_experts, top_k, num_residual, scores, bias, .. } = stored;
        if bias && stored.gate != GateNetwork::Linear {
            return Err(dsmoe_router::Error::range("bias", bias, "false, but for a linear gate"));
        }
        if let Some(hidden) = stored.gate_hidden {
            let allowed = match stored.gate {
                GateNetwork::Mlp => "1 to 65536",
                GateNetwork::Linear | GateNetwork::Neuron => "no value, but for an mlp",
            };
            if stored.gate != GateNetwork::Mlp || !(1..=MOST_GATE_ROWS).contains(&hidden) {
                return Err(dsmoe_router::Error::range("gate_hidden", hidden, allowed));
            }
        }
        if !(stored.balance_weight.is_finite() && stored.balance_weight >= 0.0) {
            return Err(wrong("balance_weight", stored.balance_weight, "0 or a positive number"));
        }
        // Gates that share experts are more than these.
        let lists = stored.expert_map.iter().flatten().map(Vec::len);
        TopKConfig::new(lists.chain([num_experts]).max().unwrap_or(num_experts), top_k)?;
        Ok(TopkSpec {
            router: TopKConfig { num_experts, top_k, num_residual, scores, score_scale },
            gate: GateSpec {
                network: stored.gate,
                normalize: stored.normalize,
                noise: stored.noise,
                bias: stored.bias,
                hidden: stored.gate_hidden,
            },
            balance_weight: stored.balance_weight,
        })
    }
}

/// Returns the settings of `spec` if it is a top-k FFN: those of the layer of most experts, where layers differ.
pub(crate) fn spec_of(spec: &dyn FfnSpec) -> Option<TopkSpec> {
    let stored = Stored::deserialize(&Value::Object(spec.settings())).ok()?;
    TopkSpec::of(&stored).ok().filter(|_| spec.kind() == KIND)
}

impl FfnSpec for TopkSpec {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn settings(&self) -> Map<String, Value> {
        match serde_json::to_value(self.stored()) {
            Ok(Value::Object(map)) => map,
            _ => unreachable!("a struct of numbers and names is an object"),
        }
    }

    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
        Box::new(TopkMoeFfn::of(Gated::of_layer(config, layer), *self))
    }

    fn num_experts(&self, _layer: usize) -> usize {
        self.all_experts()
    }

    fn top_k(&self) -> Option<usize> {
        Some(self.router.top_k)
    }

    fn with_top_k(&self, top_k: usize) -> Option<Arc<dyn FfnSpec>> {
        Some(Arc::new(TopkSpec { router: TopKConfig { top_k, ..self.router }, ..*self }))
    }

    fn with_experts(&self, counts: &[usize], maps: Option<Vec<Arc<ExpertMap>>>) -> Option<Arc<dyn FfnSpec>> {
        Some(with_experts(self, counts, maps))
    }

    fn active_experts(&self) -> Option<f64> {
        Some(TopkSpec::active_experts(self) as f64)
    }

    fn blocks(&self, _layer: usize) -> Option<usize> {
        Some(self.all_experts())
    }
}

/// Reads top-k FFNs.
pub(crate) static READER: FfnReader = FfnReader { kind: KIND, read };

fn read(path: &Path, config: &Config, settings: &Map<String, Value>) -> dsmoe_core::Result<Arc<dyn FfnSpec>> {
    let wrong = |field: &str, problem: String, help: &'static str| {
        dsmoe_core::Error::field(path, field, problem, help)
    };
    let again = "make the model again from its dense model";
    let stored = Stored::deserialize(&Value::Object(settings.clone()))
        .map_err(|cause| wrong("ffn", format!("is not of type {KIND}: {}", one_line(&cause)), again))?;
    let spec = TopkSpec::of(&stored).map_err(|cause| wrong("ffn:", cause.to_string(), again))?;
    // Bounded before it is added to or divided by.
    let most = config.layers().map(|shape| shape.intermediate).max().unwrap_or(0);
    if spec.router.num_residual > most || spec.router.num_experts > most {
        let problem = format!("are more than the {most} neurons of a layer");
        return Err(wrong("ffn.num_experts and ffn.num_residual", problem, again));
    }
    let has_layers = stored.experts_per_layer.is_some() || stored.expert_map.is_some();
    let spec: Arc<dyn FfnSpec> = match has_layers {
        true => Arc::new(layers(path, config, stored, spec)?),
        false => Arc::new(spec),
    };
    for (layer, shape) in config.layers().enumerate() {
        let (experts, neurons) = (spec.num_experts(layer), shape.intermediate);
        if !neurons.is_multiple_of(experts) {
            let problem = format!(
                "make {experts} experts, and layer {layer} has {neurons} neurons, which they do not divide"
            );
            return Err(wrong("ffn.num_experts and ffn.num_residual", problem, again));
        }
    }
    Ok(spec)
}

/// Returns the settings of layers of different numbers of experts, or of gates that share them; `spec` is of the layer of most.
fn layers(path: &Path, config: &Config, stored: Stored, spec: TopkSpec) -> dsmoe_core::Result<TopkLayers> {
    const PREFIX: &str = "ffn.";
    let experts = stored.experts_per_layer.as_deref();
    let experts = experts_of_layers(path, PREFIX, experts, [stored.num_experts, config.num_layers])?;
    let maps = stored.expert_map.map(|maps| maps_of_layers(path, PREFIX, maps, &experts)).transpose()?;
    let layers = TopkLayers::of(spec, experts, maps);
    let (top_k, fewest) = (spec.router.top_k, layers.fewest());
    if top_k > fewest {
        let problem = format!("is {top_k} and a layer has {fewest} gates");
        let help = format!("use an integer from 1 to {fewest}");
        return Err(dsmoe_core::Error::field(path, "ffn.top_k", problem, help));
    }
    Ok(layers)
}

/// A parser's message, whatever is in the file, as one line of bounded length.
fn one_line(cause: &serde_json::Error) -> String {
    cause.to_string().chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
