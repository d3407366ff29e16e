//! `dsmoe eval --tasks`, and the conventions of perplexity.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{at, command, fails, finish, fixture, json_of, run, succeeds};

const NAMES: [&str; 5] = ["Lulwick", "Sunin", "Ranen", "Ostberg", "Mirel"];

/// A folder of small benchmarks under the fixture's.
fn benchmarks(name: &str) -> PathBuf {
    let dir = fixture().out(name);
    let file = |path: &str, rows: &mut dyn Iterator<Item = Value>| {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, rows.map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    };
    let who = |i: usize| NAMES[i % NAMES.len()];
    let piqa = |i: usize| {
        json!({ "goal": format!("How does {} reach the town", who(i)), "sol1": format!("by the river {i}"),
            "sol2": "on a silver fish", "label": i % 2 })
    };
    file("piqa/valid.jsonl", &mut (0..12).map(piqa));
    let hellaswag = |i: usize| {
        json!({ "activity_label": "Fishing", "ctx_a": format!("{} sits at the river.", who(i)), "ctx_b": "the fish",
            "endings": ["is silver.", "is a weaver.", "sings of the forest.", "was founded."], "label": "2" })
    };
    file("hellaswag/validation.jsonl", &mut (0..5).map(hellaswag));
    let gsm8k = |i: usize| json!({ "question": format!("{} has {i} fish. How many?", who(i)), "answer": format!("It is {i}.\n#### {i}") });
    file("gsm8k/test.jsonl", &mut (0..3).map(gsm8k));
    file("gsm8k/train.jsonl", &mut (3..9).map(gsm8k));
    file("wikitext/test.jsonl", &mut (0..2).map(|i| json!({ "page": page(i) })));
    dir
}

/// A text that WikiText's mending of punctuation leaves alone.
fn page(i: usize) -> String {
    format!(
        "The town {} lies at the forest\nThe river runs through it and {} weavers live there",
        NAMES[i],
        7 * i
    )
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
    let data = benchmarks("shape-data");
    let model = at(&fixture().moe);
    let args = [
        "eval",
        model,
        "--tasks",
        "piqa,hellaswag,gsm8k,piqa",
        "--task-data",
        at(&data),
        "--max-new-tokens",
        "16",
    ];
    let report = json_of(&args);
    let piqa = &report["results"]["piqa"];
    assert_eq!((&piqa["alias"], &piqa["sample_len"]), (&json!("piqa"), &json!(12)));
    for key in ["acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none", "acc_bytes,none"] {
        assert!(piqa[key].is_f64(), "{key} in {piqa}");
    }
    for key in ["exact_match,strict-match", "exact_match_stderr,flexible-extract"] {
        assert!(report["results"]["gsm8k"][key].is_f64(), "{key} in {report}");
    }
    let tasks: Vec<&String> = report["results"].as_object().unwrap().keys().collect();
    assert_eq!(tasks, ["piqa", "hellaswag", "gsm8k"]);
    for key in ["configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"] {
        assert!(tasks.iter().all(|task| !report[key][task].is_null()), "{key}");
    }
    assert_eq!((&report["n-shot"]["gsm8k"], &report["versions"]["piqa"]), (&json!(5), &json!(1.0)));
    assert_eq!(report["n-samples"]["piqa"], json!({ "original": 12, "effective": 12 }));
    assert_eq!(report["higher_is_better"]["piqa"]["acc"], true);
    assert_eq!((&report["config"]["model"], &report["config"]["limit"]), (&json!("dsmoe"), &Value::Null));
    assert_eq!((&report["max_length"], &report["tokenizer_bos_token"]), (&json!(128), &json!(["<s>", "0"])));
    let extras = &report["dsmoe"];
    assert_eq!((&extras["profile"], &extras["bos"]), (&json!("dsmoe"), &json!("auto")));
    let ratio = extras["active_ratio"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&ratio) && extras["active_ratio_per_layer"].as_array().unwrap().len() == 2);
    // Experts hold 2 x 6144 parameters in all.
    let left_out = extras["params_total"].as_f64().unwrap() - extras["params_activated"].as_f64().unwrap();
    assert!((left_out - (1.0 - ratio) * 12288.0).abs() < 1e-6, "{extras}");
    let tokens: u64 = tasks.iter().map(|task| extras["tasks"][task]["tokens"].as_u64().unwrap()).sum();
    assert_eq!(extras["tokens"], tokens);

    let again = json_of(&[&args[..], &["--threads", "1"]].concat());
    assert_eq!(timeless(again), timeless(report));
    let dense = json_of(&["eval", at(&fixture().dense), "--tasks", "piqa", "--task-data", at(&data)]);
    assert_eq!((&dense["dsmoe"]["active_ratio"], &dense["dsmoe"]["threshold"]), (&Value::Null, &Value::Null));
    let human = succeeds(&args);
    for part in ["acc_norm", "strict-match", "active share", "activated of"] {
        assert!(human.contains(part), "{human}");
    }
}

