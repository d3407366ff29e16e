//! Token ids and window counts of real tokenizers against the numbers that transformers gave.

#[path = "common/shared.rs"]
mod shared;

use dsmoe_datasets::{Bos, Corpus, CorpusOptions, Error, Tokenizer, TokenizerFiles, eval_windows, tokenize};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

fn shared(test: &str) -> Option<PathBuf> {
    shared::shared(test, "golden")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

const MODELS: [&str; 3] = ["tinystories-656k", "stories-260k", "babyllama-1m"];

fn load(shared: &Path, model: &str) -> Tokenizer {
    let dir = shared.join("models").join(model);
    let config = json(&dir.join("config.json"));
    let field = |name: &str| config[name].as_u64().unwrap();
    Tokenizer::load(&dir, Some(field("bos_token_id") as u32), field("vocab_size") as usize).unwrap()
}

#[test]
fn ids_and_windows_are_those_of_transformers() {
    let Some(shared) = shared("ids_and_windows_are_those_of_transformers") else { return };
    let options = CorpusOptions { doc_separator: Some("<|endoftext|>".into()), ..CorpusOptions::default() };
    let corpus = Corpus::open(&[shared.join("golden/stories_100.txt")], options).unwrap();
    for model in MODELS {
        let golden = json(&shared.join(format!("golden/nll_{model}.json")));
        let number = |name: &str| golden[name].as_u64().unwrap() as usize;
        let tokenizer = load(&shared, model);
        for bos in [Bos::Always, Bos::Auto] {
            let stream = tokenize(&corpus, &tokenizer, bos, None, &mut |_| ()).unwrap();
            assert_eq!(stream.ids.len(), number("tokens"), "{model}");
            assert_eq!(stream.ids[..24], ids(&golden["first_ids"]), "{model}");
            let windows = eval_windows(stream.ids.len(), number("window"), number("window")).unwrap();
            let predicted: usize = windows.iter().map(|window| window.end - window.first_target).sum();
            assert_eq!(predicted, number("predicted"), "{model}");
        }
    }
}

/// Qwen, SmolLM and OLMo get nothing in front, whatever their config.json names; Llama, Gemma and others their `<s>`.
#[test]
fn families_get_the_bos_of_their_own_tokenizer() {
    let Some(shared) = shared("families_get_the_bos_of_their_own_tokenizer") else { return };
    let mut without = 0;
    for family in
        ["gemma", "gemma3", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"]
    {
        let dir = shared.join("golden/zoo").join(family);
        // Links, of which some copies of the folder hold the text.
        let content = |name: &str| {
            let bytes = fs::read(dir.join(name)).unwrap();
            let link = str::from_utf8(&bytes).ok().filter(|text| text.starts_with("../"));
            (
                name.to_owned(),
                link.map_or_else(|| bytes.clone(), |link| fs::read(dir.join(link.trim())).unwrap()),
            )
        };
        let files = ["tokenizer.json", "tokenizer_config.json"].map(content);
        let files = TokenizerFiles::named(dir.join("tokenizer.json"), files);
        let (config, golden) = (json(&dir.join("config.json")), json(&dir.join("golden.json")));
        let bos = config["bos_token_id"].as_u64().map(|id| id as u32);
        let tokenizer = Tokenizer::new(&files, bos, 512).unwrap();
        for row in golden["tokens"].as_array().unwrap() {
            let text = row["text"].as_str().unwrap();
            let (plain, special) = (ids(&row["ids"]), ids(&row["ids_with_special"]));
            assert_eq!(tokenizer.encode(text, Bos::Never).unwrap(), plain, "{family} {text:?}");
            // A text that begins with BOS gets no second one.
            let once = if plain.first() == special.first() { &plain } else { &special };
            assert_eq!(tokenizer.encode(text, Bos::Auto).unwrap(), *once, "{family} {text:?}");
            assert_eq!(
                tokenizer.decode(&plain, false).unwrap(),
                row["decoded"].as_str().unwrap(),
                "{family}"
            );
            without += u32::from(plain == special);
        }
    }
    assert!(without >= 15, "{without} texts have no BOS");
}

#[test]
fn generated_ids_decode_to_the_same_text_at_once_and_streamed() {
    let Some(shared) = shared("generated_ids_decode_to_the_same_text_at_once_and_streamed") else { return };
    for model in MODELS {
        let golden = json(&shared.join(format!("golden/nll_{model}.json")));
        let tokenizer = load(&shared, model);
        let greedy = ids(&golden["greedy_ids"]);
        let prompt = tokenizer.encode(golden["prompt"].as_str().unwrap(), Bos::Auto).unwrap();
        assert_eq!(greedy[..prompt.len()], prompt, "{model}");
        let text = golden["greedy_text"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&greedy, true).unwrap(), text, "{model}");
        let mut stream = tokenizer.stream(&[]).unwrap();
        let mut streamed: String = greedy.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
        streamed.extend(stream.finish().unwrap());
        assert_eq!(streamed, text, "{model}");
    }
}

#[test]
fn byte_fallback_streams_whole_characters() {
    let Some(shared) = shared("byte_fallback_streams_whole_characters") else { return };
    let tokenizer = load(&shared, "stories-260k");
    let text = "one 🦊 two  é\n ü!";
    let mut stream = tokenizer.stream(&[]).unwrap();
    let mut streamed = String::new();
    for id in tokenizer.encode(text, Bos::Auto).unwrap() {
        let delta = stream.push(id).unwrap().unwrap_or_default();
        assert!(!delta.contains('\u{FFFD}'), "{delta:?}");
        streamed += &delta;
    }
    assert_eq!(streamed, text);

    // A byte that belongs to no character spoils its run.
    let byte = |value: u8| 3 + u32::from(value);
    let run: Vec<u32> = [0xc3, 0xa9, 0xff, 0x41, 0xc3].into_iter().chain([0x80; 40]).map(byte).collect();
    let mut stream = tokenizer.stream(&[]).unwrap();
    for &id in &run {
        assert_eq!(stream.push(id).unwrap(), None);
    }
    let text = stream.finish().unwrap().unwrap();
    assert_eq!((&text, text.chars().count()), (&tokenizer.decode(&run, true).unwrap(), 45));
}

/// Tokens in any order, complete characters or not: what transformers prints of them, at once and token by token.
#[test]
fn byte_fallback_gives_what_transformers_gives() {
    let Some(shared) = shared("byte_fallback_gives_what_transformers_gives") else { return };
    let golden: Value = serde_json::from_str(include_str!("data/byte_fallback.json")).unwrap();
    for (model, cases) in golden.as_object().unwrap() {
        // This one is the file of llama-tokenizer, read by a class that prints special tokens as they are written.
        let class = (model == "LlamaTokenizer").then(|| br#"{"tokenizer_class": "LlamaTokenizer"}"#.to_vec());
        let folder = if class.is_some() { "llama-tokenizer" } else { model };
        let files = TokenizerFiles::read(&shared.join("models").join(folder)).unwrap();
        let files = TokenizerFiles { config: class.or(files.config.clone()), ..files };
        let tokenizer = Tokenizer::new(&files, None, 1 << 20).unwrap();
        for case in cases.as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(case[0].clone()).unwrap();
            let [without, with] = [1, 2].map(|at| case[at].as_str().unwrap());
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), with, "{model}: {ids:?}");
            // Special tokens here are marked `normalized`, and transformers prints those all the same.
            if model == "llama-tokenizer" && ids.iter().any(|&id| id < 3) {
                continue;
            }
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), without, "{model}: {ids:?}");
            let mut stream = tokenizer.stream(&[]).unwrap();
            let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
            streamed.extend(stream.finish().unwrap());
            assert_eq!(streamed, without, "{model}: {ids:?}, token by token");
        }
    }
}

