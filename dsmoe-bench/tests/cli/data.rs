//! Mixtures and `dsmoe data`, as a user runs them.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{
    SEPARATOR, agrees, fails, is_wrong_usage, json_of, list, number, path, read, run, shows, spawn, succeeds,
    text_of, texts, wait_until, weights, write,
};

/// Makes a folder of three sources with a mixture file.
fn mixture(dir: &str) {
    write(&format!("{dir}/one.txt"), text_of(11, 30_000));
    for part in ["a", "b"] {
        let text = text_of(u64::from(part.as_bytes()[0]), 12_000);
        let documents = text.split(SEPARATOR).map(str::trim).filter(|document| !document.is_empty());
        let lines = documents.map(|d| json!({"question": d, "answer": "yes"}).to_string() + "\n");
        write(&format!("{dir}/lines/{part}.jsonl"), lines.collect::<String>());
    }
    write(&format!("{dir}/two.md"), text_of(13, 15_000));
    let toml = format!(
        "[[source]]\nname = \"one\"\ndata = \"one.txt\"\nweight = 2\ndoc_separator = \"{SEPARATOR}\"\n\
         [[source]]\nname = \"lines\"\ndata = [\"lines\"]\ntext_column = \"question,answer\"\n\
         [[source]]\nname = \"two\"\ndata = \"two.md\"\nweight = 1\ndoc_separator = \"{SEPARATOR}\"\n"
    );
    write(&format!("{dir}/mixture.toml"), toml);
}

#[test]
fn a_mixture_trains_and_every_domain_is_reported() {
    mixture("mix");
    let train = |rest: &str| {
        json_of(&format!(
            "train moe --mixture mix/mixture.toml --batch 2 --seq 32 --lr 1e-3 --active-target 0.5 --steps 12 \
             --valid-fraction 0.1 --out mix/{rest}"
        ))
    };
    let report = train("plain");
    assert_eq!(texts(&report["valid_domains"], "name"), ["one", "lines", "two"]);
    let domains = list(&report["valid_domains"]).iter();
    let mean: f64 = domains.map(|domain| number(&domain["share"]) * number(&domain["nll"])).sum();
    assert!((mean - number(&report["valid_nll"])).abs() < 1e-9);
    assert!(report["sources"][1]["near_duplicates"]["train_pieces"].is_u64());
    // Tokens out of files, and a run in two parts: the same bits.
    train("cached --cache mix/cache");
    train("parts --cache mix/cache --stop-after 5");
    train("parts --resume");
    assert!(weights("mix/plain") == weights("mix/cached") && weights("mix/plain") == weights("mix/parts"));
    assert_eq!(fs::read_dir(path("mix/cache")).unwrap().count(), 3, "one cache for each source");

    let human = succeeds(
        "train moe --mixture mix/mixture.toml --steps 1 --seq 16 --near-duplicates keep --out mix/human",
    );
    shows(&human, &["perplexity", "lines", "25.0 %"]);

    let eval = |rest: &str| json_of(&format!("eval mix/plain --seq 64 {rest}"));
    let mixed = eval("--mixture mix/mixture.toml --cache mix/cache");
    assert_eq!(list(&mixed["domains"]).len(), 3);
    let words = format!("--data one=mix/one.txt:2 two=mix/two.md --doc-separator {SEPARATOR}");
    assert_eq!(eval(&words)["domains"][0]["nll"], mixed["domains"][0]["nll"]);
    let alone = eval(&format!("--data mix/one.txt --doc-separator {SEPARATOR}"));
    assert_eq!(alone["nll"], mixed["domains"][0]["nll"]);
    assert!(alone.get("domains").is_none());
    let human = succeeds("eval mix/plain --mixture mix/mixture.toml --seq 64");
    shows(&human, &["means by share", "lines"]);
}

