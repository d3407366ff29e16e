//! Reading the keys of a JSON object, with errors that name file and key.

use std::path::Path;

use dsmoe_router::RouterConfig;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Config, FORMAT_VERSION, LARGEST_DIMENSION, LayerShape, MoeConfig, RopeScaling, StoredMoe, largest,
};
use crate::error::{Error, Result, shown};
use crate::remedy::Remedy;

/// Access to one JSON object, with errors that name file and key.
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    pub(super) prefix: &'a str,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// Returns the value, unless absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn wrong(&self, key: &str, problem: impl Into<String>, help: impl Into<Remedy>) -> Error {
        Error::field(self.path, format!("{}{key}", self.prefix), problem, help)
    }

    fn is_not(&self, key: &str, value: &Value, help: impl Into<Remedy>) -> Error {
        self.wrong(key, format!("is {}", shown(&value.to_string())), help)
    }

    fn integer_opt(&self, key: &str, largest: u64) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=largest).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.is_not(key, value, format!("use an integer from 1 to {largest}"))),
        }
    }

    pub(super) fn integer(&self, key: &str, largest: u64) -> Result<usize> {
        self.integer_opt(key, largest)?.ok_or_else(|| self.wrong(key, "is missing", "add it"))
    }

    pub(super) fn dimension(&self, key: &str) -> Result<usize> {
        self.integer(key, LARGEST_DIMENSION)
    }

    pub(super) fn dimension_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.integer_opt(key, LARGEST_DIMENSION)?.unwrap_or(default))
    }

    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x > 0.0 && x.is_finite() => Ok(Some(x)),
            _ => Err(self.is_not(key, value, "use a positive number")),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.is_not(key, value, "use true or false"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.is_not(key, value, "use a text"))
    }

    /// Reads a token id or a list of them.
    pub(super) fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.is_not(key, value, "use a token id or a list of them"))
    }

    /// Refuses what would change the model's function and is not implemented.
    pub(super) fn refuse_unsupported(&self) -> Result<()> {
        match self.text("model_type")? {
            Some("llama" | "dsmoe") => {}
            None => return Err(self.wrong("model_type", "is missing", "use a LLaMA with \"llama\" here")),
            Some(other) => {
                let problem = format!("is {:?} and not supported", shown(other));
                return Err(self.wrong("model_type", problem, "use a model of type llama or dsmoe"));
            }
        }
        match self.text("hidden_act")? {
            None | Some("silu") => {}
            Some(other) => {
                let problem = format!("is {:?} and not supported", shown(other));
                return Err(self.wrong("hidden_act", problem, "use a model with silu"));
            }
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.flag(key)? == Some(true) {
                return Err(self.wrong(key, "is true and not supported", "use a model without biases"));
            }
        }
        if self.get("quantization_config").is_some() {
            let help = "use the checkpoint it was quantised from";
            return Err(self.wrong("quantization_config", "is present and not supported", help));
        }
        if self.positive("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(self.wrong("partial_rotary_factor", "is not supported", "use a model without it"));
        }
        Ok(())
    }

    fn object(&self, key: &'a str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.is_not(key, value, "use an object or null"))
    }

    /// Checks that `model_type` and the keys that only this program reads go together.
    pub(super) fn check_kind(&self) -> Result<()> {
        let own = ["dsmoe", "ffn", "layer_shapes"].into_iter().find(|key| self.get(key).is_some());
        match (self.text("model_type")?, own) {
            (Some("dsmoe"), None) => {
                let help = "convert the model again, or set model_type to llama";
                Err(self.wrong("dsmoe", "is missing", help))
            }
            (Some("dsmoe"), Some(_)) if self.get("dsmoe").is_some() && self.get("ffn").is_some() => {
                Err(self.wrong("ffn", "is present beside dsmoe", "remove one of them"))
            }
            (Some("dsmoe"), Some(_)) | (_, None) => Ok(()),
            (_, Some(key)) => {
                let help = "set model_type to dsmoe or remove the object";
                Err(self.wrong(key, "is present but model_type is not dsmoe", help))
            }
        }
    }

    /// Returns the kind of an FFN of another crate, and its settings.
    pub(super) fn ffn(&self) -> Result<Option<(&'a str, Map<String, Value>)>> {
        let Some(map) = self.object("ffn")? else { return Ok(None) };
        let fields = Fields { path: self.path, prefix: "ffn.", map };
        let kind = fields.text("type")?.ok_or_else(|| fields.wrong("type", "is missing", "add it"))?;
        let others = map.iter().filter(|(key, _)| *key != "type");
        Ok(Some((kind, others.map(|(key, value)| (key.clone(), value.clone())).collect())))
    }

    /// Returns the sizes of every layer of `config`, where they are given and differ.
    pub(super) fn layer_shapes(&self, config: &Config) -> Result<Option<Vec<LayerShape>>> {
        let Some(value) = self.get("layer_shapes") else { return Ok(None) };
        let help = "give one object with num_attention_heads, num_key_value_heads and intermediate_size for each \
                    layer";
        let layers = Vec::<LayerShape>::deserialize(value)
            .map_err(|cause| self.wrong("layer_shapes", shown(&format!("is wrong ({cause})")), help))?;
        if layers.len() != config.num_layers {
            let problem =
                format!("has {} entries and num_hidden_layers is {}", layers.len(), config.num_layers);
            return Err(self.wrong("layer_shapes", problem, help));
        }
        for (i, &LayerShape { num_heads, num_kv_heads, intermediate }) in layers.iter().enumerate() {
            let wrong = |key: &str, problem: String, help: Remedy| {
                Err(self.wrong(&format!("layer_shapes[{i}].{key}"), problem, help))
            };
            let sizes = [
                ("num_attention_heads", num_heads),
                ("num_key_value_heads", num_kv_heads),
                ("intermediate_size", intermediate),
            ];
            for (key, size) in sizes {
                if size == 0 || size as u64 > LARGEST_DIMENSION {
                    let help = format!("use an integer from 1 to {LARGEST_DIMENSION}");
                    return wrong(key, format!("is {size}"), help.into());
                }
            }
            if !num_heads.is_multiple_of(num_kv_heads) {
                let problem =
                    format!("is {num_kv_heads} and does not divide num_attention_heads {num_heads}");
                return wrong("num_key_value_heads", problem, "correct one of them".into());
            }
        }
        let most = largest(&layers);
        for (key, stated, most) in [
            ("num_attention_heads", config.num_heads, most.num_heads),
            ("num_key_value_heads", config.num_kv_heads, most.num_kv_heads),
            ("intermediate_size", config.intermediate, most.intermediate),
        ] {
            if stated != most {
                let problem = format!("is {stated} and the largest of layer_shapes is {most}");
                return Err(self.wrong(key, problem, "correct one of them"));
            }
        }
        Ok(layers.iter().any(|layer| *layer != layers[0]).then_some(layers))
    }

    pub(super) fn moe(&self) -> Result<Option<MoeConfig>> {
        let Some(stored) = self.get("dsmoe") else { return Ok(None) };
        let version = stored.get("format_version").and_then(Value::as_u64);
        if let Some(version) = version.filter(|&version| version != FORMAT_VERSION) {
            let problem = format!("is {version} and this program reads {FORMAT_VERSION}");
            return Err(self.wrong("dsmoe.format_version", problem, "update it, or convert the model again"));
        }
        let stored = StoredMoe::deserialize(stored)
            .map_err(|cause| self.wrong("dsmoe", shown(&cause.to_string()), "convert the model again"))?;
        let router = RouterConfig {
            num_experts: stored.num_experts,
            threshold: stored.threshold as f32,
            gate_value: stored.gate_value,
            rescale: stored.rescale,
            zero_active: stored.zero_active,
            ste: stored.ste,
        };
        router.validate().map_err(|cause| Error::Field {
            path: self.path.to_path_buf(),
            field: "dsmoe:".to_owned(),
            problem: cause.to_string(),
            help: "convert the model again".into(),
        })?;
        if let Some(share) = stored.active_target.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
            let problem = format!("is {share}");
            return Err(self.wrong("dsmoe.active_target", problem, "use a share above 0 and up to 1"));
        }
        Ok(Some(MoeConfig {
            router,
            partition: stored.partition,
            router_bias: stored.router_bias,
            active_target: stored.active_target,
            untrained: stored.untrained,
        }))
    }

    /// Reads base and scaling in either spelling: `rope_theta` and `rope_scaling`, or `rope_parameters`.
    pub(super) fn rope(&self) -> Result<(f64, RopeScaling)> {
        let mut theta = self.positive("rope_theta")?;
        let mut scaling = match self.map.contains_key("rope_scaling") {
            true => Some(self.scaling("rope_scaling.", self.object("rope_scaling")?)?),
            false => None,
        };
        if let Some(map) = self.object("rope_parameters")? {
            let inner = Fields { path: self.path, prefix: "rope_parameters.", map };
            if let Some((key, _)) = map.iter().find(|(_, value)| value.is_object()) {
                let help = "use a model with one set of rope_parameters";
                return Err(inner.wrong(&shown(key), "is an object and not supported", help));
            }
            let differ = |key: &str, other: &str| {
                inner.wrong(key, format!("differs from {other}"), "remove the one that is wrong")
            };
            let new_theta = inner.positive("rope_theta")?;
            if theta.is_some() && new_theta.is_some() && theta != new_theta {
                return Err(differ("rope_theta", "rope_theta"));
            }
            let new_scaling = self.scaling("rope_parameters.", Some(map))?;
            if scaling.is_some_and(|scaling| scaling != new_scaling) {
                return Err(differ("rope_type", "rope_scaling"));
            }
            theta = theta.or(new_theta);
            scaling = Some(new_scaling);
        }
        Ok((theta.unwrap_or(10_000.0), scaling.unwrap_or(RopeScaling::None)))
    }

    fn scaling(&self, prefix: &str, map: Option<&Map<String, Value>>) -> Result<RopeScaling> {
        let Some(map) = map else { return Ok(RopeScaling::None) };
        let fields = Fields { path: self.path, prefix, map };
        let (kind, legacy) = (fields.text("rope_type")?, fields.text("type")?);
        if let (Some(kind), Some(legacy)) = (kind, legacy)
            && kind != legacy
        {
            return Err(fields.wrong("type", "differs from rope_type", "remove the one that is wrong"));
        }
        let key = if kind.is_some() { "rope_type" } else { "type" };
        match kind.or(legacy) {
            None | Some("default") => Ok(RopeScaling::None),
            Some("llama3") => {
                let need = |key: &str| {
                    fields.positive(key)?.ok_or_else(|| fields.wrong(key, "is missing", "add it"))
                };
                let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
                if low >= high {
                    let problem = format!("is {low} and not below high_freq_factor {high}");
                    return Err(fields.wrong("low_freq_factor", problem, "correct one of them"));
                }
                Ok(RopeScaling::Llama3 {
                    factor: need("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position: fields.dimension("original_max_position_embeddings")?,
                })
            }
            Some(other) => {
                let problem = format!("is {:?} and not supported", shown(other));
                Err(fields.wrong(key, problem, "use a model whose type is default or llama3"))
            }
        }
    }
}
