//! `dsmoe bench`: the rows it prints, and the shapes it refuses.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::common::{agrees, fails, has, is_wrong_usage, number, on_text, run, shows, succeeds};

/// The keys of every row, whatever was measured.
const KEYS: &str =
    "work impl tokens hidden intermediate experts active dtype seconds dense_seconds peak_share";

fn rows(line: &str) -> Vec<Value> {
    let stdout = succeeds(&format!("bench {line} --json --repeats 1"));
    let rows: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for row in &rows {
        has(row, KEYS);
        assert!(number(&row["seconds"]) > 0.0, "{row}");
        if let Some(dense) = row["dense_seconds"].as_f64() {
            let ratio = number(&row["seconds"]) / dense;
            assert!((number(&row["ratio_to_dense"]) / ratio - 1.0).abs() < 1e-9, "{row}");
        }
        if let Some(share) = row["peak_share"].as_f64() {
            let part = |rate: &str, peak: &str| Some(row[rate].as_f64()? / row[peak].as_f64()?);
            let arithmetic = part("gflops", "peak_gflops").unwrap_or(0.0);
            let reading = part("gb_per_s", "peak_gb_per_s").unwrap_or(0.0);
            assert!((share / arithmetic.max(reading) - 1.0).abs() < 1e-9, "{row}");
        }
    }
    rows
}

fn texts<'a>(rows: &'a [Value], key: &str) -> Vec<&'a str> {
    rows.iter().map(|row| row[key].as_str().unwrap()).collect()
}

/// Decoding by a model: with experts beside a dense one, with thresholds beside its own weights.
#[test]
fn a_model_is_timed_beside_a_dense_one() {
    let calib = on_text().replacen("--data", "--calib", 1);
    succeeds(&format!(
        "prune dense --method thresholds --budget 80% {calib} --samples 8 --seq 32 --out bench-thresholds"
    ));
    for line in ["bench-thresholds", "moe --dense dense"] {
        let rows = rows(&format!("decode {line} --tokens 4 --prompt 8"));
        assert_eq!(texts(&rows, "impl"), ["dense", "model"]);
        assert_eq!(texts(&rows, "dtype"), ["bf16", "bf16"]);
        let [dense, model] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!((number(&dense["active_measured"]), number(&dense["work_share"])), (1.0, 1.0));
        let share = number(&model["active_measured"]);
        assert!((0.05..0.98).contains(&share), "{model}");
        assert!(number(&model["work_share"]) < 1.0 && number(&model["tokens_per_s"]) > 0.0, "{model}");
    }
}

#[test]
fn products_have_a_row_per_layout_and_precision() {
    let rows = rows("kernels --tokens 5 --hidden 48 --intermediate 40");
    let layouts = ["forward", "packed", "backward_input", "backward_weight"];
    assert_eq!(texts(&rows, "impl"), [layouts, layouts].concat());
    assert_eq!(texts(&rows, "dtype"), [["f32"; 4], ["bf16"; 4]].concat());
    let shape = json!({ "tokens": 5, "hidden": 48, "intermediate": 40 });
    for row in &rows {
        agrees(row, &shape);
        agrees(row, &json!({ "experts": null, "active": null, "dense_seconds": null }));
        let flops = number(&row["gflops"]) * 1e9 * number(&row["seconds"]);
        assert!((flops - (2 * 5 * 48 * 40) as f64).abs() < 1.0, "{row}");
    }
}

#[test]
fn experts_are_compared_with_the_dense_ffn() {
    for backward in ["", "--backward"] {
        let rows = rows(&format!(
            "ffn --hidden 32 --intermediate 64 --experts 4,8 --tokens 1,16 {backward} --active 0.25,1 --dtype f32"
        ));
        assert_eq!(rows.len(), 2 * (1 + 2 * 2), "{rows:?}");
        for group in rows.chunks(5) {
            assert_eq!(texts(group, "impl"), ["dense", "dsmoe", "dsmoe", "dsmoe", "dsmoe"]);
            for (row, experts) in group.iter().zip([1, 4, 4, 8, 8]) {
                assert_eq!((&row["experts"], &row["dense_seconds"]), (&experts.into(), &group[0]["seconds"]));
                assert_eq!(row["active"], row["active_measured"], "the share is exact: {row}");
            }
            for pair in group[1..].chunks(2) {
                let [quarter, whole] = [&pair[0], &pair[1]].map(|row| number(&row["seconds"]));
                assert_eq!(pair[0]["break_even"], pair[1]["break_even"], "{pair:?}");
                // So small a layer may take longer for a quarter of the work: then there is no line to follow.
                match pair[0]["break_even"].as_f64() {
                    Some(share) => assert!((0.0..=1.0).contains(&share), "{pair:?}"),
                    None => assert!(whole <= quarter, "{pair:?}"),
                }
            }
            assert!(group[0]["break_even"].is_null());
        }
    }
}

