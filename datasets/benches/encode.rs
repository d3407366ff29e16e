//! Encoding by this crate and by the tokenizers crate, in turns, on all threads: `cargo bench -p dsmoe-datasets`.
//!
//! Texts and tokenizers of the data folder (`DSMOE_SHARED`) where it is present, generated text otherwise.
#![expect(clippy::print_stdout, reason = "a bench reports")]

use dsmoe_datasets::world::{Domain, World};
use dsmoe_datasets::{Bos, Corpus, CorpusOptions, Tokenizer, train_bpe};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::time::Instant;

const ROUNDS: usize = 7;

fn main() {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared");
    let shared = PathBuf::from(std::env::var_os("DSMOE_SHARED").unwrap_or_else(|| default.into()));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let generated: Vec<String> = World::new(1).documents(Domain::Stories, 8_000_000).collect();
    let split = || generated.iter().cloned();
    train_bpe(split().take(2000), 4096, dir.path()).expect("a tokenizer");

    let mut texts = vec![("generated", split().collect::<Vec<_>>())];
    let web = shared.join("data/corpora/web");
    if web.is_dir() {
        let corpus = Corpus::open(&[web], CorpusOptions::default()).expect("a corpus");
        texts.push((
            "web pages",
            corpus.documents().map(|document| document.expect("a document").text).collect(),
        ));
    }
    let llama = shared.join("models/llama-tokenizer");
    for (name, texts) in &texts {
        compare(&format!("{name}, byte-level"), dir.path(), texts);
        if llama.is_dir() {
            compare(&format!("{name}, LLaMA"), &llama, texts);
        }
    }
}

fn compare(what: &str, tokenizer: &Path, texts: &[String]) {
    let ours = Tokenizer::load(tokenizer, None, usize::MAX).expect("a tokenizer");
    let crates = tokenizers::Tokenizer::from_file(tokenizer.join("tokenizer.json")).expect("a tokenizer");
    let megabytes = texts.iter().map(String::len).sum::<usize>() as f64 / 1e6;
    let (mut best_ours, mut best_crates) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let ids: Vec<Vec<u32>> =
            texts.par_iter().map(|text| ours.encode(text, Bos::Never).expect("ids")).collect();
        best_ours = best_ours.min(started.elapsed().as_secs_f64());
        let inputs: Vec<&str> = texts.iter().map(String::as_str).collect();
        let started = Instant::now();
        let encodings = crates.encode_batch_fast(inputs, false).expect("ids");
        best_crates = best_crates.min(started.elapsed().as_secs_f64());
        assert!(
            ids.iter().zip(&encodings).all(|(ids, encoding)| ids == encoding.get_ids()),
            "the ids differ"
        );
    }
    let (ours, crates) = (megabytes / best_ours, megabytes / best_crates);
    println!(
        "{what}: {megabytes:.1} MB, ours {ours:.1} MB/s, the crate {crates:.1} MB/s, {:.1} x",
        ours / crates
    );
}
