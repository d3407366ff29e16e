//! The tokenizer in GGUF's metadata as tokenizer.json and tokenizer_config.json.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::config::Keys;
use super::container::Container;
use super::pre::{Pre, byte_level};
use super::value::Value;
use crate::error::{Error, Result, shown};

const PREFIX: &str = "tokenizer.ggml.";
const OTHER: &str = "put the original tokenizer.json into a model directory with these weights";
/// SentencePiece's sign for a space.
pub(crate) const SPACE: &str = "\u{2581}";
/// The most characters of a token that is made by merges.
const LONGEST: usize = 512;

/// Kinds of tokens, as files number them.
pub(crate) mod kind {
    /// An ordinary token.
    pub(crate) const NORMAL: i64 = 1;
    /// The unknown token.
    pub(crate) const UNKNOWN: i64 = 2;
    /// A special token.
    pub(crate) const CONTROL: i64 = 3;
    /// An added token.
    pub(crate) const USER_DEFINED: i64 = 4;
    /// A row without a token.
    pub(crate) const UNUSED: i64 = 5;
    /// A byte, `<0x41>`.
    pub(crate) const BYTE: i64 = 6;
}

/// Returns the tokenizer files of the GGUF file at `path`: names and contents.
///
/// # Errors
/// The file cannot be read, or its tokenizer is of a kind that is not known.
pub fn tokenizer_files(path: &Path) -> Result<[(&'static str, Vec<u8>); 2]> {
    let container = Container::open(path)?;
    let tokenizer = Tokenizer::read(path, &container)?;
    let text = |json: &Json| format!("{json:#}\n").into_bytes();
    Ok([
        ("tokenizer.json", text(&tokenizer.json())),
        ("tokenizer_config.json", text(&tokenizer.config_json())),
    ])
}

/// The tokenizer of a GGUF file.
struct Tokenizer<'a> {
    keys: Keys<'a>,
    model: Model,
    tokens: Vec<&'a str>,
    kinds: Vec<i64>,
    bos: Option<usize>,
    eos: Option<usize>,
    unknown: Option<usize>,
    add_bos: bool,
}

enum Model {
    /// Byte-level BPE: pairs in the order of merging.
    Bytes { pre: Pre, merges: Vec<(String, String)> },
    /// SentencePiece's BPE, whose merges follow from the scores.
    Scores { merges: Vec<(String, String)>, space_prefix: bool },
}

