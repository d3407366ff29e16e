//! The objects of config.json that only this program reads.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::fields::{Fields, LARGEST_DIMENSION};
use super::{Architecture, Config, LayerShape, OUTPUT_BIAS_KEY, THRESHOLDS_KEY, largest};
use crate::error::{Result, shown};
use crate::remedy::Remedy;

impl<'a> Fields<'a> {
    /// Checks that `model_type` and the keys that only this program reads go together.
    pub(super) fn check_kind(&self) -> Result<()> {
        let keys = ["dsmoe", "ffn", "layer_shapes", OUTPUT_BIAS_KEY, THRESHOLDS_KEY];
        let own = keys.into_iter().find(|key| self.get(key).is_some());
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

    /// Returns whether the FFNs of a model of these switches have a bias of their output.
    pub(super) fn output_bias(&self, architecture: &Architecture) -> Result<bool> {
        let has = self.flag(OUTPUT_BIAS_KEY)?.unwrap_or(false);
        if has && architecture.mlp_bias {
            let help = "add it to the bias of down_proj and remove the key";
            return Err(self.wrong(OUTPUT_BIAS_KEY, "is true beside mlp_bias", help));
        }
        Ok(has)
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
}
