//! Experts changed, layers added and inputs skipped: what is refused, and processes that are killed.

use std::fs;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::common::{
    agrees, calib, config, end, fails, json_of, killed_after, kills_change_no_byte, list, nll, number,
    on_text, path, run, shows, spawn, succeeds, wait_until, write,
};

/// Trains the model in `dir` for four steps, into `dir` with `-run` behind it.
fn trains(dir: &str) {
    let steps = format!("{} --steps 4 --batch 2 --seq 32 --lr 1e-3", on_text());
    let trained = json_of(&format!("train {dir} {steps} --out {dir}-run"));
    assert_eq!(number(&trained["steps"]), 4.0, "{trained}");
}

/// Checks that the model in `dir`, which a command with this report has made, can be measured, generates text and learns. Returns
/// what `inspect` says of it, and its loss.
fn serves_on(dir: &str, report: &Value) -> (Value, f64) {
    let seen = json_of(&format!("inspect {dir}"));
    assert_eq!(number(&seen["params_total"]), number(&report["params_total"]), "{report}");
    let loss = nll(dir);
    assert!(loss.is_finite(), "{dir}: {loss}");
    succeeds(&format!("generate {dir} --prompt Once --max-tokens 4 --temperature 0"));
    trains(dir);
    assert!(nll(&format!("{dir}-run")).is_finite(), "{dir}");
    (seen, loss)
}

#[test]
fn experts_that_cannot_be_changed_are_refused() {
    let calib = calib();
    succeeds("convert dense --as mixtral --experts 4 --top-k 2 --seed 3 --out surgery-many");
    succeeds(&format!("prune surgery-many --method hc-smoe --budget 70% {calib} --out surgery-merged"));
    succeeds(&format!(
        "prune dense --method llama-moe --budget 0.85 --set experts=8 {calib} --out surgery-top-k"
    ));
    succeeds(&format!("prune dense --method duo --budget 0.85 {calib} --out surgery-duo"));
    for method in ["hc-smoe", "uncurl", "seer-moe"] {
        for (model, budget, parts) in [
            ("dense", "70%", &["it is dense, and this method changes experts", "sparse upcycling"][..]),
            ("surgery-many", "held:5%", &["budget 0.05", "fewest experts of a layer", "held or more"]),
            ("surgery-many", "1000", &["budget 1000", "fewest experts of a layer"]),
            ("surgery-many", "activated:70%", &["counts held parameters", "held:0.7"]),
        ] {
            let line =
                format!("prune {model} --method {method} --budget {budget} {calib} --out surgery-none");
            fails(&line, parts);
            assert!(!path("surgery-none").exists(), "{line}");
        }
    }
    // Pruning leaves as many experts as a token runs; merging may leave fewer gates than that, and says so.
    let dropped = format!("prune surgery-many --method seer-moe --budget 40% {calib} --out surgery-none");
    fails(&dropped, &["fewest experts of a layer"]);
    // Parts of one FFN are no variants of each other.
    for (model, method, parts) in [
        ("surgery-top-k", "hc-smoe", &["parts of one FFN and no variants of each other"][..]),
        ("moe", "hc-smoe", &["parts of one FFN and no variants of each other"]),
        (
            "surgery-merged",
            "uncurl --set router=mean",
            &["cannot be mean for gates that share experts already"],
        ),
        ("surgery-duo", "seer-moe", &["its experts cannot be changed one by one"]),
    ] {
        fails(&format!("prune {model} --method {method} --budget 90% {calib} --out surgery-none"), parts);
        assert!(!path("surgery-none").exists(), "{model} {method}");
    }
    for method in ["wanda", "llama-moe", "thresholds"] {
        let line = format!("prune surgery-many --method {method} --budget 70% {calib} --out surgery-none");
        fails(&line, &["experts"]);
    }
}

