//! `tokenizer.json` of a model: encoding with a stated BOS rule, decoding at once or token by token, and training of
//! a small byte-level BPE.

mod files;
mod sound;
mod stream;

pub use files::TokenizerFiles;
pub use stream::DecodeStream;

use crate::bpe;
use crate::encoder::{ByteLevelWords, Encoder, TooLong, byte_char};
use crate::error::{Error, Result, shown};
use crate::files::{hex, replace, without_bom};
use crate::token_texts::TokenTexts;
use files::{Settings, check_values};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sound::guarded;
use std::collections::{BTreeMap, HashMap, TryReserveError};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Decoder, DecoderWrapper, Model, ModelWrapper, Tokenizer as Inner};

/// Bytes of memory that the crate takes to encode a byte of text or of a word: its offsets, masks and texts of tokens.
const BYTES_OF_BYTE: u64 = 64;

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
    eos_id: Option<u32>,
    prefix_id: Option<u32>,
    /// The special tokens as they are written.
    special: BTreeMap<u32, String>,
    /// Special tokens in the middle of a text decode as they are written, not as the normaliser makes them.
    special_verbatim: bool,
    byte_fallback: bool,
    vocab_size: usize,
    notices: Vec<String>,
    /// The bytes of memory that there are.
    memory: u64,
}

impl Tokenizer {
    /// Reads the tokenizer of `model_dir`; see [`Tokenizer::new`].
    ///
    /// # Errors
    /// Those of [`TokenizerFiles::read`] and [`Tokenizer::new`].
    pub fn load(model_dir: &Path, bos_id: Option<u32>, vocab_size: usize) -> Result<Tokenizer> {
        Tokenizer::new(&TokenizerFiles::read(model_dir)?, bos_id, vocab_size)
    }

