//! Edited copies of good files for every reader of the crate. Longer searches: `fuzz/` of the repository.

mod bodies;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "../common/made.rs"]
mod made;

use std::fs;

use dsmoe_datasets::tokens::prepare;
use dsmoe_datasets::{Bos, Corpus, CorpusOptions, Tokenizer, tokenizer::train_bpe};
use made::{bzip2, gzip};
use proptest::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use serde_json::{Value, json};

const JSONL: &str = "{\"text\": \"one é\", \"id\": 3}\n{\"text\": \"two \\u00e9\\n\"}\n\n{\"text\": \"\"}\n";
const PIQA: &str = "{\"goal\": \"g\", \"sol1\": \"one\", \"sol2\": \"two\", \"label\": 1}\n";
const MIXTURE: &str =
    "[[source]]\nname = \"web\"\ndata = [\"a\", \"b\"]\nweight = 4\ntext_column = \"q,a\"\n";
const MANIFEST: &str = r#"{"format_version": 1, "files": [{"path": "a.txt", "bytes": 3, "sha256": "00"}]}"#;

const CHAT: &str = "{{ bos_token }}{%- for m in messages %}{% if m.role == 'user' and loop.index0 % 2 == 0 %}<{{ m.role|trim }}>\
    {{ m.content.split('a')[-1] * 2 }}{% set x = namespace(n=3) %}{% else %}{{ range(x.n|default(2))|list }}{% endif %}{% endfor %}\
    {% macro f(a) %}{{ a|upper }}{% endmacro %}{{ f('b') }}";
const CHAT_CONFIG: &str = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": true}"#;
const MESSAGES: &str =
    r#"[{"role": "user", "content": "a\u00e9"}, {"role": "assistant", "content": [{"type": "text"}]}]"#;

/// Returns how many inputs of every kind are tried; `DSMOE_FUZZ_CASES` asks for more.
fn cases(default: u32) -> u32 {
    std::env::var("DSMOE_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default)
}

/// One to five edits: a byte replaced, a range removed, digits inserted, or a range doubled.
fn edits() -> impl Strategy<Value = Vec<(prop::sample::Index, u8, u8, usize)>> {
    proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4, 0usize..40), 1..6)
}

fn edited(good: &[u8], edits: &[(prop::sample::Index, u8, u8, usize)]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for &(at, byte, kind, span) in edits {
        if bytes.is_empty() {
            break;
        }
        let at = at.index(bytes.len());
        let end = bytes.len().min(at + span);
        match kind {
            0 => bytes[at] = byte,
            1 => drop(bytes.drain(at..end)),
            2 => drop(bytes.splice(at..at, b"9".repeat(span))),
            _ => {
                let copy = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, copy));
            }
        }
    }
    bytes
}

/// Two lines of JSON.
const XZ: [u8; 96] = [
    0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x04, 0xe6, 0xd6, 0xb4, 0x46, 0x02, 0x00, 0x21, 0x01, 0x16,
    0x00, 0x00, 0x00, 0x74, 0x2f, 0xe5, 0xa3, 0xe0, 0x00, 0x22, 0x00, 0x21, 0x5d, 0x00, 0x3d, 0x88, 0x8a,
    0x86, 0x94, 0x88, 0x13, 0xe0, 0xf3, 0x87, 0x24, 0xb7, 0x68, 0x36, 0x09, 0xcc, 0x4c, 0x77, 0x52, 0x5e,
    0xaa, 0x81, 0x76, 0xbe, 0xbf, 0x4a, 0x6a, 0xc0, 0x62, 0xfe, 0xcc, 0xe0, 0x00, 0x00, 0x00, 0x00, 0x00,
    0xa6, 0x24, 0x79, 0xcd, 0x34, 0xe3, 0x10, 0x07, 0x00, 0x01, 0x3d, 0x23, 0xe7, 0x8c, 0x09, 0xe8, 0x1f,
    0xb6, 0xf3, 0x7d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x04, 0x59, 0x5a,
];

const PACKED: [&[u8]; 4] = [
    include_bytes!("../data/zstd-v2.parquet"),
    include_bytes!("../data/gzip-v1.parquet"),
    include_bytes!("../data/brotli-v2.parquet"),
    include_bytes!("../data/lz4-v1.parquet"),
];

