//! `dsmoe eval` and `dsmoe generate` on real checkpoints against transformers.

use std::path::Path;
use std::process::Command;

use dsmoe_kernels::testing::shared;
use serde_json::Value;

fn dsmoe(args: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_dsmoe"))
        .args(args)
        .args(["--json", "--quiet"])
        .env_remove("DSMOE_ISA")
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn real_checkpoints_score_and_continue_as_in_transformers() {
    let test = "real_checkpoints_score_and_continue_as_in_transformers";
    let Some(shared) = shared(test, "golden") else { return };
    let text = shared.join("golden/stories_100.txt");
    for model in ["tinystories-656k", "stories-260k", "babyllama-1m"] {
        let golden = read(&shared.join(format!("golden/nll_{model}.json")));
        let dir = shared.join("models").join(model);
        let dir = dir.to_str().unwrap();
        let data = ["--data", text.to_str().unwrap(), "--doc-separator", "<|endoftext|>", "--seq", "128"];
        let report = dsmoe(&[&["eval", dir][..], &data].concat());
        assert_eq!(
            (&report["tokens"], &report["predicted"]),
            (&golden["tokens"], &golden["predicted"]),
            "{model}"
        );
        let (ours, theirs) = (report["nll"].as_f64().unwrap(), golden["nll"].as_f64().unwrap());
        assert!((ours - theirs).abs() < 1e-4, "{model}: nll {ours}, transformers {theirs}");
        // Eight bits are kept of what products multiply; errors of a token's logits cancel in the mean, which moves by
        // less than what a rounding to eight bits would do to it.
        let report = dsmoe(&[&["eval", dir, "--dtype", "bf16"][..], &data].concat());
        let rounded = report["nll"].as_f64().unwrap();
        assert!(
            rounded != ours && (rounded - ours).abs() < ours / 256.0,
            "{model}: nll {ours}, bf16 {rounded}"
        );

        let ids = golden["greedy_ids"].as_array().unwrap();
        let prompt = golden["prompt"].as_str().unwrap();
        let most = ids.len().to_string();
        for more in [vec![], vec!["--no-kv-cache"], vec!["--prefill-chunk", "3"]] {
            let args = ["generate", dir, "--prompt", prompt, "--max-tokens", &most];
            let report = dsmoe(&[&args[..], &more].concat());
            let got = report["token_ids"].as_array().unwrap();
            assert_eq!(got[..ids.len()], ids[..], "{model} {more:?}");
            let full = format!("{prompt}{}", report["text"].as_str().unwrap());
            let theirs = golden["greedy_text"].as_str().unwrap().trim_end_matches('\u{FFFD}');
            assert!(full.starts_with(theirs), "{model} {more:?}: {full}");
        }
    }
}
