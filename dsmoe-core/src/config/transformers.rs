//! `config.json` of a directory that transformers runs, by remote code where transformers has no class for the model.

use serde_json::{Value, json};

use super::{BASE_KEY, Config};
use crate::json::object;

/// The class of the configuration in the remote code.
const CONFIG_CLASS: &str = "configuration_dsmoe.DsmoeConfig";
/// The class of the model in the remote code.
const MODEL_CLASS: &str = "modeling_dsmoe.DsmoeForCausalLM";

impl Config {
    /// Returns whether transformers runs the model by the remote code: it has experts or layers of different sizes, or
    /// heads that do not divide the hidden size, which the configurations of transformers 5 refuse.
    pub(crate) fn needs_remote_code(&self) -> bool {
        self.model_type() == "dsmoe" || (!self.hidden.is_multiple_of(self.num_heads) && !self.family.fused)
    }

    /// Returns the class in transformers of the dense model of this family.
    pub(crate) fn base_class(&self) -> &'static str {
        self.family.class
    }

    /// Returns the name of the source model on a hub, `owner/name`, if the configuration states one.
    pub(crate) fn source_name(&self) -> Option<String> {
        let name = self.raw.get("_name_or_path")?.as_str()?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let (owner, model) = name.split_once('/')?;
        let sound = |part: &str| !part.is_empty() && part.len() <= 100 && part.chars().all(is_plain);
        (sound(owner) && sound(model) && !owner.starts_with('.')).then(|| name.to_owned())
    }

    /// Returns the text of `config.json` for transformers: that of [`Config::to_json`], and where the model needs it
    /// the classes of the remote code.
    pub(crate) fn to_transformers_json(&self) -> String {
        let mut map = object(&self.to_json());
        if self.needs_remote_code() {
            let classes = json!({"AutoConfig": CONFIG_CLASS, "AutoModelForCausalLM": MODEL_CLASS});
            map.insert("auto_map".to_owned(), classes);
            if self.is_dense() {
                let layers: Vec<_> = self.layers().collect();
                map.insert("model_type".to_owned(), json!("dsmoe"));
                map.insert("architectures".to_owned(), json!(["DsmoeForCausalLM"]));
                map.insert("layer_shapes".to_owned(), json!(layers));
                map.insert(BASE_KEY.to_owned(), json!(self.family.model_type));
            }
        }
        format!("{:#}\n", Value::Object(map))
    }
}