fn parquet() -> Vec<u8> {
    let texts: Vec<String> = (0..20).map(|i| format!("text {}", i * i)).collect();
    made::parquet("message m { REQUIRED BYTE_ARRAY text (UTF8); }", vec![vec![made::texts(&texts, 0)]])
}

/// A good tokenizer, token cache and Parquet file.
fn made_files() -> &'static [Vec<u8>; 3] {
    static FILES: std::sync::OnceLock<[Vec<u8>; 3]> = std::sync::OnceLock::new();
    FILES.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("a.txt");
        fs::write(&text, "the cat sat on the mat, the cat sat on the hat").unwrap();
        train_bpe(std::iter::once(fs::read_to_string(&text).unwrap()), 280, dir.path()).unwrap();
        let tokenizer = Tokenizer::load(dir.path(), None, 280).unwrap();
        let corpus = Corpus::open(&[text], CorpusOptions::default()).unwrap();
        let cache = prepare(&corpus, &tokenizer, Bos::Never, dir.path(), &mut |_, _| ()).unwrap().path;
        let [tokenizer, cache] =
            [dir.path().join("tokenizer.json"), cache].map(|path| fs::read(path).unwrap());
        [tokenizer, cache, parquet()]
    })
}

/// Tokenizers of each kind with everything that one can hold, small so that changes meet the structure.
fn tokenizers() -> &'static [Value; 3] {
    static TOKENIZERS: std::sync::OnceLock<[Value; 3]> = std::sync::OnceLock::new();
    TOKENIZERS.get_or_init(|| {
        let added = json!([{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": true,
            "normalized": false, "special": true}]);
        let template = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
        let byte = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let split = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\w+|\\s+(?!\\S)|."}, "behavior": "Isolated", "invert": false},
            {"type": "FixedLength", "length": 3}, {"type": "Digits", "individual_digits": true}, byte]});
        let bpe = json!({"version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
            "stride": 0}, "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": 2, "pad_id": 1,
            "pad_type_id": 0, "pad_token": "a"}, "added_tokens": added, "normalizer": {"type": "NFC"},
            "pre_tokenizer": split, "post_processor": {"type": "Sequence", "processors": [template, byte]}, "decoder": byte,
            "model": {"type": "BPE", "dropout": 0.1, "unk_token": "a", "continuing_subword_prefix": "", "end_of_word_suffix": "",
                "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                "vocab": {"<s>": 0, "a": 1, "i": 2, "d": 3, "ai": 4, "aid": 5, "Ġ": 6, "s": 7},
                "merges": [["a", "i"], ["ai", "d"]]}});
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 1});
        let piece = json!({"version": "1.0", "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Lowercase"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
            "post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["<s>", 0]},
            "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, strip, {"type": "WordPiece", "prefix": "##", "cleanup": true}]},
            "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": true,
                "vocab": [["<s>", 0.0], ["a", -1.5], ["▁", -2.0], ["▁s", -3.0], ["<0x0A>", -4.0]]}});
        let word = json!({"version": "1.0", "added_tokens": added,
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": template,
            "decoder": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 20, "vocab": {"<s>": 0, "a": 1, "##id": 2, "s": 3}}});
        [bpe, piece, word]
    })
}

/// Collects the places of all values below `json`.
fn walk(json: &Value, at: &mut String, places: &mut Vec<String>) {
    let length = at.len();
    let keys: Vec<String> = match json {
        Value::Object(fields) => fields.keys().map(|key| key.replace('~', "~0").replace('/', "~1")).collect(),
        Value::Array(items) => (0..items.len()).map(|i| i.to_string()).collect(),
        _ => Vec::new(),
    };
    for key in keys {
        *at += "/";
        *at += &key;
        places.push(at.clone());
        walk(json.pointer(&format!("/{key}")).expect("its own key"), at, places);
        at.truncate(length);
    }
}

