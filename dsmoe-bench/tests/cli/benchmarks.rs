//! `dsmoe eval --tasks`, and the conventions of perplexity.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::{
    agrees, end, fails, has, is_wrong_usage, json_of, list, number, path, read_json, run, shows, spawn,
    succeeds, wait_until, write,
};

const NAMES: [&str; 5] = ["Lulwick", "Sunin", "Ranen", "Ostberg", "Mirel"];

/// JSON lines.
fn lines(rows: impl IntoIterator<Item = Value>) -> String {
    rows.into_iter().map(|row| format!("{row}\n")).collect()
}

/// Makes a folder of small benchmarks.
fn benchmarks(dir: &str) {
    let who = |i: usize| NAMES[i % NAMES.len()];
    let piqa = |i: usize| {
        json!({ "goal": format!("How does {} reach the town", who(i)), "sol1": format!("by the river {i}"),
            "sol2": "on a silver fish", "label": i % 2 })
    };
    let hellaswag = |i: usize| {
        json!({ "activity_label": "Fishing", "ctx_a": format!("{} sits at the river.", who(i)), "ctx_b": "the fish",
            "endings": ["is silver.", "is a weaver.", "sings of the forest.", "was founded."], "label": "2" })
    };
    let gsm8k = |i: usize| {
        let question = format!("{} has {i} fish. How many?", who(i));
        json!({ "question": question, "answer": format!("It is {i}.\n#### {i}") })
    };
    for (file, rows) in [
        ("piqa/valid.jsonl", lines((0..12).map(piqa))),
        ("hellaswag/validation.jsonl", lines((0..5).map(hellaswag))),
        ("gsm8k/test.jsonl", lines((0..3).map(gsm8k))),
        ("gsm8k/train.jsonl", lines((3..9).map(gsm8k))),
        ("wikitext/test.jsonl", lines((0..2).map(|i| json!({ "page": page(i) })))),
    ] {
        write(&format!("{dir}/{file}"), rows);
    }
}

/// A text that WikiText's mending of punctuation leaves alone.
fn page(i: usize) -> String {
    let (town, weavers) = (NAMES[i], 7 * i);
    format!("The town {town} lies at the forest\nThe river runs through it and {weavers} weavers live there")
}

/// A report without what differs from run to run.
fn timeless(mut report: Value) -> Value {
    for key in ["date", "total_evaluation_time_seconds"] {
        assert!(report.as_object_mut().unwrap().remove(key).is_some(), "{key}");
    }
    report["dsmoe"]["files"] = Value::Null;
    for task in report["dsmoe"]["tasks"].as_object_mut().unwrap().values_mut() {
        task["seconds"] = Value::Null;
    }
    report
}

#[test]
fn benchmarks_report_in_the_harness_s_shape() {
    benchmarks("shape-data");
    let line = "eval moe --tasks piqa,hellaswag,gsm8k,piqa --task-data shape-data --max-new-tokens 16";
    let report = json_of(line);
    let results = &report["results"];
    agrees(&results["piqa"], &json!({ "alias": "piqa", "sample_len": 12 }));
    for key in ["acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none", "acc_bytes,none"] {
        number(&results["piqa"][key]);
    }
    for key in ["exact_match,strict-match", "exact_match_stderr,flexible-extract"] {
        number(&results["gsm8k"][key]);
    }
    let tasks: Vec<&String> = results.as_object().unwrap().keys().collect();
    assert_eq!(tasks, ["piqa", "hellaswag", "gsm8k"]);
    for key in ["configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"] {
        assert!(tasks.iter().all(|task| !report[key][task].is_null()), "{key}");
    }
    let told = json!({
        "n-shot": { "gsm8k": 5 }, "versions": { "piqa": 1.0 }, "higher_is_better": { "piqa": { "acc": true } },
        "n-samples": { "piqa": { "original": 12, "effective": 12 } },
        "config": { "model": "dsmoe", "limit": null }, "max_length": 128, "tokenizer_bos_token": ["<s>", "0"],
        "dsmoe": { "profile": "dsmoe", "bos": "auto" },
    });
    agrees(&report, &told);
    let extras = &report["dsmoe"];
    let ratio = number(&extras["active_ratio"]);
    assert!((0.0..=1.0).contains(&ratio) && list(&extras["active_ratio_per_layer"]).len() == 2);
    // Experts hold 2 x 6144 parameters in all.
    assert!(number(&extras["weight_bytes"]) > number(&extras["params_total"]));
    let left_out = number(&extras["params_total"]) - number(&extras["params_activated"]);
    assert!((left_out - (1.0 - ratio) * 12288.0).abs() < 1e-6, "{extras}");
    let tokens: f64 = tasks.iter().map(|task| number(&extras["tasks"][task]["tokens"])).sum();
    assert_eq!(number(&extras["tokens"]), tokens);

    let again = json_of(&format!("{line} --threads 1"));
    assert_eq!(timeless(again), timeless(report));
    let dense = json_of("eval dense --tasks piqa --task-data shape-data");
    agrees(&dense["dsmoe"], &json!({ "active_ratio": null, "threshold": null }));
    shows(&succeeds(line), &["acc_norm", "strict-match", "active share", "activated of"]);
}

