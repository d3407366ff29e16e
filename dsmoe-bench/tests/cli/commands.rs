//! Every command, as a user runs it, on a tiny model.

use std::fs;
use std::process::Stdio;

use crate::common::{SEPARATOR, at, check_failure, command, finish, fixture, json_of, run, succeeds};
use serde_json::Value;

fn has(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value.get(key).is_some(), "no {key} in {value}");
    }
}

#[test]
fn help_and_usage() {
    assert!(succeeds(&["--version"]).starts_with("dsmoe "));
    for args in [
        vec![],
        vec!["fly"],
        vec!["convert", "model"],
        vec!["eval", "model"],
        vec!["generate", "model", "--max-tokens", "many", "--prompt", "x"],
        vec!["train", "m", "--data", "d", "--out", "o", "--sparsity", "1", "--active-target", "0.5"],
        vec!["train", "m", "--data", "d", "--out", "o", "--steps", "1", "--tokens", "10"],
        vec!["export", "m", "--as", "sparse", "--out", "o"],
        vec!["--threads", "0", "doctor"],
    ] {
        let run = run(&args);
        assert_eq!((run.code, run.stdout.as_str()), (2, ""), "{args:?}: {}", run.stderr);
        assert!(!run.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn init_and_inspect() {
    let fixture = fixture();
    let out = fixture.out("sharded");
    let config = fixture.dir.join("config.json");
    let made = json_of(&[
        "init",
        "--config",
        at(&config),
        "--out",
        at(&out),
        "--dtype",
        "bf16",
        "--max-shard-size",
        "20kB",
        "--seed",
        "3",
    ]);
    has(&made, &["out", "params_total", "bytes", "dtype", "seconds"]);
    assert!(out.join("model.safetensors.index.json").exists());
    let seen = json_of(&["inspect", at(&out)]);
    assert_eq!((&seen["dtype"], &seen["model_type"]), (&"BF16".into(), &"llama".into()));
    assert!(seen["shards"].as_u64().unwrap() > 1);
    assert_eq!(seen["params_total"], made["params_total"]);
    // embeddings 2 x 320 x 32; per layer attention 3072, FFN 6144, norms 64; last norm 32.
    assert_eq!(seen["params_total"], 2 * 320 * 32 + 2 * (3072 + 6144 + 64) + 32);
    assert_eq!(seen["layers"][1]["attention"], 3072);
    assert_eq!(seen["layers"][1]["ffn"], 6144);
    assert!(seen["experts"].is_null());

    let dense = json_of(&["inspect", at(&fixture.dense)]);
    let all = json_of(&["inspect", at(&fixture.moe)]);
    let half = json_of(&["inspect", at(&fixture.moe), "--mean-active", "2"]);
    assert_eq!((&all["model_type"], &all["experts"]["num_experts"]), (&"dsmoe".into(), &4.into()));
    assert_eq!(all["experts"]["expert_width"], 16);
    let activated = |report: &Value| report["params_activated"].as_f64().unwrap();
    assert_eq!(activated(&all) - activated(&half), 6144.0);
    assert!(half["flops_per_token"].as_f64() < dense["flops_per_token"].as_f64());
    let human = succeeds(&["inspect", at(&fixture.moe)]);
    assert!(human.contains("4 of width 16") && human.contains("parameters"), "{human}");

    let presets = json_of(&["init", "--list"]);
    let names: Vec<_> =
        presets["presets"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert!(["tiny", "llama-3.2-1b", "llama-2-7b"].iter().all(|name| names.contains(name)), "{names:?}");
}

#[test]
fn convert_and_export() {
    let fixture = fixture();
    let random = fixture.out("random");
    let report = json_of(&[
        "convert",
        at(&fixture.dense),
        "--experts",
        "8",
        "--partition",
        "random",
        "--router-init",
        "warm(3)",
        "--seed",
        "5",
        "--gate-value",
        "binary",
        "--rescale",
        "eq8",
        "--zero-active",
        "force_argmax",
        "--no-ste",
        "--threshold",
        "0.4",
        "--out",
        at(&random),
    ]);
    has(&report, &["out", "experts", "expert_width", "bytes", "seconds"]);
    let seen = json_of(&["inspect", at(&random)]);
    let experts = &seen["experts"];
    assert_eq!((&experts["gate_value"], &experts["rescale"]), (&"binary".into(), &"eq8".into()));
    assert_eq!((&experts["zero_active"], &experts["ste"]), (&"force_argmax".into(), &false.into()));
    assert_eq!((&experts["partition"], &experts["router_bias"]), (&"permuted".into(), &true.into()));

    let back = fixture.out("dense-again");
    has(
        &json_of(&["export", at(&random), "--as", "dense", "--out", at(&back)]),
        &["out", "bytes", "seconds"],
    );
    let original = fs::read(fixture.dense.join("model.safetensors")).unwrap();
    assert!(
        fs::read(back.join("model.safetensors")).unwrap() == original,
        "weights differ from the original's"
    );
    assert!(back.join("tokenizer.json").exists());

    let native = fixture.out("native");
    succeeds(&["export", at(&random), "--as", "native", "--dtype", "bf16", "--out", at(&native)]);
    let small = json_of(&["inspect", at(&native)]);
    assert_eq!(small["dtype"], "BF16");
    succeeds(&["export", at(&random), "--as", "native", "--out", at(&native), "--force"]);
    assert_eq!(json_of(&["inspect", at(&native)])["dtype"], "F32");

    // A partition by file: neuron j in expert j % 4.
    let lists: Vec<Vec<usize>> = (0..4).map(|e| (0..64).filter(|j| j % 4 == e).collect()).collect();
    let file = fixture.dir.join("partition.json");
    fs::write(&file, serde_json::json!({ "layers": [lists, lists] }).to_string()).unwrap();
    let own = fixture.out("own-partition");
    succeeds(&["convert", at(&fixture.dense), "--experts", "4", "--partition", at(&file), "--out", at(&own)]);
    assert_eq!(json_of(&["inspect", at(&own)])["experts"]["partition"], "permuted");
}

#[test]
fn eval_reports_the_whole_protocol() {
    let fixture = fixture();
    let eval = |model, more: &[&str]| {
        json_of(
            &[&["eval", at(model), "--data", at(&fixture.text), "--doc-separator", SEPARATOR], more].concat(),
        )
    };
    let dense = eval(&fixture.dense, &["--seq", "32", "--limit-tokens", "1000"]);
    has(
        &dense,
        &["model", "data", "seq", "stride", "bos", "threshold", "seconds", "tokens_per_s", "flops_per_token"],
    );
    assert_eq!((&dense["tokens"], &dense["predicted"]), (&1000.into(), &968.into()));
    assert!(dense["active_ratio"].is_null() && dense["bos"] == "auto");
    let (nll, ppl) = (dense["nll"].as_f64().unwrap(), dense["ppl"].as_f64().unwrap());
    assert!((nll.exp() - ppl).abs() < 1e-6 * ppl && (nll - 320f64.ln()).abs() < 0.5, "{nll} {ppl}");

    let all = eval(&fixture.moe, &["--seq", "32", "--limit-tokens", "1000", "--threshold", "0"]);
    assert_eq!((&all["active_ratio"], &all["zero_active_share"]), (&1.0.into(), &0.0.into()));
    assert_eq!(all["active_ratio_per_layer"], serde_json::json!([1.0, 1.0]));
    let none = eval(&fixture.moe, &["--seq", "32", "--limit-tokens", "1000", "--threshold", "1"]);
    assert_eq!((&none["active_ratio"], &none["zero_active_share"]), (&0.0.into(), &1.0.into()));
    assert!(none["params_activated"].as_f64() < all["params_activated"].as_f64());
    let strided = eval(&fixture.dense, &["--seq", "32", "--stride", "16", "--limit-tokens", "1000"]);
    assert_eq!(strided["predicted"], 999);
    let human = succeeds(&["eval", at(&fixture.moe), "--data", at(&fixture.text), "--limit-tokens", "500"]);
    assert!(human.contains("perplexity") && human.contains("active share"), "{human}");
}

#[test]
fn generate_agrees_with_itself() {
    let fixture = fixture();
    let generate = |more: &[&str]| {
        json_of(
            &[&["generate", at(&fixture.moe), "--prompt", "one two", "--max-tokens", "12"], more].concat(),
        )
    };
    let first = generate(&["--ignore-eos"]);
    has(
        &first,
        &["prompt", "text", "prompt_tokens", "finish", "prefill_tokens_per_s", "active_ratio_per_layer"],
    );
    let ids = |report: &Value, key: &str| {
        report[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!((&first["generated_tokens"], &first["finish"]), (&12.into(), &"max_tokens".into()));
    assert_eq!(first["token_ids"][0], 0, "BOS comes first");
    let all = ids(&first, "token_ids");
    assert_eq!(all[first["prompt_tokens"].as_u64().unwrap() as usize..], ids(&first, "new_token_ids"));
    assert!(first["tokens_per_s"].as_f64().unwrap() > 0.0 && first["active_ratio"].as_f64().unwrap() > 0.0);
    for other in [vec!["--no-kv-cache"], vec!["--prefill-chunk", "2"], vec!["--threads", "1"]] {
        let again = generate(&[&["--ignore-eos"], &other[..]].concat());
        assert_eq!(again["token_ids"], first["token_ids"], "{other:?}");
    }
    let sampled = |seed| {
        generate(&["--ignore-eos", "--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed", seed])
    };
    assert_eq!(sampled("7")["text"], sampled("7")["text"]);
    assert_ne!(sampled("7")["token_ids"], sampled("8")["token_ids"]);
    assert_eq!(generate(&["--bos", "never"])["prompt_tokens"], first["prompt_tokens"].as_u64().unwrap() - 1);

    // The text on stdout is that of the report, and a stop text cuts it.
    let text = first["text"].as_str().unwrap();
    let prompt = fixture.dir.join("prompt.txt");
    fs::write(&prompt, "one two\n").unwrap();
    let args =
        ["generate", at(&fixture.moe), "--prompt-file", at(&prompt), "--max-tokens", "12", "--ignore-eos"];
    assert_eq!(succeeds(&args), format!("{text}\n"));
    let stop: String = text.chars().skip(2).take(2).collect();
    let stopped = generate(&["--ignore-eos", "--stop", &stop]);
    assert_eq!(
        (&stopped["text"], &stopped["finish"]),
        (&text[..text.find(&stop).unwrap()].into(), &"stop".into())
    );
    assert!(stopped["generated_tokens"].as_u64() < Some(12));
}

#[test]
fn the_precision_is_the_one_asked_for_or_that_of_the_weights() {
    let fixture = fixture();
    let narrow = fixture.out("narrow");
    succeeds(&["export", at(&fixture.moe), "--as", "native", "--dtype", "bf16", "--out", at(&narrow)]);
    let generate = |model, more: &[&str]| {
        json_of(&[&["generate", at(model), "--prompt", "one", "--max-tokens", "3"], more].concat())["dtype"]
            .take()
    };
    let asked = ["--dtype", "bf16"];
    assert_eq!((generate(&fixture.moe, &[]), generate(&fixture.moe, &asked)), ("f32".into(), "bf16".into()));
    assert_eq!(
        (generate(&narrow, &[]), generate(&narrow, &["--dtype", "f32"])),
        ("bf16".into(), "f32".into())
    );
    let eval = |more: &[&str]| {
        let args = ["eval", at(&narrow), "--data", at(&fixture.text), "--limit-tokens", "300"];
        json_of(&[&args[..], more].concat())
    };
    let (wide, half) = (eval(&[]), eval(&asked));
    assert_eq!((&wide["dtype"], &half["dtype"]), (&"f32".into(), &"bf16".into()));
    assert_ne!(wide["nll"], half["nll"]);
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let fixture = fixture();
    let args =
        ["generate", at(&fixture.dense), "--prompt", "x", "--max-tokens", "100", "--ignore-eos", "--quiet"];
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn doctor_names_what_is_missing() {
    let fixture = fixture();
    let report = json_of(&["doctor", "--data", at(&fixture.dir), "--threads", "1"]);
    has(&report, &["cpu", "features", "isa", "cores", "memory_total_bytes", "data"]);
    assert_eq!(report["threads"], 1);
    let items = report["data"]["items"].as_array().unwrap();
    assert!(items.len() > 10 && items.iter().all(|item| item["ok"] == false));
    let human = succeeds(&["doctor", "--data", at(&fixture.dir.join("nowhere"))]);
    assert!(human.contains("missing  the folder itself"), "{human}");
    let gpu = &report["gpu"];
    has(gpu, &["built", "devices", "driver", "nvrtc", "cublaslt", "problems"]);
    assert_eq!(gpu["built"], cfg!(feature = "cuda"));
    for problem in gpu["problems"].as_array().unwrap() {
        assert!(human.contains(problem.as_str().unwrap()), "{problem}: {human}");
    }
    if cfg!(feature = "cuda") {
        let found = !gpu["devices"].as_array().unwrap().is_empty();
        let told = human.lines().any(|line| line.contains("cuda:0 "));
        assert_eq!((found, found), (told, gpu["driver"].is_string()), "{human}");
        let told = |what: &str| gpu["problems"].to_string().contains(what);
        assert_eq!(
            (told("libnvrtc"), told("libcublasLt")),
            (gpu["nvrtc"].is_null(), gpu["cublaslt"].is_null())
        );
    } else {
        assert!(human.contains("built without CUDA; build it with the feature `cuda`"), "{human}");
    }

    let mut wrong = command(&["doctor", "--json"]);
    wrong.env("DSMOE_ISA", "sse9");
    let run = finish(wrong);
    check_failure(&run, &["DSMOE_ISA"], &["DSMOE_ISA=sse9", "scalar"]);
    let error: Value = serde_json::from_str(&run.stdout).unwrap();
    assert!(run.stderr.contains(error["error"].as_str().unwrap()));
}

/// Arguments of a short run on the fixture's text.
fn training<'a>(model: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let text = at(&fixture().text);
    let common = [
        "train",
        model,
        "--data",
        text,
        "--doc-separator",
        SEPARATOR,
        "--out",
        out,
        "--batch",
        "2",
        "--seq",
        "16",
        "--lr",
        "1e-3",
        "--valid-fraction",
        "0.1",
    ];
    [&common[..], more].concat()
}

#[test]
fn train_makes_a_model_and_resumes_to_the_same_one() {
    let fixture = fixture();
    let whole = fixture.out("run-whole");
    let report =
        json_of(&training(at(&fixture.moe), at(&whole), &["--steps", "8", "--active-target", "0.5"]));
    has(&report, &["seconds", "tokens_per_s", "out", "checkpoint", "sparsity_loss", "valid_active_ratio"]);
    assert_eq!(
        (&report["finished"], &report["step"], &report["tokens"]),
        (&true.into(), &8.into(), &256.into())
    );
    assert!(
        report["valid_nll"].as_f64().unwrap() > 0.0 && report["activation_ratio"].as_f64().unwrap() > 0.0
    );
    assert_eq!(json_of(&["inspect", at(&whole)])["model_type"], "dsmoe");
    succeeds(&["generate", at(&whole), "--prompt", "a", "--max-tokens", "2"]);

    let parts = fixture.out("run-parts");
    let steps = ["--steps", "8", "--active-target", "0.5", "--threads", "1"];
    let first = run(&training(at(&fixture.moe), at(&parts), &[&steps[..], &["--stop-after", "3"]].concat()));
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert!(
        first.stderr.contains("continue with: ") && first.stderr.contains("--resume"),
        "{}",
        first.stderr
    );
    let second = json_of(&training(at(&fixture.moe), at(&parts), &[&steps[..], &["--resume"]].concat()));
    assert_eq!((&second["finished"], &second["step"]), (&true.into(), &8.into()));
    let weights = |dir: &std::path::Path| fs::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&parts), "one thread and a resumption change the weights");
}

#[test]
fn settings_come_from_file_flags_and_set() {
    let fixture = fixture();
    let file = fixture.dir.join("run.toml");
    fs::write(&file, "steps = 50\nlr = 5e-3\nweight_decay = 0.2\naccumulate = 2\n").unwrap();
    let out = fixture.out("planned");
    let more =
        ["--config", at(&file), "--steps", "7", "--set", "weight_decay=0", "--set", "seq=8", "--dry-run"];
    let plan = json_of(&training(at(&fixture.dense), at(&out), &more));
    assert_eq!((&plan["steps"], &plan["tokens_per_step"]), (&7.into(), &32.into()));
    assert_eq!((&plan["config"]["lr"], &plan["config"]["weight_decay"]), (&1e-3.into(), &0.0.into()));
    has(&plan, &["params", "memory", "memory_bytes", "flops_per_step", "budget"]);
    assert!(!out.exists(), "a dry run writes nothing");
    let more = ["--tokens", "1k", "--dry-run"];
    assert_eq!(json_of(&training(at(&fixture.dense), at(&out), &more))["steps"], 32);
    let human = succeeds(&training(at(&fixture.moe), at(&out), &more));
    assert!(human.contains("sparsity loss of weight 1"), "{human}");
}
