//! Encoding of byte-pair tokenizers word by word, with the words' ids remembered.
//!
//! The tokenizers crate spends most of its time on what a corpus does not need: offsets, masks and the text of every
//! token, some sixty bytes for each byte of text. Here a text is cut into words, a word's ids come from a table, and
//! what the table lacks is asked of the crate's own model. The ids are the crate's; a text or a tokenizer for which
//! that is not certain is left to the crate.
//!
//! A text may be cut at these places:
//! - A tokenizer that splits by a pattern is cut by the same pattern. The one part of the usual patterns that a regular
//!   expression without look-ahead cannot say, `\s+(?!\S)`, is done by hand.
//! - A tokenizer that sees the text as one word (SentencePiece's kind) is cut between two characters that stand side by
//!   side in no token: no merge crosses such a place, so the ids on both sides are what they are alone.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, PoisonError};

use regex::Regex;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

/// The pattern of GPT-2, which a byte-level pre-tokenizer uses by itself.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The end of the usual patterns: white space without its last character where a word follows, else all of it.
const TAIL: &str = r"|\s+(?!\S)|\s+";

/// SentencePiece's sign for a space.
const SPACE: char = '\u{2581}';

/// Words of a table at most, and bytes of the longest word in it.
const MAX_WORDS: usize = 1 << 17;
const MAX_WORD: usize = 64;

/// A text or word of so many bytes, more than the memory lets the crate encode.
#[derive(Debug, thiserror::Error)]
#[error("{0} bytes are more than the memory lets be encoded at once")]
pub(crate) struct TooLong(pub(crate) usize);

impl TooLong {
    /// Refuses a text of more than `most` bytes.
    pub(crate) fn check(text: &str, most: usize) -> Result<(), TooLong> {
        if text.len() > most { Err(TooLong(text.len())) } else { Ok(()) }
    }
}

/// Encodes as one tokenizer does.
pub(crate) struct Encoder {
    words: Words,
    /// Finds an added token; a text with one is left to the crate.
    added: Option<Regex>,
    tables: Mutex<Vec<Table>>,
}

enum Words {
    Pattern(Pattern),
    Pairs(Pairs),
}

impl Encoder {
    /// Makes an encoder for the tokenizer of this `tokenizer.json`, if its kind is supported.
    pub(crate) fn new(json: &Value) -> Option<Encoder> {
        let model = &json["model"];
        let plain = |key: &str| model[key].as_str().unwrap_or_default().is_empty();
        if model["type"] != "BPE" || !plain("continuing_subword_prefix") || !plain("end_of_word_suffix") {
            return None;
        }
        let words = match json["normalizer"] {
            Value::Null => match Pattern::new(&json["pre_tokenizer"]) {
                Some(pattern) => Words::Pattern(pattern),
                None => Words::Pairs(Pairs::new(json)?),
            },
            _ => Words::Pairs(Pairs::new(json)?),
        };
        let mut contents = Vec::new();
        for token in json["added_tokens"].as_array().unwrap_or(&Vec::new()) {
            let content = token["content"].as_str()?;
            // A normaliser could make such a token out of another text.
            if content.is_empty() || content.contains([' ', SPACE]) {
                return None;
            }
            contents.push(regex::escape(content));
        }
        let added = match contents.is_empty() {
            true => None,
            false => Some(Regex::new(&contents.join("|")).ok()?),
        };
        Some(Encoder { words, added, tables: Mutex::default() })
    }

    /// Appends the ids of `text`, without a BOS; false, with `ids` as it was, if the crate has to do it. A word of more than `most`
    /// bytes that no table has is refused.
    pub(crate) fn encode(
        &self,
        model: &BPE,
        text: &str,
        ids: &mut Vec<u32>,
        most: usize,
    ) -> tokenizers::Result<bool> {
        if self.added.as_ref().is_some_and(|added| added.is_match(text)) {
            return Ok(false);
        }
        let taken = self.tables.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut table = taken.unwrap_or_default();
        let done = match &self.words {
            Words::Pattern(pattern) => pattern.split(text, &mut |word| {
                table.encode(word, ids, most, &|word| model.tokenize(&as_chars(word)))
            }),
            Words::Pairs(pairs) => {
                pairs.split(text, &mut |word| table.encode(word, ids, most, &|word| model.tokenize(word)))
            }
        };
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).push(table);
        done.map(|()| true)
    }
}