#[test]
fn limits_files_profiles_and_all() {
    benchmarks("options-data");
    let report = json_of("eval dense --tasks piqa --task-data options-data --limit 4");
    let counts = |original: u32, effective: u32| json!({ "original": original, "effective": effective });
    assert_eq!(report["n-samples"]["piqa"], counts(12, 4));
    assert_eq!(report["config"]["limit"], 4);
    let named = json_of("eval dense --tasks piqa --task-file piqa=options-data/piqa/valid.jsonl --limit 4");
    assert_eq!(named["results"], report["results"]);
    fails(
        "eval dense --tasks gsm8k --task-data options-data --shots-file gsm8k=options-data/gsm8k/test.jsonl",
        &["3 rows to draw 5 examples from"],
    );
    let fewer = json_of(
        "eval dense --tasks gsm8k --task-data options-data --shots-file gsm8k=options-data/gsm8k/test.jsonl --shots 2 \
         --max-new-tokens 4",
    );
    assert_eq!(
        (&fewer["n-shot"]["gsm8k"], &fewer["configs"]["gsm8k"]["num_fewshot"]),
        (&json!(2), &json!(2))
    );
    fails(
        "eval dense --tasks wikitext --task-data options-data --shots 1",
        &["have no examples", "give no --shots"],
    );

    let line = "eval dense --tasks all --task-data options-data --json --max-new-tokens 16";
    let all = run(line);
    let report = all.json();
    let tasks: BTreeSet<&str> = report["results"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(tasks, BTreeSet::from(["gsm8k", "hellaswag", "piqa", "wikitext"]));
    shows(&all.stderr, &["winogrande: left out, there are no files of it"]);
    // The table names them as well, and --strict does not accept it.
    let left_out = list(&report["dsmoe"]["left_out"]);
    assert!(left_out.iter().any(|one| one["task"] == "winogrande"), "{left_out:?}");
    let strict = run("eval dense --tasks all --task-data options-data --limit 1 --max-new-tokens 4 --strict");
    assert_eq!(strict.code, 3, "{}", strict.stderr);
    shows(&strict.stdout, &["winogrande", "not scored: there are no files of it"]);
    let whole = run("eval dense --tasks piqa --task-data options-data --limit 1 --strict");
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    let old = run(&format!("{line} --profile lm-eval-0.3.0")).json();
    agrees(&old["dsmoe"], &json!({ "bos": "never", "profile": "lm-eval-0.3.0" }));
    number(&old["results"]["gsm8k"]["acc,none"]);

    // Documents longer than the model count in no metric and are reported.
    let row = |text: &str| json!({ "goal": "g", "sol1": text, "sol2": "b", "label": 0 });
    write("options-data/long.jsonl", lines([row("a"), row(&"word ".repeat(300)), row("c")]));
    let run = run("eval dense --tasks piqa --task-file piqa=options-data/long.jsonl --json");
    let report = run.json();
    assert_eq!(report["n-samples"]["piqa"], counts(3, 2));
    assert_eq!(report["dsmoe"]["tasks"]["piqa"]["unscored"][0]["doc_id"], 1);
    shows(&run.stderr, &["piqa: 1 of 3 documents could not be scored"]);
}

/// The files below `out/dense` whose name begins with `start`.
fn written(out: &str, start: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(path(out).join("dense")).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with(start));
    paths.sort();
    paths
}