#[test]
fn routings_other_than_random_and_no_tokens_at_all_are_measured_too() {
    for (more, expected) in [
        ("--tokens 8 --routing one-expert", json!({ "active_measured": 0.25, "routing": "one-expert" })),
        ("--tokens 8 --routing none", json!({ "active_measured": 0.0 })),
        ("--tokens 0 --active 0.5", json!({ "tokens": 0, "peak_share": null, "tokens_per_s": null })),
    ] {
        let rows = rows(&format!("ffn --hidden 32 --intermediate 64 --experts 4 --dtype bf16 {more}"));
        assert_eq!(rows.len(), 2, "{rows:?}");
        agrees(&rows[1], &expected);
    }
}

/// Sizes of a tiny model.
const TINY: &str = "--hidden 32 --intermediate 64 --layers 2 --heads 4 --vocab 300";

#[test]
fn training_steps_have_a_dense_and_a_dsmoe_row() {
    let rows = rows(&format!("train {TINY} --seq 16 --batch 4 --active 0.5"));
    assert_eq!(texts(&rows, "impl")[..2], ["dense", "dsmoe"]);
    for pair in rows.chunks(2) {
        for (row, experts) in pair.iter().zip([1, 8]) {
            agrees(row, &json!({ "tokens": 64, "experts": experts, "dense_seconds": pair[0]["seconds"] }));
            let rate = number(&row["tokens_per_s"]) * number(&row["seconds"]);
            assert!((rate - 64.0).abs() < 1e-6, "{row}");
        }
        let active = number(&pair[1]["active_measured"]);
        assert!((active - 0.5).abs() < 0.1, "{active}");
        assert_ne!(pair[0]["bits"], pair[1]["bits"]);
    }
}

#[test]
fn estimators_of_the_gradient_have_rows_of_their_own() {
    let line = format!("train {TINY} --seq 16 --batch 4 --active 0.5 --dtype f32");
    let rows = rows(&format!("{line} --router-gradient every:2,sample:25%"));
    assert_eq!(texts(&rows, "impl"), ["dense", "dsmoe", "dsmoe", "dsmoe"]);
    assert!(rows[..2].iter().all(|row| row["router_gradient"].is_null()), "{rows:?}");
    assert_eq!(texts(&rows[2..], "router_gradient"), ["every:2", "sample:0.25"]);
    let work: Vec<f64> = rows.iter().map(|row| number(&row["work_share"])).collect();
    assert!(work.is_sorted_by(|a, b| a > b), "{work:?}");
    assert_ne!(rows[1]["bits"], rows[3]["bits"]);
    fails(&format!("bench {line} --router-gradient every:65"), &["is every:65", "at most every:64"]);
    let wrong = is_wrong_usage(&format!("bench {line} --router-gradient full,sample:0"));
    shows(&wrong, &["router_gradient is sample:0; use full, every:K", "P above 0 and up to 1"]);
}

#[test]
fn decoding_has_a_dense_and_a_dsmoe_row() {
    let decode = |more: &str| rows(&format!("decode {TINY} --prompt 4 {more}"));
    let rows = decode("--tokens 40 --active 0.25 --dtype f32,bf16");
    assert_eq!(texts(&rows, "impl"), ["dense", "dsmoe", "dense", "dsmoe"]);
    assert_eq!(texts(&rows, "dtype"), ["f32", "f32", "bf16", "bf16"]);
    for row in &rows {
        agrees(row, &json!({ "tokens": 40, "layers": 2 }));
        assert!(number(&row["tokens_per_s"]) > 0.0 && row["peak_share"].is_f64(), "{row}");
    }
    let all = decode("--tokens 3 --active 1");
    agrees(&all[1], &json!({ "active_measured": 1.0, "dtype": "bf16" }));
}