/// A DSMoE model with a core and budgets, and a top-k model.
#[test]
fn parts_of_one_ffn_are_dropped_and_the_model_serves_on() {
    let calib = calib();
    for (from, made, set) in [
        ("fewer-gated", "dsmoe --set experts=8", "--set rounds=each"),
        ("fewer-chosen", "llama-moe --set experts=8", "--set score=ean"),
    ] {
        succeeds(&format!("prune dense --method {made} --budget 0.85 {calib} --out {from}"));
        let held = number(&json_of(&format!("inspect {from}"))["params_total"]);
        let out = format!("{from}-out");
        let line = format!("prune {from} --method seer-moe {set} --budget held:92% {calib}");
        let planned = json_of(&format!("{line} --dry-run"));
        assert!(!path(&out).exists());
        let report = json_of(&format!("{line} --out {out}"));
        agrees(&report, &json!({ "counts": "held", "method": "seer-moe" }));
        assert_eq!(
            (number(&report["source_held"]), &report["params_total"]),
            (held, &planned["params_total"])
        );
        let (seen, after) = serves_on(&out, &report);
        let share = number(&seen["params_total"]) / held;
        assert!((0.85..=0.92).contains(&share), "{from}: {share}");
        for form in ["native", "hf"] {
            let copy = format!("{out}-{form}");
            succeeds(&format!("export {out} --as {form} --out {copy}"));
            assert!((nll(&copy) - after).abs() < 1e-6, "{from} {form}");
        }
        // The dense form needs open gates, or folds them.
        fails(&format!("export {out} --as dense --out {out}-dense"), &["gates"]);
    }
    let [gated, fewer] =
        ["fewer-gated", "fewer-gated-out"].map(|dir| json_of(&format!("inspect {dir}"))["experts"].clone());
    assert_eq!(gated["core"], fewer["core"]);
    assert!(number(&fewer["num_experts"]) < number(&gated["num_experts"]), "{fewer}");
    assert!(fewer["budget"].is_number() && !fewer["budgets"].as_array().unwrap().is_empty(), "{fewer}");
    succeeds(&format!(
        "eval fewer-gated-out --active {} --seq 32 --limit-tokens 300 {}",
        fewer["budget"],
        on_text()
    ));
    let ffn = json_of("inspect fewer-chosen-out")["ffn"]["settings"].clone();
    assert_eq!((&ffn["gate_hidden"], &ffn["gate"]), (&json!(8), &json!("mlp")), "{ffn}");
    // What was merged has a gate for each expert that is left, or all gates.
    for from in ["fewer-gated", "fewer-chosen"] {
        for router in ["mean", "map"] {
            let out = format!("{from}-{router}");
            let line = format!("prune {from} --method uncurl --set router={router} --budget 92% {calib}");
            succeeds(&format!("{line} --out {out}"));
            succeeds(&format!("generate {out} --prompt Once --max-tokens 4 --temperature 0"));
            let seen = json_of(&format!("inspect {out}"));
            let map = match from {
                "fewer-gated" => &seen["experts"]["expert_map"],
                _ => &seen["ffn"]["settings"]["expert_map"],
            };
            assert_eq!(map.is_array(), router == "map", "{out}: {seen}");
        }
        trains(&format!("{from}-map"));
        succeeds(&format!("export {from}-map --as native --out {from}-map-native"));
        let refusal = &["expert_map says that gates share experts", "--as native"];
        fails(&format!("export {from}-map --as hf --out {from}-map-hf"), refusal);
    }
    fails(
        &format!("eval fewer-gated-map --router oracle --seq 32 --limit-tokens 300 {}", on_text()),
        &["gates that another router could stand in for"],
    );
}