#[test]
fn limits_files_profiles_and_all() {
    let data = benchmarks("options-data");
    let model = at(&fixture().dense);
    let of = |more: &[&str]| json_of(&[&["eval", model, "--tasks"][..], more].concat());
    let report = of(&["piqa", "--task-data", at(&data), "--limit", "4"]);
    assert_eq!(report["n-samples"]["piqa"], json!({ "original": 12, "effective": 4 }));
    assert_eq!(report["config"]["limit"], 4);
    let file = format!("piqa={}", at(&data.join("piqa/valid.jsonl")));
    let named = of(&["piqa", "--task-file", &file, "--limit", "4"]);
    assert_eq!(named["results"], report["results"]);
    let shots = format!("gsm8k={}", at(&data.join("gsm8k/test.jsonl")));
    let args = ["gsm8k", "--task-data", at(&data), "--shots-file", &shots];
    let few = run(&[&["eval", model, "--tasks"][..], &args].concat());
    assert!(few.code == 1 && few.stderr.contains("3 rows to draw 5 examples from"), "{}", few.stderr);

    let args =
        ["eval", model, "--tasks", "all", "--task-data", at(&data), "--json", "--max-new-tokens", "16"];
    let all = run(&args);
    let report: Value = serde_json::from_str(&all.stdout).unwrap();
    let tasks: BTreeSet<&str> = report["results"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(tasks, BTreeSet::from(["gsm8k", "hellaswag", "piqa", "wikitext"]));
    assert!(all.stderr.contains("winogrande: left out, there are no files of it"), "{}", all.stderr);
    let old = finish(command(&[&args[..], &["--profile", "lm-eval-0.3.0"]].concat()));
    let old: Value = serde_json::from_str(&old.stdout).unwrap();
    assert_eq!((&old["dsmoe"]["bos"], &old["dsmoe"]["profile"]), (&json!("never"), &json!("lm-eval-0.3.0")));
    assert!(old["results"]["gsm8k"]["acc,none"].is_f64(), "{old}");

    // Documents longer than the model count in no metric and are reported.
    let long = data.join("long/valid.jsonl");
    fs::create_dir_all(long.parent().unwrap()).unwrap();
    let row = |text: &str| format!("{}\n", json!({ "goal": "g", "sol1": text, "sol2": "b", "label": 0 }));
    fs::write(&long, row("a") + &row(&"word ".repeat(300)) + &row("c")).unwrap();
    let file = format!("piqa={}", at(&long));
    let run = run(&["eval", model, "--tasks", "piqa", "--task-file", &file, "--json"]);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(report["n-samples"]["piqa"], json!({ "original": 3, "effective": 2 }));
    assert_eq!(report["dsmoe"]["tasks"]["piqa"]["unscored"][0]["doc_id"], 1);
    assert!(run.stderr.contains("piqa: 1 of 3 documents could not be scored"), "{}", run.stderr);
}

/// The files below `out/dense` whose name begins with `start`.
fn written(out: &Path, start: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(out.join("dense")).map(|entries| entries.map(|entry| entry.unwrap().path()));
    let mut paths: Vec<PathBuf> = entries.into_iter().flatten().collect();
    paths.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with(start));
    paths.sort();
    paths
}