/// The words of `text` as a byte-level tokenizer with GPT-2's pattern sees them, in its spelling.
pub(crate) struct ByteLevelWords(Option<Pattern>);

impl ByteLevelWords {
    pub(crate) fn new() -> ByteLevelWords {
        ByteLevelWords(Pattern::of(GPT2, false))
    }

    /// Counts the words of `text`.
    pub(crate) fn count(&self, text: &str, counts: &mut HashMap<String, i64>) -> tokenizers::Result<()> {
        let Some(pattern) = &self.0 else {
            let mut split = PreTokenizedString::from(text);
            ByteLevel::new(false, true, true).pre_tokenize(&mut split)?;
            for (word, ..) in split.get_splits(OffsetReferential::Original, OffsetType::None) {
                *counts.entry(word.to_owned()).or_default() += 1;
            }
            return Ok(());
        };
        pattern.split(text, &mut |word| {
            match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => drop(counts.insert(word.to_owned(), 1)),
            }
            Ok(())
        })
    }

    /// Returns the spelling of the words that [`ByteLevelWords::count`] counts.
    pub(crate) fn spelling(&self, word: String) -> String {
        if self.0.is_some() { as_chars(&word) } else { word }
    }
}

/// Returns the bytes of `word` as GPT-2 writes them: one printable character each.
fn as_chars(word: &str) -> String {
    word.bytes().map(byte_char).collect()
}

/// Returns GPT-2's character for a byte: the byte itself where that is printable, otherwise the next one from U+0100
/// on.
pub(crate) fn byte_char(byte: u8) -> char {
    let code = match byte {
        0..=0x20 => 0x100 + u32::from(byte),
        0x7f..=0xa0 => 0x121 + u32::from(byte - 0x7f),
        0xad => 0x143,
        _ => u32::from(byte),
    };
    char::from_u32(code).unwrap_or_default()
}

/// Cuts at the matches of a pattern, and between them.
struct Pattern {
    /// The pattern with the tail `\s+` alone.
    any: Regex,
    /// The pattern without its tail, at the start of a text.
    head: Regex,
    prefix_space: bool,
}

impl Pattern {
    fn new(pre_tokenizer: &Value) -> Option<Pattern> {
        let is = |value: &Value, kind: &str| value["type"] == kind;
        if is(pre_tokenizer, "ByteLevel") {
            let own = pre_tokenizer["use_regex"].as_bool().unwrap_or(true);
            return own.then(|| Pattern::of(GPT2, pre_tokenizer["add_prefix_space"].as_bool()?)).flatten();
        }
        let [split, bytes] = &pre_tokenizer["pretokenizers"].as_array()?[..] else { return None };
        let known = is(pre_tokenizer, "Sequence")
            && is(split, "Split")
            && split["behavior"] == "Isolated"
            && split["invert"] == false
            && is(bytes, "ByteLevel")
            && bytes["use_regex"] == false
            && bytes["add_prefix_space"] == false;
        known.then(|| Pattern::of(split["pattern"]["Regex"].as_str()?, false)).flatten()
    }

    fn of(pattern: &str, prefix_space: bool) -> Option<Pattern> {
        let head = pattern.strip_suffix(TAIL)?;
        let any = Regex::new(&format!(r"{head}|\s+")).ok()?;
        Some(Pattern { any, head: Regex::new(&format!(r"\A(?:{head})")).ok()?, prefix_space })
    }

