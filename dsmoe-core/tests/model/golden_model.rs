//! Whole models against transformers: logits, window nll, greedy text.

use std::path::Path;

use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::model::{Cache, Inference, Workspace};
use dsmoe_kernels::Precision;
use serde_json::Value;

use crate::{common, golden};

const MODELS: [&str; 3] = ["tinystories-656k", "stories-260k", "babyllama-1m"];

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("array").iter().map(|x| x.as_u64().expect("id") as u32).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("golden file")).expect("JSON")
}

#[test]
fn logits_are_those_of_transformers_however_the_text_is_fed() {
    let Some(shared) = common::shared("golden_model") else { return };
    for name in MODELS {
        let dir = shared.join("models").join(name);
        let (ids, want) = golden::logits(&dir);
        let model = Inference::load(&dir, Precision::F32).expect("model");
        let vocab = model.config().vocab_size;
        let mut workspace = Workspace::default();
        for chunk in [ids.len(), 1, 5, 17] {
            let mut cache = Cache::new(&model, ids.len());
            let mut worst = 0.0f32;
            for (i, piece) in ids.chunks(chunk).enumerate() {
                let got = model.logits(piece, piece.len(), &mut cache, None, &mut workspace).expect("logits");
                let want = &want[i * chunk * vocab..][..got.len()];
                worst = got.iter().zip(want).fold(worst, |m, (g, w)| m.max((g - w).abs()));
            }
            assert!(worst < 2e-4, "{name}, {chunk} tokens at a time: {worst}");
        }
    }
}

#[test]
fn greedy_text_is_that_of_transformers_with_and_without_cache_and_in_any_chunks() {
    let Some(shared) = common::shared("golden_model") else { return };
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