/// Layers of different numbers of experts, in the commands that read them.
#[test]
fn one_expert_of_a_whole_model_is_dropped() {
    let calib = calib();
    for (out, made) in
        [("uneven-gated", "dsmoe --set experts=8"), ("uneven-chosen", "llama-moe --set experts=8")]
    {
        succeeds(&format!("prune dense --method {made} --budget 0.85 {calib} --out {out}-source"));
        let line =
            format!("prune {out}-source --method seer-moe --set allocation=global --budget held:99.9%");
        let report = json_of(&format!("{line} {calib} --out {out}"));
        let (seen, before) = serves_on(out, &report);
        let of = if out == "uneven-gated" { &seen["experts"] } else { &seen["ffn"]["settings"] };
        let mut layers: Vec<u64> = serde_json::from_value(of["experts_per_layer"].clone()).unwrap();
        layers.sort_unstable();
        assert_eq!((layers[0], &of["num_experts"]), (7, &json!(8)), "{of}");
        assert!(layers[1..].iter().all(|&experts| experts == 8), "{layers:?}");
        succeeds(&format!("export {out} --as native --out {out}-native"));
        assert_eq!(nll(&format!("{out}-native")), before);
        let refusal = &["experts_per_layer", "different numbers of experts", "--as native"];
        fails(&format!("export {out} --as hf --out {out}-hf"), refusal);
    }
}

/// Training of a top-k model and of a mixture to fewer experts for a token.
#[test]
fn tokens_of_top_k_models_run_fewer_experts_after_training() {
    let calib = calib();
    succeeds(&format!(
        "prune dense --method llama-moe --budget 0.85 --set experts=8 {calib} --out lower-source"
    ));
    let spec = |dir: &str| json_of(&format!("inspect {dir}"))["ffn"]["settings"].clone();
    let before = spec("lower-source")["top_k"].as_u64().unwrap();
    let steps = format!("{} --steps 6 --batch 2 --seq 32", on_text());
    let line = format!("train lower-source {steps} --gate-entropy 0.01");
    succeeds(&format!("{line} --top-k {} --out lowered", before - 1));
    assert_eq!(spec("lowered")["top_k"].as_u64(), Some(before - 1));
    let activated = |dir: &str| number(&json_of(&format!("inspect {dir}"))["params_activated"]);
    assert!(activated("lowered") < activated("lower-source"));
    let metrics = fs::read_to_string(path("lowered/metrics.jsonl")).unwrap();
    assert!(metrics.lines().nth(1).unwrap().contains("\"gate_entropy\":"), "{metrics}");
    succeeds("generate lowered --prompt Once --max-tokens 4 --temperature 0");
    for (model, rest, parts) in [
        ("lower-source", format!("--top-k {}", before + 1), vec!["top_k is", "1 to the number of experts"]),
        ("dense", "--top-k 1".to_owned(), vec!["top_k is 1", "no fixed number of experts"]),
        ("dense", "--gate-entropy 0.1".to_owned(), vec!["gate_entropy is 0.1", "without gates"]),
        ("moe", "--top-k 1".to_owned(), vec!["top_k is 1", "no fixed number of experts"]),
    ] {
        fails(&format!("train {model} {steps} {rest} --out lowered-none"), &parts);
    }
}

