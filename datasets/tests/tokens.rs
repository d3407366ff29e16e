//! Tokenizers of one's own training: BOS rules, streaming, the token cache.

use dsmoe_datasets::token_cache::TokenFile;
use dsmoe_datasets::tokens::{Stage, prepare};
use dsmoe_datasets::world::{Domain, World};
use dsmoe_datasets::{
    Bos, Corpus, CorpusOptions, DOC_SEPARATOR, Error, TokenStream, Tokenizer, tokenize, train_bpe,
};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;

/// About `bytes` bytes of documents with separators between them.
fn text_of(seed: u64, bytes: u64) -> String {
    let world = World::new(seed);
    let documents = world.documents(Domain::Stories, bytes);
    documents.map(|document| format!("{document}\n{DOC_SEPARATOR}\n")).collect()
}

const VOCAB: usize = 400;

/// A directory with a tokenizer trained on synthetic text.
fn trained() -> TempDir {
    let dir = TempDir::new().unwrap();
    let text = text_of(1, 60_000);
    let size = train_bpe(text.split(DOC_SEPARATOR).map(String::from), VOCAB, dir.path()).unwrap();
    assert_eq!(size, VOCAB);
    dir
}

fn load(dir: &Path) -> Tokenizer {
    Tokenizer::load(dir, Some(0), VOCAB).unwrap()
}

/// Changes `tokenizer.json` in `dir`.
fn edit(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join("tokenizer.json");
    let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

static TOKENIZER: LazyLock<(TempDir, Tokenizer)> = LazyLock::new(|| {
    let dir = trained();
    let tokenizer = load(dir.path());
    (dir, tokenizer)
});

#[test]
fn equal_texts_train_equal_files() {
    let (one, two) = (trained(), trained());
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        let [one, two] = [&one, &two].map(|dir| fs::read(dir.path().join(name)).unwrap());
        assert_eq!(one, two, "{name}");
    }
    assert!(matches!(train_bpe(std::iter::empty(), 257, one.path()), Err(Error::Setting { .. })));
    assert_eq!(train_bpe(std::iter::empty(), 300, one.path()).unwrap(), 258);
}

#[test]
fn a_tokenizer_takes_the_place_of_an_old_one_as_whole_files() {
    let dir = trained();
    let names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"];
    let old = TempDir::new().unwrap();
    for name in names {
        fs::hard_link(dir.path().join(name), old.path().join(name)).unwrap();
        fs::write(dir.path().join(name), format!("old {name}")).unwrap();
    }
    assert_eq!(train_bpe(std::iter::empty(), 300, dir.path()).unwrap(), 258);
    for name in names {
        assert_eq!(fs::read_to_string(old.path().join(name)).unwrap(), format!("old {name}"));
    }
    let mut found: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    found.sort();
    assert_eq!(found, names);
}

#[test]
fn training_shortens_text() {
    let text = text_of(2, 5000);
    let ids = TOKENIZER.1.encode(&text, Bos::Never).unwrap();
    assert!(ids.len() * 5 < text.len() * 3, "{} ids for {} bytes", ids.len(), text.len());
    assert_eq!(TOKENIZER.1.decode(&ids, true).unwrap(), text);
}

#[test]
fn bos_rules() {
    let tokenizer = &TOKENIZER.1;
    let bare = tokenizer.encode("A day", Bos::Never).unwrap();
    assert_ne!(bare[0], 0);
    for bos in [Bos::Auto, Bos::Always] {
        assert_eq!(tokenizer.encode("A day", bos).unwrap(), [&[0], &bare[..]].concat());
        assert_eq!(tokenizer.encode("<s>A day", bos).unwrap(), [&[0], &bare[..]].concat(), "no second BOS");
        assert_eq!(tokenizer.encode("", bos).unwrap(), [0]);
    }
    assert_eq!("always".parse::<Bos>().unwrap(), Bos::Always);
    assert!("Always".parse::<Bos>().unwrap_err().to_string().contains("auto, always or never"));
}

#[test]
fn special_tokens_in_text_can_be_plain_text() {
    let ends = |tokenizer: &Tokenizer| tokenizer.encode("a</s>", Bos::Never).unwrap().last() == Some(&1);
    assert!(ends(&TOKENIZER.1));
    let plain = load(TOKENIZER.0.path()).special_in_text(false);
    assert!(!ends(&plain));
    assert_eq!(plain.encode("<s>", Bos::Always).unwrap()[0], 0);
    assert!(plain.encode("<s>", Bos::Always).unwrap().len() > 1);
}