    /// Makes a tokenizer of its files. `bos_id` is the `bos_token_id` of the model's config, which counts only where the
    /// files name no BOS token; `vocab_size` is the number of rows of the model's embedding.
    ///
    /// Truncation, padding and merge dropout that the files may ask for are switched off: they would drop, add or
    /// randomise tokens of a corpus.
    ///
    /// # Errors
    /// Files that do not parse or contradict themselves, an added token whose id is not the next free one, or a tokenizer
    /// that can produce an id outside the embedding.
    pub fn new(files: &TokenizerFiles, bos_id: Option<u32>, vocab_size: usize) -> Result<Tokenizer> {
        let path = files.path.clone();
        let bad =
            |cause: tokenizers::Error| Error::BadTokenizer { path: path.clone(), reason: one_line(cause) };
        let bytes = without_bom(&files.tokenizer);
        check_values(&path, bytes)?;
        let mut json: Value = serde_json::from_slice(bytes).map_err(|cause| bad(cause.into()))?;
        let mut inner = sound::parse(bytes, &json).map_err(bad)?;
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
        let settings = files.settings()?;
        let mut notices = Vec::new();
        let outside = Outside { path: &path, next: largest_id.saturating_add(1), vocab_size };
        let added = outside.add(&settings, &mut inner, &mut notices)?;
        let largest_id = largest_id.max(added.keys().next_back().copied().unwrap_or(0));
        let bos = BosIds::new(&inner, &settings, bos_id, vocab_size).map_err(bad)?;
        notices.extend(bos.notice(bos_id, &inner));
        let special = inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special);
        let special = special.map(|(id, token)| (id, token.content)).collect();
        let sha256 = identity(bytes, &added);
        let encoder = encoder(&mut json, &added);
        let eos_id = settings.special("eos_token").and_then(|text| inner.token_to_id(text));
        let BosIds { auto: auto_bos, named: bos_id, own } = bos;
        let prefix_id = own.or(eos_id);
        let vocab_size = largest_id as usize + 1;
        Ok(Tokenizer {
            byte_fallback: has_byte_fallback(&inner),
            inner,
            encoder,
            path,
            sha256,
            bos_id,
            auto_bos,
            eos_id,
            prefix_id,
            special,
            special_verbatim: settings.writes_special_verbatim(),
            vocab_size,
            notices,
            memory: u64::MAX,
        })
    }

    /// Sets the bytes of memory that there are: a document whose encoding takes more is refused, with [`Error::Encoding`]. Without
    /// it none is.
    #[must_use]
    pub fn with_memory(mut self, bytes: u64) -> Tokenizer {
        self.memory = bytes;
        self
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
        let most = usize::try_from(self.memory / BYTES_OF_BYTE).unwrap_or(usize::MAX);
        let encoded = guarded(|| {
            let quick = match (&self.encoder, self.inner.get_model()) {
                (Some(encoder), ModelWrapper::BPE(model)) => encoder.encode(model, text, &mut ids, most)?,
                _ => false,
            };
            if !quick {
                TooLong::check(text, most)?;
                ids.extend_from_slice(self.inner.encode_fast(text, false)?.get_ids());
            }
            Ok(())
        });
        let files = || "a document".to_owned();
        encoded.map_err(|cause| match cause.downcast_ref::<TooLong>() {
            Some(&TooLong(bytes)) => Error::Encoding { files: files(), bytes, memory: self.memory },
            None if cause.is::<TryReserveError>() => Error::Memory { files: files(), ids: ids.len() },
            None => self.failed("encoding", cause),
        })?;
        if prefix.is_some() && ids.get(1) == prefix.as_ref() {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// Encodes each of `texts` as [`Tokenizer::encode`] does, on all threads. An error comes with the number of its text.
    pub(crate) fn encode_all(
        &self,
        texts: &[String],
        bos: Bos,
    ) -> std::result::Result<Vec<Vec<u32>>, (usize, Error)> {
        let encode = |(at, text): (usize, &String)| self.encode(text, bos).map_err(|cause| (at, cause));
        texts.par_iter().enumerate().map(encode).collect()
    }

    /// Decodes `ids`, without special tokens if `skip_special`. Ids outside the vocabulary are left out.
    ///
    /// Special tokens that stay are printed as transformers prints them. It also prints some that were to be left out: those
    /// marked `normalized` that no Llama class reads, since it compares their normalised texts.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let token = |id: u32| match self.special.get(&id) {
            Some(_) if skip_special => None,
            Some(text) if self.special_verbatim => Some(text.clone()),
            _ => self
                .inner
                .get_added_vocabulary()
                .simple_id_to_token(id)
                .or_else(|| self.inner.get_model().id_to_token(id)),
        };
        let tokens: Vec<String> = ids.iter().filter_map(|&id| token(id)).collect();
        let decoded = guarded(|| match self.inner.get_decoder() {
            Some(decoder) => decoder.decode(tokens),
            None => Ok(tokens.join(" ")),
        });
        decoded.map_err(|cause| self.failed("decoding", cause))
    }

    /// Returns a decoder of what follows the ids `before`, which receives one token at a time. Special tokens give no text.
    pub fn stream(&self, before: &[u32]) -> Result<DecodeStream<'_>> {
        DecodeStream::new(self, before)
    }

    /// Returns whether the token is a byte of a run that decodes together; none if it has no text.
    fn is_byte(&self, id: u32) -> Option<bool> {
        let token = self.inner.id_to_token(id).filter(|_| !self.special.contains_key(&id))?;
        Some(self.byte_fallback && byte_of(&token).is_some())
    }

    /// Returns the bytes of each token; special tokens have none.
    pub fn token_texts(&self) -> TokenTexts {
        let bytes_of_chars: HashMap<char, u8> = (0..=255).map(|byte| (byte_char(byte), byte)).collect();
        let byte_level = matches!(self.inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let bytes_of = |id: u32| -> Option<Vec<u8>> {
            let token = self.inner.id_to_token(id).filter(|_| !self.special.contains_key(&id))?;
            if byte_level
                && let Some(bytes) = token.chars().map(|c| bytes_of_chars.get(&c).copied()).collect()
            {
                return Some(bytes);
            }
            Some(
                byte_of(&token)
                    .map_or_else(|| token.replace('\u{2581}', " ").into_bytes(), |byte| vec![byte]),
            )
        };
        let texts: Vec<_> = (0..self.vocab_size as u32).map(bytes_of).collect();
        TokenTexts::new(texts.iter().map(Option::as_deref))
    }

    /// Returns the SHA-256 of the bytes of `tokenizer.json` and of the tokens that other files add, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Returns one more than the largest id that this tokenizer produces.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the BOS id: the one that the tokenizer's files name, or else that of the model's config.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Returns the id of the token that `tokenizer_config.json` names as `eos_token`.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// Returns the id from which a text without context is scored, as lm-evaluation-harness takes it: the BOS that the
    /// tokenizer's files name, or else the EOS.
    pub fn prefix_id(&self) -> Option<u32> {
        self.prefix_id
    }

    /// Returns the id of the special or added token that is written exactly like `text`.
    pub fn added_id(&self, text: &str) -> Option<u32> {
        self.inner.get_added_vocabulary().get_vocab().get(text).copied()
    }

    /// Returns the id of the longest special or added token that `text` begins with.
    pub fn added_prefix(&self, text: &str) -> Option<u32> {
        let added = self.inner.get_added_vocabulary().get_vocab().iter();
        let found = added.filter(|(token, _)| !token.is_empty() && text.starts_with(token.as_str()));
        found.max_by_key(|(token, _)| token.len()).map(|(_, &id)| id)
    }

    /// Returns the special tokens that are written out in `text`, each once, in the order of their ids.
    pub fn special_within(&self, text: &str) -> Vec<String> {
        self.special.values().filter(|token| text.contains(token.as_str())).cloned().collect()
    }

    /// Returns what a user should know about the files: contradictions that were resolved.
    pub fn notices(&self) -> &[String] {
        &self.notices
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
        // Of its own this class of transformers gives token_type_ids too, which models of these families do not take.
        "model_input_names": ["input_ids", "attention_mask"],
    });
    let special = serde_json::json!({ "bos_token": "<s>", "eos_token": "</s>" });
    fs::create_dir_all(out_dir).map_err(Error::io(out_dir))?;
    for (name, text) in [
        ("tokenizer.json", inner.to_string(true).map_err(failed)?),
        ("tokenizer_config.json", format!("{config:#}\n")),
        ("special_tokens_map.json", format!("{special:#}\n")),
    ] {
        let path = out_dir.join(name);
        replace(&path, |file| file.write_all(text.as_bytes())).map_err(Error::io(&path))?;
    }
    Ok(size)
}

