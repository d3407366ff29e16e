//! Mixtures and `dsmoe data`, as a user runs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{Fixture, SEPARATOR, at, command, fails, fixture, json_of, run, succeeds, text_of};

/// A folder of three sources with a mixture file.
fn mixture(fixture: &Fixture, name: &str) -> (PathBuf, PathBuf) {
    let dir = fixture.out(name);
    fs::create_dir_all(dir.join("lines")).unwrap();
    fs::write(dir.join("one.txt"), text_of(11, 30_000)).unwrap();
    for part in ["a", "b"] {
        let text = text_of(u64::from(part.as_bytes()[0]), 12_000);
        let documents = text.split(SEPARATOR).map(str::trim).filter(|document| !document.is_empty());
        let lines = documents.map(|d| serde_json::json!({"question": d, "answer": "yes"}).to_string() + "\n");
        fs::write(dir.join(format!("lines/{part}.jsonl")), lines.collect::<String>()).unwrap();
    }
    fs::write(dir.join("two.md"), text_of(13, 15_000)).unwrap();
    let toml = format!(
        "[[source]]\nname = \"one\"\ndata = \"one.txt\"\nweight = 2\ndoc_separator = \"{0}\"\n\
         [[source]]\nname = \"lines\"\ndata = [\"lines\"]\ntext_column = \"question,answer\"\n\
         [[source]]\nname = \"two\"\ndata = \"two.md\"\nweight = 1\ndoc_separator = \"{0}\"\n",
        SEPARATOR.replace('\n', "\\n")
    );
    let file = dir.join("mixture.toml");
    fs::write(&file, toml).unwrap();
    (dir, file)
}

