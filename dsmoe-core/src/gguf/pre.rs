//! How byte-level tokenizers cut a text into words, by the names that GGUF files have for it.

use serde_json::{Value as Json, json};

/// The pattern of Llama 3: up to three digits together.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The pattern of Qwen 2: digits alone.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The pattern of Mistral's Tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The pattern of GPT-4o.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Returns the byte-level pre-tokenizer, which is the decoder and the post-processor too.
pub(crate) fn byte_level(use_regex: bool) -> Json {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

/// A way to cut a text into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pre {
    /// Its name in files that are written.
    pub(crate) name: &'static str,
    split: Split,
    /// True if a text is normalised to NFC first.
    nfc: bool,
    /// True if a word that is a token stays one, whatever the merges say.
    pub(crate) ignores_merges: bool,
    /// True if BOS goes in front where the file does not say.
    pub(crate) adds_bos: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// By the pattern of GPT-2.
    ByteLevel,
    /// Digits by themselves, then by the pattern of GPT-2.
    Digits,
    /// By another pattern.
    Pattern(&'static str),
}

const fn pre(name: &'static str, split: Split) -> Pre {
    Pre { name, split, nfc: false, ignores_merges: false, adds_bos: false }
}

const LLAMA_BPE: Pre =
    Pre { ignores_merges: true, adds_bos: true, ..pre("llama-bpe", Split::Pattern(LLAMA3)) };

/// All ways.
const ALL: [Pre; 7] = [
    LLAMA_BPE,
    Pre { nfc: true, ..pre("qwen2", Split::Pattern(QWEN2)) },
    pre("smollm", Split::Digits),
    pre("gpt-2", Split::ByteLevel),
    pre("dbrx", Split::Pattern(LLAMA3)),
    Pre { ignores_merges: true, adds_bos: true, ..pre("tekken", Split::Pattern(TEKKEN)) },
    pre("gpt-4o", Split::Pattern(GPT4O)),
];

/// Other names of the same.
const ALIASES: [(&str, &str); 17] = [
    ("llama3", "llama-bpe"),
    ("llama-v3", "llama-bpe"),
    ("falcon3", "llama-bpe"),
    ("pixtral", "llama-bpe"),
    ("deepseek-r1-qwen", "qwen2"),
    ("megrez", "qwen2"),
    ("stablelm2", "qwen2"),
    ("starcoder", "smollm"),
    ("refact", "smollm"),
    ("command-r", "smollm"),
    ("codeshell", "smollm"),
    ("olmo", "gpt-2"),
    ("mpt", "gpt-2"),
    ("phi-2", "gpt-2"),
    ("mellum", "gpt-2"),
    ("smaug-bpe", "dbrx"),
    ("llama4", "gpt-4o"),
];

impl Pre {
    /// Returns the way of this name.
    pub(crate) fn of(name: &str) -> Option<Pre> {
        let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name);
        ALL.into_iter().find(|pre| pre.name == name)
    }

    /// Returns the way of a tokenizer.json with these pre-tokenizers.
    pub(crate) fn of_json(steps: &[&Json], ignores_merges: bool) -> Option<Pre> {
        let plain = |step: &Json, use_regex: bool| {
            let own = step["use_regex"].as_bool().unwrap_or(true);
            step["type"] == "ByteLevel" && step["add_prefix_space"] == false && own == use_regex
        };
        let split = match *steps {
            [bytes] if plain(bytes, true) => Split::ByteLevel,
            [digits, bytes]
                if digits["type"] == "Digits"
                    && digits["individual_digits"] == true
                    && plain(bytes, true) =>
            {
                Split::Digits
            }
            [split, bytes] if split["type"] == "Split" && plain(bytes, false) => {
                let isolated = split["behavior"] == "Isolated" && split["invert"] != true;
                let pattern = split["pattern"]["Regex"].as_str().filter(|_| isolated)?;
                let known = |known: &&'static str| *known == pattern;
                Split::Pattern([LLAMA3, QWEN2, TEKKEN, GPT4O].into_iter().find(known)?)
            }
            _ => return None,
        };
        ALL.into_iter().find(|pre| pre.split == split && pre.ignores_merges == ignores_merges)
    }

    pub(crate) fn normalizer(&self) -> Json {
        if self.nfc { json!({ "type": "NFC" }) } else { Json::Null }
    }

    pub(crate) fn pre_tokenizer(&self) -> Json {
        let sequence = |first: Json, use_regex: bool| json!({ "type": "Sequence", "pretokenizers": [first, byte_level(use_regex)] });
        match self.split {
            Split::ByteLevel => byte_level(true),
            Split::Digits => sequence(json!({ "type": "Digits", "individual_digits": true }), true),
            Split::Pattern(pattern) => {
                let split = json!({
                    "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false,
                });
                sequence(split, false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    use super::*;

    /// The words that another regular expression engine finds by the patterns of published tokenizers.
    const GOLDEN: &str = include_str!("../../tests/data/pre_tokenizers.json");

    #[test]
    fn every_kind_cuts_awkward_texts_as_the_published_tokenizers_do() {
        let golden: BTreeMap<String, Vec<Vec<String>>> = serde_json::from_str(GOLDEN).unwrap();
        assert_eq!(golden.len(), ALL.len());
        for pre in ALL {
            let split: PreTokenizerWrapper = serde_json::from_value(pre.pre_tokenizer()).unwrap();
            for wanted in &golden[pre.name] {
                let text = wanted.concat();
                let mut pieces = PreTokenizedString::from(text.as_str());
                split.pre_tokenize(&mut pieces).unwrap();
                let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
                let words: Vec<&str> =
                    pieces.iter().map(|(_, (start, end), _)| &text[*start..*end]).collect();
                assert_eq!(words, *wanted, "{}", pre.name);
            }
            let (steps, ignores_merges) = (pre.pre_tokenizer(), pre.ignores_merges);
            let steps =
                steps["pretokenizers"].as_array().map_or(vec![&steps], |steps| steps.iter().collect());
            assert_eq!(Pre::of_json(&steps, ignores_merges).map(|found| found.split), Some(pre.split));
        }
    }
}
