//! Whole models against transformers: logits, window nll, greedy text.

use std::path::Path;

use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::model::Inference;
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::shared;
use serde_json::Value;

use crate::{golden, logits};

const MODELS: [&str; 3] = ["tinystories-656k", "stories-260k", "babyllama-1m"];

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("array").iter().map(|x| x.as_u64().expect("id") as u32).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("golden file")).expect("JSON")
}

#[test]
fn logits_are_those_of_transformers_however_the_text_is_fed() {
    let Some(shared) = shared("golden_model", "models") else { return };
    for name in MODELS {
        let dir = shared.join("models").join(name);
        let (ids, want) = golden::logits(&dir);
        let model = Inference::load(&dir, Precision::F32).expect("model");
        for chunk in [ids.len(), 1, 5, 17] {
            let got = logits(&model, ids.chunks(chunk));
            assert_eq!(got.len(), ids.len() * model.config().vocab_size);
            let worst = got.iter().zip(&want).fold(0.0f32, |m, (g, w)| m.max((g - w).abs()));
            assert!(worst < 2e-4, "{name}, {chunk} tokens at a time: {worst}");
        }
    }
}

#[test]
fn greedy_text_is_that_of_transformers_with_and_without_cache_and_in_any_chunks() {
    let Some(shared) = shared("golden_model", "models") else { return };
    let mut cases: Vec<(&str, Vec<u32>, usize)> = Vec::new();
    for name in MODELS {
        let golden = json(&shared.join(format!("golden/nll_{name}.json")));
        let greedy = ids(&golden["greedy_ids"]);
        let prompt = greedy.len() - 48;
        cases.push((name, greedy, prompt));
    }
    let golden = json(&shared.join("models/stories-260k/golden_greedy.json"));
    cases.push(("stories-260k", ids(&golden["greedy_token_ids_from_bos_200"]), 1));
    for (name, greedy, prompt) in cases {
        let model = Inference::load(&shared.join("models").join(name), Precision::F32).expect("model");
        for (kv_cache, prefill_chunk) in [(true, 0), (true, 1), (true, 3), (false, 0), (false, 7)] {
            let options = GenerateOptions {
                max_tokens: greedy.len() - prompt,
                kv_cache,
                prefill_chunk,
                ..GenerateOptions::default()
            };
            let got = generate(&model, &greedy[..prompt], &options, |_| true).expect("generation");
            assert_eq!(got.tokens, greedy[prompt..], "{name}, cache {kv_cache}, chunk {prefill_chunk}");
        }
    }
}