/// Adds the tokens that stand in other files only.
struct Outside<'a> {
    path: &'a Path,
    /// The next free id.
    next: u32,
    vocab_size: usize,
}

impl Outside<'_> {
    /// Adds the tokens of `settings` that `inner` lacks and returns them.
    fn add(
        mut self,
        settings: &Settings,
        inner: &mut Inner,
        notices: &mut Vec<String>,
    ) -> Result<BTreeMap<u32, AddedToken>> {
        let mut added = BTreeMap::new();
        let known = inner.get_added_tokens_decoder();
        for (&id, token) in &settings.added_tokens {
            let content = &token.content;
            match inner.token_to_id(content) {
                Some(own) if own != id => notices.push(format!(
                    "{}: token {content:?} has id {own} here and {id} in the files beside it; {own} is used",
                    self.path.display()
                )),
                Some(_) if known.contains_key(&id) => {}
                Some(_) => drop(added.insert(id, token.clone())),
                None if id as usize >= self.vocab_size => notices.push(format!(
                    "{}: the added token {content:?} has id {id}, for which the model's embedding has no row; it is left out",
                    self.path.display()
                )),
                None if id == self.next => {
                    added.insert(id, token.clone());
                    self.next += 1;
                }
                None => return Err(self.misplaced(content, id)),
            }
        }
        let tokens: Vec<AddedToken> = added.values().cloned().collect();
        guarded(|| inner.add_tokens(tokens)).map_err(|cause| Error::BadTokenizer {
            path: self.path.to_path_buf(),
            reason: one_line(cause),
        })?;
        match added.iter().find(|(id, token)| inner.token_to_id(&token.content) != Some(**id)) {
            Some((&id, token)) => Err(self.misplaced(&token.content, id)),
            None => Ok(added),
        }
    }

    fn misplaced(&self, token: &str, id: u32) -> Error {
        Error::AddedToken { path: self.path.to_path_buf(), token: token.to_owned(), id, next: self.next }
    }
}

