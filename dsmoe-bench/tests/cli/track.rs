//! `dsmoe bench record`, `compare` and `history`.

use std::fs;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::common::{
    PROGRAM, agrees, fails, has, is_wrong_usage, json_of, list, number, path, read, read_json, run, shows,
    succeeds, write,
};

/// The file of a record of one quick benchmark, made once.
fn record() -> &'static str {
    const FILE: &str = "track/records/first.json";
    static RECORD: OnceLock<()> = OnceLock::new();
    RECORD.get_or_init(|| {
        fs::create_dir_all(path("track/records")).unwrap();
        succeeds(&format!(
            "bench record --suite kernels --only rms_norm --processes 1 --threads 2 --repeats 8 --out {FILE}"
        ));
    });
    FILE
}

/// Compares the record with one in a file of `track`.
fn compare(name: &str) -> String {
    format!("bench compare {} track/{name}", record())
}

/// Compares the record with a changed one.
fn compare_changed(name: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut value = read_json(record());
    change(&mut value);
    write(&format!("track/{name}"), value.to_string());
    compare(name)
}

fn scale(value: &mut Value, factor: f64) {
    for key in ["median", "low", "high"] {
        value[key] = json!(factor * number(&value[key]));
    }
}

fn sorted(samples: &Value) -> Vec<f64> {
    let mut samples: Vec<f64> = list(samples).iter().map(number).collect();
    samples.sort_by(f64::total_cmp);
    samples
}

#[test]
fn a_record_says_what_where_and_how_sure() {
    let record = read_json(record());
    agrees(&record, &json!({ "format": "dsmoe-bench-record", "version": 2 }));
    has(&record["machine"], "cpu cores caches isa threads system");
    has(&record["build"], "revision rustc version");
    assert!(record["build"]["rustc"].as_str().unwrap().starts_with("rustc 1."));
    assert_eq!(list(&record["benchmarks"]).len(), 2);
    for one in list(&record["benchmarks"]) {
        agrees(one, &json!({ "repetitions": 8, "unit": "s", "kind": "time" }));
        for (estimate, samples) in
            [("value", "samples"), ("ratio", "ratio_samples"), ("exchange_ratio", "exchange_samples")]
        {
            let samples = sorted(&one[samples]);
            assert_eq!(samples.len(), 8);
            // 8 samples: all of them.
            agrees(&one[estimate], &json!({ "low": samples[0], "high": samples[7] }));
            let middle = (samples[3] + samples[4]) / 2.0;
            assert!((number(&one[estimate]["median"]) / middle - 1.0).abs() < 1e-12);
        }
    }
}

#[test]
fn processes_are_the_samples_of_a_record() {
    fs::create_dir_all(path("track")).unwrap();
    succeeds(
        "bench record --suite kernels --only rms_norm/forward --processes 3 --repeats 8 --out track/processes.json",
    );
    let one = &read_json("track/processes.json")["benchmarks"][0];
    let samples = sorted(&one["samples"]);
    assert_eq!((&one["repetitions"], samples.len()), (&json!(3), 3));
    assert_eq!(one["value"], json!({ "low": samples[0], "median": samples[1], "high": samples[2] }));
}

#[test]
fn equal_records_pass_and_a_slower_one_ends_with_3() {
    let same = run(&compare("records/first.json"));
    assert_eq!(same.code, 0, "{}", same.stderr);
    let slow = compare_changed("slow.json", |record| {
        // Beyond whatever interval a busy machine gave.
        let one = &mut record["benchmarks"][1];
        for key in ["ratio", "value", "exchange_ratio"] {
            let spread = number(&one[key]["high"]) / number(&one[key]["low"]);
            scale(&mut one[key], 1.1 * spread);
        }
    });
    let found = run(&format!("{slow} --fail-above 3% --json"));
    assert_eq!(found.code, 3, "{}", found.stderr);
    let report = found.json();
    assert_eq!(report["worse"], 1);
    // The worst is first.
    agrees(&report["rows"][0], &json!({ "name": "kernels/rms_norm/backward", "verdict": "worse" }));
    assert_eq!(report["rows"][1]["verdict"], "same");
    shows(&run(&slow).stdout, &["WORSE", "1 of 2 are worse"]);
    let told = run(&format!("{slow} --fail-on instructions,quality"));
    assert_eq!(told.code, 0, "{}", told.stderr);
    shows(&told.stdout, &["WORSE", ", 0 to fail"]);
    succeeds(&format!("{slow} --fail-above 100000%"));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let newer = compare_changed("newer.json", |record| record["version"] = json!(3));
    fails(&newer, &["newer.json", "version is 3", "measure again"]);
    let other = compare_changed("other.json", |record| record["suites"] = json!(["ffn"]));
    fails(&other, &["kernels", "ffn", "--suite"]);
    let spoiled =
        compare_changed("spoiled.json", |record| record["benchmarks"][0]["value"]["low"] = json!(-1.0));
    fails(&spoiled, &["spoiled.json", "no interval"]);
    fails(&compare("none.json"), &["none.json"]);
    write("track/list.json", "[]");
    fails(&compare("list.json"), &["list.json", "not a record"]);
    fails("bench record --only 'no such thing'", &["no such thing", "--suite"]);
    let machine = compare_changed("machine.json", |record| record["machine"]["cpu"] = json!("another"));
    shows(&run(&machine).stderr, &["machines differ"]);
    is_wrong_usage(&format!("bench compare {}", record()));
    is_wrong_usage("bench record --repeats 7");
}

