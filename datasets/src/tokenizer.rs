//! `tokenizer.json` of a model: encoding with a stated BOS rule, decoding at once or token by token, and training of
//! a small byte-level BPE.

use crate::bpe;
use crate::encoder::{ByteLevelWords, Encoder, byte_char};
use crate::error::{Error, Result};
use crate::files::hex;
use crate::token_texts::TokenTexts;
use rayon::prelude::*;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper, Tokenizer as Inner};

/// Tokens that a [`DecodeStream`] holds back at most: more than one character can need.
const MAX_HELD: usize = 16;

/// The rule by which a text gets the beginning-of-sequence token in front.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bos {
    /// The tokenizer's own files decide.
    #[default]
    Auto,
    /// Always; the model must name a BOS token.
    Always,
    /// Never.
    Never,
}

impl FromStr for Bos {
    type Err = Error;

    fn from_str(text: &str) -> Result<Bos> {
        match text {
            "auto" => Ok(Bos::Auto),
            "always" => Ok(Bos::Always),
            "never" => Ok(Bos::Never),
            _ => Err(Error::setting_range("bos", format!("{text:?}"), "auto, always or never")),
        }
    }
}

/// The tokenizer of one model.
pub struct Tokenizer {
    inner: Inner,
    /// Gives the same ids faster, for the kinds of tokenizers it supports.
    encoder: Option<Encoder>,
    path: PathBuf,
    sha256: String,
    bos_id: Option<u32>,
    auto_bos: Option<u32>,
    special_ids: BTreeSet<u32>,
    vocab_size: usize,
}

/// The fields that are read of `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    add_bos_token: Option<bool>,
    #[serde(default)]
    bos_token: Option<TokenText>,
}