/// The ids of BOS by each rule.
struct BosIds {
    /// For [`Bos::Auto`].
    auto: Option<u32>,
    /// For [`Bos::Always`].
    named: Option<u32>,
    /// The one that the tokenizer's files name.
    own: Option<u32>,
}

impl BosIds {
    fn new(
        inner: &Inner,
        settings: &Settings,
        config: Option<u32>,
        vocab_size: usize,
    ) -> tokenizers::Result<BosIds> {
        let template = template_bos(inner)?;
        if let Some(id) = template.filter(|&id| id as usize >= vocab_size) {
            return Err(
                format!("the post-processor adds id {id}, the model's vocab_size is {vocab_size}").into()
            );
        }
        let own = template.or(settings.special("bos_token").and_then(|text| inner.token_to_id(text)));
        let named = own.or(config);
        // The id of config.json alone adds nothing: many models name one there that they were never trained with.
        let auto = template.or(named.filter(|_| settings.add_bos_token == Some(true)));
        Ok(BosIds { auto, named, own })
    }

    /// Returns what to tell the user if the model's config names another token.
    fn notice(&self, config: Option<u32>, inner: &Inner) -> Option<String> {
        let (named, config) = (self.named?, config?);
        let text = |id| inner.id_to_token(id).unwrap_or_default();
        (named != config).then(|| {
            format!(
                "BOS: config.json names id {config} ({:?}), the tokenizer id {named} ({:?}), which is used",
                text(config),
                text(named)
            )
        })
    }
}

/// Returns the byte that a token such as `<0x0A>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 2)
}

/// Returns whether runs of byte tokens decode together.
fn has_byte_fallback(inner: &Inner) -> bool {
    let newline = || inner.get_decoder().map(|decoder| decoder.decode(vec!["<0x0A>".into()])).transpose();
    guarded(newline).is_ok_and(|text| text.as_deref() == Some("\n"))
}

/// Returns the token that the tokenizer's own post-processor puts in front of a text.
fn template_bos(inner: &Inner) -> tokenizers::Result<Option<u32>> {
    let encoding = guarded(|| inner.encode("a", true))?;
    let first = encoding.get_ids().first().copied();
    Ok(first.filter(|_| encoding.get_special_tokens_mask().first() == Some(&1)))
}

/// Returns the SHA-256 of `tokenizer.json` and the tokens added to it, in hexadecimal.
fn identity(bytes: &[u8], added: &BTreeMap<u32, AddedToken>) -> String {
    let mut hasher = Sha256::new_with_prefix(bytes);
    for (id, token) in added {
        hasher.update(format!("\n{id} {token:?}"));
    }
    hex(&hasher.finalize())
}

/// Returns the fast encoder, which leaves texts with added tokens to the library.
fn encoder(json: &mut Value, added: &BTreeMap<u32, AddedToken>) -> Option<Encoder> {
    if !added.is_empty() {
        let contents = added.values().map(|token| serde_json::json!({ "content": token.content }));
        let mut all = json["added_tokens"].as_array().cloned().unwrap_or_default();
        all.extend(contents);
        json.as_object_mut()?.insert("added_tokens".into(), all.into());
    }
    Encoder::new(json)
}

fn one_line(cause: impl ToString) -> String {
    shown(&cause.to_string())
}
