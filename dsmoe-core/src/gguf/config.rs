//! The config.json that the metadata of a GGUF file stands for.
//!
//! A value that a file does not state, such as the activation or the layers with a window, follows from the architecture.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::arch::Arch;
use super::container::Container;
use super::rope;
use super::value::Value;
use crate::error::{Error, Result, shown};

pub(crate) const ARCHITECTURE_KEY: &str = "general.architecture";
const OTHER_MODEL: &str = "use a model of a supported architecture";
const FOREIGN: &str = "convert the model to GGUF again with a current converter";

/// Access to the keys of one architecture, with errors that name file and key.
pub(crate) struct Keys<'a> {
    pub(crate) path: &'a Path,
    pub(crate) container: &'a Container,
    pub(crate) arch: &'static Arch,
}

impl<'a> Keys<'a> {
    /// Finds the architecture of the file.
    pub(crate) fn new(path: &'a Path, container: &'a Container) -> Result<Keys<'a>> {
        let wrong =
            |problem: String, help: &str| Err(Error::field(path, ARCHITECTURE_KEY, problem, help.to_owned()));
        let Some(name) = container.metadata.get(ARCHITECTURE_KEY).and_then(Value::as_str) else {
            return wrong("is missing".into(), FOREIGN);
        };
        let Some(arch) = Arch::of(name) else {
            let problem = format!("is {:?} and not supported", shown(name));
            return wrong(problem, &format!("use a dense model of one of {}", Arch::names()));
        };
        let keys = Keys { path, container, arch };
        if keys.count("expert_count")?.is_some_and(|count| count > 0) {
            return Err(keys.wrong("expert_count", "is above 0: the model has experts", OTHER_MODEL));
        }
        Ok(Keys { arch: keys.variant()?, ..keys })
    }

    /// Returns the architecture among those that share its name.
    fn variant(&self) -> Result<&'static Arch> {
        let window = self.count("attention.sliding_window")?.is_some_and(|window| window > 0);
        Ok(match (self.arch.name, window) {
            ("llama", true) => self.arch.variant("mistral"),
            ("olmo2", true) => self.arch.variant("olmo3"),
            _ => self.arch,
        })
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch.name)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.container.metadata.get(&self.key(name))
    }

    pub(crate) fn wrong(&self, name: &str, problem: impl Into<String>, help: impl Into<String>) -> Error {
        Error::field(self.path, self.key(name), problem, help.into())
    }

    /// Returns an integer; a list of one number for each layer must hold one number alone.
    pub(crate) fn count(&self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let one = match value.as_list() {
            Some([first, rest @ ..]) if rest.iter().all(|other| other == first) => first,
            Some(_) => {
                let help = "use a model whose layers have one shape";
                return Err(self.wrong(name, "differs from layer to layer", help));
            }
            None => value,
        };
        let count = one.as_u64().ok_or_else(|| self.wrong(name, format!("is {value}"), FOREIGN))?;
        Ok(Some(count))
    }

    fn need(&self, name: &str) -> Result<u64> {
        self.count(name)?.ok_or_else(|| self.wrong(name, "is missing", FOREIGN))
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.wrong(name, format!("is {value}"), FOREIGN))
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, format!("is {value}"), FOREIGN))
    }

    fn has(&self, tensor: &str) -> bool {
        self.container.tensor(tensor).is_some()
    }

    /// Returns the number of query heads, key-value heads, and the width of a head.
    pub(crate) fn heads(&self) -> Result<(u64, u64, u64)> {
        let heads = self.need("attention.head_count")?;
        let kv_heads = self.count("attention.head_count_kv")?.unwrap_or(heads);
        let hidden = self.need("embedding_length")?;
        let head_dim = match self.count("attention.key_length")? {
            Some(width) => width,
            None if heads > 0 && hidden % heads == 0 => hidden / heads,
            None => {
                let problem = format!("is {heads} and does not divide embedding_length {hidden}");
                return Err(self.wrong("attention.head_count", problem, FOREIGN));
            }
        };
        if self.count("attention.value_length")?.is_some_and(|width| width != head_dim) {
            let help = "use a model whose keys and values have one width";
            return Err(self.wrong("attention.value_length", format!("is not {head_dim}"), help));
        }
        Ok((heads, kv_heads, head_dim))
    }
}

/// Returns the config.json of the model in the file.
pub(crate) fn config_json(path: &Path, container: &Container) -> Result<Map<String, Json>> {
    let keys = Keys::new(path, container)?;
    let mut map = sizes(&keys)?;
    map.extend(tokens(&keys)?);
    map.extend(biases(&keys));
    map.extend(rope::from_keys(&keys)?);
    map.extend(family(&keys)?);
    Ok(map)
}

fn object(value: Json) -> Map<String, Json> {
    match value {
        Json::Object(map) => map,
        _ => Map::new(),
    }
}

fn sizes(keys: &Keys<'_>) -> Result<Map<String, Json>> {
    let (heads, kv_heads, head_dim) = keys.heads()?;
    let vocab = match keys.container.tensor("token_embd.weight") {
        Some(embedding) => embedding.shape.first().map_or(0, |&rows| rows as u64),
        None => keys.need("vocab_size")?,
    };
    let eps = keys.number("attention.layer_norm_rms_epsilon")?;
    let eps = eps.ok_or_else(|| keys.wrong("attention.layer_norm_rms_epsilon", "is missing", FOREIGN))?;
    Ok(object(json!({
        "architectures": [keys.arch.class],
        "model_type": keys.arch.model_type,
        "vocab_size": vocab,
        "hidden_size": keys.need("embedding_length")?,
        "intermediate_size": keys.need("feed_forward_length")?,
        "num_hidden_layers": keys.need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.need("context_length")?,
        "rms_norm_eps": eps,
        "tie_word_embeddings": !keys.has("output.weight"),
    })))
}

