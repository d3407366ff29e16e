//! Configurations of mixtures of experts: read, and made of a dense model's.

use std::path::Path;

use dsmoe_router::mixture::MixtureConfig;
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{BASE_KEY, Config, MixtureSpec};
use crate::error::{Error, Result};
use crate::family::Family;
use crate::json::object;

impl Fields<'_> {
    /// Reads the experts of a family of mixtures.
    pub(super) fn mixture(&self, family: &Family) -> Result<Option<MixtureSpec>> {
        let Some(mixture) = &family.mixture else { return Ok(None) };
        if self.get(BASE_KEY).is_some() {
            let problem = format!("is {:?}, whose FFNs are experts already", family.model_type);
            return Err(self.wrong(BASE_KEY, problem, "name the family of a dense model"));
        }
        mixture.read(self).map(Some)
    }
}

impl Config {
    /// Returns the configuration of the mixture of `family` whose experts all are the FFN of this dense model, with
    /// renormalised coefficients. `path` is that of this configuration, for messages.
    ///
    /// # Errors
    /// The model is not dense, its layers differ, or it does something that models of `family` do not; k is not in
    /// 1..=n; the experts are too many.
    pub(crate) fn to_mixture(
        &self,
        path: &Path,
        family: &'static Family,
        [num_experts, top_k]: [usize; 2],
    ) -> Result<Config> {
        let wrong =
            |field: &str, problem: String, help: &'static str| Err(Error::field(path, field, problem, help));
        let Some(mixture) = family.mixture.as_ref().filter(|mixture| !mixture.shared) else {
            let problem = format!("models of type {} are not made of a dense one", family.model_type);
            return Err(Error::argument(problem, "use mixtral, qwen3_moe or olmoe"));
        };
        if !self.is_dense() {
            let problem = format!("is {:?}, which has experts or thresholds already", self.model_type());
            return wrong("model_type", problem, "use a dense model");
        }
        if !self.is_even() {
            return wrong("layer_shapes", "has layers of different sizes".to_owned(), "use another model");
        }
        let spec = MixtureSpec {
            router: MixtureConfig::new(num_experts, top_k, true)?,
            width: self.intermediate,
            shared: None,
            balance_weight: mixture.balance_weight,
        };
        let mut raw = object(&self.to_json());
        self.state_defaults(&mut raw);
        raw.insert("model_type".to_owned(), json!(family.model_type));
        raw.insert("architectures".to_owned(), json!([family.class]));
        mixture.write(&mut raw, &spec);
        let made = Config::from_json(path, &Value::Object(raw).to_string())?;
        let same = made.architecture == self.architecture
            && made.qk_norm_widths(0) == self.qk_norm_widths(0)
            && (made.head_dim, made.max_position) == (self.head_dim, self.max_position)
            && made.tie_word_embeddings == self.tie_word_embeddings;
        if !same {
            let has = self.architecture.differences();
            let has = if has.is_empty() { "what it has".to_owned() } else { has.join(", ") };
            let problem = format!(
                "is {:?} with {has}, and a model of type {} cannot be the same function",
                self.model_type(),
                family.model_type
            );
            return wrong("model_type", problem, "use a family of experts that has it");
        }
        Ok(made)
    }

    /// Writes out what another family would read otherwise where the key is absent.
    fn state_defaults(&self, raw: &mut Map<String, Value>) {
        let window = self.architecture.layers.iter().find_map(|layer| layer.window);
        for (key, value) in [
            ("rms_norm_eps", json!(self.rms_norm_eps)),
            ("max_position_embeddings", json!(self.max_position)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("head_dim", json!(self.head_dim)),
            ("num_key_value_heads", json!(self.num_kv_heads)),
            ("bos_token_id", json!(self.bos_token_id)),
            ("eos_token_id", json!(self.eos_token_ids)),
            ("sliding_window", json!(window)),
        ] {
            if !raw.contains_key(key) {
                raw.insert(key.to_owned(), value);
            }
        }
    }
}