#[test]
fn special_tokens_in_a_text_are_found_as_they_are_written() {
    let Some(shared) = shared("special_tokens_in_a_text_are_found_as_they_are_written") else { return };
    for model in ["llama-tokenizer", "stories-260k"] {
        let tokenizer = Tokenizer::load(&shared.join("models").join(model), None, 1 << 20).unwrap();
        assert_eq!(tokenizer.special_within("a</s> <s> s>"), ["<s>", "</s>"], "{model}");
    }
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_refused() {
    let Some(shared) = shared("a_tokenizer_larger_than_the_embedding_is_refused") else { return };
    let dir = shared.join("models/llama-tokenizer");
    let Err(error @ Error::TokenizerTooLarge { largest_id: 32002, vocab_size: 32000, .. }) =
        Tokenizer::load(&dir, Some(1), 32000)
    else {
        panic!("must be refused");
    };
    assert!(error.to_string().contains("larger than the embedding"), "{error}");
    let tokenizer = Tokenizer::load(&dir, Some(1), 32003).unwrap();
    assert_eq!(tokenizer.vocab_size(), 32003);
    assert_eq!(tokenizer.encode("Hello world", Bos::Auto).unwrap(), [1, 15043, 3186]);
}

/// Every document of the real texts, by every tokenizer: what the tokenizers crate itself gives.
#[test]
fn ids_of_real_texts_are_those_of_the_tokenizers_crate() {
    let Some(shared) = shared("ids_of_real_texts_are_those_of_the_tokenizers_crate") else { return };
    let corpora = shared.join("data/corpora");
    let options = |text_column: &str| CorpusOptions {
        doc_separator: Some("<|endoftext|>".into()),
        text_column: text_column.into(),
        ..CorpusOptions::default()
    };
    for model in [&MODELS[..], &["llama-tokenizer"]].concat() {
        let dir = shared.join("models").join(model);
        let ours = Tokenizer::load(&dir, None, 1 << 20).unwrap();
        let crates = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        for (path, column) in [
            ("web", "text"),
            ("code/codegen-instruct.json", "instruction,input,response"),
            ("math/gsm8k_train.jsonl", "question,answer"),
            ("stories/tinystories_sample_2M.txt", "text"),
        ] {
            let corpus = Corpus::open(&[corpora.join(path)], options(column)).unwrap();
            // Every eighth: the crate takes its time.
            for (at, document) in corpus.documents().step_by(8).enumerate() {
                let text = document.unwrap().text;
                let wanted = crates.encode_fast(text.as_str(), false).unwrap();
                let ids = ours.encode(&text, Bos::Never).unwrap();
                assert!(ids == wanted.get_ids(), "{model} {path}: document {}", at * 8);
            }
        }
    }
}