#[test]
fn prepare_stats_and_verify() {
    mixture("prepared");
    let prepare = "data prepare --mixture prepared/mixture.toml --model dense --cache prepared/cache";
    let first = json_of(prepare);
    assert_eq!(first["sources"][1]["files"], 2);
    let second = json_of(prepare);
    let stats = json_of("data stats --mixture prepared/mixture.toml --model dense");
    let mut sum = 0.0;
    for (i, one) in list(&first["sources"]).iter().enumerate() {
        let reused = json!({ "reused": true, "tokens": one["tokens"], "path": one["path"] });
        assert_eq!(one["reused"], false);
        agrees(&second["sources"][i], &reused);
        let counted = &stats["sources"][i];
        agrees(counted, &json!({ "tokens": one["tokens"], "documents": one["documents"] }));
        let rate = number(&counted["text_bytes"]) / number(&counted["tokens"]);
        assert!((rate - number(&counted["bytes_per_token"])).abs() < 1e-9 && rate > 1.0);
        sum += number(&counted["tokens"]);
    }
    assert_eq!(stats["sources"][0]["share"], 0.5);
    assert_eq!(number(&stats["total"]["tokens"]), sum);
    assert!(json_of("data stats --data prepared/one.txt")["total"]["tokens"].is_null());

    // A changed file makes another cache; a damaged cache is reported and made again.
    write("prepared/two.md", "Another text, quite short.");
    let third = json_of(prepare);
    let reused = |i: usize| &third["sources"][i]["reused"];
    assert_eq!((reused(0), reused(2)), (&true.into(), &false.into()));
    let cache = third["sources"][0]["path"].as_str().unwrap();
    let verify = format!("data verify {cache}");
    shows(&succeeds(&verify), &["whole"]);
    let good = fs::read(path(cache)).unwrap();
    let mut bad = good.clone();
    bad[100] ^= 1;
    write(cache, bad);
    fails(&verify, &[".tokens", "does not match its hash", "made again"]);
    assert_eq!(json_of(prepare)["sources"][0]["reused"], false);
    assert!(fs::read(path(cache)).unwrap() == good);

    let verify = "data verify prepared/lines";
    fails(verify, &["dsmoe-manifest.json", "no manifest", "--write"]);
    assert_eq!(json_of(&format!("{verify} --write"))["checked"][0]["written"], 2);
    assert_eq!(json_of(verify)["checked"][0]["good"], 2);
    write("prepared/lines/a.jsonl", "{}");
    let changed = run(&format!("{verify} --json"));
    assert_eq!(changed.code, 3);
    let report = changed.json();
    assert_eq!((&report["holds"], &report["checked"][0]["changed"][0]), (&false.into(), &"a.jsonl".into()));

    let listing = json_of("data list --folder d");
    let commands = texts(&listing["datasets"], "command");
    assert_eq!(commands.len(), 4);
    for command in commands {
        assert!(command.starts_with("hf download ") && command.contains("--local-dir d/"), "{command}");
    }
}

#[test]
fn a_killed_prepare_goes_on() {
    write("killed-prepare/text.txt", text_of(3, 200_000).repeat(150));
    let prepare = |cache: &str| {
        format!(
            "data prepare --data killed-prepare/text.txt --doc-separator {SEPARATOR} --model dense --cache killed-prepare/{cache} --quiet"
        )
    };
    let whole = json_of(&prepare("calm"));
    let mut child = spawn(&prepare("cache"));
    let cache = path("killed-prepare/cache");
    let has_cursor = || {
        let entries = fs::read_dir(&cache).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.path().join("cursor.json").exists())
    };
    wait_until("a checkpoint", || has_cursor() || child.try_wait().unwrap().is_some());
    assert!(child.try_wait().unwrap().is_none(), "it was done before it could be killed");
    child.kill().unwrap();
    child.wait().unwrap();
    let rest = json_of(&prepare("cache"));
    assert!(number(&rest["sources"][0]["resumed_tokens"]) > 0.0, "{rest}");
    let file = |report: &Value| fs::read(path(report["sources"][0]["path"].as_str().unwrap())).unwrap();
    assert!(file(&whole) == file(&rest), "the caches differ");
}

