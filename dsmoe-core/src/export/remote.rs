//! The code by which transformers runs a sparse model, and the files that lead it there.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::{CONFIG_FILE, Config};
use crate::error::{Error, Result};
use crate::files::{is_present, write_synced};
use crate::json::{parse_object, read_tokenizer};

const CONFIGURATION_FILE: &str = "configuration_dsmoe.py";
const MODELING_FILE: &str = "modeling_dsmoe.py";
const CONFIGURATION: &str = include_str!("configuration_dsmoe.py");
const MODELING: &str = include_str!("modeling_dsmoe.py");
/// The classes of the base family that the files import.
const BASE_CONFIG: &str = "LlamaConfig";
const BASE_MODEL: &str = "LlamaForCausalLM";

const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// Writes config.json for transformers, and where the model needs it the remote code, on the classes of its family.
pub(super) fn write(config: &Config, dir: &Path) -> Result<()> {
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        write_synced(&path, text.as_bytes()).map_err(Error::io(&path))
    };
    if config.needs_remote_code() {
        let model = config.base_class();
        let of_family = config_class(model);
        put(CONFIGURATION_FILE, &CONFIGURATION.replace(BASE_CONFIG, &of_family))?;
        put(MODELING_FILE, &MODELING.replace(BASE_MODEL, model))?;
    }
    if let Some(text) = tokenizer_config(dir)? {
        put(TOKENIZER_CONFIG_FILE, &text)?;
    }
    put(CONFIG_FILE, &config.to_transformers_json())
}

/// Returns the class of the configuration that belongs to a class of models.
fn config_class(model: &str) -> String {
    match model {
        "Gemma3ForCausalLM" => "Gemma3TextConfig".to_owned(),
        model => model.replace("ForCausalLM", "Config"),
    }
}

/// The class of transformers for any tokenizer.json.
const ANY_CLASS: &str = "PreTrainedTokenizerFast";

/// Returns `tokenizer_config.json` with a class for the tokenizer, if it names none: transformers would look for one
/// by the type of the model, which it does not know. Of its own the class for any tokenizer gives token_type_ids, which
/// the models do not take.
fn tokenizer_config(dir: &Path) -> Result<Option<String>> {
    if !dir.join(TOKENIZER_FILE).is_file() {
        return Ok(None);
    }
    let path = dir.join(TOKENIZER_CONFIG_FILE);
    let mut map = if is_present(&path)? { parse_object(&path, &read_tokenizer(&path)?)? } else { Map::new() };
    let class = map.entry("tokenizer_class").or_insert(Value::Null);
    let named = !class.is_null();
    if !named {
        *class = json!(ANY_CLASS);
    }
    let gives_all = *class == ANY_CLASS && map.get("model_input_names").is_none_or(Value::is_null);
    if gives_all {
        map.insert("model_input_names".to_owned(), json!(["input_ids", "attention_mask"]));
    }
    if named && !gives_all {
        return Ok(None);
    }
    Ok(Some(format!("{:#}\n", Value::Object(map))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_classes_stand_where_they_are_replaced() {
        for (text, class, times) in [(CONFIGURATION, BASE_CONFIG, 1), (MODELING, BASE_MODEL, 1)] {
            assert_eq!(text.matches(class).count(), times, "{class}");
            assert!(text.contains(&format!("import {class} as Base")), "{class}");
        }
        assert_eq!(config_class("Qwen2ForCausalLM"), "Qwen2Config");
        assert_eq!(config_class("Gemma3ForCausalLM"), "Gemma3TextConfig");
    }

    #[test]
    fn a_tokenizer_gets_a_class_and_keeps_the_one_it_has() {
        let work = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(work.path().join(name), text).unwrap();
        assert_eq!(tokenizer_config(work.path()).unwrap(), None);
        put(TOKENIZER_FILE, "{}");
        let made = tokenizer_config(work.path()).unwrap().unwrap();
        assert!(made.contains("PreTrainedTokenizerFast"));
        let inputs = json!(["input_ids", "attention_mask"]);
        for (config, class) in [
            (r#"{"add_bos_token": true}"#, ANY_CLASS),
            (r#"{"add_bos_token": true, "tokenizer_class": null}"#, ANY_CLASS),
            (r#"{"add_bos_token": true, "tokenizer_class": "PreTrainedTokenizerFast"}"#, ANY_CLASS),
        ] {
            put(TOKENIZER_CONFIG_FILE, config);
            let made = tokenizer_config(work.path()).unwrap().unwrap();
            let made: Value = serde_json::from_str(&made).unwrap();
            let expected =
                json!({"add_bos_token": true, "tokenizer_class": class, "model_input_names": inputs});
            assert_eq!(made, expected, "{config}");
        }
        for config in [
            r#"{"tokenizer_class": "LlamaTokenizer"}"#,
            r#"{"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids"]}"#,
        ] {
            put(TOKENIZER_CONFIG_FILE, config);
            assert_eq!(tokenizer_config(work.path()).unwrap(), None, "{config}");
        }
    }
}