#[test]
fn results_have_the_same_bits_on_one_thread_and_on_two() {
    for work in [
        "kernels --tokens 70 --hidden 300 --intermediate 130",
        "ffn --tokens 70 --hidden 96 --intermediate 320 --experts 5 --active 0.4",
        "ffn --backward --tokens 40 --hidden 96 --intermediate 320 --experts 5",
        &format!("train --seq 20 --batch 3 {TINY}"),
        &format!("decode --prompt 9 --tokens 2 --dtype f32,bf16 {TINY}"),
    ] {
        let [one, two] = [1, 2].map(|threads| {
            let rows = rows(&format!("{work} --threads {threads}"));
            assert!(rows.iter().all(|row| row["threads"] == threads), "{work}");
            texts(&rows, "bits").into_iter().map(str::to_owned).collect::<Vec<_>>()
        });
        assert_eq!(one, two, "{work}");
        assert!(one.iter().collect::<BTreeSet<_>>().len() > 1, "{one:?}");
    }
}

#[test]
fn people_get_a_table_with_the_break_even() {
    let table = succeeds(
        "bench ffn --tokens 4 --hidden 32 --intermediate 64 --experts 4 --active 0.25,1 --repeats 1 --quiet --dtype f32",
    );
    assert!(table.starts_with("work"), "{table}");
    let parts = ["of dense", "of peak", "ffn dense", "25.0 %", "ffn of 4 tokens, 32 to 64, 4 experts, f32: "];
    shows(&table, &parts);
}

#[test]
fn shapes_that_cannot_be_are_refused_in_one_line() {
    for (line, parts) in [
        ("ffn --experts 7", &["--experts 7", "--intermediate 8192", "divisor"][..]),
        ("ffn --experts 0", &["--experts 0", "divisor"]),
        ("ffn --hidden 0", &["--hidden 0", "at least 1"]),
        ("ffn --tokens 99999999999", &["--tokens 99999999999", "smaller"]),
        ("ffn --tokens 16777216 --experts 1024", &["more pairs", "fewer"]),
        ("kernels --tokens 16777216 --hidden 1048576", &["memory", "smaller"]),
        ("kernels --intermediate 0", &["--intermediate 0", "at least 1"]),
        ("train --hidden 100 --heads 8", &["--hidden 100", "--heads 8", "multiple of 16"]),
        ("train --experts 7", &["--experts 7", "divisor"]),
        ("train --seq 0", &["--seq 0", "at least 1"]),
        ("train --layers 99999999", &["--layers 99999999", "smaller"]),
        ("decode --kv-heads 3", &["--kv-heads 3", "divisor"]),
        ("decode --tokens 0", &["--tokens 0", "at least 1"]),
        ("decode --layers 4000", &["memory", "smaller"]),
        // The weights are small, and not the keys and values.
        (
            "decode --hidden 64 --intermediate 64 --layers 2000 --heads 4 --vocab 64 --prompt 8000000 --tokens 8000000",
            &["memory", "smaller"],
        ),
        ("decode --prompt 16777216 --tokens 16777216", &["33554433 positions", "fewer"]),
    ] {
        fails(&format!("bench {line}"), parts);
    }
    for line in ["ffn --active 1.5", "decode --active -0.1", "ffn --core 40"] {
        shows(&is_wrong_usage(&format!("bench {line}")), &["is not a share from 0 to 1; write 0.4 or 40%"]);
    }
    for (line, parts) in [
        ("decode dense", &["config.json", "has no thresholds", "--dense"][..]),
        ("decode moe --dense dense --tokens 100000", &["positions", "fewer"]),
        ("decode nowhere --dense dense", &["nowhere"]),
    ] {
        fails(&format!("bench {line}"), parts);
    }
    let both = run("bench decode moe --dense dense --layers 2");
    assert!(both.code == 2 && both.stderr.contains("--layers"), "{}", both.stderr);
    let refused = run("bench ffn --active NaN");
    assert!(refused.code == 2 && refused.stderr.contains("`NaN` is not a share"), "{}", refused.stderr);
}