    fn split(
        &self,
        text: &str,
        take: &mut dyn FnMut(&str) -> tokenizers::Result<()>,
    ) -> tokenizers::Result<()> {
        let prefixed;
        let text = if self.prefix_space && !text.is_empty() && !text.starts_with(' ') {
            prefixed = format!(" {text}");
            &prefixed
        } else {
            text
        };
        let mut at = 0;
        while let Some(found) = self.any.find_at(text, at) {
            if at < found.start() {
                take(&text[at..found.start()])?;
            }
            let mut word = found.as_str();
            if found.is_empty() {
                return Err("its pattern matches nothing".into());
            }
            let last = word.chars().next_back().map_or(0, char::len_utf8);
            if found.end() < text.len()
                && last < word.len()
                && word.trim_start().is_empty()
                && !self.head.is_match(&text[found.start()..])
            {
                word = &word[..word.len() - last];
            }
            take(word)?;
            at = found.start() + word.len();
        }
        if at < text.len() { take(&text[at..]) } else { Ok(()) }
    }
}

/// Cuts between characters that no token joins.
struct Pairs {
    /// Put in front of a text: always, or unless it is there already.
    prefix: Option<Prefix>,
    /// Cut before every [`SPACE`] too.
    at_spaces: bool,
    /// True where `a` then `b` stand side by side in a token, for ASCII and [`SPACE`] (written as a space).
    ascii: Vec<bool>,
    others: HashSet<(char, char), BuildHasherDefault<WordHasher>>,
    /// Characters that are tokens, where others are unknown to the model; none: it spells all.
    known: Option<HashSet<char>>,
    /// True if the model leaves out what it does not know, so that the characters around it join.
    drops_unknown: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Prefix {
    Always,
    Unless,
}

impl Pairs {
    fn new(json: &Value) -> Option<Pairs> {
        let model = &json["model"];
        // Whole words are looked up first: a cut would make other words.
        if model["ignore_merges"] == true {
            return None;
        }
        let space = SPACE.to_string();
        let prepend = |value: &Value| value["type"] == "Prepend" && value["prepend"] == space.as_str();
        let replace = |value: &Value| {
            value["type"] == "Replace"
                && value["pattern"]["String"] == " "
                && value["content"] == space.as_str()
        };
        let (normalizer, pre_tokenizer) = (&json["normalizer"], &json["pre_tokenizer"]);
        let (prefix, at_spaces) = match (normalizer["type"].as_str(), pre_tokenizer["type"].as_str()) {
            (Some("Sequence"), None) if pre_tokenizer.is_null() => {
                match &normalizer["normalizers"].as_array()?[..] {
                    [first, second] if prepend(first) && replace(second) => (Some(Prefix::Always), false),
                    _ => return None,
                }
            }
            (Some("Replace"), None) if pre_tokenizer.is_null() && replace(normalizer) => (None, false),
            (None, Some("Metaspace"))
                if normalizer.is_null() && pre_tokenizer["replacement"] == space.as_str() =>
            {
                let prefix = match pre_tokenizer["prepend_scheme"].as_str()? {
                    "always" | "first" => Some(Prefix::Unless),
                    "never" => None,
                    _ => return None,
                };
                (prefix, pre_tokenizer["split"].as_bool()?)
            }
            _ => return None,
        };

        let vocab = model["vocab"].as_object()?;
        let byte = |b: u8| vocab.contains_key(&format!("<0x{b:02X}>"));
        let all_bytes = model["byte_fallback"] == true && (0..=255).all(byte);
        let mut pairs = Pairs {
            prefix,
            at_spaces,
            ascii: vec![false; 128 * 128],
            others: HashSet::default(),
            known: (!all_bytes).then(HashSet::new),
            drops_unknown: !model["unk_token"].is_string(),
        };
        for token in vocab.keys() {
            // A merge of byte tokens joins characters that its text does not show.
            if token.contains("<0x") && token.len() > 6 {
                return None;
            }
            let mut before = None;
            for c in token.chars() {
                if let Some(before) = before {
                    match pair_index(before, c) {
                        Some(at) => pairs.ascii[at] = true,
                        None => drop(pairs.others.insert((before, c))),
                    }
                }
                before = Some(c);
            }
            if let (Some(known), Some(c), None) =
                (&mut pairs.known, token.chars().next(), token.chars().nth(1))
            {
                known.insert(c);
            }
        }
        Some(pairs)
    }