#[test]
fn a_mixture_trains_and_every_domain_is_reported() {
    let fixture = fixture();
    let (dir, file) = mixture(fixture, "mixture");
    let cache = dir.join("cache");
    let train = |out: &Path, more: &[&str]| {
        let common = ["train", at(&fixture.moe), "--mixture", at(&file), "--out", at(out), "--batch", "2"];
        let rest = [
            "--seq",
            "32",
            "--lr",
            "1e-3",
            "--active-target",
            "0.5",
            "--steps",
            "12",
            "--valid-fraction",
            "0.1",
        ];
        [&common[..], &rest, more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let json = |args: &[String]| json_of(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let (plain, cached, parts) = (dir.join("plain"), dir.join("cached"), dir.join("parts"));
    let report = json(&train(&plain, &[]));
    let domains = report["valid_domains"].as_array().unwrap();
    let names: Vec<_> = domains.iter().map(|domain| domain["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one", "lines", "two"]);
    let mean: f64 = domains.iter().map(|d| d["share"].as_f64().unwrap() * d["nll"].as_f64().unwrap()).sum();
    assert!((mean - report["valid_nll"].as_f64().unwrap()).abs() < 1e-9);
    assert!(report["sources"][1]["near_duplicates"]["train_pieces"].is_u64());
    // Tokens out of files, and a run in two parts: the same bits.
    json(&train(&cached, &["--cache", at(&cache)]));
    json(&train(&parts, &["--cache", at(&cache), "--stop-after", "5"]));
    json(&train(&parts, &["--resume"]));
    let weights = |out: &Path| fs::read(out.join("model.safetensors")).unwrap();
    assert!(weights(&plain) == weights(&cached) && weights(&plain) == weights(&parts));
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 3, "one cache for each source");

    let human = succeeds(&[
        "train",
        at(&fixture.moe),
        "--mixture",
        at(&file),
        "--steps",
        "1",
        "--seq",
        "16",
        "--near-duplicates",
        "keep",
        "--out",
        at(&dir.join("h")),
    ]);
    assert!(human.contains("perplexity") && human.contains("lines") && human.contains("25.0 %"), "{human}");

    let eval = json_of(&["eval", at(&plain), "--mixture", at(&file), "--seq", "64", "--cache", at(&cache)]);
    assert_eq!(eval["domains"].as_array().unwrap().len(), 3);
    let words = [format!("one={}:2", at(&dir.join("one.txt"))), format!("two={}", at(&dir.join("two.md")))];
    let eval_words = json_of(&[
        "eval",
        at(&plain),
        "--data",
        &words[0],
        &words[1],
        "--doc-separator",
        SEPARATOR,
        "--seq",
        "64",
    ]);
    assert_eq!(eval_words["domains"][0]["nll"], eval["domains"][0]["nll"]);
    let alone = json_of(&[
        "eval",
        at(&plain),
        "--data",
        at(&dir.join("one.txt")),
        "--doc-separator",
        SEPARATOR,
        "--seq",
        "64",
    ]);
    assert_eq!(alone["nll"], eval["domains"][0]["nll"]);
    assert!(alone.get("domains").is_none());
    let human = succeeds(&["eval", at(&plain), "--mixture", at(&file), "--seq", "64"]);
    assert!(human.contains("means by share") && human.contains("lines"), "{human}");
}

#[test]
fn prepare_stats_and_verify() {
    let fixture = fixture();
    let (dir, file) = mixture(fixture, "prepared");
    let cache = dir.join("cache");
    let prepare =
        ["data", "prepare", "--mixture", at(&file), "--model", at(&fixture.dense), "--cache", at(&cache)];
    let first = json_of(&prepare);
    assert_eq!(first["sources"][1]["files"], 2);
    assert!(first["sources"].as_array().unwrap().iter().all(|source| source["reused"] == false));
    let second = json_of(&prepare);
    for (one, two) in first["sources"].as_array().unwrap().iter().zip(second["sources"].as_array().unwrap()) {
        assert_eq!(
            (&two["reused"], &two["tokens"], &two["path"]),
            (&true.into(), &one["tokens"], &one["path"])
        );
    }
    let stats = json_of(&["data", "stats", "--mixture", at(&file), "--model", at(&fixture.dense)]);
    for (counted, made) in
        stats["sources"].as_array().unwrap().iter().zip(first["sources"].as_array().unwrap())
    {
        assert_eq!((&counted["tokens"], &counted["documents"]), (&made["tokens"], &made["documents"]));
        let rate = counted["text_bytes"].as_f64().unwrap() / counted["tokens"].as_f64().unwrap();
        assert!((rate - counted["bytes_per_token"].as_f64().unwrap()).abs() < 1e-9 && rate > 1.0);
    }
    assert_eq!(stats["sources"][0]["share"], 0.5);
    let sum: u64 = stats["sources"].as_array().unwrap().iter().map(|s| s["tokens"].as_u64().unwrap()).sum();
    assert_eq!(stats["total"]["tokens"], sum);
    assert!(json_of(&["data", "stats", "--data", at(&dir.join("one.txt"))])["total"]["tokens"].is_null());

    // A changed file makes another cache; a damaged cache is reported and made again.
    fs::write(dir.join("two.md"), "Another text, quite short.").unwrap();
    let third = json_of(&prepare);
    assert_eq!(
        (&third["sources"][0]["reused"], &third["sources"][2]["reused"]),
        (&true.into(), &false.into())
    );
    let path = PathBuf::from(third["sources"][0]["path"].as_str().unwrap());
    assert!(succeeds(&["data", "verify", at(&path)]).contains("whole"));
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[100] ^= 1;
    fs::write(&path, bad).unwrap();
    fails(&["data", "verify", at(&path)], &[".tokens", "does not match its hash", "made again"]);
    assert_eq!(json_of(&prepare)["sources"][0]["reused"], false);
    assert!(fs::read(&path).unwrap() == good);

    let folder = dir.join("lines");
    fails(&["data", "verify", at(&folder)], &["dsmoe-manifest.json", "no manifest", "--write"]);
    assert_eq!(json_of(&["data", "verify", "--write", at(&folder)])["checked"][0]["written"], 2);
    assert_eq!(json_of(&["data", "verify", at(&folder)])["checked"][0]["good"], 2);
    fs::write(folder.join("a.jsonl"), "{}").unwrap();
    let changed = run(&["data", "verify", at(&folder), "--json"]);
    let report: Value = serde_json::from_str(&changed.stdout).unwrap();
    assert_eq!(
        (changed.code, &report["holds"], &report["checked"][0]["changed"][0]),
        (3, &false.into(), &"a.jsonl".into())
    );

    let list = json_of(&["data", "list", "--folder", "d"]);
    let commands: Vec<_> =
        list["datasets"].as_array().unwrap().iter().map(|d| d["command"].as_str().unwrap()).collect();
    assert_eq!(commands.len(), 4);
    assert!(
        commands.iter().all(|c| c.starts_with("hf download ") && c.contains("--local-dir d/")),
        "{commands:?}"
    );
}

#[test]
fn a_killed_prepare_goes_on() {
    let fixture = fixture();
    let dir = fixture.out("killed-prepare");
    fs::create_dir_all(&dir).unwrap();
    let story = text_of(3, 200_000);
    fs::write(dir.join("text.txt"), story.repeat(150)).unwrap();
    let (calm, killed) = (dir.join("calm"), dir.join("killed"));
    let prepare = |cache: &Path| {
        let text = dir.join("text.txt");
        [
            "data",
            "prepare",
            "--data",
            at(&text),
            "--doc-separator",
            SEPARATOR,
            "--model",
            at(&fixture.dense),
            "--cache",
            at(cache),
            "--json",
            "--quiet",
        ]
        .map(str::to_owned)
    };
    let words = |args: &[String]| -> Value {
        serde_json::from_str(&succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>())).unwrap()
    };
    let whole = words(&prepare(&calm));
    let args = prepare(&killed);
    let mut child =
        command(&args.iter().map(String::as_str).collect::<Vec<_>>()).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let has_cursor = || {
        let entries = fs::read_dir(&killed).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.path().join("cursor.json").exists())
    };
    while !has_cursor() && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "no checkpoint appears");
        sleep(Duration::from_millis(1));
    }
    assert!(child.try_wait().unwrap().is_none(), "it was done before it could be killed");
    child.kill().unwrap();
    child.wait().unwrap();
    let rest = words(&args);
    assert!(rest["sources"][0]["resumed_tokens"].as_u64().unwrap() > 0, "{rest}");
    let file = |report: &Value| fs::read(report["sources"][0]["path"].as_str().unwrap()).unwrap();
    assert!(file(&whole) == file(&rest), "the caches differ");
}