#[test]
fn a_text_that_the_memory_cannot_encode_is_refused() {
    // Words and texts with special tokens of 40 bytes at the most.
    let tokenizer = load(TOKENIZER.0.path()).with_memory(40 * 64);
    let many = "A day in the woods. ".repeat(50);
    let never = |tokenizer: &Tokenizer, text: &str| tokenizer.encode(text, Bos::Never);
    assert_eq!(never(&tokenizer, &many).unwrap(), never(&TOKENIZER.1, &many).unwrap());
    let (long, special) = (format!("A {} day", "long".repeat(10)), format!("{many}</s>"));
    for (text, refused) in [(&long, 41), (&special, 1004)] {
        let wanted = never(&TOKENIZER.1, text);
        assert!(wanted.is_ok());
        match never(&tokenizer, text) {
            Err(Error::Encoding { bytes, memory: 2560, .. }) => assert_eq!(bytes, refused),
            other => panic!("{text}: {other:?}"),
        }
    }

    let dir = TempDir::new().unwrap();
    let rows = format!("{{\"text\": \"{many}\"}}\n{{\"text\": \"{long}\"}}\n");
    fs::write(dir.path().join("a.txt"), &many).unwrap();
    fs::write(dir.path().join("b.jsonl"), rows).unwrap();
    let corpus = Corpus::open(&[dir.path().to_path_buf()], CorpusOptions::default()).unwrap();
    assert!(tokenize(&corpus, &TOKENIZER.1, Bos::Never, None, &mut |_| {}).is_ok());
    let error = tokenize(&corpus, &tokenizer, Bos::Never, None, &mut |_| {}).unwrap_err();
    let wanted = format!(
        "{}: to encode 41 bytes at once takes more than the 2560 bytes of memory; split the file, or name where documents end with doc_separator",
        dir.path().join("b.jsonl").display()
    );
    assert_eq!(error.to_string(), wanted);
    assert_eq!(
        error.help().map(ToString::to_string).as_deref(),
        wanted.split_once("; ").map(|(_, help)| help)
    );
}

#[test]
fn auto_bos_follows_template_then_config() {
    let dir = trained();
    let starts = |bos_id| {
        let tokenizer = Tokenizer::load(dir.path(), bos_id, VOCAB).unwrap();
        tokenizer.encode("a", Bos::Auto).unwrap()[0] == 0
    };
    assert!(starts(None), "the template alone");
    edit(dir.path(), |json| json["post_processor"] = serde_json::Value::Null);
    assert!(starts(None) && starts(Some(0)), "add_bos_token of the config");
    fs::write(dir.path().join("tokenizer_config.json"), "{\"add_bos_token\": false}").unwrap();
    assert!(!starts(Some(0)));
    fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    assert!(!starts(Some(0)), "the model's config alone");
    fs::remove_file(dir.path().join("special_tokens_map.json")).unwrap();
    let none = Tokenizer::load(dir.path(), None, VOCAB).unwrap();
    assert!(matches!(none.encode("a", Bos::Always), Err(Error::NoBos { .. })));
}

#[test]
fn the_tokenizers_own_bos_wins_over_that_of_the_config() {
    let dir = trained();
    let tokenizer = Tokenizer::load(dir.path(), Some(1), VOCAB).unwrap();
    for bos in [Bos::Auto, Bos::Always] {
        assert_eq!(tokenizer.encode("a", bos).unwrap()[0], 0, "{bos:?}");
    }
    let [notice] = tokenizer.notices() else { panic!("{:?}", tokenizer.notices()) };
    assert!(notice.contains("config.json names id 1 (\"</s>\"), the tokenizer id 0 (\"<s>\")"), "{notice}");
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.prefix_id()), (Some(0), Some(1), Some(0)));
    assert!(load(dir.path()).notices().is_empty());
    // A tokenizer that names none, as Qwen's: the id of the config is there for those who ask.
    edit(dir.path(), |json| json["post_processor"] = serde_json::Value::Null);
    fs::write(dir.path().join("tokenizer_config.json"), "{\"add_bos_token\": false, \"bos_token\": null}")
        .unwrap();
    fs::remove_file(dir.path().join("special_tokens_map.json")).unwrap();
    let tokenizer = Tokenizer::load(dir.path(), Some(7), VOCAB).unwrap();
    assert_ne!(tokenizer.encode("a", Bos::Auto).unwrap()[0], 7);
    assert_eq!(tokenizer.encode("a", Bos::Always).unwrap()[0], 7);
    assert!(tokenizer.notices().is_empty());
    assert_eq!((tokenizer.prefix_id(), tokenizer.eos_id()), (None, None));
}

