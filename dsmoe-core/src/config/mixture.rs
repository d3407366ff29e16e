//! Configurations of mixtures of experts: read, made of a dense model's, and with other experts.

use std::path::Path;
use std::sync::Arc;

use dsmoe_router::mixture::MixtureConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::experts::{experts_of_layers, lists_of_maps, maps_of_layers};
use super::fields::Fields;
use super::{BASE_KEY, Config, LayerShape, MixtureSpec};
use crate::error::{Error, Result, shown};
use crate::family::Family;
use crate::json::object;

/// The `type` of the `ffn` object of a mixture that its family's format does not hold.
pub(crate) const KIND: &str = "mixture";

/// [`MixtureSpec`] as the `ffn` object holds it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    num_experts: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    experts_per_layer: Option<Vec<usize>>,
    top_k: usize,
    renormalise: bool,
    expert_width: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shared_width: Option<usize>,
    balance_weight: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expert_map: Option<Vec<Vec<u32>>>,
}

impl MixtureSpec {
    /// Returns the keys of the `ffn` object, but `type`.
    pub(crate) fn to_settings(&self) -> Map<String, Value> {
        let stored = Stored {
            num_experts: self.most_experts(),
            experts_per_layer: (!self.is_even()).then(|| self.experts.clone()),
            top_k: self.top_k,
            renormalise: self.renormalise,
            expert_width: self.width,
            shared_width: self.shared,
            balance_weight: self.balance_weight,
            expert_map: self.maps.as_deref().map(lists_of_maps),
        };
        match serde_json::to_value(stored) {
            Ok(Value::Object(map)) => map,
            _ => unreachable!("a struct of numbers is an object"),
        }
    }
}

impl Fields<'_> {
    /// Reads the experts of a family of mixtures.
    pub(super) fn mixture(&self, family: &Family, num_layers: usize) -> Result<Option<MixtureSpec>> {
        let Some(mixture) = &family.mixture else { return Ok(None) };
        if self.text("model_type")? != Some("dsmoe") {
            return mixture.read(self, num_layers).map(Some);
        }
        match self.ffn()? {
            Some((KIND, settings)) => {
                let fields = Fields { path: self.path, prefix: "ffn.", map: &settings };
                fields.stored_mixture(mixture.shared, num_layers).map(Some)
            }
            _ => {
                let problem = format!("is {:?}, whose FFNs are experts already", family.model_type);
                Err(self.wrong(BASE_KEY, problem, "name the family of a dense model"))
            }
        }
    }

    /// Reads the `ffn` object of a mixture.
    fn stored_mixture(&self, has_shared: bool, num_layers: usize) -> Result<MixtureSpec> {
        let stored = Stored::deserialize(&Value::Object(self.map.clone())).map_err(|cause| {
            let problem = format!("is not of type {KIND}: {}", shown(&cause.to_string()));
            Error::field(self.path, "ffn", problem, "make the model again")
        })?;
        let width = self.dimension("expert_width")?;
        let shared = self.dimension_opt("shared_width")?;
        if shared.is_some() != has_shared {
            let [is, help] = match has_shared {
                true => ["is missing, and layers of this family have a shared expert", "add it"],
                false => ["is present, and layers of this family have no shared expert", "remove it"],
            };
            return Err(self.wrong("shared_width", is, help));
        }
        self.bounded("expert_width", width, self.dimension("num_experts")?)?;
        let (most, experts) = (stored.num_experts, stored.experts_per_layer.as_deref());
        let experts = experts_of_layers(self.path, self.prefix, experts, [most, num_layers])?;
        let maps = stored.expert_map.map(|maps| maps_of_layers(self.path, self.prefix, maps, &experts));
        let maps = maps.transpose()?;
        let Stored { top_k, renormalise, .. } = stored;
        let balance_weight = self.not_negative("balance_weight")?.unwrap_or(0.0);
        let spec = MixtureSpec { top_k, renormalise, width, shared, balance_weight, experts, maps };
        let fewest = (0..num_layers).map(|layer| spec.gates(layer)).min().unwrap_or(0);
        MixtureConfig::new(fewest, top_k, renormalise).map_err(|_| {
            let problem = format!("is {top_k} and a layer has {fewest} gates");
            self.wrong("top_k", problem, format!("use an integer from 1 to {fewest}"))
        })?;
        Ok(spec)
    }

    /// Checks that the layers of `config` have the neurons of their experts.
    pub(super) fn check_neurons(&self, config: &Config, spec: &MixtureSpec) -> Result<()> {
        let differs = |&layer: &usize| config.layer(layer).intermediate != spec.neurons(layer);
        let Some(layer) = (0..config.num_layers).find(differs) else { return Ok(()) };
        let (experts, width, neurons) = (spec.experts[layer], spec.width, config.layer(layer).intermediate);
        let problem =
            format!("has {neurons} neurons in layer {layer}, and {experts} experts of {width} are there");
        Err(self.wrong("layer_shapes", problem, "make the model again"))
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
        let MixtureConfig { renormalise, .. } = MixtureConfig::new(num_experts, top_k, true)?;
        let spec = MixtureSpec {
            top_k,
            renormalise,
            width: self.intermediate,
            shared: None,
            balance_weight: mixture.balance_weight,
            experts: vec![num_experts; self.num_layers],
            maps: None,
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

    /// Returns the experts of a mixture; none for another model.
    pub fn mixture(&self) -> Option<&MixtureSpec> {
        self.ffn.as_deref().and_then(|spec| spec.as_mixture())
    }

    /// Replaces the experts of a mixture. The family's own format is kept where it holds them; otherwise config.json gets an
    /// `ffn` object of type `mixture`.
    ///
    /// # Panics
    /// The model is no mixture, or `spec` is of another number of layers or has a layer without experts.
    pub fn set_mixture(&mut self, spec: MixtureSpec) {
        let family = self.family.mixture.as_ref().filter(|_| self.mixture().is_some());
        let family = family.expect("config: a mixture whose experts are replaced");
        assert_eq!(spec.experts.len(), self.num_layers, "config: experts of layers");
        let shape = |(i, experts): (usize, &usize)| LayerShape {
            intermediate: experts * spec.width,
            ..self.layer(i)
        };
        self.set_layers(spec.experts.iter().enumerate().map(shape).collect());
        match spec.fits_family() {
            true => family.write(&mut self.raw, &spec),
            false => {
                family.remove(&mut self.raw);
                self.raw.insert("intermediate_size".to_owned(), json!(self.intermediate));
            }
        }
        self.ffn = Some(Arc::new(spec));
    }

    /// Lowers the number of experts that are chosen for every token.
    ///
    /// # Errors
    /// Their number is not fixed, or `top_k` is not in 1 to it.
    pub fn lower_top_k(&mut self, top_k: usize) -> Result<()> {
        let spec = self.ffn.as_ref().and_then(|spec| Some((spec.top_k()?, spec.with_top_k(top_k)?)));
        let Some((before, lowered)) = spec else {
            let problem =
                format!("tokens of this model run no fixed number of experts, and {top_k} are asked for");
            return Err(Error::argument(problem, "use a mixture of experts"));
        };
        if !(1..=before).contains(&top_k) {
            let problem = format!("{top_k} experts of a token are asked for, and this model runs {before}");
            return Err(Error::argument(problem, format!("use 1 to {before}")));
        }
        match lowered.as_mixture() {
            Some(spec) => self.set_mixture(spec.clone()),
            None => self.ffn = Some(lowered),
        }
        Ok(())
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
