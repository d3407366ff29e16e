//! tokenizer.json as GGUF's metadata.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::pre::Pre;
use super::tokenizer::{SPACE, kind, scored_merges, tokenizer_files};
use super::value::Value;
use crate::config::Config;
use crate::error::{Error, Result, shown};
use crate::files::is_present;
use crate::json::{MOST_IN_TOKENIZER, check_values, parse, read_tokenizer};

const COPY: &str = "copy the file again";
const OTHER: &str = "export it as native: llama.cpp has no such tokenizer";

/// The files of a model's tokenizer.
pub(crate) struct Files {
    /// Where tokenizer.json is, for messages.
    path: PathBuf,
    tokenizer: Json,
    settings: Json,
    /// The chat template in a file of its own.
    template: Option<String>,
}

impl Files {
    /// Reads the tokenizer of the model directory or GGUF file `model`.
    ///
    /// # Errors
    /// There is none, or a file is not JSON.
    pub(crate) fn read(model: &Path) -> Result<Files> {
        if let Some(path) = super::file_of(model)? {
            let [(_, tokenizer), (_, settings)] = tokenizer_files(&path)?;
            let json = |bytes: Vec<u8>| parse(&path, &String::from_utf8_lossy(&bytes), "JSON", COPY);
            let (tokenizer, settings) = (json(tokenizer)?, json(settings)?);
            return Ok(Files { path, tokenizer, settings, template: None });
        }
        let path = model.join("tokenizer.json");
        if !path.is_file() {
            let help = "copy the tokenizer of the original model into the directory: a GGUF file needs one";
            return Err(Error::path(&path, "is missing", help));
        }
        let json = |path: &Path| -> Result<Json> {
            let text = read_tokenizer(path)?;
            check_values(path, &text, MOST_IN_TOKENIZER)?;
            parse(path, &text, "JSON", COPY)
        };
        let tokenizer = json(&path)?;
        let settings = model.join("tokenizer_config.json");
        let settings = match is_present(&settings)? {
            true => json(&settings)?,
            false => Json::Null,
        };
        let template = model.join("chat_template.jinja");
        let template = if is_present(&template)? { Some(read_tokenizer(&template)?) } else { None };
        Ok(Files { path, tokenizer, settings, template })
    }

    fn wrong(&self, field: &str, problem: impl Into<String>) -> Error {
        Error::field(&self.path, field, problem, OTHER)
    }

    /// Returns the keys of the metadata.
    ///
    /// # Errors
    /// The tokenizer is of a kind that GGUF has no name for.
    pub(crate) fn metadata(&self, config: &Config) -> Result<Vec<(String, Value)>> {
        let model = &self.tokenizer["model"];
        if model["type"] != "BPE" {
            let problem = format!("is {} and not supported", shown(&model["type"].to_string()));
            return Err(self.wrong("model.type", problem));
        }
        let scores = model["byte_fallback"] == true;
        let unknown = model["unk_token"].as_str().filter(|_| scores);
        let vocabulary = Vocabulary::read(self, config.vocab_size, unknown)?;
        let merges = self.merges()?;
        let mut keys = match scores {
            true => self.scored(&vocabulary, &merges)?,
            false => self.byte_level(&merges)?,
        };
        let text = |text: &str| Value::Text(text.to_owned());
        let tokens = vocabulary.tokens.iter().map(|token| text(token)).collect();
        keys.push(("ggml.tokens", Value::List(tokens)));
        let kinds = vocabulary.kinds.iter().map(|&kind| Value::Signed(kind)).collect();
        keys.push(("ggml.token_type", Value::List(kinds)));
        let template_bos = self.template_bos();
        let bos = template_bos.or(config.bos_token_id.map(u64::from));
        let adds = template_bos.is_some() || self.settings["add_bos_token"] == true;
        keys.push(("ggml.add_bos_token", Value::Bool(adds && bos.is_some())));
        keys.push(("ggml.add_eos_token", Value::Bool(false)));
        let unknown = unknown.and_then(|unknown| vocabulary.id(unknown));
        let mut ends = config.eos_token_ids.iter().map(|&id| u64::from(id));
        for (name, id) in [
            ("ggml.bos_token_id", bos),
            ("ggml.eos_token_id", ends.next()),
            ("ggml.eot_token_id", ends.next()),
            ("ggml.unknown_token_id", unknown),
        ] {
            keys.extend(id.map(|id| (name, Value::Unsigned(id))));
        }
        let template = self.template.as_deref().or(self.settings["chat_template"].as_str());
        keys.extend(template.map(|template| ("chat_template", text(template))));
        Ok(keys.into_iter().map(|(key, value)| (format!("tokenizer.{key}"), value)).collect())
    }

