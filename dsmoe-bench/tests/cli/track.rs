//! `dsmoe bench record`, `compare` and `history`.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::common::{at, fails, run, succeeds};

fn dir() -> PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("track");
        if dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
        }
        fs::create_dir_all(dir.join("records")).unwrap();
        dir
    })
    .clone()
}

/// A record of one quick benchmark, made once.
fn record() -> &'static (PathBuf, Value) {
    static RECORD: OnceLock<(PathBuf, Value)> = OnceLock::new();
    RECORD.get_or_init(|| {
        let path = dir().join("records").join("first.json");
        succeeds(&[
            "bench",
            "record",
            "--suite",
            "kernels",
            "--only",
            "rms_norm",
            "--processes",
            "1",
            "--threads",
            "2",
            "--repeats",
            "8",
            "--out",
            at(&path),
        ]);
        let record = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        (path, record)
    })
}

/// The record changed, in a file of its own.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
    let mut value = record().1.clone();
    change(&mut value);
    let path = dir().join(name);
    fs::write(&path, value.to_string()).unwrap();
    path
}

fn scale(value: &mut Value, factor: f64) {
    for key in ["median", "low", "high"] {
        value[key] = json!(factor * value[key].as_f64().unwrap());
    }
}

#[test]
fn a_record_says_what_where_and_how_sure() {
    let record = &record().1;
    assert_eq!((&record["format"], &record["version"]), (&json!("dsmoe-bench-record"), &json!(2)));
    for (part, keys) in [
        ("machine", &["cpu", "cores", "caches", "isa", "threads", "system"][..]),
        ("build", &["revision", "rustc", "version"]),
    ] {
        keys.iter().for_each(|key| assert!(record[part].get(key).is_some(), "{part}.{key}"));
    }
    assert!(record["build"]["rustc"].as_str().unwrap().starts_with("rustc 1."));
    let all = record["benchmarks"].as_array().unwrap();
    assert_eq!(all.len(), 2);
    for one in all {
        assert_eq!(
            (&one["repetitions"], &one["unit"], &one["kind"]),
            (&json!(8), &json!("s"), &json!("time"))
        );
        for (estimate, samples) in
            [("value", "samples"), ("ratio", "ratio_samples"), ("exchange_ratio", "exchange_samples")]
        {
            let number = |key| one[estimate][key].as_f64().unwrap();
            let mut samples: Vec<f64> =
                one[samples].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            samples.sort_by(f64::total_cmp);
            assert_eq!(samples.len(), 8);
            assert_eq!((number("low"), number("high")), (samples[0], samples[7]), "8 samples: all of them");
            assert!((number("median") / ((samples[3] + samples[4]) / 2.0) - 1.0).abs() < 1e-12);
        }
    }
}

