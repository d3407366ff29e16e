//! The files of a tokenizer by content: what `tokenizer_config.json` and its neighbours say beside `tokenizer.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{Error, Result, shown};
use crate::files::{json_values, read_at_most, without_bom};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const ADDED: &str = "added_tokens.json";
const SPECIAL: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";

/// The largest file that is read, in bytes; a Unigram model of a million tokens, with indents, has some 70 million.
const MAX_BYTES: u64 = 128 << 20;
/// Most keys and values of a file; the largest tokenizers in use have three million.
const MAX_VALUES: usize = 1 << 23;

/// The files of one tokenizer, by content. [`TokenizerFiles::read`] takes them from a directory; a program that has
/// them from elsewhere fills them in itself.
#[derive(Clone, Debug, Default)]
pub struct TokenizerFiles {
    /// The path of `tokenizer.json`, which messages name.
    pub path: PathBuf,
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// `tokenizer_config.json`.
    pub config: Option<Vec<u8>>,
    /// `added_tokens.json`: an object of texts and ids.
    pub added_tokens: Option<Vec<u8>>,
    /// `special_tokens_map.json`.
    pub special_tokens: Option<Vec<u8>>,
    /// `chat_template.jinja`.
    pub chat_template: Option<Vec<u8>>,
}

impl TokenizerFiles {
    /// Reads the files of `model_dir`; all but `tokenizer.json` may be absent.
    ///
    /// # Errors
    /// No `tokenizer.json`, or a file that cannot be read.
    pub fn read(model_dir: &Path) -> Result<TokenizerFiles> {
        let path = model_dir.join(TOKENIZER);
        if !path.exists() {
            let dir = model_dir.to_path_buf();
            return Err(match model_dir.join("tokenizer.model").exists() {
                true => Error::SentencePieceOnly { dir },
                false => Error::NoTokenizer { dir },
            });
        }
        let optional = |name: &str| {
            let path = model_dir.join(name);
            match fs::symlink_metadata(&path) {
                // A link to nothing is no absent file: what it should say would be left out without a word.
                Ok(_) => read(&path).map(Some),
                Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(None),
                Err(cause) => Err(Error::io(&path)(cause)),
            }
        };
        Ok(TokenizerFiles {
            tokenizer: read(&path)?,
            config: optional(CONFIG)?,
            added_tokens: optional(ADDED)?,
            special_tokens: optional(SPECIAL)?,
            chat_template: optional(TEMPLATE)?,
            path,
        })
    }

    /// Takes the files by their names in a model directory; others are left out. `path` is what messages call
    /// `tokenizer.json`.
    pub fn named(path: PathBuf, files: impl IntoIterator<Item = (String, Vec<u8>)>) -> TokenizerFiles {
        let mut named = TokenizerFiles { path, ..TokenizerFiles::default() };
        for (name, bytes) in files {
            match &name[..] {
                TOKENIZER => named.tokenizer = bytes,
                CONFIG => named.config = Some(bytes),
                ADDED => named.added_tokens = Some(bytes),
                SPECIAL => named.special_tokens = Some(bytes),
                TEMPLATE => named.chat_template = Some(bytes),
                _ => {}
            }
        }
        named
    }

    /// Returns what the files beside `tokenizer.json` say.
    pub(crate) fn settings(&self) -> Result<Settings> {
        let mut config: Config = self.parse(self.config.as_deref(), CONFIG)?;
        let legacy: Map<String, Value> = self.parse(self.special_tokens.as_deref(), SPECIAL)?;
        let added: BTreeMap<String, u32> = self.parse(self.added_tokens.as_deref(), ADDED)?;
        let mut special_tokens = Map::new();
        for (name, token) in std::mem::take(&mut config.rest).into_iter().chain(legacy) {
            let text = match token {
                Value::Array(tokens) if name == "additional_special_tokens" => {
                    Some(tokens.into_iter().filter_map(text_of).collect())
                }
                token if name.ends_with("_token") => text_of(token),
                _ => None,
            };
            if let Some(text) = text {
                special_tokens.entry(name).or_insert(text);
            }
        }
        let path = self.beside(CONFIG);
        let added_tokens = added_tokens(&path, config.added_tokens_decoder, added, &special_tokens)?;
        Ok(Settings {
            class: config.tokenizer_class,
            add_bos_token: config.add_bos_token,
            chat_template: config.chat_template,
            special_tokens,
            added_tokens,
        })
    }

    /// Returns the text of `chat_template.jinja`.
    pub(crate) fn template_file(&self) -> Result<Option<(PathBuf, String)>> {
        let Some(bytes) = &self.chat_template else { return Ok(None) };
        let path = self.beside(TEMPLATE);
        match str::from_utf8(without_bom(bytes)) {
            Ok(text) => Ok(Some((path, text.to_owned()))),
            Err(cause) => Err(Error::NotUtf8 { path, offset: cause.valid_up_to() as u64 }),
        }
    }