    fn merges(&self) -> Result<Vec<(&str, &str)>> {
        let list = self.tokenizer["model"]["merges"].as_array().map_or(&[][..], Vec::as_slice);
        let mut merges = Vec::with_capacity(list.len());
        for (i, merge) in list.iter().enumerate() {
            merges.push(
                match merge {
                    Json::String(text) => text.split_once(' '),
                    pair => pair[0].as_str().zip(pair[1].as_str()),
                }
                .ok_or_else(|| self.wrong(&format!("model.merges[{i}]"), "is not a pair of tokens"))?,
            );
        }
        Ok(merges)
    }

    /// Returns the token that the post-processor puts in front of a text.
    fn template_bos(&self) -> Option<u64> {
        let processors = flat(&self.tokenizer["post_processor"], "processors");
        let template = processors.into_iter().find(|one| one["type"] == "TemplateProcessing")?;
        let first = template["single"][0]["SpecialToken"]["id"].as_str()?;
        template["special_tokens"][first]["ids"][0].as_u64()
    }

    /// Returns the keys of a byte-level BPE.
    fn byte_level(&self, merges: &[(&str, &str)]) -> Result<Vec<(&'static str, Value)>> {
        let steps = flat(&self.tokenizer["pre_tokenizer"], "pretokenizers");
        let pre = Pre::of_json(&steps, self.tokenizer["model"]["ignore_merges"] == true);
        let pre = pre.ok_or_else(|| {
            let shape = shown(&self.tokenizer["pre_tokenizer"].to_string());
            self.wrong("pre_tokenizer", format!("is {shape}, which has no name in GGUF"))
        })?;
        if let Some((left, right)) = merges.iter().find(|(l, r)| l.contains(' ') || r.contains(' ')) {
            return Err(self.wrong("model.merges", format!("joins {left:?} and {right:?}, with a space")));
        }
        let merges = merges.iter().map(|(left, right)| Value::Text(format!("{left} {right}"))).collect();
        Ok(vec![
            ("ggml.model", Value::Text("gpt2".into())),
            ("ggml.pre", Value::Text(pre.name.into())),
            ("ggml.merges", Value::List(merges)),
        ])
    }