#[test]
fn processes_are_the_samples_of_a_record() {
    let path = dir().join("processes.json");
    let three = ["bench", "record", "--suite", "kernels", "--only", "rms_norm/forward", "--processes", "3"];
    succeeds(&[&three[..], &["--repeats", "8", "--out", at(&path)]].concat());
    let record: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let one = &record["benchmarks"][0];
    assert_eq!((&one["repetitions"], one["samples"].as_array().unwrap().len()), (&json!(3), 3));
    let mut samples: Vec<f64> =
        one["samples"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    samples.sort_by(f64::total_cmp);
    assert_eq!(one["value"], json!({ "low": samples[0], "median": samples[1], "high": samples[2] }));
}

#[test]
fn equal_records_pass_and_a_slower_one_ends_with_3() {
    let (path, _) = record();
    let same = run(&["bench", "compare", at(path), at(path), "--json"]);
    assert_eq!(same.code, 0, "{}", same.stderr);
    let slow = changed("slow.json", |record| {
        // Beyond whatever interval a busy machine gave.
        let one = &mut record["benchmarks"][1];
        for key in ["ratio", "value", "exchange_ratio"] {
            let spread = one[key]["high"].as_f64().unwrap() / one[key]["low"].as_f64().unwrap();
            scale(&mut one[key], 1.1 * spread);
        }
    });
    let found = run(&["bench", "compare", at(path), at(&slow), "--fail-above", "3%", "--json"]);
    assert_eq!(found.code, 3, "{}", found.stderr);
    let report: Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!(report["worse"], 1);
    assert_eq!(report["rows"][0]["name"], "kernels/rms_norm/backward", "the worst is first");
    assert_eq!(report["rows"][0]["verdict"], "worse");
    assert_eq!(report["rows"][1]["verdict"], "same");
    let text = run(&["bench", "compare", at(path), at(&slow)]);
    assert!(text.stdout.contains("WORSE") && text.stdout.contains("1 of 2 are worse"), "{}", text.stdout);
    let told = run(&["bench", "compare", at(path), at(&slow), "--fail-on", "instructions,quality"]);
    assert_eq!(told.code, 0, "{}", told.stderr);
    assert!(told.stdout.contains("WORSE") && told.stdout.contains(", 0 to fail"), "{}", told.stdout);
    let generous = run(&["bench", "compare", at(path), at(&slow), "--fail-above", "100000%"]);
    assert_eq!(generous.code, 0);
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let (path, _) = record();
    let newer = changed("newer.json", |record| record["version"] = json!(3));
    fails(&["bench", "compare", at(path), at(&newer)], &["newer.json", "version is 3", "measure again"]);
    let other = changed("other.json", |record| record["suites"] = json!(["ffn"]));
    fails(&["bench", "compare", at(path), at(&other)], &["kernels", "ffn", "--suite"]);
    let spoiled = changed("spoiled.json", |record| record["benchmarks"][0]["value"]["low"] = json!(-1.0));
    fails(&["bench", "compare", at(path), at(&spoiled)], &["spoiled.json", "no interval"]);
    let none = dir().join("none.json");
    fails(&["bench", "compare", at(path), at(&none)], &["none.json"]);
    fs::write(dir().join("list.json"), "[]").unwrap();
    fails(&["bench", "compare", at(path), at(&dir().join("list.json"))], &["list.json", "not a record"]);
    fails(&["bench", "record", "--only", "no such thing"], &["no such thing", "--suite"]);
    let machine = changed("machine.json", |record| record["machine"]["cpu"] = json!("another"));
    let warned = run(&["bench", "compare", at(path), at(&machine)]);
    assert!(warned.stderr.contains("machines differ"), "{}", warned.stderr);
    assert_eq!(run(&["bench", "compare", at(path)]).code, 2);
    assert_eq!(run(&["bench", "record", "--repeats", "7"]).code, 2);
}

#[test]
fn other_tools_get_their_formats() {
    let formatted = |format: &str| {
        succeeds(&[
            "bench",
            "record",
            "--only",
            "decode/dense",
            "--suite",
            "decode",
            "--processes",
            "1",
            "--repeats",
            "8",
            "--format",
            format,
        ])
    };
    let bmf: Value = serde_json::from_str(&formatted("bmf")).unwrap();
    let latency = &bmf["decode/dense_bf16/tokens"]["latency"];
    assert!(latency["value"].as_f64().unwrap() > 1000.0, "nanoseconds: {latency}");
    assert!(latency["lower_value"].as_f64().unwrap() <= latency["upper_value"].as_f64().unwrap());
    let gha: Value = serde_json::from_str(&formatted("gha")).unwrap();
    assert_eq!(gha[0]["name"], "decode/dense_bf16/tokens");
    assert!(gha[0]["value"].as_f64().unwrap() > 0.0 && gha[0]["unit"].is_string());
    let csv = formatted("csv");
    let fields: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(fields, [11, 11], "{csv}");
    assert!(formatted("md").contains("| decode/dense_bf16/tokens |"));
}

#[test]
fn quality_is_the_same_bits_and_any_other_fails() {
    let path = dir().join("quality.json");
    let again = dir().join("quality-again.json");
    for out in [&path, &again] {
        succeeds(&["bench", "record", "--suite", "quality", "--out", at(out)]);
    }
    let compared = run(&["bench", "compare", at(&path), at(&again)]);
    assert_eq!(compared.code, 0, "{}", compared.stdout);
    let mut record: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(record["benchmarks"].as_array().unwrap().len(), 3);
    scale(&mut record["benchmarks"][0]["value"], 0.999);
    fs::write(&again, record.to_string()).unwrap();
    let found = run(&["bench", "compare", at(&path), at(&again)]);
    assert_eq!(found.code, 3);
    assert!(found.stdout.contains("CHANGED"), "{}", found.stdout);
    let tolerated = run(&["bench", "compare", at(&path), at(&again), "--quality-tolerance", "0.2%"]);
    assert_eq!(tolerated.code, 0);
}

#[test]
fn two_builds_take_turns() {
    let this = env!("CARGO_BIN_EXE_dsmoe");
    let ran = run(&[
        "bench",
        "compare",
        "--run",
        this,
        this,
        "--rounds",
        "8",
        "--suite",
        "kernels",
        "--only",
        "rms_norm/forward",
        "--fail-above",
        "100000%",
        "--json",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["rows"].as_array().unwrap().len(), 1);
    assert!(report["rows"][0]["interval"]["low"].as_f64().unwrap() > 0.0);
    let missing = dir().join("no-such-build");
    fails(&["bench", "compare", "--run", this, at(&missing)], &["no-such-build"]);
}

#[test]
fn the_history_is_one_page() {
    record();
    let out = dir().join("report.html");
    let folder = dir().join("records");
    succeeds(&["bench", "history", at(&folder), at(&record().0), "--out", at(&out)]);
    let page = fs::read_to_string(&out).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("kernels/rms_norm/forward"));
    assert_eq!(page.matches("<circle").count(), 4);
    let empty = dir().join("empty");
    fs::create_dir_all(&empty).unwrap();
    fails(&["bench", "history", at(&empty), "--out", at(&out)], &["empty", "no .json"]);
}