#[test]
fn results_and_samples_are_written() {
    benchmarks("written-data");
    let report =
        json_of("eval dense --tasks piqa,gsm8k --task-data written-data --out written --max-new-tokens 16");
    let results = written("written", "results_");
    assert_eq!(results.len(), 1);
    assert_eq!(timeless(read_json(results[0].to_str().unwrap())), timeless(report.clone()));
    assert_eq!(list(&report["dsmoe"]["files"]).len(), 3);
    for (task, rows, metric, filter) in
        [("piqa", 12, "acc", "none"), ("gsm8k", 6, "exact_match", "strict-match")]
    {
        let samples = fs::read_to_string(&written("written", &format!("samples_{task}_"))[0]).unwrap();
        let samples: Vec<Value> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(samples.len(), rows, "{task}");
        for sample in &samples {
            has(sample, "doc_id doc target arguments resps filtered_resps filter doc_hash");
            assert!(sample.as_object().unwrap().values().all(|value| !value.is_null()), "{sample}");
        }
        let counted = samples.iter().filter(|sample| sample["filter"] == filter);
        let values: Vec<f64> = counted.map(|sample| number(&sample[metric])).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        assert_eq!(report["results"][task][format!("{metric},{filter}")], mean, "{task}");
    }
    assert_eq!(written("written", "").len(), 3, "answers are left behind");
}

#[test]
fn an_interrupted_run_goes_on_where_it_was() {
    let row = |i: usize| {
        let (name, goal) = (NAMES[i % NAMES.len()], "through the forest ".repeat(3 + i % 4));
        json!({ "goal": format!("{name} {goal}{i}"), "sol1": "by the river", "sol2": format!("on the fish of {name}"),
            "label": i % 2 })
    };
    write("long-data/piqa/valid.jsonl", lines((0..6000).map(row)));
    let plain = "eval dense --tasks piqa --task-data long-data";
    let whole = timeless(json_of(plain));
    let line = format!("{plain} --out interrupted-eval --quiet --threads 1");
    let journal = path("interrupted-eval/dense/answers_piqa.jsonl");
    for signal in ["-INT", "-KILL", "-TERM"] {
        let size = || fs::metadata(&journal).map_or(0, |m| m.len());
        let before = size();
        let child = spawn(&format!("{line} --json"));
        wait_until("answers", || size() >= before + 20_000);
        let run = end(child, signal);
        assert_eq!(run.code, if signal == "-KILL" { -1 } else { 130 }, "{signal}: {}", run.stderr);
        assert!(run.stdout.is_empty() && written("interrupted-eval", "results_").is_empty(), "{signal}");
    }
    // Another model may not continue with these answers, nor may the same at another precision.
    fails(
        &format!("{plain} --out interrupted-eval --dtype bf16"),
        &["answers_piqa.jsonl", "the responses of another model or of other settings"],
    );
    assert_eq!(timeless(json_of(&line)), whole);
    assert!(!journal.exists());
}