    /// Returns true if the ids before and after the place between `a` and `b` do not depend on each other.
    fn cuts(&self, a: char, b: char) -> bool {
        let joined = match pair_index(a, b) {
            Some(at) => self.ascii[at],
            None => self.others.contains(&(a, b)),
        };
        let known = |c: char| self.known.as_ref().is_none_or(|known| known.contains(&c));
        // Unknown characters that stand side by side may become one token.
        (self.at_spaces && b == SPACE) || (!joined && known(b) && (!self.drops_unknown || known(a)))
    }

    fn split(
        &self,
        text: &str,
        take: &mut dyn FnMut(&str) -> tokenizers::Result<()>,
    ) -> tokenizers::Result<()> {
        let mut spelled = String::with_capacity(text.len() + text.len() / 2);
        match self.prefix {
            Some(Prefix::Always) if !text.is_empty() => spelled.push(SPACE),
            Some(Prefix::Unless) if !text.is_empty() && !text.starts_with([' ', SPACE]) => {
                spelled.push(SPACE)
            }
            _ => {}
        }
        for (i, part) in text.split(' ').enumerate() {
            if i > 0 {
                spelled.push(SPACE);
            }
            spelled.push_str(part);
        }
        let (mut start, mut before) = (0, None);
        for (at, c) in spelled.char_indices() {
            if before.is_some_and(|before| self.cuts(before, c)) {
                take(&spelled[start..at])?;
                start = at;
            }
            before = Some(c);
        }
        if start < spelled.len() { take(&spelled[start..]) } else { Ok(()) }
    }
}

/// Returns the index of a pair in [`Pairs::ascii`].
fn pair_index(a: char, b: char) -> Option<usize> {
    let index = |c: char| match c {
        // No text has a plain space once it is spelled.
        SPACE => Some(usize::from(b' ')),
        ' ' => None,
        _ => c.is_ascii().then_some(c as usize),
    };
    Some(index(a)? * 128 + index(b)?)
}

/// The ids of words met before.
#[derive(Default)]
struct Table {
    words: HashMap<Box<str>, (u32, u32), BuildHasherDefault<WordHasher>>,
    ids: Vec<u32>,
}

impl Table {
    fn encode(
        &mut self,
        word: &str,
        ids: &mut Vec<u32>,
        most: usize,
        model: &dyn Fn(&str) -> tokenizers::Result<Vec<tokenizers::Token>>,
    ) -> tokenizers::Result<()> {
        // The ids of a long document may be more than the memory holds.
        if let Some(&(start, end)) = self.words.get(word) {
            ids.try_reserve((end - start) as usize)?;
            ids.extend_from_slice(&self.ids[start as usize..end as usize]);
            return Ok(());
        }
        TooLong::check(word, most)?;
        let tokens = model(word)?;
        ids.try_reserve(tokens.len())?;
        ids.extend(tokens.iter().map(|token| token.id));
        if word.len() <= MAX_WORD && self.words.len() < MAX_WORDS {
            let start = self.ids.len() as u32;
            self.ids.extend(tokens.iter().map(|token| token.id));
            self.words.insert(word.into(), (start, self.ids.len() as u32));
        }
        Ok(())
    }
}

/// Multiply and rotate, eight bytes at a time: the words come from the user's own text.
#[derive(Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (eights, rest) = bytes.as_chunks::<8>();
        for &eight in eights {
            self.write_u64(u64::from_le_bytes(eight));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.write_u64(u64::from_le_bytes(last) ^ (bytes.len() as u64) << 56);
    }