/// It is refused before a device is opened, so that this needs none, and before anything is written.
#[cfg(feature = "cuda")]
#[test]
fn what_no_gpu_runs_is_refused_by_every_command() {
    let (calib, text) = (calib(), on_text());
    succeeds(&format!("prune dense --method duo --budget 0.85 {calib} --out gpu-duo"));
    succeeds(&format!("prune dense --method thresholds --budget 80% {calib} --out gpu-thresholds"));
    succeeds("convert dense --as mixtral --experts 4 --top-k 2 --seed 3 --out gpu-mixture");
    let train = |model: &str| format!("train {model} --steps 2 --batch 2 --seq 32 {text} --out gpu-none");
    succeeds(&format!("prune moe --method uncurl --budget held:95% {calib} --out gpu-shared"));
    for (model, refusal) in [
        ("gpu-shared", "a GPU does not run llama with sigmoid gates that share experts; set --device to cpu"),
        ("gpu-duo", "a GPU does not run the FFN of layer 0, which is of type duo; set --device to cpu"),
        ("gpu-thresholds", "a GPU does not run llama with thresholds of inputs; set --device to cpu"),
    ] {
        for line in [
            format!("eval {model} --seq 32 --limit-tokens 300 {text}"),
            format!("generate {model} --prompt Once --max-tokens 4"),
            train(model),
        ] {
            fails(&format!("{line} --device cuda:0"), &[refusal]);
        }
    }
    for (model, setting, parts) in [
        ("moe", "--separability 0.1", ["separability is 0.1", "0 on a GPU"]),
        ("gpu-mixture", "--gate-entropy 0.1", ["gate_entropy is 0.1", "0 on a GPU"]),
        ("gpu-mixture", "--top-k 1", ["top_k is 1", "no number on a GPU: train on the processor"]),
        ("moe", "--teacher dense", ["teacher is set for a GPU", "--device cpu only"]),
        ("moe", "--set train_layers=[0]", ["train_layers is set for a GPU", "--device cpu only"]),
        ("moe", "--recompute", ["recompute is set for a GPU", "--device cpu only"]),
        ("moe", "--lanes 2", ["lanes is 2", "1 on a GPU, and a larger --accumulate"]),
        ("moe", "--dtype f32", ["dtype is f32", "bf16 on a GPU"]),
    ] {
        fails(&format!("{} {setting} --device cuda:0", train(model)), &parts);
    }
    assert!(!path("gpu-none").exists());
}

/// The files of a directory with their bytes.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn growth_by_networks_continues_where_it_was_killed() {
    succeeds("grow dense --layers 3 --method average --out grow-source");
    let line = "grow grow-source --layers 5 --epochs 60 --force --resume --quiet --out grow-kills/model";
    kills_change_no_byte(line, "grow-kills", 5);
    fails(
        "grow grow-source --layers 4 --method copy --resume --out grow-none",
        &["--resume", "--method lesa"],
    );
    // What another command left is not continued, and a call that starts over removes it.
    let other = "grow grow-source --layers 5 --epochs 400 --seed 1 --out grow-other/model";
    let child = spawn(other);
    wait_until("a finished part", || path("grow-other/model.partial/part-fit-0").exists());
    end(child, "-TERM");
    fails(&format!("{other} --penalty 0.1 --resume"), &["grow-other/model.partial", "leave --resume out"]);
    succeeds("grow grow-source --layers 5 --epochs 1 --quiet --out grow-other/model");
    // Nor does the folder stay that the ended process was writing.
    let left = fs::read_dir(path("grow-other")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["model"]);
}

#[test]
fn an_order_of_neurons_that_may_not_be_the_best_is_told() {
    let mut wide = config();
    wide["intermediate_size"] = json!(640);
    write("surgery-wide.json", wide.to_string());
    succeeds("init --config surgery-wide.json --tokenizer tokenizer.json --out surgery-wide-dense");
    succeeds("convert surgery-wide-dense --as mixtral --experts 4 --top-k 2 --seed 3 --out surgery-wide");
    let line = format!("prune surgery-wide --method uncurl --budget 70% {}", calib());
    for rest in ["--dry-run", "--out surgery-wide-merged"] {
        let told = run(&format!("{line} {rest} --json"));
        assert_eq!(told.code, 0, "{}", told.stderr);
        shows(&told.stderr, &["note: neurons are matched greedily, since experts of 640 are wider than 512"]);
        let notices = &told.json()["notices"];
        assert!(list(notices).len() == 1 && told.stderr.contains(notices[0].as_str().unwrap()), "{notices}");
    }
    let told = run(&format!("{line} --set alignment=none --dry-run --json"));
    assert!(told.code == 0 && told.json().get("notices").is_none(), "{}", told.stderr);
}