/// The record is refused before its values take memory: the command has 2 GB of address space.
#[cfg(target_os = "linux")]
#[test]
fn a_record_of_too_many_values_is_refused() {
    use crate::common::{check_failure, finish, in_memory};
    write("track/values.json", format!("[{}0]", "0,".repeat(8_000_000)));
    for line in [
        "bench compare track/values.json track/values.json --quiet",
        "bench history track/values.json --out track/values.html --quiet",
    ] {
        let parts = ["track/values.json: its 8000001 values take", "more than a quarter of"];
        check_failure(&finish(in_memory(2_000_000, line)), line, &parts);
    }
}

#[test]
fn other_tools_get_their_formats() {
    let formatted = |format: &str| {
        succeeds(&format!(
            "bench record --only decode/dense --suite decode --processes 1 --repeats 8 --format {format}"
        ))
    };
    let bmf: Value = serde_json::from_str(&formatted("bmf")).unwrap();
    let latency = &bmf["decode/dense_bf16/tokens"]["latency"];
    assert!(number(&latency["value"]) > 1000.0, "nanoseconds: {latency}");
    assert!(number(&latency["lower_value"]) <= number(&latency["upper_value"]));
    let gha: Value = serde_json::from_str(&formatted("gha")).unwrap();
    assert_eq!(gha[0]["name"], "decode/dense_bf16/tokens");
    assert!(number(&gha[0]["value"]) > 0.0 && gha[0]["unit"].is_string());
    let csv = formatted("csv");
    let fields: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(fields, [11, 11], "{csv}");
    shows(&formatted("md"), &["| decode/dense_bf16/tokens |"]);
}

#[test]
fn quality_is_the_same_bits_and_any_other_fails() {
    fs::create_dir_all(path("track")).unwrap();
    for file in ["quality.json", "quality-again.json"] {
        succeeds(&format!("bench record --suite quality --out track/{file}"));
    }
    let compare = "bench compare track/quality.json track/quality-again.json";
    succeeds(compare);
    let mut record = read_json("track/quality.json");
    assert_eq!(list(&record["benchmarks"]).len(), 3);
    scale(&mut record["benchmarks"][0]["value"], 0.999);
    write("track/quality-again.json", record.to_string());
    let found = run(compare);
    assert_eq!(found.code, 3);
    shows(&found.stdout, &["CHANGED"]);
    succeeds(&format!("{compare} --quality-tolerance 0.2%"));
}

#[test]
fn two_builds_take_turns() {
    let ran = run(&format!(
        "bench compare --run '{PROGRAM}' '{PROGRAM}' --rounds 8 --suite kernels --only rms_norm/forward \
         --fail-above 100000% --json"
    ));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!(list(&report["rows"]).len(), 1);
    assert!(number(&report["rows"][0]["interval"]["low"]) > 0.0);
    fails(&format!("bench compare --run '{PROGRAM}' no-such-build"), &["no-such-build"]);
}

#[test]
fn the_history_is_one_page() {
    let first = record();
    succeeds(&format!("bench history track/records {first} --out track/report.html"));
    let page = read("track/report.html");
    assert!(page.starts_with("<!doctype html>"), "{page}");
    shows(&page, &["kernels/rms_norm/forward"]);
    assert_eq!(page.matches("<circle").count(), 4);
    // A file of the folder that is no record is named and left out; one that is named itself is an error.
    write("track/mixed/other.json", "{}");
    write("track/mixed/one.json", read(first));
    let found = json_of("bench history track/mixed --out track/mixed.html");
    assert_eq!((&found["records"], list(&found["left_out"]).len()), (&1.into(), 1), "{found}");
    shows(&read("track/mixed.html"), &["track/mixed/other.json"]);
    fails("bench history track/mixed/other.json --out track/other.html", &["other.json"]);
    fails("bench history track/mixed --out track/mixed.html", &["track/mixed.html exists", "--force"]);
    succeeds("bench history track/mixed --out track/mixed.html --force");
    fails("bench history track/mixed --out track/mixed", &["track/mixed is a folder"]);
    fs::create_dir_all(path("track/none")).unwrap();
    write("track/none/a.json", "{}");
    fails(
        "bench history track/none --out track/none.html",
        &["none of the files is a record", "track/none/a.json"],
    );
    // Before anything is measured.
    fails(&format!("bench record --suite kernels --out {first}"), &[first, "exists", "--force"]);
    fs::create_dir_all(path("track/empty")).unwrap();
    fails("bench history track/empty --out track/empty.html", &["empty", "no .json"]);
}
