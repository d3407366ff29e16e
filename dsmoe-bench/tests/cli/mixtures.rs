//! Mixtures of experts: made of a dense model, inspected, measured, trained, generated from and exported; and what is refused.

use dsmoe_core::family;
use serde_json::{Value, json};

use crate::common::{agrees, calib, fails, json_of, nll, number, on_text, path, run, succeeds};

#[test]
fn the_docs_name_all_families_of_mixtures() {
    let text = include_str!("../../../docs/families.md");
    for family in family::all().filter(|family| family.has_experts()) {
        assert!(text.contains(&format!("| `{}`", family.model_type)), "{}", family.model_type);
    }
}

#[test]
fn a_mixture_is_made_measured_trained_and_exported() {
    let line = "convert dense --as mixtral --experts 4 --top-k 2 --seed 3 --out mixtral";
    let made = json_of(line);
    // An expert is 3 x 64 x 32, a router 4 x 32; the dense model has 38,976 parameters and one FFN in each of two layers.
    let (expert, router) = (3 * 64 * 32, 4 * 32);
    let dense = number(&json_of("inspect dense")["params_total"]);
    let total = dense + f64::from(2 * (3 * expert + router));
    agrees(&made, &json!({ "family": "mixtral", "experts": 4, "top_k": 2, "expert_width": 64 }));
    assert_eq!(
        (number(&made["params_total"]), number(&made["params_router"])),
        (total, f64::from(2 * router))
    );
    let seen = json_of("inspect mixtral");
    agrees(&seen, &json!({ "model_type": "mixtral", "family": "mixtral" }));
    assert_eq!(seen["ffn"]["type"], "mixture");
    assert_eq!(number(&seen["params_activated"]), dense + f64::from(2 * (expert + router)));
    assert_eq!(seen["params_activated"], made["params_activated"]);

    let (of_dense, start) = (nll("dense"), nll("mixtral"));
    assert!((of_dense - start).abs() < 1e-5, "{of_dense} dense, {start} upcycled");
    succeeds("generate mixtral --prompt Once --max-tokens 4 --temperature 0");
    let steps = format!("{} --steps 12 --batch 4 --seq 32 --lr 3e-3", on_text());
    let trained = json_of(&format!("train mixtral {steps} --out mixtral-trained"));
    assert!(number(&trained["steps"]) == 12.0, "{trained}");
    let after = nll("mixtral-trained");
    assert!(after < start - 0.1, "{start} before training and {after} after");
    assert_eq!(json_of("inspect mixtral-trained")["model_type"], "mixtral");
    for form in ["native", "hf"] {
        let out = format!("mixtral-{form}");
        succeeds(&format!("export mixtral-trained --as {form} --out {out}"));
        assert!((nll(&out) - after).abs() < 1e-6, "{form}");
        // Transformers has the class.
        assert!(!path(&out).join("modeling_dsmoe.py").exists(), "{form}");
        let config: Value =
            serde_json::from_slice(&std::fs::read(path(&out).join("config.json")).unwrap()).unwrap();
        agrees(&config, &json!({ "architectures": ["MixtralForCausalLM"], "num_local_experts": 4 }));
    }
}

#[test]
fn experts_are_merged_and_dropped_and_the_model_serves_on() {
    succeeds("convert dense --as mixtral --experts 4 --top-k 2 --seed 3 --out many");
    let calib = calib();
    let (held, before) = (number(&json_of("inspect many")["params_total"]), nll("many"));
    for (method, set, budget) in [
        ("hc-smoe", "", "held:70%"),
        ("hc-smoe", "--set allocation=global --set vectors=router-logits", "70%"),
        ("uncurl", "--set router=mean", "70%"),
        ("seer-moe", "--set score=ean --set rounds=each", "70%"),
    ] {
        let line = format!("prune many --method {method} {set} --budget {budget} {calib}");
        let planned = json_of(&format!("{line} --dry-run"));
        let made = json_of(&format!("{line} --force --out fewer"));
        agrees(&made, &json!({ "counts": "held", "method": method }));
        assert_eq!(number(&made["source_held"]), held);
        assert!(made.get("params_dense").is_none());
        assert_eq!((&planned["params_total"], &planned["budget"]), (&made["params_total"], &made["budget"]));
        let share = number(&made["params_total"]) / held;
        assert!((0.5..0.7).contains(&share), "{method}: {share}");
        // Merged experts are stored once.
        assert_eq!(made["source_bytes"], json_of("inspect many")["bytes"]);
        let stored = number(&made["bytes"]) / number(&made["source_bytes"]);
        assert!((stored - share).abs() < 0.05, "{method}: {stored} of the bytes, {share} of the parameters");
        // Experts of one function: what is left of them is that function.
        assert!((nll("fewer") - before).abs() < 1e-6, "{method} {set}");
        succeeds("generate fewer --prompt Once --max-tokens 4 --temperature 0");
        let text = succeeds(&format!("{line} --dry-run"));
        assert!(text.contains("parameters held") && text.contains("held before"), "{text}");
        let text = succeeds(&format!("{line} --force --out fewer"));
        assert!(text.contains("weights on disk: ") && text.contains("parameters held"), "{text}");
    }
    fails(
        &format!("prune many --method seer-moe --budget 10% {calib} --out many-none"),
        &["budget 0.1", "fewest experts of a layer", "held or more"],
    );
    fails(
        "prune many --method uncurl --budget 70% --out many-none",
        &["--method uncurl reads calibration text"],
    );
    assert!(!path("many-none").exists());
}

#[test]
fn mixtures_that_cannot_be_made_are_refused() {
    for (line, parts) in [
        ("convert dense --as mixtral --top-k 9 --out no", &["top_k", "8"][..]),
        ("convert dense --as qwen3_moe --out no", &["model_type", "llama", "qwen3_moe"]),
        ("convert dense --as mixtral --threshold 0.4 --out no", &["--threshold", "--as mixtral"]),
        ("convert dense --as mixtral --active-target 0.4 --out no", &["--active-target", "--as mixtral"]),
        ("convert dense --top-k 2 --out no", &["--top-k", "--as mixtral"]),
        ("convert moe --as mixtral --out no", &["model_type", "experts or thresholds already"]),
    ] {
        fails(line, parts);
        assert!(!path("no").exists(), "{line}");
    }
    succeeds("convert dense --as mixtral --experts 3 --out mixtral-of-three");
    for (line, parts) in [
        ("convert mixtral-of-three --out no", &["model_type is already mixtral"][..]),
        (
            "prune mixtral-of-three --method llama-moe --budget 0.85 --out no",
            &["experts or thresholds already"],
        ),
        ("export mixtral-of-three --as dense --out no", &["mixture", "no dense form"]),
        (
            "export mixtral-of-three --as gguf --out no.gguf",
            &["ffn.type is \"mixture\"", "export it as native"],
        ),
    ] {
        fails(line, parts);
        assert!(!path("no").exists() && !path("no.gguf").exists(), "{line}");
    }
    assert_eq!(run("convert dense --as mistral --out no").code, 2);
}
