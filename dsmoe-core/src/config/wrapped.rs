//! Models that read images, too: the configuration of their text model, which is all that is read of them.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use crate::error::Result;

/// A model of a vision tower, a projector and a text model.
#[derive(Debug)]
struct Wrapper {
    model_type: &'static str,
    /// `model_type` of a text model that names none.
    text: &'static str,
    /// Sizes that transformers leaves out of the text model's object where they are these.
    sizes: [(&'static str, u64); 6],
}

static WRAPPERS: [Wrapper; 2] = [
    Wrapper { model_type: "gemma3", text: "gemma3_text", sizes: sizes([262_208, 2304, 9216, 26, 8, 4]) },
    Wrapper { model_type: "mistral3", text: "mistral", sizes: sizes([32_000, 4096, 14_336, 32, 32, 8]) },
];

/// Keys of tokens, for which the outer object holds: it is the one that generation uses.
const OF_TOKENS: [&str; 3] = ["bos_token_id", "eos_token_id", "pad_token_id"];
/// Keys that hold for the text model where it does not have them itself.
const OF_WHOLE: [&str; 4] = ["tie_word_embeddings", "dtype", "torch_dtype", "_name_or_path"];

const fn sizes(values: [u64; 6]) -> [(&'static str, u64); 6] {
    [
        ("vocab_size", values[0]),
        ("hidden_size", values[1]),
        ("intermediate_size", values[2]),
        ("num_hidden_layers", values[3]),
        ("num_attention_heads", values[4]),
        ("num_key_value_heads", values[5]),
    ]
}

/// The prefix of the text model's keys, for messages.
pub(super) const PREFIX: &str = "text_config.";

/// Returns the configuration of the text model of a model that reads images, too, as if it stood alone; none of a model
/// that does not.
pub(super) fn text_model(outer: &Fields<'_>) -> Result<Option<Map<String, Value>>> {
    let model_type = outer.text("model_type")?;
    let Some(wrapper) = WRAPPERS.iter().find(|wrapper| model_type == Some(wrapper.model_type)) else {
        return Ok(None);
    };
    const KEY: &str = "text_config";
    let Some(inner) = outer.object(KEY)? else {
        return Err(outer.wrong(KEY, "is missing", "use the config.json that belongs to the weights"));
    };
    let mut text = inner.clone();
    text.entry("model_type").or_insert_with(|| json!(wrapper.text));
    for (key, size) in wrapper.sizes {
        text.entry(key).or_insert_with(|| json!(size));
    }
    for key in OF_TOKENS {
        if let Some(value) = outer.get(key) {
            text.insert(key.to_owned(), value.clone());
        }
    }
    for key in OF_WHOLE {
        if let Some(value) = outer.get(key) {
            text.entry(key).or_insert_with(|| value.clone());
        }
    }
    Ok(Some(text))
}

/// Returns what a user should know about a text model that was read in that way.
pub(super) fn notice(outer: &Fields<'_>) -> Result<String> {
    let model_type = outer.text("model_type")?.unwrap_or_default();
    Ok(format!("{model_type} reads images, too: its vision tower and projector are left out"))
}