#[test]
fn bad_benchmarks_are_told_in_a_line() {
    benchmarks("bad-data");
    write("a-file", "");
    for (rest, parts) in [
        (
            "winogrande --task-data bad-data",
            &["task winogrande: no folder `winogrande` in ", "--task-file winogrande=FILE"][..],
        ),
        ("piqa --task-data nowhere", &["nowhere: no such folder; give --task-data a folder"]),
        ("all --task-data dense", &["--tasks all: no files of any benchmark; give --task-data"]),
        ("piqa --task-file piqa=gone.jsonl", &["gone.jsonl: there is no such file"]),
        (
            "social_iqa --task-data bad-data --profile lm-eval-0.3.0",
            &["task social_iqa: lm-eval-0.3.0 has no such task; leave it out, or use --profile dsmoe"],
        ),
        ("piqa --task-data bad-data --out a-file", &["a-file", "Not a directory"]),
    ] {
        fails(&format!("eval dense --tasks {rest}"), parts);
    }

    let good = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
    let second = |bad: &str| format!("{good}\n{bad}\n").into_bytes();
    let choices = r#"{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": [], "label": "0"}"#;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(format!("{good}\n").repeat(500).as_bytes()).unwrap();
    let packed = gzip.finish().unwrap();
    let parquet = "piqa/validation-00000-of-00001.parquet";
    let column = "no column `goal`, there is text";
    for (file, bytes, parts) in [
        (
            "piqa/valid.jsonl",
            second(r#"{"text": "g"}"#),
            [&format!("row 2: {column}") as &str, "give a file of piqa"],
        ),
        (
            "piqa/valid.jsonl",
            second(&good.replace('0', "2")),
            ["row 2: `label` is \"2\", not one of 0 to 1", "take the row from"],
        ),
        (
            "piqa/valid.jsonl",
            second(&good.replace("\"a\"", "\"\"")),
            ["row 2: `sol1` is empty", "remove the row"],
        ),
        ("piqa/valid.jsonl", second("{\"goal\": "), ["row 2: not a JSON object", "fetch the file again"]),
        (
            "hellaswag/val.jsonl",
            choices.into(),
            ["row 1: `endings` has 0 texts, at least 2 needed", "remove the row"],
        ),
        (
            "piqa/valid.jsonl.gz",
            packed[..packed.len() - 20].to_vec(),
            ["damaged or truncated gzip data", "fetch the file again"],
        ),
        (
            parquet,
            b"PAR1 not really PAR1".to_vec(),
            ["row 1: unreadable Parquet data", "fetch the file again"],
        ),
        (parquet, foreign_parquet(), [&format!("row 1: {column}"), "give a file of piqa"]),
    ] {
        let dir = format!("bad-{}", parts[0].replace(|c: char| !c.is_alphanumeric(), "-"));
        write(&format!("{dir}/{file}"), bytes);
        let task = file.split('/').next().unwrap();
        let place = format!("{dir}/{file}: row ");
        fails(
            &format!("eval dense --tasks {task} --task-data {dir}"),
            &[&[&place as &str], &parts[..]].concat(),
        );
    }
}

/// A Parquet file with one column of text.
fn foreign_parquet() -> Vec<u8> {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    let schema =
        parquet::schema::parser::parse_message_type("message m { required binary text (UTF8); }").unwrap();
    let mut bytes = Vec::new();
    let mut writer =
        SerializedFileWriter::new(&mut bytes, std::sync::Arc::new(schema), std::sync::Arc::default())
            .unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&[ByteArray::from("a text")], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn wrong_usage_of_eval_is_refused() {
    for rest in [
        "--task-data x",
        "--tasks piqa --data x",
        "--tasks piqa --seq 8",
        "--tasks piqa --perplexity window",
        "--tasks ''",
        "--tasks piqa --profile newest",
        "--tasks piqa --limit 0",
        "--tasks piqa --task-file piqa",
        "--data x --limit 5",
        "--data x --perplexity words",
    ] {
        is_wrong_usage(&format!("eval model {rest}"));
    }
}

#[test]
fn perplexities_follow_their_conventions() {
    let pages: Vec<String> = (0..5).map(page).collect();
    let rows: Vec<String> = pages.iter().map(|page| json!({ "text": page }).to_string()).collect();
    write("pages/rows.jsonl", rows.join("\n"));
    write("pages/blank.jsonl", rows.join("\n{\"text\": \"\"}\n"));
    write("pages/joined.txt", pages.join("\n\n"));
    write("pages/wikitext/test.jsonl", rows.join("\n").replace("\"text\"", "\"page\""));
    let of = |rest: &str| json_of(&format!("eval moe --data pages/{rest}"));

    // The windows of the joined rows are those of one text, without the last tokens.
    let window = of("rows.jsonl --perplexity window --seq 32")["window"].take();
    let windows = number(&window["windows"]);
    assert!(windows > 3.0 && number(&window["predicted"]) == 31.0 * windows, "{window}");
    let stream = of(&format!("joined.txt --seq 32 --limit-tokens {}", 32.0 * windows));
    assert_eq!(window["ppl"], stream["ppl"]);
    // Blank rows and the space around texts belong to the joined text.
    let blank = of("blank.jsonl --perplexity window --seq 32");
    assert_ne!(blank["window"]["ppl"], window["ppl"]);

    // By word and byte, as the harness's task does.
    let rolling = of("rows.jsonl --perplexity rolling --bos auto")["rolling"].take();
    let task = json_of("eval moe --tasks wikitext --task-data pages");
    for metric in ["word_perplexity", "byte_perplexity", "bits_per_byte"] {
        let theirs = number(&task["results"]["wikitext"][format!("{metric},none")]);
        let ours = number(&rolling[metric]);
        assert!((ours - theirs).abs() < 1e-12 * theirs, "{metric}: {ours}, {theirs}");
    }
    agrees(&rolling, &json!({ "documents": 5, "words": 5 * 17 }));
    assert_eq!(rolling["params_total"], task["dsmoe"]["params_total"]);

    let line = "rows.jsonl --perplexity stream,window,rolling --seq 32";
    let all = of(line);
    assert!(all["ppl"].is_f64() && all["window"]["ppl"] == window["ppl"], "{all}");
    let human = succeeds(&format!("eval moe --data pages/{line}"));
    shows(&human, &["perplexity  ", "window perplexity", "word perplexity", "bits per byte"]);
    fails(
        "eval moe --data pages/rows.jsonl --perplexity window --seq 5000",
        &["tokens are fewer than one window of 5000; give more text, or a smaller --seq"],
    );
    fails(
        "eval moe --data pages/rows.jsonl --perplexity rolling --limit-tokens 50",
        &["--stride, --limit-tokens, --against and --cache are for --perplexity stream; leave them out"],
    );
}