#[test]
fn tokens_of_the_other_files_are_added() {
    let dir = trained();
    let (plain, hash) = (load(dir.path()), load(dir.path()).sha256().to_owned());
    let config = |text: &str| fs::write(dir.path().join("tokenizer_config.json"), text).unwrap();
    let size = VOCAB as u32;
    let rows = |more: usize| Tokenizer::load(dir.path(), Some(0), VOCAB + more);
    config(&format!(
        "{{\"added_tokens_decoder\": {{\"{}\": {{\"content\": \"<|im_end|>\", \"special\": true}},
            \"{size}\": {{\"content\": \"<|im_start|>\", \"special\": true}}, \"0\": {{\"content\": \"<s>\", \"special\": true}}}}}}",
        size + 1
    ));
    fs::write(dir.path().join("added_tokens.json"), format!("{{\"<think>\": {}, \"<s>\": 0}}", size + 2))
        .unwrap();
    let tokenizer = rows(3).unwrap();
    let text = "<|im_start|>A day<think>.<|im_end|>";
    let ids = tokenizer.encode(text, Bos::Never).unwrap();
    let words = |text: &str| plain.encode(text, Bos::Never).unwrap();
    assert_eq!(ids, [&[size][..], &words("A day"), &[size + 2], &words("."), &[size + 1]].concat());
    assert_eq!((tokenizer.vocab_size(), tokenizer.notices().len()), (VOCAB + 3, 0));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "A day<think>.");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert_eq!((tokenizer.added_id("<|im_end|>"), tokenizer.added_id("im_end")), (Some(size + 1), None));
    assert_eq!(tokenizer.added_prefix("<|im_end|>\n<s>"), Some(size + 1));
    assert_eq!(tokenizer.special_within("x<|im_end|> <s> <think>"), ["<s>", "<|im_end|>"]);
    assert_ne!(tokenizer.sha256(), hash, "caches of the other ids do not fit");

    // Without rows in the embedding, they are left out, and the user is told.
    let short = rows(1).unwrap();
    assert_eq!((short.vocab_size(), short.added_id("<|im_start|>")), (VOCAB + 1, Some(size)));
    assert!(
        short.notices()[0].contains("\"<|im_end|>\" has id 401, for which the model's embedding has no row")
    );

    for (entry, next) in [(size + 4, size), (5, size)] {
        fs::remove_file(dir.path().join("added_tokens.json")).ok();
        config(&format!("{{\"added_tokens_decoder\": {{\"{entry}\": {{\"content\": \"<new>\"}}}}}}"));
        let message = rows(9).err().expect("must be refused").to_string();
        assert!(
            message.contains(&format!("the token \"<new>\" as id {entry}, and the next free id is {next}")),
            "{message}"
        );
    }
    config("{\"added_tokens_decoder\": {\"3\": {\"content\": \"</s>\"}}}");
    let other = rows(0).unwrap();
    assert!(other.notices()[0].contains("\"</s>\" has id 1 here and 3 in the files beside it; 1 is used"));
}

#[test]
fn byte_order_marks_of_tokenizer_files_are_dropped() {
    let dir = trained();
    let (want, hash) =
        (load(dir.path()).encode("A day", Bos::Auto).unwrap(), load(dir.path()).sha256().to_owned());
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        let path = dir.path().join(name);
        fs::write(&path, [b"\xEF\xBB\xBF", &fs::read(&path).unwrap()[..]].concat()).unwrap();
    }
    let tokenizer = load(dir.path());
    assert_eq!((tokenizer.encode("A day", Bos::Auto).unwrap(), tokenizer.sha256()), (want, &hash[..]));
}

