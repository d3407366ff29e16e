//! `dsmoe prune` and `dsmoe methods`: every method, from a dense model to one that is trained, scored and used.

use serde_json::json;

use crate::common::{
    SEPARATOR, agrees, fails, is_wrong_usage, json_of, number, on_text, path, read, shows, succeeds, texts,
    weights,
};

fn prune(method: &str, rest: &str) -> String {
    format!("prune dense --method {method} --budget 0.85 {rest}")
}

fn calibration(samples: u32) -> String {
    format!("--calib text.txt --doc-separator {SEPARATOR} --samples {samples} --seq 32")
}

#[test]
fn every_method_makes_a_model_that_the_other_commands_take() {
    let methods = json_of("methods");
    let listed = texts(&methods["methods"], "name");
    let sources = texts(&methods["methods"], "source");
    succeeds("convert dense --as mixtral --experts 4 --top-k 2 --out prune-mixture");
    for method in
        ["dsmoe", "llm-pruner-block", "llm-pruner-channel", "sparsegpt", "wanda", "magnitude", "llama-moe"]
    {
        assert!(listed.contains(&method), "{method} in {listed:?}");
    }
    for (method, source) in listed.into_iter().zip(sources) {
        let has_experts = ["llama-moe", "moefication", "random-k"].contains(&method);
        let experts = if has_experts { "--set experts=4" } else { "" };
        let asked = prune(method, &format!("{experts} {}", calibration(8)));
        let asked = match source {
            // It routes what the method before it has made.
            "experts" if method == "duo-router" => asked.replacen("dense", "prune-duo", 1),
            "experts" => asked.replacen("dense", "prune-mixture", 1),
            _ => asked,
        };
        let out = format!("prune-{method}");
        let planned = json_of(&format!("{asked} --dry-run"));
        let made = json_of(&format!("{asked} --out {out}"));
        // Thresholds are shares of inputs in calibration text: what is used of it is counted after the plan.
        let is_measured = method == "thresholds";
        for key in ["params_total", "params_activated", "reached_by"] {
            if !is_measured || key == "params_total" {
                assert_eq!(planned[key], made[key], "{method}: {key}");
            }
        }
        let [plan, used] = [&planned, &made].map(|result| number(&result["params_activated"]));
        assert!((plan - used).abs() < 1e-3 * plan, "{method}: {used} of {plan}");
        let seen = json_of(&format!("inspect {out}"));
        assert_eq!(number(&seen["params_total"]), number(&made["params_total"]), "{method}: {made}");
        assert_eq!((&made["bytes"], planned.get("bytes")), (&seen["bytes"], None), "{method}: {made}");
        if !method.starts_with("dense") {
            assert!((0.8..1.1).contains(&number(&made["reached"])), "{method}: {made}");
        }
        let text = on_text();
        let train = format!("train {out} --out {out}-run --steps 3 --batch 2 --seq 32 --lr 1e-3 {text}");
        let trained = if is_measured {
            fails(&train, &["thresholds"]);
            out
        } else {
            succeeds(&train);
            format!("{out}-run")
        };
        let score = json_of(&format!("eval {trained} --seq 32 --limit-tokens 500 {text}"));
        assert!((1.0..1000.0).contains(&number(&score["ppl"])), "{method}: {score}");
        succeeds(&format!("generate {trained} --prompt The --max-tokens 4 --temperature 0"));
    }
}

#[test]
fn a_seed_gives_the_same_model_twice() {
    succeeds("convert dense --as mixtral --experts 4 --top-k 2 --out prune-twice-mixture");
    for method in ["hc-smoe", "uncurl", "seer-moe"] {
        let [one, two] = [1, 2].map(|threads| {
            let out = format!("prune-twice-{method}-{threads}");
            let asked =
                prune(method, &format!("{} --seed 3 --threads {threads} --out {out}", calibration(8)));
            succeeds(&asked.replacen("dense", "prune-twice-mixture", 1));
            weights(&out)
        });
        assert!(one == two, "{method}");
    }
    for method in ["sparsegpt", "llm-pruner-block", "llama-moe"] {
        let [one, two] = [1, 2].map(|threads| {
            let out = format!("prune-twice-{method}-{threads}");
            succeeds(&prune(method, &format!("{} --seed 3 --threads {threads} --out {out}", calibration(8))));
            weights(&out)
        });
        assert!(one == two, "{method}");
    }
}