/// Returns the ids of the special tokens. A token that ends a turn ends a text too.
fn tokens(keys: &Keys<'_>) -> Result<Map<String, Json>> {
    let id = |name: &str| -> Result<Option<u64>> {
        let key = format!("tokenizer.ggml.{name}");
        let Some(value) = keys.container.metadata.get(&key) else { return Ok(None) };
        let wrong = || Error::field(keys.path, key.as_str(), format!("is {value}"), FOREIGN);
        value.as_u64().map(Some).ok_or_else(wrong)
    };
    let mut ends: Vec<u64> = Vec::new();
    for name in ["eos_token_id", "eot_token_id"] {
        ends.extend(id(name)?.filter(|id| !ends.contains(id)));
    }
    let mut map = object(json!({ "bos_token_id": id("bos_token_id")? }));
    match &ends[..] {
        [] => {}
        [end] => drop(map.insert("eos_token_id".into(), json!(end))),
        ends => drop(map.insert("eos_token_id".into(), json!(ends))),
    }
    if let Some(pad) = id("padding_token_id")? {
        map.insert("pad_token_id".into(), json!(pad));
    }
    Ok(map)
}

/// Returns the keys of biases, for the families that have such keys.
fn biases(keys: &Keys<'_>) -> Map<String, Json> {
    let (attention, ffn) = (keys.has("blk.0.attn_q.bias"), keys.has("blk.0.ffn_up.bias"));
    match keys.arch.model_type {
        "llama" | "granite" | "smollm3" => object(json!({ "attention_bias": attention, "mlp_bias": ffn })),
        "qwen3" | "olmo2" | "olmo3" | "gemma" | "gemma2" | "gemma3_text" => {
            object(json!({ "attention_bias": attention }))
        }
        _ => Map::new(),
    }
}

/// Returns the keys that only some families have.
fn family(keys: &Keys<'_>) -> Result<Map<String, Json>> {
    let window = keys.count("attention.sliding_window")?.filter(|&window| window > 0);
    let mut map = object(match keys.arch.model_type {
        "mistral" => json!({ "sliding_window": window }),
        "qwen2" | "qwen3" => json!({ "use_sliding_window": false }),
        "phi3" => json!({ "sliding_window": window }),
        "olmo3" => json!({ "sliding_window": window }),
        "granite" => granite(keys)?,
        "gemma" => json!({ "hidden_activation": "gelu_pytorch_tanh" }),
        "gemma2" => gemma2(keys, window)?,
        "gemma3_text" => gemma3(keys, window)?,
        _ => json!({}),
    });
    let act = if keys.arch.norm_plus_one { "gelu_pytorch_tanh" } else { "silu" };
    map.insert("hidden_act".into(), json!(act));
    if keys.get("attention.temperature_scale").is_some() {
        return Err(keys.wrong("attention.temperature_scale", "is present and not supported", OTHER_MODEL));
    }
    Ok(map)
}

fn granite(keys: &Keys<'_>) -> Result<Json> {
    let scale = |name: &str| Ok::<_, Error>(keys.number(name)?.filter(|scale| *scale != 0.0));
    let (_, _, head_dim) = keys.heads()?;
    let attention = scale("attention.scale")?.unwrap_or_else(|| (head_dim as f64).sqrt().recip());
    Ok(json!({
        "embedding_multiplier": scale("embedding_scale")?.unwrap_or(1.0),
        "residual_multiplier": scale("residual_scale")?.unwrap_or(1.0),
        "logits_scaling": scale("logit_scale")?.unwrap_or(1.0),
        "attention_multiplier": attention,
    }))
}

/// Returns the square of the inverse of the attention scale: the width of a head, but in the largest models, which
/// have `largest` layers, hidden / heads.
fn query_scalar(keys: &Keys<'_>, largest: u64) -> Result<u64> {
    let (heads, _, head_dim) = keys.heads()?;
    Ok(if keys.need("block_count")? == largest { keys.need("embedding_length")? / heads } else { head_dim })
}

fn gemma2(keys: &Keys<'_>, window: Option<u64>) -> Result<Json> {
    Ok(json!({
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": query_scalar(keys, 46)?,
        "sliding_window": window.unwrap_or(4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping")?.unwrap_or(50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping")?.unwrap_or(30.0),
    }))
}

fn gemma3(keys: &Keys<'_>, window: Option<u64>) -> Result<Json> {
    // Without a window llama.cpp runs every layer as a full one.
    let pattern = match window {
        Some(_) => keys.count("attention.sliding_window_pattern")?.unwrap_or(6),
        None => 1,
    };
    Ok(json!({
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": query_scalar(keys, 62)?,
        "sliding_window": window.unwrap_or(4096),
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": keys.number("rope.freq_base_swa")?.unwrap_or(1e4),
        "attn_logit_softcapping": null,
        "final_logit_softcapping": keys.number("final_logit_softcapping")?,
    }))
}
