//! Runs that estimate the routers' gradient.

use std::path::Path;

use crate::common::*;
use dsmoe_train::TrainConfig;
use serde_json::Value;

const RULES: [&str; 2] = ["every:3", "sample:0.25"];
const LR: &str = "lr=1e-2";

fn setting(rule: &str) -> String {
    format!("router_gradient={rule}")
}

/// Changes the `dsmoe` object of a config.json.
fn edit_config(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["dsmoe"][key] = value;
    std::fs::write(&path, config.to_string()).unwrap();
}

/// A bed whose model has some gates shut from the start.
fn half_shut() -> Bed {
    let bed = Bed::new(true);
    edit_config(&bed.source, "threshold", 0.7.into());
    bed
}

/// The bytes of the weights after a whole run.
fn trained(bed: &Bed, name: &str, rule: &str, more: &[&str]) -> Vec<u8> {
    let heard = bed.whole(name, &[&[LR, &setting(rule)][..], more].concat());
    let share = heard.records[0].activation_ratio.unwrap();
    assert!((0.2..0.9).contains(&share), "{share} of the pairs are active");
    weights(&bed.path(name))
}

#[test]
fn rules_that_compute_all_pairs_have_the_bits_of_the_default() {
    let bed = half_shut();
    bed.whole("default", &[LR, "steps=6"]);
    for (i, rule) in ["full", "every:1", "sample:1", "sample:100%"].into_iter().enumerate() {
        let found = trained(&bed, &format!("out {i}"), rule, &["steps=6"]);
        assert_eq!(found, weights(&bed.path("default")), "{rule}");
    }
}

#[test]
fn an_estimating_run_resumes_to_the_bit_on_any_number_of_threads() {
    let bed = half_shut();
    let full = trained(&bed, "full", "full", &[]);
    for (i, rule) in RULES.into_iter().enumerate() {
        let [whole, parts, one, other] =
            ["whole", "parts", "one thread", "another seed"].map(|name| format!("{name} {i}"));
        let setting = setting(rule);
        let all = bed.whole(&whole, &[LR, &setting]);
        let found = weights(&bed.path(&whole));
        assert_ne!(found, full, "{rule}");

        let first = bed.part(&parts, 7, &[LR, &setting]);
        let rest = bed.rest(&parts, &[LR, &setting, "threads=2"]);
        assert_eq!(weights(&bed.path(&parts)), found, "{rule}");
        let norms =
            |heard: &Heard| heard.records.iter().map(|record| record.router_grad_norm).collect::<Vec<_>>();
        assert_eq!([norms(&first), norms(&rest)].concat(), norms(&all), "{rule}");
        assert_eq!(trained(&bed, &one, rule, &["threads=1"]), found, "{rule}");
        assert_ne!(trained(&bed, &other, rule, &["seed=9"]), found, "{rule}");
    }
}

/// The rule is part of what a run is.
#[test]
fn checkpoints_and_settings_hold_the_rule() {
    let bed = half_shut();
    let of_run = setting("every:3");
    bed.part("out", 2, &[LR, &of_run]);
    let read = |name: &str| std::fs::read_to_string(bed.path("out").join(name)).unwrap();
    let state: Value = serde_json::from_str(&read("checkpoints/step-00000002/state.json")).unwrap();
    assert_eq!(state["config"]["router_gradient"], "every:3");
    assert!(read("run.toml").contains("router_gradient = \"every:3\""), "{}", read("run.toml"));
    for rule in ["every:4", "full"] {
        let parts = ["router_gradient was \"every:3\"", &format!("is now \"{rule}\"")];
        refused(&text(1), settings(&[LR, &setting(rule)]), bed.resumed("out"), &parts);
    }

    // A run of before there was a choice goes on with all pairs.
    bed.part("old", 2, &[LR]);
    let path = bed.path("old/checkpoints/step-00000002/state.json");
    let mut state: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    state["config"].as_object_mut().unwrap().retain(|key, _| key != "router_gradient");
    std::fs::write(&path, state.to_string()).unwrap();
    without_manifest(path.parent().unwrap());
    let parts = ["router_gradient was \"full\"", "is now \"every:3\""];
    refused(&text(1), settings(&[LR, &of_run]), bed.resumed("old"), &parts);
    bed.rest("old", &[LR]);
}

#[test]
fn models_without_the_rule_are_refused() {
    let [dense, gates] = [Bed::new(false), Bed::new(true)];
    edit_config(&gates.source, "ste", false.into());
    let config = |more: &[&str]| TrainConfig { active_target: None, ..settings(more) };
    for rule in RULES {
        for bed in [&dense, &gates] {
            let parts = [&format!("router_gradient is {rule}")[..], "full for a model without gates"];
            refused(&text(1), config(&[&setting(rule)]), bed.options("x"), &parts);
        }
    }
    // A rule that computes all pairs says nothing about the gates.
    let every = config(&["router_gradient=every:1", "steps=1"]);
    train(&text(1), every, dense.options("dense")).unwrap();
}