#[test]
fn a_folder_that_is_named_often_is_looked_at_once() {
    for i in 0..5 {
        write(&format!("often/words/{i}.txt"), "A few words.");
    }
    let often = vec!["\"words\""; 100_000].join(",");
    write("often/mixture.toml", format!("[[source]]\nname = \"often\"\ndata = [{often}]\n"));
    let line = "train dense --mixture often/mixture.toml --steps 1 --seq 16 --out often/out --dry-run";
    let started = Instant::now();
    let plan = json_of(line);
    agrees(&plan, &json!({ "data_files": 500_000, "data_bytes": 6_000_000 }));
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    let source = |i: u32| format!("[[source]]\nname = \"s{i}\"\ndata = [{often}]\n");
    write("often/mixture.toml", (0..3).map(source).collect::<String>());
    fails(
        line,
        &["source s2: with it the text has more than 1048576 files; join small files into larger ones"],
    );
}

#[test]
fn tokenizers_are_trained() {
    let train = |vocab: u32, rest: &str| {
        format!(
            "data tokenizer --data text.txt --doc-separator {SEPARATOR} --vocab {vocab} --out trained/{rest}"
        )
    };
    assert_eq!(json_of(&train(400, "one"))["vocab"], 400);
    assert!(number(&json_of(&train(400, "two.json"))["documents"]) > 10.0);
    assert_eq!(read("trained/one/tokenizer.json"), read("trained/two.json"));
    assert!(
        path("trained/one/tokenizer_config.json").exists() && !path("trained/tokenizer_config.json").exists()
    );
    fails(&train(400, "two.json"), &["two.json exists", "--force"]);
    succeeds(&train(400, "two.json --force"));
    fails(&train(100, "three"), &["--vocab is 100", "at least 258"]);
    write("trained/broken.jsonl", "{\"text\": \"a\"}\n{");
    let broken = "data tokenizer --data trained/broken.jsonl --vocab 300 --out trained/four";
    fails(broken, &["broken.jsonl: line 2"]);
    // What is refused leaves no folder.
    assert!(!path("trained/three").exists() && !path("trained/four").exists());
}

#[test]
fn separators_are_typed_with_escapes() {
    write("escapes.txt", "one\n\ntwo\n\nthree\\nfour");
    let count =
        |rest: &str| json_of(&format!("data stats --data escapes.txt {rest}"))["total"]["documents"].clone();
    assert_eq!(count(""), 1);
    assert_eq!(count(r"--doc-separator '\n\n'"), 3);
    assert_eq!(count(r"--doc-separator '\\n'"), 2);
}

#[test]
fn what_is_wrong_with_sources_is_said() {
    mixture("bad");
    for (name, bytes, parts) in [
        (
            "foreign.parquet",
            &b"PAR1 no such thing PAR1"[..],
            &["foreign.parquet: row 1: unreadable Parquet data", "fetch the file again"][..],
        ),
        (
            "cut.jsonl.gz",
            b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\x56",
            &["cut.jsonl.gz", "truncated", "fetch"],
        ),
        (
            "column.jsonl",
            b"\n{\"body\": \"b\"}\n",
            &["column.jsonl: line 2: no column \"text\"", "--text-column"],
        ),
    ] {
        write(&format!("bad/{name}"), bytes);
        fails(&format!("data stats --data bad/{name}"), parts);
        fails(&format!("data prepare --data bad/{name} --model dense --cache bad/cache"), parts);
        fails(&format!("train dense --data one=bad/{name} --out bad/out --steps 1 --seq 16"), parts);
    }
    write("bad/short.txt", "A few words.");
    for (words, parts) in [
        ("one=a.txt:x", &["a.txt:x", "there is no such file or folder"][..]),
        ("one=text.txt:0", &["weight 0", "above 0"]),
        ("one=text.txt text.txt", &["some sources have names", "NAME=PATH:WEIGHT"]),
        (
            "one=text.txt two=bad/short.txt",
            &["source two: ", "fewer than one window", "leave the source out"],
        ),
    ] {
        fails(&format!("train dense --out bad/out --steps 1 --seq 16 --data {words}"), parts);
    }
    assert!(!path("bad/out").exists());
    write("bad/mixture.toml", read("bad/mixture.toml").replace("weight = 2", "wait = 2"));
    fails(
        "data stats --mixture bad/mixture.toml",
        &["mixture.toml: line 4: unknown field `wait`", "[[source]]"],
    );
    fails("data prepare --data text.txt --model dense", &["--cache DIR"]);
    for line in ["", "stats", "stats --data x --mixture y", "verify"] {
        is_wrong_usage(&format!("data {line}"));
    }
}