/// No layer is added, by no method: the model of two layers is too small for lesa to add any.
#[test]
fn as_many_layers_as_there_are_are_a_copy() {
    let same = json!({ "layers": 2, "source_layers": 2, "unchanged": true, "new_layers": [] });
    agrees(&json_of("grow dense --layers 2 --dry-run"), &same);
    for rest in ["--method stack", "--method lesa", "--resume"] {
        let line = format!("grow dense --layers 2 --force --out grow-same {rest}");
        let made = json_of(&line);
        agrees(&made, &same);
        assert_eq!(made["params"], made["source_params"]);
        shows(&succeeds(&line), &["2 layers of 2", "new layers: none, a copy of the model"]);
        assert!(!path("grow-same.partial").exists());
        let loss = |model: &str| json_of(&format!("eval {model} {}", on_text()))["nll"].clone();
        assert_eq!(loss("grow-same"), loss("dense"));
    }
    fails("grow dense --layers 2 --fill 0-1 --out grow-none", &["fill", "no layer is to be added"]);
    fails("grow dense --layers 1 --out grow-none", &["layers: is 1", "use 2 to copy it, or more"]);
}

#[test]
fn methods_with_calibration_continue_where_they_were_killed() {
    let calib = format!("{} --samples 16 --seq 64", on_text().replacen("--data", "--calib", 1));
    succeeds("convert dense --as mixtral --experts 8 --top-k 2 --seed 3 --out continued-source");
    for (i, (method, set, budget, model)) in [
        ("hc-smoe", "linkage=average", "60%", "continued-source"),
        ("seer-moe", "rounds=each", "60%", "continued-source"),
        ("thresholds", "choose=search", "80%", "dense"),
        ("thresholds", "step=0.1", "80%", "dense"),
        ("factorllm", "epochs=300", "85%", "dense"),
        ("duo", "ratio=8", "85%", "dense"),
    ]
    .into_iter()
    .enumerate()
    {
        let line = format!("prune {model} --method {method} --set {set} --budget {budget} {calib}");
        kills_change_no_byte(
            &format!("{line} --force --resume --quiet --out continued-{i}/model"),
            &format!("continued-{i}"),
            6 + i as u64,
        );
    }
    for (method, set) in [("wanda", ""), ("duo", "--set start=random")] {
        let line = format!("prune dense --method {method} {set} --budget 80% {calib} --out continued-none");
        fails(&format!("{line} --resume"), &["--resume", method, "does not continue"]);
        assert!(!path("continued-none").exists());
    }
}

#[test]
fn a_command_that_is_killed_leaves_nothing_half_written_and_ends_as_a_whole_one() {
    let calib = calib();
    succeeds("convert dense --as mixtral --experts 8 --top-k 2 --seed 3 --out killed-source");
    succeeds(&format!("prune dense --method duo --budget 85% {calib} --out killed-unrouted"));
    for (name, line) in [
        ("hc-smoe", format!("prune killed-source --method hc-smoe --budget 60% {calib}")),
        ("uncurl", format!("prune killed-source --method uncurl --budget 60% {calib}")),
        ("seer-moe", format!("prune killed-source --method seer-moe --set rounds=each --budget 60% {calib}")),
        ("teal", format!("prune dense --method thresholds --set choose=teal --budget 80% {calib}")),
        ("factorllm", format!("prune dense --method factorllm --budget 85% {calib}")),
        ("duo", format!("prune dense --method duo --budget 85% {calib}")),
        ("duo-router", "prune killed-unrouted --method duo-router --budget 85%".to_owned()),
        ("mixture", "convert dense --as mixtral --experts 4 --top-k 2".to_owned()),
        ("grow", "grow dense --layers 3 --method average".to_owned()),
    ] {
        let started = Instant::now();
        succeeds(&format!("{line} --out killed-{name}-whole/model"));
        let (took, want) = (started.elapsed(), files(&path(&format!("killed-{name}-whole/model"))));
        let out = path(&format!("killed-{name}/model"));
        for part in [0.3, 0.6, 0.8, 0.9] {
            killed_after(&format!("{line} --force --quiet --out killed-{name}/model"), took.mul_f64(part));
            assert!(!out.exists() || files(&out) == want, "{name}, killed after {part}");
        }
        succeeds(&format!("{line} --force --out killed-{name}/model"));
        assert!(files(&out) == want, "{name}");
    }
}