    fn write_u8(&mut self, _: u8) {
        // Ends a string; the length is in already.
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        // The table takes its place from the upper bits and its tag from the lower ones.
        self.0 ^ self.0 >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::collections::BTreeMap;
    use std::str::FromStr;
    use tokenizers::{ModelWrapper, Tokenizer};

    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const TEXT: &str = "It's a day.  Don't say 'Twas so \n\n\n they'll go\t\tfar, 12345 x1 É été 日本語 日本 \r\n \r\n  a  \u{a0} b \
                        e\u{301}\u{2003}x ('d've)\n  \n";

    fn bytes_vocab() -> serde_json::Map<String, Value> {
        (0..=255u8).map(|b| (byte_char(b).to_string(), json!(b))).collect()
    }

    fn byte_level(pre_tokenizer: Value, ignore_merges: bool) -> Value {
        let mut vocab = bytes_vocab();
        let mut merges = Vec::new();
        for (left, right) in
            [("Ġ", "d"), ("Ġd", "a"), ("'", "s"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "y"), ("t", "'")]
        {
            vocab.insert(format!("{left}{right}"), json!(vocab.len()));
            merges.push(json!([left, right]));
        }
        vocab.insert("Ġday".into(), json!(vocab.len()));
        json!({"version": "1.0", "added_tokens": [{"id": 400, "content": "<s>", "special": true, "normalized": false,
            "lstrip": false, "rstrip": false, "single_word": false}], "normalizer": null, "pre_tokenizer": pre_tokenizer,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}})
    }

