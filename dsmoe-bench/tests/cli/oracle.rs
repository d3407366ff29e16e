//! `dsmoe oracle`, and the models of two FFNs that it routes.

use serde_json::Value;

use crate::common::{
    fails, json_of, kills_change_no_byte, list, number, path, read, read_json, shows, succeeds, write,
};

const TEXT: &str = "--data text.txt --limit-tokens 200 --seq 40";

#[test]
fn an_oracle_has_the_best_route_of_every_token() {
    let line = format!("oracle dense {TEXT} --out oracle/routes.json");
    let plan = json_of(&format!("{line} --dry-run"));
    assert!(!path("oracle").exists());
    let layers = number(&plan["layers"]) as u32;
    assert_eq!(
        (number(&plan["all_routes"]), plan["exact"].as_bool()),
        (f64::from(2u32.pow(layers)), Some(true))
    );
    assert_eq!(number(&plan["predicted"]), 195.0);

    let found = json_of(&line);
    let levels = list(&found["levels"]);
    assert_eq!(levels.len() as u32, layers + 1);
    for level in levels {
        assert!(
            number(&level["oracle"]) <= number(&level["best"])
                && number(&level["best"]) <= number(&level["mean"])
        );
    }
    // All FFNs: what `dsmoe eval` measures.
    let eval = json_of(&format!("eval dense {TEXT} --dtype f32"));
    let whole = number(&levels[layers as usize]["mean"]);
    assert!((whole - number(&eval["nll"])).abs() < 1e-9, "{whole} {}", eval["nll"]);
    let written = read_json("oracle/routes.json");
    assert_eq!(written["levels"], found["levels"]);
    let tokens = &written["tokens"];
    assert_eq!((list(&tokens["best"]).len(), list(&tokens["routes"]).len()), (195, 2usize.pow(layers)));
    assert!(!path("oracle/routes.json.partial").exists());

    let before = read("oracle/routes.json");
    fails(&line, &["oracle/routes.json exists", "--force"]);
    // A state of other work is left aside, and the bytes are the same again.
    write("oracle/routes.json.partial", "{");
    succeeds(&format!("{line} --force"));
    assert_eq!(read("oracle/routes.json"), before);
    shows(
        &succeeds(&format!("oracle dense {TEXT} --no-control")),
        &["level", "best route", "any route: oracle"],
    );

    // Within a budget, and for tokens whose earlier ones keep all FFNs or take their own best routes.
    let budget = json_of(&format!("oracle dense {TEXT} --no-control --budget 1"));
    assert_eq!(
        (&budget["levels"], number(&budget["budget"]["level"])),
        (&without_control(&found)["levels"], 1.0)
    );
    let [each, mean] = ["each", "mean"].map(|way| &budget["budget"][way]);
    assert!(number(&each["oracle"]) <= number(&levels[1]["oracle"]) && number(&each["mean_level"]) <= 1.0);
    assert!(number(&mean["oracle"]) <= number(&each["oracle"]) && number(&mean["mean_level"]) <= 1.0);
    for context in ["dense", "greedy"] {
        let line = format!("oracle dense {TEXT} --context {context} --out oracle/{context}.json");
        assert!(number(&json_of(&format!("{line} --dry-run"))["passes"]) > number(&plan["passes"]));
        let other = json_of(&line);
        assert_eq!(other["context"], context);
        assert_eq!(other["default"], found["default"]);
        assert_eq!(other["levels"].as_array().map(Vec::len), Some(levels.len()));
        assert!(other["levels"] != found["levels"] && other.get("budget").is_none(), "{other}");
        assert_eq!(read_json(&format!("oracle/{context}.json"))["levels"], other["levels"]);
    }
    let both = succeeds(&format!("oracle dense {TEXT} --no-control --budget 1.5 --context dense"));
    shows(
        &both,
        &["every token up to level 1.5", "tokens up to level 1.5 in the mean", "take the default route"],
    );

    fails(&format!("oracle dense {TEXT} --budget 9"), &["budget is 9", "0 to 2"]);
    fails(&format!("oracle dense {TEXT} --routes experts"), &["routes", "a model of experts"]);
    fails(&format!("oracle dense {TEXT} --routes big-small"), &["routes", "two choices in every layer"]);
    fails(&format!("oracle dense {TEXT} --exact 0"), &["exact is 0", "1 to 65536"]);
    fails("oracle dense --data text.txt --seq 100000", &["seq is 100000", "max_position"]);
    fails("oracle missing --data text.txt", &["missing"]);
}

/// A report without its control.
fn without_control(report: &Value) -> Value {
    let mut report = report.clone();
    for level in report["levels"].as_array_mut().unwrap() {
        level.as_object_mut().unwrap().retain(|key, _| !["control", "beyond"].contains(&&key[..]));
    }
    report
}

#[test]
fn kills_do_not_change_routes() {
    for (seed, context) in [(1, "same"), (2, "greedy")] {
        let out = format!("oracle-kills-{context}");
        let options = "--budget 1 --force --quiet";
        let line = format!("oracle dense {TEXT} --context {context} {options} --out {out}/routes.json");
        kills_change_no_byte(&line, &out, seed);
    }
}

#[test]
fn a_duo_model_is_made_trained_routed_and_measured() {
    let calib = "--calib text.txt --samples 8 --seq 32";
    succeeds(&format!("prune dense --method duo --budget 95% --set ratio=8 {calib} --out duo/random"));
    let train = "--data text.txt --steps 3 --batch 2 --seq 32 --lr 1e-3";
    succeeds(&format!("train duo/random {train} --out duo/run"));
    let made = json_of("prune duo/run --method duo-router --budget 95% --out duo/routed");
    let share = number(&made["active_target"]);
    assert!(share > 0.0 && share < 1.0, "{made}");
    let trained = succeeds(&format!("train duo/routed {train} --out duo/router-run"));
    assert!(!trained.is_empty());
    shows(&read("duo/router-run/run.toml"), &["active_target"]);
    for model in ["duo/run", "duo/router-run"] {
        let found = json_of(&format!("eval {model} {TEXT} --dtype f32"));
        let active = number(&found["active_ratio"]);
        assert!((0.0..=1.0).contains(&active));
        let counts = json_of(&format!("inspect {model}"));
        assert!(number(&found["params_activated"]) < number(&counts["params_total"]), "{found}");
        succeeds(&format!("generate {model} --prompt once --max-tokens 4 --temperature 0"));
    }
    let found = json_of(&format!("oracle duo/router-run {TEXT} --routes big-small --no-control"));
    assert!(number(&found["any"]["oracle"]) < number(&found["default"]));
    fails("export duo/run --as hf --out duo/hf", &["\"duo\"", "native"]);
    fails("export duo/run --as gguf --out duo/x.gguf", &["\"duo\""]);
    succeeds("export duo/run --as native --out duo/native");
}
