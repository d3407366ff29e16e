//! Exports: models for Python, and dense forms of trained models.

use crate::common::{fails, json_of, number, path, read, shows, succeeds};

#[test]
fn trained_models_leave_for_python_or_with_folded_gates() {
    let text = "--data text.txt --doc-separator <|endoftext|>";
    succeeds(&format!("train moe {text} --out leaving --steps 2 --seq 16 --batch 2 --eval-every 1"));

    let dense = "export leaving --as dense --out left-dense";
    fails(dense, &["export it --as hf", "--fold mean with --data"]);
    let folded = json_of(&format!("{dense} --fold mean {text}"));
    assert_eq!(folded["dense"], "folded");
    let [before, after] = ["ppl_before", "ppl_after"].map(|key| number(&folded["fold"][key]));
    // Both are measured on all of the text, in windows of the model's length.
    let eval = |model| json_of(&format!("eval {model} {text}"));
    assert_eq!(number(&eval("leaving")["ppl"]), before);
    assert_eq!(number(&eval("left-dense")["ppl"]), after);
    let measured = format!("| perplexity | {before:.4} (of the sparse model");
    shows(&read("left-dense/README.md"), &[&measured, "on its held-out text at step 2"]);

    assert_eq!(json_of("export leaving --as hf --out left-hf")["form"], "transformers");
    for name in ["modeling_dsmoe.py", "configuration_dsmoe.py", "README.md", "tokenizer_config.json"] {
        assert!(path("left-hf").join(name).is_file(), "{name}");
    }
    // The directory still is one that this program reads.
    assert_eq!(eval("left-hf")["nll"], eval("leaving")["nll"]);

    let fold = "--fold mean --data text.txt --out left-dense --force";
    fails(&format!("export dense --as dense {fold}"), &["has no gates to fold; leave --fold out"]);
    fails(&format!("export leaving --as native {fold}"), &["only --as dense does"]);
    assert_eq!(json_of("export moe --as dense --out left-dense --force")["dense"], "source");
}

/// The mean factors of experts of which every token runs k.
#[test]
fn top_k_models_are_folded() {
    let (text, calib) = ("--data text.txt --doc-separator <|endoftext|>", "--samples 8 --seq 16");
    let calib = format!("--calib text.txt --doc-separator <|endoftext|> {calib}");
    for (method, settings) in [
        ("llama-moe", "--set construction=sharing-inter"),
        ("moefication", "--set experts=4 --set epochs=1"),
        ("random-k", ""),
    ] {
        let (model, out) = (format!("topk-{method}"), format!("topk-{method}-dense"));
        succeeds(&format!("prune dense --method {method} --budget 90% {settings} {calib} --out {model}"));
        let dense = format!("export {model} --as dense --out {out}");
        fails(&dense, &["ffn.type is \"topk\", and without its gates", "--as hf", "--fold mean with --data"]);
        let folded = json_of(&format!("{dense} --fold mean {text}"));
        assert_eq!(folded["dense"], "folded", "{method}");
        let eval = |model: &str| json_of(&format!("eval {model} {text}"));
        assert_eq!(eval(&model)["ppl"], folded["fold"]["ppl_before"], "{method}");
        assert_eq!(eval(&out)["ppl"], folded["fold"]["ppl_after"], "{method}");
        assert_eq!(json_of(&format!("inspect {out}"))["model_type"], "llama", "{method}");
    }
}