impl<'a> Tokenizer<'a> {
    fn read(path: &'a Path, container: &'a Container) -> Result<Tokenizer<'a>> {
        let keys = Keys::new(path, container)?;
        let tokens = texts(&keys, "tokens")?;
        let kinds = match list(&keys, "token_type")? {
            Some(list) => numbers(&keys, "token_type", list, |value| {
                value.as_u64().and_then(|kind| i64::try_from(kind).ok())
            })?,
            None => vec![kind::NORMAL; tokens.len()],
        };
        check_len(&keys, "token_type", kinds.len(), tokens.len())?;
        let id = |name: &str| -> Result<Option<usize>> {
            let Some(value) = get(&keys, name) else { return Ok(None) };
            match value.as_u64() {
                Some(id) if id < tokens.len() as u64 => Ok(Some(id as usize)),
                _ => Err(wrong(&keys, name, format!("is {value}, not the id of a token"))),
            }
        };
        let (bos, eos, unknown) = (id("bos_token_id")?, id("eos_token_id")?, id("unknown_token_id")?);
        let model = match get(&keys, "model").and_then(Value::as_str) {
            Some("gpt2") => Model::Bytes { pre: pre(&keys)?, merges: stated_merges(&keys)? },
            Some("llama") => Model::Scores {
                merges: scored_merges(&tokens, &kinds, &scores(&keys, tokens.len())?),
                space_prefix: flag(&keys, "add_space_prefix")?.unwrap_or(!keys.arch.norm_plus_one),
            },
            Some(other) => {
                return Err(wrong(&keys, "model", format!("is {:?} and not supported", shown(other))));
            }
            None => return Err(wrong(&keys, "model", "is missing".into())),
        };
        let usual = match &model {
            Model::Bytes { pre, .. } => pre.adds_bos,
            Model::Scores { .. } => true,
        };
        let add_bos = flag(&keys, "add_bos_token")?.unwrap_or(usual) && bos.is_some();
        Ok(Tokenizer { keys, model, tokens, kinds, bos, eos, unknown, add_bos })
    }

    /// Returns whether a token stands in a text by itself, not by merges.
    fn is_added(&self, id: usize) -> bool {
        match self.kinds[id] {
            kind::CONTROL | kind::USER_DEFINED => true,
            kind::UNKNOWN => matches!(self.model, Model::Scores { .. }),
            _ => false,
        }
    }

    fn json(&self) -> Json {
        let mut vocab = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if self.kinds[id] != kind::UNUSED {
                vocab.insert((*token).to_owned(), json!(id));
            }
        }
        let added: Vec<Json> = (0..self.tokens.len())
            .filter(|&id| self.is_added(id) && vocab.get(self.tokens[id]) == Some(&json!(id)))
            .map(|id| {
                json!({
                    "id": id, "content": self.tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": self.kinds[id] != kind::USER_DEFINED,
                })
            })
            .collect();
        let (normalizer, pre_tokenizer, decoder) = match &self.model {
            Model::Bytes { pre, .. } => (pre.normalizer(), pre.pre_tokenizer(), byte_level(true)),
            Model::Scores { space_prefix, .. } => {
                (space_normalizer(*space_prefix), Json::Null, space_decoder(*space_prefix))
            }
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(), "decoder": decoder, "model": self.model_json(vocab),
        })
    }

    fn model_json(&self, vocab: Map<String, Json>) -> Json {
        let (merges, ignore_merges, byte_fallback) = match &self.model {
            Model::Bytes { merges, pre } => (merges, pre.ignores_merges, false),
            Model::Scores { merges, .. } => (merges, false, true),
        };
        let unknown = byte_fallback.then(|| self.tokens.get(self.unknown.unwrap_or(0)).copied());
        json!({
            "type": "BPE", "dropout": null, "unk_token": unknown.flatten(), "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges,
        })
    }

    /// Returns the template with BOS in front.
    fn post_processor(&self) -> Json {
        let Some((id, token)) = self.bos.filter(|_| self.add_bos).map(|id| (id, self.tokens[id])) else {
            return match self.model {
                Model::Bytes { .. } => byte_level(true),
                Model::Scores { .. } => Json::Null,
            };
        };
        let special = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        json!({
            "type": "TemplateProcessing", "single": [special, text("A")],
            "pair": [special, text("A"), special, text("B")],
            "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
        })
    }

    fn config_json(&self) -> Json {
        let mut map = Map::new();
        let mut put = |key: &str, value: Json| drop(map.insert(key.to_owned(), value));
        put("tokenizer_class", json!("PreTrainedTokenizerFast"));
        // Of its own this class gives token_type_ids too, which the models do not take.
        put("model_input_names", json!(["input_ids", "attention_mask"]));
        put("clean_up_tokenization_spaces", json!(false));
        put("add_bos_token", json!(self.add_bos));
        put("add_eos_token", json!(false));
        for (key, id) in [("bos_token", self.bos), ("eos_token", self.eos), ("unk_token", self.unknown)] {
            if let Some(id) = id {
                put(key, json!(self.tokens[id]));
            }
        }
        let template = self.keys.container.metadata.get("tokenizer.chat_template").and_then(Value::as_str);
        if let Some(template) = template {
            put("chat_template", json!(template));
        }
        Json::Object(map)
    }
}

fn space_normalizer(prefix: bool) -> Json {
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    match prefix {
        true => {
            json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": SPACE }, replace] })
        }
        false => replace,
    }
}

fn space_decoder(prefix: bool) -> Json {
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({ "type": "Sequence", "decoders": decoders })
}

fn get<'a>(keys: &Keys<'a>, name: &str) -> Option<&'a Value> {
    keys.container.metadata.get(&format!("{PREFIX}{name}"))
}