#[test]
fn what_cannot_be_pruned_is_said_in_a_line() {
    let text = format!("--calib text.txt --doc-separator {SEPARATOR}");
    for (rest, parts) in [
        ("magic --budget 0.8", &["magic", "is not a method", "sparsegpt"][..]),
        ("wanda --budget 0.8", &["wanda", "--calib"]),
        ("magnitude --budget 0.01", &["budget", "0.01"]),
        ("magnitude --budget held:0.8", &["budget held:0.8", "magnitude counts activated parameters"]),
        ("hc-smoe --budget 0.8", &["model: it is dense", "sparse upcycling"]),
        ("seer-moe --budget activated:0.8", &["seer-moe counts held parameters", "held:0.8"]),
        ("magnitude --budget 0.8 --set speed=9", &["speed", "not a setting", "pattern"]),
        ("magnitude --budget 0.8 --set pattern=3:5", &["pattern", "3:5", "2:4"]),
        (&format!("llama-moe --budget 0.85 --set experts=5 {text}"), &["experts", "5"]),
        (&format!("wanda --budget 0.85 --seq 500 {text}"), &["--seq 500", "128"]),
        (&format!("wanda --budget 0.85 --samples 9999 {text}"), &["--samples", "9999"]),
    ] {
        fails(&format!("prune dense --out prune-nothing --method {rest}"), parts);
        assert!(!path("prune-nothing").exists(), "{rest}");
    }
    fails("prune moe --out prune-nothing --method magnitude --budget 0.8", &["dsmoe"]);
    let usage = is_wrong_usage("prune dense --out prune-nothing --method magnitude --budget lots");
    shows(&usage, &["735M"]);
    assert!(json_of("methods")["methods"][0]["settings"].is_array());
}

#[test]
fn convert_with_text_makes_what_prune_makes() {
    let text = format!("{} --seed 2", calibration(16));
    let share = &json_of(&prune("dsmoe", &format!("{text} --out prune-start")))["active_target"];
    let convert = |rest: &str| json_of(&format!("convert dense {text} {rest}"));
    let report = convert(&format!("--active-target {share} --out convert-start"));
    agrees(&report, &json!({ "partition": "clusters", "router_init": "fitted", "expert_width": 16 }));
    assert!(weights("prune-start") == weights("convert-start"));
    let config = read("convert-start/config.json");
    assert_eq!(read("prune-start/config.json"), config);
    shows(&config, &[&format!("\"active_target\": {share}")]);

    // Options that are given win; those that contradict each other are refused.
    let own = "--router-init calibrated --partition contiguous --gate-value sigmoid --active-target 0.5 \
               --out convert-own";
    agrees(&convert(own), &json!({ "partition": "contiguous", "router_init": "calibrated" }));
    for (rest, parts) in [
        (&text as &str, &["--calib", "--active-target"][..]),
        (&format!("{text} --active-target 0.5 --router-init open"), &["--router-init open", "--calib"]),
        ("--active-target 0.5 --router-init calibrated", &["calibrated needs text", "--calib"]),
        (&format!("{text} --active-target 0.5 --partition random"), &["--partition", "calibrated"]),
        (&format!("{text} --active-target 0.5 --router-init calibrated --core 0.5"), &["--core", "fitted"]),
        (&format!("{text} --active-target 0.5 --budgets 0.1"), &["a budget of 0.1", "core"]),
        (&format!("{text} --active-target 0.5 --gate-value sigmoid"), &["gates are sigmoid", "binary"]),
        ("--active-target 0", &["--active-target 0", "above 0"]),
    ] {
        fails(&format!("convert dense --out convert-none {rest}"), parts);
    }
    is_wrong_usage("convert dense --out convert-none --active-target 1.5");
    is_wrong_usage("convert dense --out convert-none --samples 4");
    is_wrong_usage("convert dense --out convert-none --core 0.5");
}

#[test]
fn budgets_are_chosen_by_share() {
    let text = format!("{} --seed 2", calibration(16));
    succeeds(&format!("convert dense {text} --active-target 0.5 --budgets 0.75,1 --experts 8 --out budgets"));
    let eval =
        |rest: &str| json_of(&format!("eval budgets --data text.txt --doc-separator {SEPARATOR} {rest}"));
    let shares =
        ["", "--active 0.6", "--active 0.75", "--active 1"].map(|rest| number(&eval(rest)["active_ratio"]));
    assert!(shares.is_sorted_by(|a, b| a < b) && shares[0] > 0.2, "{shares:?}");
    agrees(&eval("--active 0.75"), &json!({ "budget": 0.75, "threshold": null }));
    fails("eval budgets --data text.txt --active 0.4", &["outside of the model's budgets", "0.5 to 1"]);
    fails("eval moe --data text.txt --active 0.5", &["no budgets"]);
    is_wrong_usage("eval budgets --data text.txt --active 0.75 --threshold 0.5");
    succeeds("generate budgets --prompt one --max-tokens 4 --active 0.75");
    succeeds("export budgets --as hf --active 0.75 --out budgets-hf");
    agrees(&json_of("inspect budgets-hf"), &json!({ "experts": { "budget": 0.75, "core": [1, 2] } }));
    fails("export budgets --as dense --out budgets-none", &["was fitted or trained with gates"]);
    fails("export budgets --as gguf --active 0.75 --out budgets-none", &["--active"]);
}
