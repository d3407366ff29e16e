//! Edited copies of good files for every reader of the crate. Longer searches: `fuzz/` of the repository.

mod bodies;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "../common/made.rs"]
mod made;

use std::fs;

use dsmoe_datasets::tokens::prepare;
use dsmoe_datasets::{Bos, Corpus, CorpusOptions, Tokenizer, tokenizer::train_bpe};
use made::gzip;
use proptest::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

const JSONL: &str = "{\"text\": \"one é\", \"id\": 3}\n{\"text\": \"two \\u00e9\\n\"}\n\n{\"text\": \"\"}\n";
const PIQA: &str = "{\"goal\": \"g\", \"sol1\": \"one\", \"sol2\": \"two\", \"label\": 1}\n";
const MIXTURE: &str =
    "[[source]]\nname = \"web\"\ndata = [\"a\", \"b\"]\nweight = 4\ntext_column = \"q,a\"\n";
const MANIFEST: &str = r#"{"format_version": 1, "files": [{"path": "a.txt", "bytes": 3, "sha256": "00"}]}"#;

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

#[test]
fn the_unedited_files_are_good() {
    let [tokenizer, cache, _] = made_files();
    bodies::tokenizer(tokenizer);
    bodies::token_cache(cache);
    assert_eq!(edited(b"abc", &[]), b"abc");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

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
    }

    #[test]
    fn edited_texts(edits in edits()) {
        let jsonl = JSONL.as_bytes();
        bodies::corpus("a.jsonl", &edited(jsonl, &edits));
        bodies::corpus("a.jsonl.gz", &edited(&gzip(jsonl), &edits));
        bodies::corpus("a.jsonl.gz", &gzip(&edited(jsonl, &edits)));
        bodies::corpus("a.jsonl.zst", &edited(&compress_to_vec(jsonl, CompressionLevel::Fastest), &edits));
        bodies::corpus("a.parquet", &edited(&made_files()[2], &edits));
    }

    #[test]
    fn edited_benchmarks_and_settings(edits in edits()) {
        bodies::task("piqa", "a.jsonl", &edited(PIQA.as_bytes(), &edits));
        bodies::mixture(&edited(MIXTURE.as_bytes(), &edits));
        bodies::manifest(&edited(MANIFEST.as_bytes(), &edits));
    }

    #[test]
    fn edited_tokens(edits in edits()) {
        bodies::tokenizer(&edited(&made_files()[0], &edits));
        bodies::token_cache(&edited(&made_files()[1], &edits));
    }
}
