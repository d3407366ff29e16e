//! `dsmoe prune` and `dsmoe methods`: every method, from a dense model to one that is trained, scored and used.

use serde_json::Value;

use crate::common::{SEPARATOR, at, fails, fixture, json_of, run, succeeds};

const BUDGET: &str = "0.85";

#[test]
fn every_method_makes_a_model_that_the_other_commands_take() {
    let fixture = fixture();
    let listed = json_of(&["methods"]);
    let listed: Vec<&str> =
        listed["methods"].as_array().unwrap().iter().map(|method| method["name"].as_str().unwrap()).collect();
    for method in
        ["dsmoe", "llm-pruner-block", "llm-pruner-channel", "sparsegpt", "wanda", "magnitude", "llama-moe"]
    {
        assert!(listed.contains(&method), "{method} in {listed:?}");
    }
    let text = ["--doc-separator", SEPARATOR];
    for method in listed {
        let (out, trained) =
            (fixture.out(&format!("prune-{method}")), fixture.out(&format!("prune-{method}-run")));
        let experts: &[&str] = if ["llama-moe", "moefication", "random-k"].contains(&method) {
            &["--set", "experts=4"]
        } else {
            &[]
        };
        let calibration = ["--calib", at(&fixture.text), "--samples", "8", "--seq", "32"];
        let prune = ["prune", at(&fixture.dense), "--method", method, "--budget", BUDGET];
        let asked = [&prune[..], experts, &calibration, &text].concat();
        let planned = json_of(&[&asked[..], &["--dry-run"]].concat());
        let made = json_of(&[&asked[..], &["--out", at(&out)]].concat());
        for key in ["params_total", "params_activated", "reached_by"] {
            assert_eq!(planned[key], made[key], "{method}: {key}");
        }
        let seen = json_of(&["inspect", at(&out)]);
        assert_eq!(seen["params_total"].as_f64(), made["params_total"].as_f64(), "{method}: {made}");
        if !method.starts_with("dense") {
            let reached = made["reached"].as_f64().unwrap();
            assert!((0.8..1.1).contains(&reached), "{method}: {made}");
        }
        let data = [&["--data", at(&fixture.text)][..], &text].concat();
        let train = [
            "train",
            at(&out),
            "--out",
            at(&trained),
            "--steps",
            "3",
            "--batch",
            "2",
            "--seq",
            "32",
            "--lr",
            "1e-3",
        ];
        json_of(&[&train[..], &data].concat());
        let score =
            json_of(&[&["eval", at(&trained), "--seq", "32", "--limit-tokens", "500"][..], &data].concat());
        assert!(score["ppl"].as_f64().is_some_and(|ppl| ppl > 1.0 && ppl < 1000.0), "{method}: {score}");
        succeeds(&["generate", at(&trained), "--prompt", "The", "--max-tokens", "4", "--temperature", "0"]);
    }
}