/// A tokenizer of SentencePiece's kind: `<unk>`, the 256 byte tokens from id 3 on, and a few letters.
fn sentence_piece(dir: &Path) -> Tokenizer {
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let letters = ["\u{2581}", "a", "b", "\u{2581}a"].map(str::to_owned);
    let tokens = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).chain(letters);
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let space = "\u{2581}";
    let json = serde_json::json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": null, "post_processor": null,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": space},
            {"type": "Replace", "pattern": {"String": " "}, "content": space}]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": space}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [[space, "a"]], "unk_token": "<unk>", "fuse_unk": true,
            "byte_fallback": true}});
    fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::load(dir, None, 300).unwrap()
}

static BYTES: LazyLock<(TempDir, Tokenizer)> = LazyLock::new(|| {
    let dir = TempDir::new().unwrap();
    let tokenizer = sentence_piece(dir.path());
    (dir, tokenizer)
});

#[test]
fn byte_tokens_decode_as_in_transformers() {
    let tokenizer = &BYTES.1;
    let ids = |bytes: &[u8]| -> Vec<u32> { bytes.iter().map(|&byte| 3 + u32::from(byte)).collect() };
    let (a, b) = (260, 261);
    assert_eq!(
        tokenizer.decode(&[&[262][..], &ids("é🦊\n".as_bytes()), &[b]].concat(), true).unwrap(),
        "aé🦊\nb"
    );
    // One invalid byte makes every byte of its run a U+FFFD.
    for (bytes, count) in [(&b"\xff"[..], 1), (b"\xc3", 1), (b"\xc3\xa9\xff", 3), (b"A\xe2\x82", 3)] {
        let wanted = format!("a{}b", "\u{FFFD}".repeat(count));
        assert_eq!(
            tokenizer.decode(&[&[a][..], &ids(bytes), &[b]].concat(), true).unwrap(),
            wanted,
            "{bytes:?}"
        );
    }
    // A run of bytes is given with the token that ends it.
    let mut stream = tokenizer.stream(&[]).unwrap();
    let pieces: Vec<String> = [&[a][..], &ids("é🦊".as_bytes()), &[b]]
        .concat()
        .into_iter()
        .map(|id| stream.push(id).unwrap().unwrap_or_default())
        .collect();
    assert_eq!(pieces, ["a", "", "", "", "", "", "", "é🦊b"]);
}