fn wrong(keys: &Keys<'_>, name: &str, problem: String) -> Error {
    Error::field(keys.path, format!("{PREFIX}{name}"), problem, OTHER)
}

fn flag(keys: &Keys<'_>, name: &str) -> Result<Option<bool>> {
    let Some(value) = get(keys, name) else { return Ok(None) };
    value.as_bool().map(Some).ok_or_else(|| wrong(keys, name, format!("is {value}, not a flag")))
}

fn list<'a>(keys: &Keys<'a>, name: &str) -> Result<Option<&'a [Value]>> {
    let Some(value) = get(keys, name) else { return Ok(None) };
    value.as_list().map(Some).ok_or_else(|| wrong(keys, name, format!("is {value}, not a list")))
}

fn numbers<'a, T>(
    keys: &Keys<'_>,
    name: &str,
    list: &'a [Value],
    read: impl Fn(&'a Value) -> Option<T>,
) -> Result<Vec<T>> {
    let each = |(i, value): (usize, &'a Value)| {
        read(value).ok_or_else(|| wrong(keys, name, format!("has {value} as entry {i}")))
    };
    list.iter().enumerate().map(each).collect()
}

fn texts<'a>(keys: &Keys<'a>, name: &str) -> Result<Vec<&'a str>> {
    let list = list(keys, name)?.ok_or_else(|| wrong(keys, name, "is missing".into()))?;
    numbers(keys, name, list, Value::as_str)
}

fn check_len(keys: &Keys<'_>, name: &str, found: usize, tokens: usize) -> Result<()> {
    if found == tokens {
        return Ok(());
    }
    Err(wrong(keys, name, format!("has {found} entries and there are {tokens} tokens")))
}

fn pre(keys: &Keys<'_>) -> Result<Pre> {
    let Some(name) = get(keys, "pre").and_then(Value::as_str) else {
        return Err(wrong(keys, "pre", "is missing: how the tokenizer cuts words is not known".into()));
    };
    Pre::of(name).ok_or_else(|| {
        let problem = format!("is {:?}, and how that cuts words is not known", shown(name));
        wrong(keys, "pre", problem)
    })
}

fn stated_merges(keys: &Keys<'_>) -> Result<Vec<(String, String)>> {
    let merges = texts(keys, "merges")?.into_iter().enumerate().map(|(i, merge)| {
        // A token of a byte-level vocabulary holds no space, but its first character may be one.
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let pair = at.map(|at| (merge[..at].to_owned(), merge[at + 1..].to_owned()));
        pair.ok_or_else(|| wrong(keys, "merges", format!("has {:?} as entry {i}, not a pair", shown(merge))))
    });
    merges.collect()
}

fn scores(keys: &Keys<'_>, tokens: usize) -> Result<Vec<f32>> {
    let list = list(keys, "scores")?.ok_or_else(|| wrong(keys, "scores", "is missing".into()))?;
    check_len(keys, "scores", list.len(), tokens)?;
    numbers(keys, "scores", list, |value| match value {
        Value::F32(score) => Some(*score),
        _ => None,
    })
}

/// Returns the merges that a vocabulary with scores stands for: all pairs of tokens that make a token, those with the
/// highest score of the whole first.
pub(crate) fn scored_merges(tokens: &[&str], kinds: &[i64], scores: &[f32]) -> Vec<(String, String)> {
    let usable = |id: &usize| kinds[*id] != kind::UNUSED;
    let ids: HashMap<&str, usize> = (0..tokens.len()).filter(usable).map(|id| (tokens[id], id)).collect();
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let merged = matches!(kinds[id], kind::NORMAL | kind::USER_DEFINED) && ids.get(token) == Some(&id);
        if !merged || token.len() > LONGEST {
            continue;
        }
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((id, cut));
            }
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
    let pair = |(id, cut): (usize, usize)| {
        let (left, right) = tokens[id].split_at(cut);
        (left.to_owned(), right.to_owned())
    };
    merges.into_iter().map(pair).collect()
}