/// A token by its text, as old and new files write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Added { content: String },
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where present, `tokenizer_config.json` of `model_dir`. `bos_id` is the
    /// `bos_token_id` of the model's config; `vocab_size` the number of rows of its embedding.
    ///
    /// Truncation, padding and merge dropout that the file may ask for are switched off: they would drop, add or
    /// randomise tokens of a corpus.
    ///
    /// # Errors
    /// No `tokenizer.json`, one that does not parse, or one that can produce an id outside the embedding.
    pub fn load(model_dir: &Path, bos_id: Option<u32>, vocab_size: usize) -> Result<Tokenizer> {
        let path = model_dir.join("tokenizer.json");
        if !path.exists() {
            let dir = model_dir.to_path_buf();
            return Err(match model_dir.join("tokenizer.model").exists() {
                true => Error::SentencePieceOnly { dir },
                false => Error::NoTokenizer { dir },
            });
        }
        let json = fs::read(&path).map_err(Error::io(&path))?;
        let config = model_dir.join("tokenizer_config.json");
        let config = match config.exists() {
            true => fs::read(&config).map_err(Error::io(&config))?,
            false => b"{}".to_vec(),
        };
        Tokenizer::from_json(&path, &json, &config, bos_id, vocab_size)
    }

    /// Does as [`Tokenizer::load`] with the contents of `tokenizer.json` and `tokenizer_config.json`; `path` is for
    /// messages.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn from_json(
        path: &Path,
        json: &[u8],
        config: &[u8],
        bos_id: Option<u32>,
        vocab_size: usize,
    ) -> Result<Tokenizer> {
        let path = path.to_path_buf();
        let bad =
            |cause: tokenizers::Error| Error::BadTokenizer { path: path.clone(), reason: one_line(cause) };
        let mut inner = parse(json).map_err(bad)?;
        inner.with_truncation(None).map_err(bad)?.with_padding(None);
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some()
        {
            let mut model = model.clone();
            model.dropout = None;
            inner.with_model(model);
        }

        let largest = inner.get_vocab(true).into_iter().max_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
        let Some((token, largest_id)) = largest else {
            return Err(Error::BadTokenizer { path, reason: "its vocabulary is empty".into() });
        };
        if largest_id as usize >= vocab_size {
            return Err(Error::TokenizerTooLarge { path, token, largest_id, vocab_size });
        }
        if let Some(id) = bos_id
            && id as usize >= vocab_size
        {
            return Err(Error::setting_range("bos_token_id in config.json", id, "an id below vocab_size"));
        }
        let config: TokenizerConfig = serde_json::from_slice(config).map_err(|cause| {
            let path = path.with_file_name("tokenizer_config.json");
            Error::BadTokenizer { path, reason: cause.to_string() }
        })?;
        let template_bos = template_bos(&inner).map_err(bad)?;
        let auto_bos = match config.add_bos_token {
            Some(true) => {
                let named = config.bos_token.and_then(|token| match token {
                    TokenText::Plain(content) | TokenText::Added { content } => inner.token_to_id(&content),
                });
                template_bos.or(bos_id).or(named)
            }
            _ => template_bos,
        };
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect();
        let sha256 = hex(&Sha256::digest(json));
        let encoder = serde_json::from_slice(json).ok().as_ref().and_then(Encoder::new);
        Ok(Tokenizer {
            inner,
            encoder,
            path,
            sha256,
            bos_id,
            auto_bos,
            special_ids,
            vocab_size: largest_id as usize + 1,
        })
    }

    /// Sets whether special tokens written out in a text (`"</s>"`) become those tokens (the default) or plain text.
    #[must_use]
    pub fn special_in_text(mut self, parse: bool) -> Tokenizer {
        self.inner.set_encode_special_tokens(!parse);
        self
    }

    /// Encodes `text`, with the BOS token in front as `bos` says unless the text already starts with it. Never adds
    /// an end token.
    pub fn encode(&self, text: &str, bos: Bos) -> Result<Vec<u32>> {
        let prefix = self.bos_prefix(bos)?;
        let mut ids: Vec<u32> = prefix.into_iter().collect();
        let quick = match (&self.encoder, self.inner.get_model()) {
            (Some(encoder), ModelWrapper::BPE(model)) => encoder.encode(model, text, &mut ids),
            _ => Ok(false),
        };
        if !quick.map_err(|cause| self.failed("encoding", cause))? {
            let encoding =
                self.inner.encode_fast(text, false).map_err(|cause| self.failed("encoding", cause))?;
            ids.extend_from_slice(encoding.get_ids());
        }
        if prefix.is_some() && ids.get(1) == prefix.as_ref() {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// Encodes each of `texts` as [`Tokenizer::encode`] does, on all threads.
    pub(crate) fn encode_all(&self, texts: &[String], bos: Bos) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text, bos)).collect()
    }

    /// Decodes `ids`, without special tokens if `skip_special`. Ids outside the vocabulary are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        // The library compares normalised texts here and so misses special tokens marked `normalized`.
        let kept: Vec<u32> =
            ids.iter().copied().filter(|id| !(skip_special && self.special_ids.contains(id))).collect();
        self.inner.decode(&kept, false).map_err(|cause| self.failed("decoding", cause))
    }

    /// Returns a decoder that receives one token at a time. Special tokens give no text.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), shown: 0 }
    }

    /// Returns the bytes of each token; special tokens have none.
    pub fn token_texts(&self) -> TokenTexts {
        let bytes_of_chars: HashMap<char, u8> = (0..=255).map(|byte| (byte_char(byte), byte)).collect();
        let byte_level = matches!(self.inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let bytes_of = |id: u32| -> Option<Vec<u8>> {
            let token = self.inner.id_to_token(id).filter(|_| !self.special_ids.contains(&id))?;
            if byte_level
                && let Some(bytes) = token.chars().map(|c| bytes_of_chars.get(&c).copied()).collect()
            {
                return Some(bytes);
            }
            let byte = token
                .strip_prefix("<0x")
                .and_then(|rest| u8::from_str_radix(rest.strip_suffix('>')?, 16).ok());
            Some(byte.map_or_else(|| token.replace('\u{2581}', " ").into_bytes(), |byte| vec![byte]))
        };
        let texts: Vec<_> = (0..self.vocab_size as u32).map(bytes_of).collect();
        TokenTexts::new(texts.iter().map(Option::as_deref))
    }

    /// Returns the SHA-256 of the bytes of `tokenizer.json`, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Returns one more than the largest id that this tokenizer produces.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the model's BOS id, as given to [`Tokenizer::load`].
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Returns the id that `bos` puts in front of a text.
    pub(crate) fn bos_prefix(&self, bos: Bos) -> Result<Option<u32>> {
        match bos {
            Bos::Never => Ok(None),
            Bos::Auto => Ok(self.auto_bos),
            Bos::Always => match self.bos_id {
                Some(id) => Ok(Some(id)),
                None => Err(Error::NoBos { path: self.path.clone() }),
            },
        }
    }

    /// Returns true if special tokens in a text are parsed.
    pub(crate) fn parses_special(&self) -> bool {
        !self.inner.get_encode_special_tokens()
    }

    fn failed(&self, what: &'static str, cause: tokenizers::Error) -> Error {
        Error::Tokenizer { path: self.path.clone(), what, reason: one_line(cause) }
    }
}

/// Text of a token sequence that grows; made by [`Tokenizer::stream`].
///
/// The pieces it gives, put together, are the text that [`Tokenizer::decode`] gives for the whole sequence. A token
/// that ends inside a character is held back until the character is complete.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the last piece, for context, then those held back.
    ids: Vec<u32>,
    /// The number of `ids` that have been shown.
    shown: usize,
}