#[test]
fn what_a_file_asks_beyond_encoding_is_switched_off() {
    let dir = trained();
    let text = "A day on the hill with a goat and a fox.";
    let expected = load(dir.path()).encode(text, Bos::Auto).unwrap();
    edit(dir.path(), |json| {
        json["model"]["dropout"] = 0.9.into();
        json["truncation"] = serde_json::json!(
            {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = serde_json::json!({"strategy": {"Fixed": 90}, "direction": "Right",
            "pad_to_multiple_of": null, "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"});
    });
    assert_eq!(load(dir.path()).encode(text, Bos::Auto).unwrap(), expected);
}

#[test]
fn tokenizers_that_cannot_be_used() {
    let dir = trained();
    let message = |vocab_size| match Tokenizer::load(dir.path(), Some(0), vocab_size) {
        Ok(_) => panic!("must not load"),
        Err(error) => error.to_string(),
    };
    let large = message(VOCAB - 1);
    assert!(large.contains("has id 399, the model's vocab_size is 399"), "{large}");
    assert!(Tokenizer::load(dir.path(), Some(VOCAB as u32), VOCAB).is_err());
    fs::write(dir.path().join("tokenizer_config.json"), "{\"add_bos_token\": 3}").unwrap();
    assert!(message(VOCAB).contains("tokenizer_config.json: not a tokenizer file"));
    edit(dir.path(), |json| {
        json["normalizer"] = serde_json::json!({"type": "Precompiled", "precompiled_charsmap": 3});
    });
    assert!(message(VOCAB).contains("a field has a value of the wrong kind"));
    edit(dir.path(), |json| json["normalizer"] = serde_json::Value::Null);
    let good = fs::read(dir.path().join("tokenizer.json")).unwrap();
    let cuts = (0..60).map(|cut| &good[..cut * 30]);
    for content in cuts.chain([
        &b"{}"[..],
        &b"[]"[..],
        &b"\0"[..],
        &b"{\"version\": \"1.0\", \"model\": {\"type\": \"BPE\"}}"[..],
    ]) {
        fs::write(dir.path().join("tokenizer.json"), content).unwrap();
        assert!(message(VOCAB).contains("tokenizer.json: not a tokenizer file"), "{content:?}");
    }
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(message(VOCAB).contains("no tokenizer.json"));
    fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    assert!(message(VOCAB).contains("only tokenizer.model; convert it"));
}

/// All that a stream gives for `ids`, and its pieces.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> (String, Vec<String>) {
    let mut stream = tokenizer.stream(&[]).unwrap();
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    pieces.extend(stream.finish().unwrap());
    (pieces.concat(), pieces)
}

#[test]
fn a_stream_holds_back_half_characters() {
    let tokenizer = &TOKENIZER.1;
    let ids = tokenizer.encode("a🦊é", Bos::Always).unwrap();
    let (text, pieces) = streamed(tokenizer, &ids);
    assert_eq!((text.as_str(), pieces.len()), ("a🦊é", 3), "{pieces:?}");
    let (cut, pieces) = streamed(tokenizer, &ids[..ids.len() - 1]);
    assert_eq!(cut, "a🦊\u{FFFD}");
    assert!(!pieces[1].contains('\u{FFFD}'));
}

proptest! {
    #[test]
    fn streamed_text_is_decoded_text(text in "(\\PC|\n| |<s>|[a-z]){0,40}") {
        let tokenizer = &TOKENIZER.1;
        let ids = tokenizer.encode(&text, Bos::Auto).unwrap();
        prop_assert_eq!(streamed(tokenizer, &ids).0, tokenizer.decode(&ids, true).unwrap());
    }

    #[test]
    fn texts_of_byte_tokens_stream_as_they_decode(text in "(\\PC|\n| |[ab]){0,30}") {
        let tokenizer = &BYTES.1;
        let ids = tokenizer.encode(&text, Bos::Auto).unwrap();
        let (streamed, pieces) = streamed(tokenizer, &ids);
        prop_assert_eq!(&streamed, &text);
        let halves = |piece: &String| piece.contains(char::REPLACEMENT_CHARACTER);
        prop_assert!(text.contains(char::REPLACEMENT_CHARACTER) || !pieces.iter().any(halves));
        prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }

    #[test]
    /// Bytes of both kinds, of which few are UTF-8.
    #[test]
    fn any_ids_stream_as_they_decode(ids in proptest::collection::vec(0u32..VOCAB as u32 + 50, 0..150)) {
        for tokenizer in [&TOKENIZER.1, &BYTES.1] {
            let (streamed, _) = streamed(tokenizer, &ids);
            prop_assert_eq!(streamed, tokenizer.decode(&ids, true).unwrap());
        }
    }

    /// Text that follows a prompt is what the whole has behind it, if the whole begins with the prompt.
    #[test]
    fn text_after_a_prompt_streams(ids in proptest::collection::vec(0u32..VOCAB as u32, 2..40), at in 1usize..39) {
        for tokenizer in [&TOKENIZER.1, &BYTES.1] {
            let (prompt, new) = ids.split_at(at.min(ids.len()));
            let decode = |ids: &[u32]| tokenizer.decode(ids, true).unwrap();
            let mut stream = tokenizer.stream(prompt).unwrap();
            let mut text: String = new.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
            text.extend(stream.finish().unwrap());
            if let Some(after) = decode(&ids).strip_prefix(&decode(prompt)) {
                prop_assert_eq!(text, after);
            }
        }
    }
}

/// Writes a cache file by the description of its format.
fn write_cache(path: &Path, stream: &TokenStream) {
    let mut payload: Vec<u8> = stream.ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
    payload.extend(stream.doc_starts.iter().flat_map(|&start| (start as u64).to_le_bytes()));
    let mut bytes = [&b"DSMOETOK"[..], &3u32.to_le_bytes(), &2u32.to_le_bytes()].concat();
    bytes.extend((stream.ids.len() as u64).to_le_bytes());
    bytes.extend((stream.doc_starts.len() as u64).to_le_bytes());
    bytes.extend(Sha256::digest(&payload));
    bytes.extend(payload);
    fs::write(path, bytes).unwrap();
}

struct Case {
    _dir: TempDir,
    text: PathBuf,
    cache: PathBuf,
}

impl Case {
    fn new() -> Case {
        let dir = TempDir::new().unwrap();
        let (text, cache) = (dir.path().join("a.txt"), dir.path().join("cache"));
        fs::write(&text, text_of(5, 20_000)).unwrap();
        Case { _dir: dir, text, cache }
    }

    fn tokenize(&self, tokenizer: &Tokenizer, bos: Bos, separator: &str) -> TokenStream {
        let options = CorpusOptions { doc_separator: Some(separator.into()), ..CorpusOptions::default() };
        let corpus = Corpus::open(std::slice::from_ref(&self.text), options).unwrap();
        let mut done = 0;
        let stream = tokenize(&corpus, tokenizer, bos, Some(&self.cache), &mut |bytes| done = bytes).unwrap();
        assert_eq!(done, corpus.total_bytes());
        stream
    }

    fn cache_files(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.cache).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

#[test]
fn a_stream_is_the_documents_each_with_bos() {
    let (case, tokenizer) = (Case::new(), &TOKENIZER.1);
    let stream = case.tokenize(tokenizer, Bos::Auto, DOC_SEPARATOR);
    let text = fs::read_to_string(&case.text).unwrap();
    let documents: Vec<&str> = text.split(DOC_SEPARATOR).map(str::trim).filter(|d| !d.is_empty()).collect();
    assert_eq!(stream.documents().count(), documents.len());
    for (ids, document) in stream.documents().zip(documents) {
        assert_eq!(ids, tokenizer.encode(document, Bos::Auto).unwrap());
        assert_eq!(ids[0], 0);
    }
}

#[test]
fn the_cache_is_used_and_keyed_by_content() {
    let (case, tokenizer) = (Case::new(), &TOKENIZER.1);
    let stream = case.tokenize(tokenizer, Bos::Auto, DOC_SEPARATOR);
    let [file] = &case.cache_files()[..] else { panic!("one cache file") };
    assert_eq!(TokenFile::open(file).unwrap().into_stream().unwrap(), stream);

    // A marked cache shows that it is taken; the rule that gives the same ids shares it.
    let mut marked = stream.clone();
    marked.ids.truncate(marked.ids.len() - 1);
    write_cache(file, &marked);
    assert_eq!(case.tokenize(tokenizer, Bos::Auto, DOC_SEPARATOR), marked);
    assert_eq!(case.tokenize(tokenizer, Bos::Always, DOC_SEPARATOR), marked);
    assert_eq!(case.cache_files().len(), 1);

    assert_ne!(case.tokenize(tokenizer, Bos::Never, DOC_SEPARATOR), stream);
    assert_ne!(case.tokenize(tokenizer, Bos::Auto, "."), stream);
    case.tokenize(&load(TOKENIZER.0.path()).special_in_text(false), Bos::Auto, DOC_SEPARATOR);
    assert_eq!(case.cache_files().len(), 4);
    fs::write(&case.text, "other").unwrap();
    assert_eq!(case.tokenize(tokenizer, Bos::Auto, DOC_SEPARATOR).doc_starts, [0]);
    assert_eq!(case.cache_files().len(), 5);
}

#[test]
fn a_cache_that_lies_is_made_again() {
    let (case, tokenizer) = (Case::new(), &TOKENIZER.1);
    let stream = case.tokenize(tokenizer, Bos::Auto, DOC_SEPARATOR);
    let [file] = &case.cache_files()[..] else { panic!("one cache file") };
    let good = fs::read(file).unwrap();
    let foreign = TokenStream { ids: vec![1, VOCAB as u32], doc_starts: vec![0] };
    write_cache(file, &foreign);
    for bad in [fs::read(file).unwrap(), good[..good.len() / 2].to_vec(), vec![], b"DSMOETOK".to_vec()] {
        fs::write(file, bad).unwrap();
        assert_eq!(case.tokenize(tokenizer, Bos::Auto, DOC_SEPARATOR), stream);
        assert_eq!(fs::read(file).unwrap(), good);
    }
}

/// Text of about `megabytes`, in documents, half of it in a second file of JSON lines.
fn large(dir: &Path, megabytes: usize) -> Corpus {
    let story = text_of(9, 60_000);
    let documents: Vec<&str> = story.split(DOC_SEPARATOR).map(str::trim).filter(|d| !d.is_empty()).collect();
    let bytes: usize = documents.iter().map(|document| document.len()).sum();
    let times = megabytes * 500_000 / bytes + 1;
    let one = (0..times).map(|i| format!("{i} {}", documents.join(DOC_SEPARATOR))).collect::<Vec<_>>();
    fs::write(dir.join("a.txt"), one.join(DOC_SEPARATOR)).unwrap();
    let lines = (0..times)
        .flat_map(|i| documents.iter().map(move |d| serde_json::json!({"text": format!("{d} {i}")})));
    fs::write(dir.join("b.jsonl"), lines.map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let options = CorpusOptions { doc_separator: Some(DOC_SEPARATOR.into()), ..CorpusOptions::default() };
    Corpus::open(&[dir.join("a.txt"), dir.join("b.jsonl")], options).unwrap()
}

#[test]
fn a_cache_goes_on_after_a_kill_and_is_the_same() {
    let (dir, tokenizer) = (TempDir::new().unwrap(), &TOKENIZER.1);
    let corpus = large(dir.path(), 24);
    let cache = |name: &str| dir.path().join(name);
    let whole = prepare(&corpus, tokenizer, Bos::Auto, &cache("whole"), &mut |_, _| ()).unwrap();
    assert!(!whole.reused && whole.resumed == 0);
    // Whatever ends a process in the middle: the state on the disk is all that the next one has.
    for end in [9_000_000, 14_000_000, 20_000_000] {
        let killed = std::panic::catch_unwind(|| {
            prepare(&corpus, tokenizer, Bos::Auto, &cache("killed"), &mut |stage, bytes| {
                if stage == Stage::Encoding && bytes > end {
                    std::panic::resume_unwind(Box::new("killed"));
                }
            })
        });
        assert!(killed.is_err());
    }
    let rest = prepare(&corpus, tokenizer, Bos::Auto, &cache("killed"), &mut |_, _| ()).unwrap();
    assert!(rest.resumed as usize > whole.tokens.len() / 2, "{} of {}", rest.resumed, whole.tokens.len());
    assert_eq!(rest.path.file_name(), whole.path.file_name());
    assert!(fs::read(&rest.path).unwrap() == fs::read(&whole.path).unwrap());
    assert_eq!(fs::read_dir(cache("killed")).unwrap().count(), 1, "nothing else is left");
    // A process that is killed after the cache is in place leaves the folder that it came from.
    let part = rest.path.with_extension("part");
    fs::create_dir(&part).unwrap();
    fs::write(part.join("starts"), [0; 8]).unwrap();
    assert!(prepare(&corpus, tokenizer, Bos::Auto, &cache("killed"), &mut |_, _| ()).unwrap().reused);
    assert!(!part.exists());
    // In memory and from the file: the same.
    let stream = tokenize(&corpus, tokenizer, Bos::Auto, None, &mut |_| ()).unwrap();
    let mut ids = Vec::new();
    rest.tokens.for_each(&mut |some| ids.extend_from_slice(some)).unwrap();
    assert!(ids == stream.ids && rest.tokens.doc_starts() == stream.doc_starts);
}

#[test]
fn a_file_that_changes_while_it_is_read_makes_no_cache() {
    let (dir, tokenizer) = (TempDir::new().unwrap(), &TOKENIZER.1);
    let corpus = large(dir.path(), 6);
    let file = dir.path().join("b.jsonl");
    let changed = prepare(&corpus, tokenizer, Bos::Auto, &dir.path().join("cache"), &mut |stage, _| {
        if stage == Stage::Encoding {
            let mut text = fs::read(&file).unwrap();
            text.extend(b"{\"text\": \"more\"}\n");
            fs::write(&file, text).unwrap();
        }
    });
    let message = changed.unwrap_err().to_string();
    assert!(message.contains("b.jsonl: changed while it was read"), "{message}");
    let mut left = fs::read_dir(dir.path().join("cache")).unwrap();
    assert!(!left.any(|entry| entry.unwrap().path().extension().unwrap() == "tokens"));
}

#[test]
fn the_bytes_of_tokens_are_those_of_the_text() {
    let (tokenizer, text) = (&TOKENIZER.1, "A day's wörk: 12 foxes\n");
    let texts = tokenizer.token_texts();
    let ids = tokenizer.encode(text, Bos::Never).unwrap();
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| texts.of(id).to_vec()).collect();
    assert_eq!(bytes, text.as_bytes());
    assert_eq!(texts.of(0), b" ", "a special token separates");
}