    /// Returns the keys of a SentencePiece BPE: scores, from which readers make the merges again.
    fn scored(&self, vocabulary: &Vocabulary, merges: &[(&str, &str)]) -> Result<Vec<(&'static str, Value)>> {
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            ranks.entry(format!("{left}{right}")).or_insert(rank);
        }
        let score = |token: &String| -(ranks.get(token).copied().unwrap_or(merges.len()) as f32);
        let scores: Vec<f32> = vocabulary.tokens.iter().map(score).collect();
        let tokens: Vec<&str> = vocabulary.tokens.iter().map(String::as_str).collect();
        let again = scored_merges(&tokens, &vocabulary.kinds, &scores);
        let made: HashSet<(&str, &str)> = again.iter().map(|(l, r)| (l.as_str(), r.as_str())).collect();
        let lost = merges.iter().find(|pair| !made.contains(pair));
        // A pair that makes a token of another pair is one more way to the same token.
        let new = made.iter().find(|(left, right)| !ranks.contains_key(&format!("{left}{right}")));
        if let Some((left, right)) = lost.or(new) {
            let problem = format!("differs from the merges that scores give, in {left:?} with {right:?}");
            return Err(self.wrong("model.merges", problem));
        }
        Ok(vec![
            ("ggml.model", Value::Text("llama".into())),
            ("ggml.pre", Value::Text("default".into())),
            ("ggml.scores", Value::List(scores.into_iter().map(Value::F32).collect())),
            ("ggml.add_space_prefix", Value::Bool(self.space_prefix()?)),
        ])
    }

    /// Returns whether a space goes in front of a text.
    fn space_prefix(&self) -> Result<bool> {
        let steps = flat(&self.tokenizer["normalizer"], "normalizers");
        let kinds: Vec<&str> = steps.iter().filter_map(|step| step["type"].as_str()).collect();
        let spaces = |step: &Json| step["content"] == SPACE && step["pattern"]["String"] == " ";
        let before = flat(&self.tokenizer["pre_tokenizer"], "pretokenizers");
        match (&kinds[..], &before[..]) {
            (["Prepend", "Replace"], []) if steps[0]["prepend"] == SPACE && spaces(steps[1]) => Ok(true),
            (["Replace"], _) if spaces(steps[0]) && !before.iter().any(|one| one["type"] == "Metaspace") => {
                Ok(false)
            }
            ([], [metaspace]) if metaspace["type"] == "Metaspace" => Ok(match &metaspace["prepend_scheme"] {
                Json::Null => metaspace["add_prefix_space"] != false,
                scheme => *scheme != "never",
            }),
            _ => {
                let shape = shown(&self.tokenizer["normalizer"].to_string());
                Err(self.wrong("normalizer", format!("is {shape}, which GGUF cannot state")))
            }
        }
    }
}

/// Returns the parts of a sequence of `key`, or the one part.
fn flat<'a>(step: &'a Json, key: &str) -> Vec<&'a Json> {
    match (step, step[key].as_array()) {
        (Json::Null, _) => Vec::new(),
        (_, Some(parts)) => parts.iter().collect(),
        (one, None) => vec![one],
    }
}

/// The tokens by their ids.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<i64>,
}

impl Vocabulary {
    fn read(files: &Files, size: usize, unknown: Option<&str>) -> Result<Vocabulary> {
        let mut entries: BTreeMap<u64, (String, i64)> = BTreeMap::new();
        let vocab = files.tokenizer["model"]["vocab"].as_object();
        let vocab = vocab.ok_or_else(|| files.wrong("model.vocab", "is missing"))?;
        let scores = files.tokenizer["model"]["byte_fallback"] == true;
        for (token, id) in vocab {
            let id = id.as_u64().ok_or_else(|| files.wrong("model.vocab", format!("has {id} as an id")))?;
            let of_byte = scores && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            let kind = if of_byte { kind::BYTE } else { kind::NORMAL };
            entries.insert(id, (token.clone(), kind));
        }
        for added in files.tokenizer["added_tokens"].as_array().unwrap_or(&Vec::new()) {
            let (Some(id), Some(content)) = (added["id"].as_u64(), added["content"].as_str()) else {
                return Err(files.wrong("added_tokens", "has an entry without id and content"));
            };
            let kind = if added["special"] == true { kind::CONTROL } else { kind::USER_DEFINED };
            entries.insert(id, (content.to_owned(), kind));
        }
        if let Some(entry) = entries.values_mut().find(|entry| Some(entry.0.as_str()) == unknown) {
            entry.1 = kind::UNKNOWN;
        }
        if let Some((id, (token, _))) = entries.last_key_value().filter(|(id, _)| **id >= size as u64) {
            let problem = format!("has {:?} as token {id} and the model has {size}", shown(token));
            return Err(files.wrong("model.vocab", problem));
        }
        let row = |id: usize| {
            let unused = || (format!("[PAD{id}]"), kind::UNUSED);
            entries.get(&(id as u64)).cloned().unwrap_or_else(unused)
        };
        let (tokens, kinds) = (0..size).map(row).unzip();
        Ok(Vocabulary { tokens, kinds })
    }

    fn id(&self, token: &str) -> Option<u64> {
        self.tokens.iter().position(|other| other == token).map(|id| id as u64)
    }
}