#[test]
fn results_and_samples_are_written() {
    let data = benchmarks("written-data");
    let out = fixture().out("written");
    let args =
        ["eval", at(&fixture().dense), "--tasks", "piqa,gsm8k", "--task-data", at(&data), "--out", at(&out)];
    let report = json_of(&[&args[..], &["--max-new-tokens", "16"]].concat());
    let results = written(&out, "results_");
    assert_eq!(results.len(), 1);
    let file: Value = serde_json::from_slice(&fs::read(&results[0]).unwrap()).unwrap();
    assert_eq!(timeless(file), timeless(report.clone()));
    assert_eq!(report["dsmoe"]["files"].as_array().unwrap().len(), 3);
    for (task, rows) in [("piqa", 12), ("gsm8k", 6)] {
        let samples = fs::read_to_string(&written(&out, &format!("samples_{task}_"))[0]).unwrap();
        let samples: Vec<Value> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(samples.len(), rows, "{task}");
        for key in ["doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "doc_hash"] {
            assert!(samples.iter().all(|sample| !sample[key].is_null()), "{task} {key}");
        }
        let metric = if task == "piqa" { "acc" } else { "exact_match" };
        let mean = |filter: &str| {
            let of: Vec<f64> = samples
                .iter()
                .filter(|sample| sample["filter"] == filter)
                .map(|sample| sample[metric].as_f64().unwrap())
                .collect();
            of.iter().sum::<f64>() / of.len() as f64
        };
        let filter = if task == "piqa" { "none" } else { "strict-match" };
        assert_eq!(report["results"][task][format!("{metric},{filter}")], mean(filter), "{task}");
    }
    assert_eq!(written(&out, "").len(), 3, "answers are left behind");
}

