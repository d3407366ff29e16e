//! `dsmoe eval` and `dsmoe generate` on real checkpoints against transformers.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::{SEPARATOR, agrees, json_of, list, number};

/// The data folder; none when it is absent and not required.
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn shared(test: &str) -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared");
    let dir = PathBuf::from(std::env::var("DSMOE_SHARED").unwrap_or_else(|_| default.to_owned()));
    if dir.is_dir() {
        return Some(dir);
    }
    let required = std::env::var("DSMOE_REQUIRE").is_ok_and(|list| list.contains("shared"));
    assert!(!required, "{test}: no {}", dir.display());
    println!("SKIP {test}: no {}; set DSMOE_SHARED", dir.display());
    None
}

#[test]
fn real_checkpoints_score_and_continue_as_in_transformers() {
    let Some(shared) = shared("real_checkpoints_score_and_continue_as_in_transformers") else { return };
    let shared = shared.canonicalize().unwrap();
    let place = |name: &str| format!("'{}'", shared.join(name).display());
    let data = format!("--data {} --doc-separator {SEPARATOR} --seq 128", place("golden/stories_100.txt"));
    for model in ["tinystories-656k", "stories-260k", "babyllama-1m"] {
        let golden = fs::read(shared.join(format!("golden/nll_{model}.json"))).unwrap();
        let golden: Value = serde_json::from_slice(&golden).unwrap();
        let dir = place(&format!("models/{model}"));
        let report = json_of(&format!("eval {dir} {data}"));
        agrees(&report, &json!({ "tokens": golden["tokens"], "predicted": golden["predicted"] }));
        let (ours, theirs) = (number(&report["nll"]), number(&golden["nll"]));
        assert!((ours - theirs).abs() < 1e-4, "{model}: nll {ours}, transformers {theirs}");
        // Eight bits are kept of what products multiply; errors of a token's logits cancel in the mean, which moves by
        // less than what a rounding to eight bits would do to it.
        let rounded = number(&json_of(&format!("eval {dir} --dtype bf16 {data}"))["nll"]);
        let is_near = rounded != ours && (rounded - ours).abs() < ours / 256.0;
        assert!(is_near, "{model}: nll {ours}, bf16 {rounded}");

        let (ids, prompt) = (list(&golden["greedy_ids"]), golden["prompt"].as_str().unwrap());
        for more in ["", "--no-kv-cache", "--prefill-chunk 3"] {
            let report =
                json_of(&format!("generate {dir} --prompt '{prompt}' --max-tokens {} {more}", ids.len()));
            assert_eq!(list(&report["token_ids"])[..ids.len()], *ids, "{model} {more}");
            let full = format!("{prompt}{}", report["text"].as_str().unwrap());
            let theirs = golden["greedy_text"].as_str().unwrap().trim_end_matches('\u{FFFD}');
            assert!(full.starts_with(theirs), "{model} {more}: {full}");
        }
    }
}