#[test]
fn a_seed_gives_the_same_model_twice() {
    let fixture = fixture();
    let weights = |method: &str, number: usize, threads: &str| {
        let out = fixture.out(&format!("prune-twice-{method}-{number}"));
        succeeds(&[
            "prune",
            at(&fixture.dense),
            "--method",
            method,
            "--budget",
            BUDGET,
            "--out",
            at(&out),
            "--calib",
            at(&fixture.text),
            "--samples",
            "8",
            "--seq",
            "32",
            "--seed",
            "3",
            "--threads",
            threads,
            "--doc-separator",
            SEPARATOR,
        ]);
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    for method in ["sparsegpt", "llm-pruner-block", "llama-moe"] {
        assert!(weights(method, 1, "1") == weights(method, 2, "2"), "{method}");
    }
}

#[test]
fn what_cannot_be_pruned_is_said_in_a_line() {
    let fixture = fixture();
    let out = fixture.out("prune-nothing");
    let base = ["prune", at(&fixture.dense), "--out", at(&out)];
    let calib = ["--calib", at(&fixture.text), "--doc-separator", SEPARATOR];
    let check = |args: &[&str], parts: &[&str]| {
        fails(&[&base[..], args].concat(), parts);
        assert!(!out.exists(), "{args:?}");
    };
    check(&["--method", "magic", "--budget", "0.8"], &["magic", "is not a method", "sparsegpt"]);
    check(&["--method", "wanda", "--budget", "0.8"], &["wanda", "--calib"]);
    check(&["--method", "magnitude", "--budget", "0.01"], &["budget", "0.01"]);
    check(
        &["--method", "magnitude", "--budget", "0.8", "--set", "speed=9"],
        &["speed", "not a setting", "pattern"],
    );
    check(&["--method", "magnitude", "--budget", "0.8", "--set", "pattern=3:5"], &["pattern", "3:5", "2:4"]);
    check(
        &[&["--method", "llama-moe", "--budget", "0.85", "--set", "experts=5"][..], &calib].concat(),
        &["experts", "5"],
    );
    check(
        &[&["--method", "wanda", "--budget", "0.85", "--seq", "500"][..], &calib].concat(),
        &["--seq 500", "128"],
    );
    check(
        &[&["--method", "wanda", "--budget", "0.85", "--samples", "9999"][..], &calib].concat(),
        &["--samples", "9999"],
    );
    let moe = ["prune", at(&fixture.moe), "--out", at(&out), "--method", "magnitude", "--budget", "0.8"];
    fails(&moe, &["dsmoe"]);
    let budget =
        run(&["prune", at(&fixture.dense), "--out", at(&out), "--method", "magnitude", "--budget", "lots"]);
    assert_eq!(budget.code, 2);
    assert!(budget.stderr.contains("735M"), "{}", budget.stderr);
    let listed: Value = json_of(&["methods"]);
    assert!(listed["methods"][0]["settings"].is_array(), "{listed}");
}

#[test]
fn convert_with_text_makes_what_prune_makes() {
    let fixture = fixture();
    let [pruned, converted] = ["prune-start", "convert-start"].map(|name| fixture.out(name));
    let text = [
        "--calib",
        at(&fixture.text),
        "--doc-separator",
        SEPARATOR,
        "--samples",
        "16",
        "--seq",
        "32",
        "--seed",
        "2",
    ];
    let prune = ["prune", at(&fixture.dense), "--method", "dsmoe", "--budget", BUDGET, "--out", at(&pruned)];
    let share = json_of(&[&prune[..], &text].concat())["active_target"].to_string();
    let convert = ["convert", at(&fixture.dense), "--active-target", &share, "--out", at(&converted)];
    let report = json_of(&[&convert[..], &text].concat());
    assert_eq!((&report["partition"], &report["router_init"]), (&"clusters".into(), &"calibrated".into()));
    for file in ["model.safetensors", "config.json"] {
        assert!(
            std::fs::read(pruned.join(file)).unwrap() == std::fs::read(converted.join(file)).unwrap(),
            "{file}"
        );
    }
    let config = std::fs::read_to_string(converted.join("config.json")).unwrap();
    assert!(config.contains(&format!("\"active_target\": {share}")), "{config}");

    // Options that are given win; those that contradict each other are refused.
    let own = fixture.out("convert-own");
    let given = ["--partition", "contiguous", "--gate-value", "sigmoid"];
    let convert = ["convert", at(&fixture.dense), "--active-target", "0.5", "--out", at(&own)];
    let report = json_of(&[&convert[..], &text, &given].concat());
    assert_eq!((&report["partition"], &report["router_init"]), (&"contiguous".into(), &"calibrated".into()));
    let none = fixture.out("convert-none");
    let base = ["convert", at(&fixture.dense), "--out", at(&none)];
    let check = |args: &[&str], parts: &[&str]| fails(&[&base[..], args].concat(), parts);
    check(&text, &["--calib", "--active-target"]);
    check(
        &[&text[..], &["--active-target", "0.5", "--router-init", "open"]].concat(),
        &["--router-init open", "--calib"],
    );
    check(&["--active-target", "0.5", "--router-init", "calibrated"], &["calibrated needs text", "--calib"]);
    check(&["--active-target", "1.5"], &["--active-target 1.5"]);
    assert_eq!(run(&[&base[..], &["--samples", "4"]].concat()).code, 2);
}