impl DecodeStream<'_> {
    /// Adds a token and returns the text that it completes, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        self.advance(self.ids.len() - self.shown >= MAX_HELD)
    }

    /// Returns the text that is still held back, with an incomplete character as U+FFFD.
    pub fn finish(mut self) -> Result<Option<String>> {
        self.advance(true)
    }

    fn advance(&mut self, incomplete_too: bool) -> Result<Option<String>> {
        let before = self.tokenizer.decode(&self.ids[..self.shown], true)?;
        let now = self.tokenizer.decode(&self.ids, true)?;
        if now.len() <= before.len() || (now.ends_with('\u{FFFD}') && !incomplete_too) {
            return Ok(None);
        }
        // Invalid bytes can change how the bytes before them decode: then only the number of characters is common.
        let delta = match now.strip_prefix(&before) {
            Some(rest) => rest.to_string(),
            None => now.chars().skip(before.chars().count()).collect(),
        };
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(Some(delta))
    }
}

/// Trains a byte-level BPE of at most `vocab_size` tokens on `texts` and writes `tokenizer.json`,
/// `tokenizer_config.json` and `special_tokens_map.json` to `out_dir`. Id 0 is `<s>` (BOS, put in front by the
/// tokenizer's template), id 1 `</s>`, ids 2 to 257 the bytes. Equal texts give equal files.
///
/// Returns the size of the vocabulary, which is smaller than asked for when no pair repeats any more.
///
/// # Errors
/// `vocab_size` below 258, or a file that cannot be written.
pub fn train_bpe(texts: impl Iterator<Item = String>, vocab_size: usize, out_dir: &Path) -> Result<usize> {
    const SPECIAL: [&str; 2] = ["<s>", "</s>"];
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    if vocab_size < SPECIAL.len() + alphabet.len() {
        return Err(Error::setting_range("vocab_size", vocab_size, "at least 258 (256 bytes, <s> and </s>)"));
    }
    let path = out_dir.join("tokenizer.json");
    let failed = |cause: tokenizers::Error| Error::Tokenizer {
        path: path.clone(),
        what: "writing",
        reason: one_line(cause),
    };

    let byte_level = ByteLevel::new(false, true, true);
    let splitter = ByteLevelWords::new();
    let mut counts = HashMap::new();
    for text in texts {
        splitter.count(&text, &mut counts).map_err(failed)?;
    }
    let words: BTreeMap<String, i64> =
        counts.into_iter().map(|(word, count)| (splitter.spelling(word), count)).collect();
    let tokens =
        SPECIAL.iter().map(ToString::to_string).chain(alphabet.iter().map(char::to_string)).collect();
    let bpe::Vocabulary { tokens, merges } = bpe::learn(tokens, &words, vocab_size);
    let size = tokens.len();

    let vocab: Vocab = tokens.into_iter().zip(0..).collect();
    let model = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(failed)?;
    let template = TemplateProcessing::builder()
        .try_single("<s> $A")
        .and_then(|builder| builder.try_pair("<s> $A <s> $B"))
        .and_then(|builder| builder.special_tokens(vec![("<s>", 0)]).build().map_err(|e| e.to_string()))
        .map_err(|reason| failed(reason.into()))?;
    let mut inner = Inner::new(model);
    inner
        .with_pre_tokenizer(Some(byte_level))
        .with_decoder(Some(byte_level))
        .with_post_processor(Some(template));
    inner.add_special_tokens(SPECIAL.map(|token| AddedToken::from(token, true))).map_err(failed)?;

    let config = serde_json::json!({
        "add_bos_token": true, "add_eos_token": false, "bos_token": "<s>", "eos_token": "</s>",
        "clean_up_tokenization_spaces": false, "tokenizer_class": "PreTrainedTokenizerFast",
    });
    let special = serde_json::json!({ "bos_token": "<s>", "eos_token": "</s>" });
    fs::create_dir_all(out_dir).map_err(Error::io(out_dir))?;
    for (name, text) in [
        ("tokenizer.json", inner.to_string(true).map_err(failed)?),
        ("tokenizer_config.json", format!("{config:#}\n")),
        ("special_tokens_map.json", format!("{special:#}\n")),
    ] {
        let path = out_dir.join(name);
        fs::write(&path, text).map_err(Error::io(&path))?;
    }
    Ok(size)
}

/// Parses `tokenizer.json`. The library panics on some broken files; the check of the syntax catches most of them.
fn parse(bytes: &[u8]) -> tokenizers::Result<Inner> {
    serde_json::from_slice::<IgnoredAny>(bytes)?;
    catch_unwind(|| Inner::from_bytes(bytes))
        .unwrap_or_else(|_| Err("a field has a value of the wrong kind".into()))
}

/// Returns the token that the tokenizer's own post-processor puts in front of a text.
fn template_bos(inner: &Inner) -> tokenizers::Result<Option<u32>> {
    let encoding = inner.encode("a", true)?;
    let first = encoding.get_ids().first().copied();
    Ok(first.filter(|_| encoding.get_special_tokens_mask().first() == Some(&1)))
}

fn one_line(cause: impl ToString) -> String {
    cause.to_string().replace('\n', " ")
}
