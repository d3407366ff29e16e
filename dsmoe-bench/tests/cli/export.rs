//! What leaves the project: models for Python, and dense models of trained ones.

use std::fs;

use crate::common::{at, fails, fixture, json_of, succeeds};

#[test]
fn trained_models_leave_for_python_or_with_folded_gates() {
    let fixture = fixture();
    let trained = fixture.out("export-trained");
    let text = at(&fixture.text);
    let split = ["--doc-separator", "<|endoftext|>"];
    let train =
        ["train", at(&fixture.moe), "--data", text, "--out", at(&trained), "--steps", "2", "--seq", "16"];
    succeeds(&[&train[..], &split, &["--batch", "2", "--eval-every", "1"]].concat());

    let dense = fixture.out("export-dense");
    let export = ["export", at(&trained), "--as", "dense", "--out", at(&dense)];
    fails(&export, &["export it --as hf", "--fold mean with --data"]);
    let folded = json_of(&[&export[..], &["--fold", "mean", "--data", text], &split].concat());
    assert_eq!(folded["dense"], "folded");
    let [before, after] = ["ppl_before", "ppl_after"].map(|key| folded["fold"][key].as_f64().unwrap());
    // Both are measured on all of the text, in windows of the model's length.
    let eval = |model| json_of(&[&["eval", model, "--data", text][..], &split].concat());
    assert_eq!(eval(at(&trained))["ppl"].as_f64(), Some(before));
    assert_eq!(eval(at(&dense))["ppl"].as_f64(), Some(after));
    let card = fs::read_to_string(dense.join("README.md")).unwrap();
    assert!(card.contains(&format!("| perplexity | {before:.4} (of the sparse model")), "{card}");
    assert!(card.contains("on its held-out text at step 2"), "{card}");

    let python = fixture.out("export-python");
    let hf = ["export", at(&trained), "--as", "hf", "--out", at(&python)];
    assert_eq!(json_of(&hf)["form"], "transformers");
    for name in ["modeling_dsmoe.py", "configuration_dsmoe.py", "README.md", "tokenizer_config.json"] {
        assert!(python.join(name).is_file(), "{name}");
    }
    // The directory still is one that this program reads.
    assert_eq!(eval(at(&python))["nll"], eval(at(&trained))["nll"]);

    let no_gates = [
        "export",
        at(&fixture.dense),
        "--as",
        "dense",
        "--fold",
        "mean",
        "--data",
        text,
        "--out",
        at(&dense),
    ];
    fails(&[&no_gates[..], &["--force"]].concat(), &["has no gates to fold; leave --fold out"]);
    let native =
        ["export", at(&trained), "--as", "native", "--fold", "mean", "--data", text, "--out", at(&dense)];
    fails(&native, &["only --as dense does"]);
    let unchanged = json_of(&["export", at(&fixture.moe), "--as", "dense", "--force", "--out", at(&dense)]);
    assert_eq!(unchanged["dense"], "source");
}