#[test]
fn an_interrupted_run_goes_on_where_it_was() {
    let fixture = fixture();
    let data = fixture.out("long-data");
    fs::create_dir_all(data.join("piqa")).unwrap();
    let rows: String = (0..6000)
        .map(|i| {
            let (name, goal) = (NAMES[i % NAMES.len()], "through the forest ".repeat(3 + i % 4));
            format!(
                "{}\n",
                json!({ "goal": format!("{name} {goal}{i}"), "sol1": "by the river",
                "sol2": format!("on the fish of {name}"), "label": i % 2 })
            )
        })
        .collect();
    fs::write(data.join("piqa/valid.jsonl"), rows).unwrap();
    let out = fixture.out("interrupted-eval");
    let plain = ["eval", at(&fixture.dense), "--tasks", "piqa", "--task-data", at(&data)];
    let whole = timeless(json_of(&plain));
    let args = [&plain[..], &["--out", at(&out), "--json", "--quiet", "--threads", "1"]].concat();
    let journal = out.join("dense/answers_piqa.jsonl");
    for signal in ["-INT", "-KILL", "-TERM"] {
        let before = fs::metadata(&journal).map_or(0, |m| m.len());
        let child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while fs::metadata(&journal).map_or(0, |m| m.len()) < before + 20_000 {
            assert!(Instant::now() < deadline, "no answers come");
            sleep(Duration::from_millis(1));
        }
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        if signal != "-KILL" {
            assert_eq!(
                output.status.code(),
                Some(130),
                "{signal}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        assert!(output.stdout.is_empty() && written(&out, "results_").is_empty(), "{signal}");
    }
    // Another model may not continue with these answers, nor may the same at another precision.
    let other = [&plain[..], &["--out", at(&out), "--dtype", "bf16"]].concat();
    fails(&other, &[at(&journal), "the responses of another model or of other settings"]);
    let resumed = timeless(serde_json::from_str(&succeeds(&args)).unwrap());
    assert_eq!(resumed, whole);
    assert!(!journal.exists());
}

#[test]
fn bad_benchmarks_are_told_in_a_line() {
    let fixture = fixture();
    let model = at(&fixture.dense);
    let good = benchmarks("bad-data");
    let data = |name: &str, path: &str, content: &[u8]| {
        let dir = fixture.out(name);
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        (dir, path)
    };
    let eval = |tasks: &str, dir: &Path, parts: &[&str]| {
        fails(&["eval", model, "--tasks", tasks, "--task-data", at(dir)], parts);
    };
    eval("pika", &good, &["task pika: unknown; use hellaswag, lambada_openai"]);
    eval(
        "winogrande",
        &good,
        &["task winogrande: no folder `winogrande` in ", "--task-file winogrande=FILE"],
    );
    eval("piqa", Path::new("nowhere"), &["nowhere: no such folder; give --task-data a folder"]);
    eval("all", &fixture.dense, &["--tasks all: no files of any benchmark; give --task-data"]);
    fails(
        &["eval", model, "--tasks", "piqa"],
        &["task piqa: no files; give --task-data FOLDER or --task-file"],
    );
    let missing = ["eval", model, "--tasks", "piqa", "--task-file", "piqa=gone.jsonl"];
    fails(&missing, &["gone.jsonl: No such file"]);

    let row = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
    for (name, bad, parts) in [
        ("columns", r#"{"text": "g"}"#, ["row 2: no column `goal`, there is text", "give a file of piqa"]),
        (
            "label",
            &row.replace('0', "2"),
            ["row 2: `label` is \"2\", not one of 0 to 1", "take the row from"],
        ),
        ("empty", &row.replace("\"a\"", "\"\""), ["row 2: `sol1` is empty", "remove the row"]),
        ("syntax", "{\"goal\": ", ["row 2: not a JSON object", "fetch the file again"]),
    ] {
        let (dir, path) = data(name, "piqa/valid.jsonl", format!("{row}\n{bad}\n").as_bytes());
        eval("piqa", &dir, &[&[at(&path)], &parts[..]].concat());
    }
    let choices = r#"{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": [], "label": "0"}"#;
    let (dir, path) = data("choices", "hellaswag/val.jsonl", choices.as_bytes());
    eval(
        "hellaswag",
        &dir,
        &[at(&path), "row 1: `endings` has 0 texts, at least 2 needed", "remove the row"],
    );
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(format!("{row}\n").repeat(500).as_bytes()).unwrap();
    let packed = gzip.finish().unwrap();
    let (dir, path) = data("gzip", "piqa/valid.jsonl.gz", &packed[..packed.len() - 20]);
    eval("piqa", &dir, &[at(&path), ": row ", "damaged or truncated gzip data", "fetch the file again"]);
    let (dir, path) = data("parquet", "piqa/validation-00000-of-00001.parquet", b"PAR1 not really PAR1");
    eval("piqa", &dir, &[at(&path), "row 1: unreadable Parquet data", "fetch the file again"]);
    let (dir, path) = data("foreign", "piqa/validation-00000-of-00001.parquet", &foreign_parquet());
    eval("piqa", &dir, &[at(&path), "row 1: no column `goal`, there is text", "give a file of piqa"]);

    let profile =
        ["eval", model, "--tasks", "social_iqa", "--task-data", at(&good), "--profile", "lm-eval-0.3.0"];
    fails(
        &profile,
        &["task social_iqa: lm-eval-0.3.0 has no such task; leave it out, or use --profile dsmoe"],
    );
    let file = fixture.out("a-file");
    fs::write(&file, "").unwrap();
    let blocked = ["eval", model, "--tasks", "piqa", "--task-data", at(&good), "--out", at(&file)];
    fails(&blocked, &[at(&file), "Not a directory"]);
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
    for args in [
        &["--task-data", "x"][..],
        &["--tasks", "piqa", "--data", "x"],
        &["--tasks", "piqa", "--seq", "8"],
        &["--tasks", "piqa", "--perplexity", "window"],
        &["--tasks", ""],
        &["--tasks", "piqa", "--profile", "newest"],
        &["--tasks", "piqa", "--limit", "0"],
        &["--tasks", "piqa", "--task-file", "piqa"],
        &["--data", "x", "--limit", "5"],
        &["--data", "x", "--perplexity", "words"],
    ] {
        let run = run(&[&["eval", "model"][..], args].concat());
        assert_eq!((run.code, run.stdout.as_str()), (2, ""), "{args:?}: {}", run.stderr);
    }
}

#[test]
fn perplexities_follow_their_conventions() {
    let fixture = fixture();
    let model = at(&fixture.moe);
    let pages: Vec<String> = (0..5).map(page).collect();
    let (rows, joined) = (fixture.out("rows.jsonl"), fixture.out("joined.txt"));
    let lines: Vec<String> = pages.iter().map(|page| json!({ "text": page }).to_string()).collect();
    fs::write(&rows, lines.join("\n")).unwrap();
    fs::write(&joined, pages.join("\n\n")).unwrap();
    let of = |data: &Path, more: &[&str]| json_of(&[&["eval", model, "--data", at(data)][..], more].concat());

    // The windows of the joined rows are those of one text, without the last tokens.
    let window = of(&rows, &["--perplexity", "window", "--seq", "32"])["window"].clone();
    let windows = window["windows"].as_u64().unwrap();
    assert!(windows > 3 && window["predicted"] == 31 * windows, "{window}");
    let limit = (32 * windows).to_string();
    let stream = of(&joined, &["--seq", "32", "--limit-tokens", &limit]);
    assert_eq!(window["ppl"], stream["ppl"]);
    // Blank rows and the space around texts belong to the joined text.
    let blank = fixture.out("blank.jsonl");
    fs::write(&blank, lines.join("\n{\"text\": \"\"}\n")).unwrap();
    let more = of(&blank, &["--perplexity", "window", "--seq", "32"]);
    assert_ne!(more["window"]["ppl"], window["ppl"]);

    // By word and byte, as the harness's task does.
    let rolling = of(&rows, &["--perplexity", "rolling", "--bos", "auto"])["rolling"].clone();
    let folder = fixture.out("pages");
    fs::create_dir_all(folder.join("wikitext")).unwrap();
    fs::write(folder.join("wikitext/test.jsonl"), lines.join("\n").replace("\"text\"", "\"page\"")).unwrap();
    let task = json_of(&["eval", model, "--tasks", "wikitext", "--task-data", at(&folder)]);
    for metric in ["word_perplexity", "byte_perplexity", "bits_per_byte"] {
        let (ours, theirs) = (rolling[metric].as_f64().unwrap(), &task["results"]["wikitext"]);
        let theirs = theirs[format!("{metric},none")].as_f64().unwrap();
        assert!((ours - theirs).abs() < 1e-12 * theirs, "{metric}: {ours}, {theirs}");
    }
    assert_eq!((&rolling["documents"], &rolling["words"]), (&json!(5), &json!(5 * 17)));

    let all = of(&rows, &["--perplexity", "stream,window,rolling", "--seq", "32"]);
    assert!(all["ppl"].is_f64() && all["window"]["ppl"] == window["ppl"], "{all}");
    let human = succeeds(&[
        "eval",
        model,
        "--data",
        at(&rows),
        "--perplexity",
        "stream,window,rolling",
        "--seq",
        "32",
    ]);
    for part in ["perplexity  ", "window perplexity", "word perplexity", "bits per byte"] {
        assert!(human.contains(part), "{human}");
    }
    let long = ["eval", model, "--data", at(&rows), "--perplexity", "window", "--seq", "5000"];
    fails(&long, &["tokens are fewer than one window of 5000; give more text, or a smaller --seq"]);
    let limit = ["eval", model, "--data", at(&rows), "--perplexity", "rolling", "--limit-tokens", "50"];
    fails(&limit, &["--stride, --limit-tokens and --cache are for --perplexity stream; leave them out"]);
}