/// Replaces the value at `place`, or removes it.
fn change(json: &mut Value, place: &str, value: usize) {
    let values = [
        json!(null),
        json!(0),
        json!(1),
        json!(-1),
        json!(300),
        json!(4_294_967_295u32),
        json!(1e18),
        json!(""),
        json!("zz"),
        json!("▁"),
        json!([]),
        json!({}),
        json!(true),
    ];
    if let Some(value) = values.get(value) {
        *json.pointer_mut(place).expect("a place") = value.clone();
        return;
    }
    let (above, key) = place.rsplit_once('/').expect("a place below the top");
    match json.pointer_mut(above) {
        Some(Value::Object(fields)) => drop(fields.remove(&key.replace("~1", "/").replace("~0", "~"))),
        Some(Value::Array(items)) => drop(items.remove(key.parse().expect("an index"))),
        _ => unreachable!("a place has something above it"),
    }
}

#[test]
fn the_unedited_files_are_good() {
    let dir = tempfile::tempdir().unwrap();
    for json in tokenizers() {
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::load(dir.path(), None, 300).unwrap().encode("aid s", Bos::Auto).unwrap();
    }
    let [tokenizer, cache, _] = made_files();
    bodies::tokenizer(tokenizer);
    bodies::token_cache(cache);
    assert_eq!(edited(b"abc", &[]), b"abc");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(200)))]

    #[test]
    fn any_bytes_in_any_reader(bytes: Vec<u8>) {
        for name in ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz", "a.txt.zst", "a.parquet"] {
            bodies::corpus(name, &bytes);
        }
        for name in ["a.jsonl", "a.parquet"] {
            bodies::task("piqa", name, &bytes);
        }
        bodies::tokenizer(&bytes);
        bodies::token_cache(&bytes);
        bodies::manifest(&bytes);
        bodies::mixture(&bytes);
        bodies::definition(&bytes);
    }

    #[test]
    fn edited_texts(edits in edits()) {
        let jsonl = JSONL.as_bytes();
        bodies::corpus("a.jsonl", &edited(jsonl, &edits));
        bodies::corpus("a.jsonl.gz", &edited(&gzip(jsonl), &edits));
        bodies::corpus("a.jsonl.gz", &gzip(&edited(jsonl, &edits)));
        bodies::corpus("a.jsonl.zst", &edited(&compress_to_vec(jsonl, CompressionLevel::Fastest), &edits));
        bodies::corpus("a.jsonl.bz2", &edited(&bzip2(jsonl), &edits));
        bodies::corpus("a.jsonl.xz", &edited(&XZ, &edits));
        bodies::corpus("a.parquet", &edited(&made_files()[2], &edits));
        for packed in PACKED {
            bodies::corpus("a.parquet", &edited(packed, &edits));
        }
    }

    #[test]
    fn edited_benchmarks_and_settings(edits in edits()) {
        bodies::task("piqa", "a.jsonl", &edited(PIQA.as_bytes(), &edits));
        bodies::mixture(&edited(MIXTURE.as_bytes(), &edits));
        bodies::manifest(&edited(MANIFEST.as_bytes(), &edits));
        for (name, text) in dsmoe_datasets::tasks::definitions() {
            // Its own name is taken.
            let text = text.replacen("name = \"", "name = \"edited_", 1).replace("\naliases", "\n# aliases");
            assert!(!text.is_empty(), "{name}");
            bodies::definition(&edited(text.as_bytes(), &edits));
        }
    }

    /// Whole fields change: the file parses and contradicts itself.
    #[test]
    fn changed_fields_of_tokenizers(
        kind in 0usize..3,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..14), 1..4),
    ) {
        let mut json = tokenizers()[kind].clone();
        for (at, value) in changes {
            let mut places = Vec::new();
            walk(&json, &mut String::new(), &mut places);
            change(&mut json, &places[at.index(places.len())], value);
        }
        bodies::tokenizer(json.to_string().as_bytes());
    }

    #[test]
    fn edited_conversations(edits in edits()) {
        bodies::chat(&edited(CHAT.as_bytes(), &edits), CHAT_CONFIG.as_bytes(), MESSAGES.as_bytes());
        bodies::chat(CHAT.as_bytes(), &edited(CHAT_CONFIG.as_bytes(), &edits), MESSAGES.as_bytes());
        bodies::chat(CHAT.as_bytes(), CHAT_CONFIG.as_bytes(), &edited(MESSAGES.as_bytes(), &edits));
    }

    #[test]
    fn edited_tokens(edits in edits()) {
        bodies::tokenizer(&edited(&made_files()[0], &edits));
        bodies::token_cache(&edited(&made_files()[1], &edits));
    }
}