    /// Returns the path of `tokenizer_config.json`, or of the GGUF file that it was made of.
    pub(crate) fn config_path(&self) -> PathBuf {
        self.beside(CONFIG)
    }

    /// Returns the path of the file `name` beside `tokenizer.json`. A GGUF file holds all of them.
    fn beside(&self, name: &str) -> PathBuf {
        match self.path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            true => self.path.clone(),
            false => self.path.with_file_name(name),
        }
    }

    fn parse<T: DeserializeOwned + Default>(&self, bytes: Option<&[u8]>, name: &str) -> Result<T> {
        let Some(bytes) = bytes else { return Ok(T::default()) };
        let path = self.beside(name);
        check_values(&path, bytes)?;
        serde_json::from_slice(without_bom(bytes))
            .map_err(|cause| Error::BadTokenizer { path, reason: shown(&cause.to_string()) })
    }
}

/// Refuses JSON with more values than a tokenizer has, before each of them takes memory.
pub(super) fn check_values(path: &Path, json: &[u8]) -> Result<()> {
    let values = json_values(json);
    if values > MAX_VALUES {
        let reason = format!("it has {values} values, more than {MAX_VALUES}");
        return Err(Error::BadTokenizer { path: path.to_path_buf(), reason });
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    // A pipe would block, and a device need not end.
    if !path.is_file() {
        return Err(Error::NotAFile { path: path.to_path_buf() });
    }
    read_at_most(path, MAX_BYTES).map_err(Error::io(path))
}

/// The settings in the files beside `tokenizer.json`.
pub(crate) struct Settings {
    /// The class by which transformers reads the files.
    class: Value,
    pub(crate) add_bos_token: Option<bool>,
    /// The template of `tokenizer_config.json`: a text, or a list of named ones.
    pub(crate) chat_template: Value,
    /// The texts of `bos_token`, `eos_token` and the like, by these names.
    pub(crate) special_tokens: Map<String, Value>,
    /// Tokens with ids of their own, in the order of ids.
    pub(crate) added_tokens: BTreeMap<u32, AddedToken>,
}

impl Settings {
    /// Returns the text of a special token by the name of its role, such as `bos_token`.
    pub(crate) fn special(&self, role: &str) -> Option<&str> {
        self.special_tokens.get(role)?.as_str()
    }

    /// Returns whether transformers prints special tokens as they are written: its Llama class takes none of them for
    /// `normalized`, whatever `tokenizer.json` says.
    pub(crate) fn writes_special_verbatim(&self) -> bool {
        matches!(self.class.as_str(), Some("LlamaTokenizer" | "LlamaTokenizerFast"))
    }
}

/// The fields that are read of `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct Config {
    #[serde(default)]
    tokenizer_class: Value,
    #[serde(default)]
    add_bos_token: Option<bool>,
    #[serde(default)]
    added_tokens_decoder: Option<BTreeMap<String, Entry>>,
    #[serde(default)]
    chat_template: Value,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A token of `added_tokens_decoder`.
#[derive(Deserialize)]
struct Entry {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

/// Returns a token's text, which old files write plainly and new ones as an object.
fn text_of(token: Value) -> Option<Value> {
    match token {
        Value::String(_) => Some(token),
        Value::Object(mut fields) => fields.remove("content").filter(Value::is_string),
        _ => None,
    }
}

/// Joins the two tables of added tokens. `tokenizer_config.json` is newer than `added_tokens.json` and wins.
fn added_tokens(
    path: &Path,
    decoder: Option<BTreeMap<String, Entry>>,
    added: BTreeMap<String, u32>,
    special: &Map<String, Value>,
) -> Result<BTreeMap<u32, AddedToken>> {
    let mut tokens = BTreeMap::new();
    let mut known = BTreeSet::new();
    for (id, entry) in decoder.unwrap_or_default() {
        let Ok(id) = id.parse() else {
            let reason = format!("added_tokens_decoder has the id {id:?}, which is no number");
            return Err(Error::BadTokenizer { path: path.to_path_buf(), reason });
        };
        known.insert(entry.content.clone());
        let token = AddedToken::from(entry.content, entry.special)
            .single_word(entry.single_word)
            .lstrip(entry.lstrip)
            .rstrip(entry.rstrip);
        let normalized = entry.normalized.unwrap_or(token.normalized);
        tokens.insert(id, token.normalized(normalized));
    }
    let names = |value: &Value, text: &str| match value {
        Value::Array(texts) => texts.iter().any(|one| one == text),
        one => one == text,
    };
    for (text, id) in added {
        if !known.contains(&text) {
            let special = special.values().any(|value| names(value, &text));
            tokens.entry(id).or_insert_with(|| AddedToken::from(text, special));
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(config: &str, added: &str, special: &str) -> Result<Settings> {
        let bytes = |text: &str| (!text.is_empty()).then(|| text.as_bytes().to_vec());
        TokenizerFiles {
            path: "m/tokenizer.json".into(),
            config: bytes(config),
            added_tokens: bytes(added),
            special_tokens: bytes(special),
            ..TokenizerFiles::default()
        }
        .settings()
    }

    #[test]
    fn what_is_no_file_is_not_taken_for_absent() {
        let work = tempfile::tempdir().unwrap();
        let at = |name: &str| work.path().join(name);
        fs::write(at(TOKENIZER), "{}").unwrap();
        assert!(TokenizerFiles::read(work.path()).unwrap().config.is_none());
        for name in [CONFIG, ADDED, SPECIAL, TEMPLATE] {
            fs::create_dir(at(name)).unwrap();
            let message = TokenizerFiles::read(work.path()).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("not a regular file"), "{message}");
            fs::remove_dir(at(name)).unwrap();
            #[cfg(unix)]
            for target in ["nothing", "/dev/zero"] {
                std::os::unix::fs::symlink(target, at(name)).unwrap();
                let message = TokenizerFiles::read(work.path()).unwrap_err().to_string();
                assert!(message.contains(name) && message.contains("not a regular file"), "{message}");
                fs::remove_file(at(name)).unwrap();
            }
        }
    }

    #[test]
    fn special_tokens_are_read_in_every_spelling() {
        let found = settings(
            "\u{FEFF}{\"bos_token\": {\"content\": \"<s>\", \"lstrip\": false}, \"eos_token\": \"</s>\", \
             \"pad_token\": null, \"add_bos_token\": true, \"chat_template\": \"x\"}",
            "",
            "{\"eos_token\": \"other\", \"unk_token\": {\"content\": \"<unk>\"}, \"additional_special_tokens\": [\"<a>\", \
             {\"content\": \"<b>\"}]}",
        )
        .unwrap();
        assert_eq!(found.special("bos_token"), Some("<s>"));
        assert_eq!(found.special("eos_token"), Some("</s>"), "the newer file wins");
        assert_eq!((found.special("unk_token"), found.special("pad_token")), (Some("<unk>"), None));
        assert_eq!(found.special_tokens["additional_special_tokens"], serde_json::json!(["<a>", "<b>"]));
        assert_eq!((found.add_bos_token, found.chat_template), (Some(true), "x".into()));
    }

    #[test]
    fn both_tables_of_added_tokens_are_joined() {
        let found = settings(
            r#"{"eos_token": "<e>", "added_tokens_decoder": {"10": {"content": "<d>", "special": true, "lstrip": true},
                "9": {"content": "x", "normalized": false}}}"#,
            r#"{"<d>": 77, "<e>": 12, "y": 11}"#,
            "",
        )
        .unwrap();
        let ids: Vec<u32> = found.added_tokens.keys().copied().collect();
        assert_eq!(ids, [9, 10, 11, 12]);
        assert_eq!(found.added_tokens[&10], AddedToken::from("<d>", true).lstrip(true));
        assert_eq!(found.added_tokens[&9], AddedToken::from("x", false).normalized(false));
        assert_eq!(found.added_tokens[&11], AddedToken::from("y", false));
        assert!(found.added_tokens[&12].special, "named as eos_token");
    }

    #[test]
    fn values_are_counted_before_they_take_memory() {
        let list = |values: usize| format!("{{\"x\": [{}0]}}", "0,".repeat(values));
        assert!(settings(&list(1000), "", "").is_ok());
        let message = settings(&list(MAX_VALUES), "", "").err().expect("must not parse").to_string();
        assert!(message.starts_with("m/tokenizer_config.json: not a tokenizer file"), "{message}");
        assert!(message.contains("it has 8388611 values, more than 8388608"), "{message}");
    }

    #[test]
    fn a_gguf_file_is_named_for_all_that_it_holds() {
        for name in ["m/model.gguf", "m/MODEL.GGUF"] {
            let config = Some(b"[]".to_vec());
            let files = TokenizerFiles { path: name.into(), config, ..TokenizerFiles::default() };
            assert_eq!(files.config_path(), PathBuf::from(name));
            let message = files.settings().err().expect("must not parse").to_string();
            assert!(message.starts_with(&format!("{name}: not a tokenizer file")), "{message}");
        }
    }

    #[test]
    fn broken_files_are_named() {
        for (config, added, name) in [
            ("[]", "", "tokenizer_config.json"),
            ("{\"added_tokens_decoder\": {\"x\": {\"content\": \"a\"}}}", "", "tokenizer_config.json"),
            ("{\"added_tokens_decoder\": {\"1\": {}}}", "", "tokenizer_config.json"),
            ("", "{\"a\": -1}", "added_tokens.json"),
        ] {
            let message = settings(config, added, "").err().expect("must not parse").to_string();
            assert!(message.starts_with(&format!("m/{name}: not a tokenizer file")), "{message}");
        }
    }
}