#[test]
fn tokenizers_are_trained() {
    let fixture = fixture();
    let dir = fixture.out("trained-tokenizer");
    let (one, two) = (dir.join("one"), dir.join("two.json"));
    let train = |out: &Path, more: &[&str]| {
        let common = [
            "data",
            "tokenizer",
            "--data",
            at(&fixture.text),
            "--doc-separator",
            SEPARATOR,
            "--vocab",
            "400",
        ];
        [&common[..], &["--out", at(out)], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let as_words = |args: Vec<String>, then: &dyn Fn(&[&str])| {
        then(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    as_words(train(&one, &[]), &|args| assert_eq!(json_of(args)["vocab"], 400));
    as_words(train(&two, &[]), &|args| assert!(json_of(args)["documents"].as_u64().unwrap() > 10));
    assert_eq!(fs::read(one.join("tokenizer.json")).unwrap(), fs::read(&two).unwrap());
    assert!(one.join("tokenizer_config.json").exists() && !dir.join("tokenizer_config.json").exists());
    as_words(train(&two, &[]), &|args| fails(args, &["two.json exists", "--force"]));
    as_words(train(&two, &["--force"]), &|args| drop(succeeds(args)));
    let mut small = train(&dir.join("three"), &[]);
    small[7] = "100".into();
    as_words(small, &|args| fails(args, &["--vocab is 100", "at least 258"]));
    let broken = dir.join("broken.jsonl");
    fs::write(&broken, "{\"text\": \"a\"}\n{").unwrap();
    fails(
        &["data", "tokenizer", "--data", at(&broken), "--vocab", "300", "--out", at(&dir.join("four"))],
        &["broken.jsonl: line 2"],
    );
    assert!(!dir.join("four/tokenizer.json").exists());
}

#[test]
fn what_is_wrong_with_sources_is_said() {
    let fixture = fixture();
    let (dir, file) = mixture(fixture, "bad-mixture");
    let file_of = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let parquet = file_of("foreign.parquet", b"PAR1 no such thing PAR1");
    let cut = file_of("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\x56");
    let column = file_of("column.jsonl", b"\n{\"body\": \"b\"}\n");
    let short = file_of("short.txt", b"A few words.");
    let cache = dir.join("cache");
    for (path, parts) in [
        (&parquet, &["foreign.parquet: row 1: unreadable Parquet data", "fetch the file again"][..]),
        (&cut, &["cut.jsonl.gz", "truncated", "fetch"]),
        (&column, &["column.jsonl: line 2: no column \"text\"", "--text-column"]),
    ] {
        fails(&["data", "stats", "--data", at(path)], parts);
        fails(
            &["data", "prepare", "--data", at(path), "--model", at(&fixture.dense), "--cache", at(&cache)],
            parts,
        );
        let named = format!("one={}", at(path));
        let out = dir.join("out");
        fails(
            &[
                "train",
                at(&fixture.dense),
                "--data",
                &named,
                "--out",
                at(&out),
                "--steps",
                "1",
                "--seq",
                "16",
            ],
            parts,
        );
    }
    let text = at(&fixture.text);
    let out = dir.join("out");
    let train = |words: &[&str], parts: &[&str]| {
        let common =
            ["train", at(&fixture.dense), "--out", at(&out), "--steps", "1", "--seq", "16", "--data"];
        fails(&[&common[..], words].concat(), parts);
    };
    train(&["one=a.txt:x"], &["a.txt:x", "No such file"]);
    train(&[&format!("one={text}:0")], &["weight 0", "above 0"]);
    train(&[&format!("one={text}"), text], &["some sources have names", "NAME=PATH:WEIGHT"]);
    train(
        &[&format!("one={text}"), &format!("two={}", at(&short))],
        &["source two: ", "fewer than one window", "leave the source out"],
    );
    assert!(!out.exists());
    let toml = fs::read_to_string(&file).unwrap();
    fs::write(&file, toml.replace("weight = 2", "wait = 2")).unwrap();
    fails(
        &["data", "stats", "--mixture", at(&file)],
        &["mixture.toml: line 4: unknown field `wait`", "[[source]]"],
    );
    fails(&["data", "prepare", "--data", text, "--model", at(&fixture.dense)], &["--cache DIR"]);
    for args in [
        vec!["data"],
        vec!["data", "stats"],
        vec!["data", "stats", "--data", "x", "--mixture", "y"],
        vec!["data", "verify"],
    ] {
        assert_eq!(run(&args).code, 2, "{args:?}");
    }
}