    fn sentence_piece(byte_fallback: bool, fuse_unk: bool, changes: Value) -> Value {
        let mut vocab = serde_json::Map::new();
        vocab.insert("<unk>".into(), json!(0));
        if byte_fallback {
            for b in 0..=255u8 {
                vocab.insert(format!("<0x{b:02X}>"), json!(vocab.len()));
            }
        }
        for c in "▁abcdeghostyITD.,'1é日\n".chars() {
            vocab.insert(c.into(), json!(vocab.len()));
        }
        let mut merges = Vec::new();
        for (left, right) in [
            ("a", "y"),
            ("▁", "d"),
            ("▁d", "ay"),
            ("▁", "▁"),
            ("s", "a"),
            ("e", "▁"),
            ("é", "t"),
            ("▁", "日"),
            ("a", "."),
        ] {
            vocab.insert(format!("{left}{right}"), json!(vocab.len()));
            merges.push(json!([left, right]));
        }
        let mut json = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": null,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>", "fuse_unk": fuse_unk,
                "byte_fallback": byte_fallback}});
        json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        json
    }

    fn kinds() -> Vec<Value> {
        let byte = |prefix| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true});
        let llama3 = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
        let meta = |scheme: &str, split| {
            json!({"normalizer": null,
                "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}})
        };
        // Unknown characters vanish, and the space is one of them.
        let dropping = |changes: Value| {
            let mut json = sentence_piece(false, false, changes);
            let model = json["model"].as_object_mut().unwrap();
            model.remove("unk_token");
            model["vocab"].as_object_mut().unwrap().retain(|token, _| token != "▁" && token != "<unk>");
            model["merges"].as_array_mut().unwrap().retain(|merge| !merge.to_string().contains('▁'));
            json
        };
        vec![
            byte_level(byte(false), false),
            byte_level(byte(true), false),
            byte_level(llama3.clone(), false),
            byte_level(llama3, true),
            sentence_piece(true, true, json!({})),
            sentence_piece(false, true, json!({})),
            sentence_piece(false, false, json!({})),
            sentence_piece(true, true, meta("first", false)),
            sentence_piece(false, true, meta("always", true)),
            sentence_piece(true, false, meta("never", true)),
            dropping(json!({})),
            dropping(meta("never", false)),
            dropping(meta("always", true)),
        ]
    }

    /// Ids of ours and of the crate.
    fn both(json: &Value, text: &str) -> (Option<Vec<u32>>, Vec<u32>) {
        let crates = Tokenizer::from_str(&json.to_string()).unwrap();
        let ModelWrapper::BPE(model) = crates.get_model() else { panic!("a BPE") };
        let encoder = Encoder::new(json).expect("a known kind");
        let mut ids = Vec::new();
        let mut ours = None;
        // The second time out of the table.
        for _ in 0..2 {
            ids.clear();
            ours = encoder.encode(model, text, &mut ids, usize::MAX).unwrap().then(|| ids.clone());
        }
        (ours, crates.encode_fast(text, false).unwrap().get_ids().to_vec())
    }

    #[test]
    fn ids_are_those_of_the_crate() {
        for json in kinds() {
            for text in [
                TEXT,
                "",
                " ",
                "  ",
                "\n",
                "a",
                " a",
                "▁a",
                "  day",
                "day ",
                "zz日z",
                "🦊🦊 🦊",
                "a y",
                "aéy",
                "s  a",
            ] {
                let (ours, crates) = both(&json, text);
                assert_eq!(ours, Some(crates), "{text:?} {} {}", json["pre_tokenizer"], json["normalizer"]);
            }
        }
        assert_eq!(both(&kinds()[0], "a <s> b").0, None, "an added token is left to the crate");
    }

    #[test]
    fn what_is_not_certain_is_left_to_the_crate() {
        let base = sentence_piece(true, true, json!({}));
        let changed = |at: &str, value: Value| {
            let mut json = base.clone();
            *json.pointer_mut(at).unwrap() = value;
            Encoder::new(&json).is_none()
        };
        assert!(changed("/model/type", json!("Unigram")));
        assert!(changed("/normalizer/normalizers/0/prepend", json!("x")));
        assert!(changed("/normalizer/normalizers/1/content", json!("_")));
        assert!(changed("/normalizer", json!({"type": "NFC"})));
        assert!(changed("/pre_tokenizer", json!({"type": "Whitespace"})));
        assert!(changed("/added_tokens", json!([{"content": "a b"}])));
        assert!(changed("/model/vocab", json!({"<0x0A><0x0A>": 0})));
        let mut ignoring = base.clone();
        ignoring["model"]["ignore_merges"] = json!(true);
        assert!(Encoder::new(&ignoring).is_none());
        assert!(Encoder::new(&json!({})).is_none() && Encoder::new(&json!([1])).is_none());
    }

    #[test]
    fn byte_characters_are_those_of_the_crate() {
        let alphabet: BTreeMap<char, ()> = ByteLevel::alphabet().into_iter().map(|c| (c, ())).collect();
        let ours: BTreeMap<char, ()> = (0..=255).map(|b| (byte_char(b), ())).collect();
        assert_eq!(ours, alphabet);
        assert_eq!([b' ', b'\n', b'a', 0xad].map(byte_char), ['Ġ', 'Ċ', 'a', 'Ń']);
    }

    #[test]
    fn words_are_counted_as_the_crate_splits() {
        let ours = ByteLevelWords::new();
        assert!(ours.0.is_some());
        let (mut counts, mut expected) = (HashMap::new(), HashMap::new());
        ours.count(TEXT, &mut counts).unwrap();
        ByteLevelWords(None).count(TEXT, &mut expected).unwrap();
        let counts: HashMap<String, i64> =
            counts.into_iter().map(|(word, n)| (ours.spelling(word), n)).collect();
        assert_eq!(counts, expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn any_text_has_the_ids_of_the_crate(
            text in "([ \\n\\t\\r]|\\PC|[a-eyst'.,▁ ]|'s| day|\u{2003}|日|[0-9]){0,40}",
            kind in 0usize..13,
        ) {
            let json = &kinds()[kind];
            let (ours, crates) = both(json, &text);
            prop_assert_eq!(ours.unwrap_or_else(|| crates.clone()), crates);
        }
    }
}
