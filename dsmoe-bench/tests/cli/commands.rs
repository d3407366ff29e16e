//! Every command, as a user runs it, on a tiny model.

use serde_json::{Value, json};

use crate::common::{
    agrees, check_failure, command, fails, finish, has, is_wrong_usage, json_of, list, number, on_text, path,
    run, shows, spawn, succeeds, texts, weights, write,
};

#[test]
fn help_and_usage() {
    assert_eq!(succeeds("-V").trim(), concat!("dsmoe ", env!("CARGO_PKG_VERSION")));
    let version = succeeds("--version");
    shows(&version, &[concat!("dsmoe ", env!("CARGO_PKG_VERSION")), "revision", "rustc ", "mpi", "scalar"]);
    assert_eq!(succeeds("prune --version").lines().count(), version.lines().count());
    for line in [
        "",
        "fly",
        "convert model",
        "eval model",
        "generate model --max-tokens many --prompt x",
        "train m --data d --out o --sparsity 1 --active-target 0.5",
        "train m --data d --out o --steps 1 --tokens 10",
        "export m --as sparse --out o",
        "--threads 0 doctor",
    ] {
        is_wrong_usage(line);
    }
}

/// A line that cannot be parsed is an object on stdout with `--json`, and still an error on stderr.
#[test]
fn wrong_usage_is_json_too() {
    let found = run("eval dense --data text.txt --seq many --json");
    assert_eq!(found.code, 2);
    let object: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
    agrees(&object, &json!({ "wrong_usage": true }));
    shows(object["error"].as_str().unwrap(), &["many", "--seq"]);
    assert!(!found.stdout.contains("For more information"), "{}", found.stdout);
    assert!(found.stderr.starts_with("dsmoe: error: invalid value"), "{}", found.stderr);
    for (color, red) in [("always", true), ("never", false), ("auto", false)] {
        let found = run(&format!("inspect nowhere --color {color}"));
        assert_eq!(found.stderr.contains("\u{1b}["), red, "{color}: {}", found.stderr);
        let found = run(&format!("fly --color={color}"));
        assert_eq!(found.stderr.contains("\u{1b}["), red, "{color}: {}", found.stderr);
    }
}

/// Lines of help are no longer than the terminal is wide, but for usage lines, which are commands, and words.
#[test]
fn help_wraps_at_the_width_of_the_terminal() {
    for name in
        ["", "train", "convert", "prune", "eval", "generate", "reproduce", "bench compare", "plan profile"]
    {
        for width in [40usize, 60, 79, 80, 120] {
            let found =
                command(&format!("{name} --help")).env("COLUMNS", width.to_string()).output().unwrap();
            let text = String::from_utf8(found.stdout).unwrap();
            let body = text.split("Examples:").next().unwrap();
            for line in body.lines().filter(|line| line.chars().count() > width) {
                let is_usage = line.starts_with("Usage:") || line.trim_start().starts_with("dsmoe ");
                let is_name = line.trim_start().starts_with(['-', '<', '[']) && line.split("  ").count() < 5;
                assert!(is_usage || is_name || !line.trim().contains(' '), "{name} at {width}: {line}");
            }
            // Words stand side by side.
            let words = |line: &str| line.split_whitespace().count();
            let alone =
                body.lines().filter(|line| words(line) == 1 && line.starts_with("          ")).count();
            assert!(alone * 4 < body.lines().count(), "{name} at {width}: {alone} lines of a word\n{body}");
        }
    }
}

#[test]
fn shells_and_manuals_know_every_command() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = succeeds(&format!("completions {shell}"));
        shows(&script, &["reproduce", "active-target"]);
    }
    shows(&succeeds("man"), &[".TH dsmoe", "dsmoe\\-train"]);
    let pages = json_of("man --out manual");
    let names: Vec<&str> = list(&pages["pages"]).iter().map(|page| page.as_str().unwrap()).collect();
    for name in ["dsmoe.1", "dsmoe-train.1", "dsmoe-bench-record.1"] {
        assert!(names.iter().any(|page| page.ends_with(name)), "{name}: {names:?}");
    }
    shows(&std::fs::read_to_string(path("manual/dsmoe-train.1")).unwrap(), &["active\\-target", "Examples"]);
    fails("man --out manual", &["manual/dsmoe", "exists", "--force"]);
    succeeds("man --out manual --force");
}

/// A fault that would appear at the end appears before the work.
#[test]
fn output_folders_are_checked_before_the_work() {
    for line in [
        "convert dense --calib nowhere.txt --active-target 50% --out moe",
        "prune dense --method wanda --budget 80% --calib nowhere.txt --out moe",
    ] {
        let found = run(line);
        check_failure(&found, line, &["is not empty"]);
        assert!(!found.stderr.contains("nowhere.txt"), "{}", found.stderr);
    }
}

#[test]
fn init_and_inspect() {
    let made = json_of("init --config config.json --out sharded --dtype bf16 --max-shard-size 20kB --seed 3");
    has(&made, "out params_total bytes dtype seconds");
    assert!(path("sharded/model.safetensors.index.json").exists());
    let seen = json_of("inspect sharded");
    // embeddings 2 x 320 x 32; per layer attention 3072, FFN 6144, norms 64; last norm 32.
    let params = 2 * 320 * 32 + 2 * (3072 + 6144 + 64) + 32;
    agrees(
        &seen,
        &json!({ "dtype": "BF16", "model_type": "llama", "params_total": params, "experts": null }),
    );
    assert!(number(&seen["shards"]) > 1.0);
    assert_eq!(seen["params_total"], made["params_total"]);
    agrees(&seen["layers"][1], &json!({ "attention": 3072, "ffn": 6144 }));

    let dense = json_of("inspect dense");
    let all = json_of("inspect moe");
    let half = json_of("inspect moe --mean-active 2");
    agrees(&all, &json!({ "model_type": "dsmoe", "experts": { "num_experts": 4, "expert_width": 16 } }));
    assert_eq!(number(&all["params_activated"]) - number(&half["params_activated"]), 6144.0);
    assert!(number(&half["flops_per_token"]) < number(&dense["flops_per_token"]));
    shows(&succeeds("inspect moe"), &["4 of width 16", "parameters", "of weights in f32"]);

    let presets = json_of("init --list");
    let names = texts(&presets["presets"], "name");
    assert!(["tiny", "llama-3.2-1b", "llama-2-7b"].iter().all(|name| names.contains(name)), "{names:?}");
}

#[test]
fn convert_and_export() {
    let report = json_of(
        "convert dense --experts 8 --partition random --router-init warm(3) --seed 5 --gate-value binary --rescale eq8 \
         --zero-active force_argmax --no-ste --threshold 0.4 --out random",
    );
    has(&report, "out experts expert_width bytes seconds");
    let settings = json!({
        "gate_value": "binary", "rescale": "eq8", "zero_active": "force_argmax", "ste": false,
        "partition": "permuted", "router_bias": true,
    });
    agrees(&json_of("inspect random")["experts"], &settings);

    has(&json_of("export random --as dense --out dense-again"), "out bytes seconds");
    assert!(weights("dense-again") == weights("dense"), "weights differ from the original's");
    assert!(path("dense-again/tokenizer.json").exists());

    succeeds("export random --as native --dtype bf16 --out native");
    assert_eq!(json_of("inspect native")["dtype"], "BF16");
    succeeds("export random --as native --out native --force");
    assert_eq!(json_of("inspect native")["dtype"], "F32");

    // A partition by file: neuron j in expert j % 4.
    let lists: Vec<Vec<usize>> = (0..4).map(|e| (0..64).filter(|j| j % 4 == e).collect()).collect();
    write("partition.json", json!({ "layers": [lists, lists] }).to_string());
    succeeds("convert dense --experts 4 --partition partition.json --out own-partition");
    assert_eq!(json_of("inspect own-partition")["experts"]["partition"], "permuted");
}

#[test]
fn eval_reports_the_whole_protocol() {
    let eval = |rest: &str| json_of(&format!("eval {rest} {} --seq 32 --limit-tokens 1000", on_text()));
    let dense = eval("dense");
    has(&dense, "model data seq stride bos threshold seconds tokens_per_s flops_per_token");
    agrees(&dense, &json!({ "tokens": 1000, "predicted": 968, "active_ratio": null, "bos": "auto" }));
    let (nll, ppl) = (number(&dense["nll"]), number(&dense["ppl"]));
    assert!((nll.exp() - ppl).abs() < 1e-6 * ppl && (nll - 320f64.ln()).abs() < 0.5, "{nll} {ppl}");

    let all = eval("moe --threshold 0");
    let shares =
        json!({ "active_ratio": 1.0, "zero_active_share": 0.0, "active_ratio_per_layer": [1.0, 1.0] });
    agrees(&all, &shares);
    let none = eval("moe --threshold 1");
    agrees(&none, &json!({ "active_ratio": 0.0, "zero_active_share": 1.0 }));
    assert!(number(&none["params_activated"]) < number(&all["params_activated"]));
    // Held parameters beside those that a token uses, and the bytes that they take in memory.
    let seen = json_of("inspect moe");
    assert_eq!(all["params_total"], seen["params_total"]);
    let bytes = |precision: &str| number(&eval(&format!("moe --dtype {precision}"))["weight_bytes"]);
    assert!(bytes("f32") >= 4.0 * number(&all["params_total"]) && bytes("bf16") < bytes("f32"));
    let least = |precision: &str| number(&seen["weight_bytes"][precision]);
    assert_eq!((least("f32"), least("bf16")), (2.0 * least("bf16"), 2.0 * number(&all["params_total"])));
    for precision in ["f32", "bf16"] {
        assert!((least(precision)..1.5 * least(precision)).contains(&bytes(precision)), "{precision}");
    }
    assert_eq!(eval("dense --stride 16")["predicted"], 999);
    let human = succeeds("eval moe --data text.txt --limit-tokens 500");
    shows(&human, &["perplexity", "active share", "activated of", "in memory"]);
}

#[test]
fn generate_agrees_with_itself() {
    let generate = |more: &str| json_of(&format!("generate moe --prompt 'one two' --max-tokens 12 {more}"));
    let first = generate("--ignore-eos");
    has(&first, "prompt text prompt_tokens finish prefill_tokens_per_s active_ratio_per_layer");
    agrees(&first, &json!({ "generated_tokens": 12, "finish": "max_tokens" }));
    assert_eq!(first["token_ids"][0], 0, "BOS comes first");
    let prompt = number(&first["prompt_tokens"]) as usize;
    assert_eq!(list(&first["token_ids"])[prompt..], *list(&first["new_token_ids"]));
    assert!(number(&first["tokens_per_s"]) > 0.0 && number(&first["active_ratio"]) > 0.0);
    for other in ["--no-kv-cache", "--prefill-chunk 2", "--threads 1"] {
        let again = generate(&format!("--ignore-eos {other}"));
        assert_eq!(again["token_ids"], first["token_ids"], "{other}");
    }
    let sampled =
        |seed: u32| generate(&format!("--ignore-eos --temperature 1 --top-k 50 --top-p 0.9 --seed {seed}"));
    assert_eq!(sampled(7)["text"], sampled(7)["text"]);
    assert_ne!(sampled(7)["token_ids"], sampled(8)["token_ids"]);
    assert_eq!(generate("--bos never")["prompt_tokens"], prompt - 1);

    // The text on stdout is that of the report, and a stop text cuts it.
    let text = first["text"].as_str().unwrap();
    write("prompt.txt", "one two\n");
    let plain = succeeds("generate moe --prompt-file prompt.txt --max-tokens 12 --ignore-eos");
    assert_eq!(plain, format!("{text}\n"));
    let stop: String = text.chars().skip(2).take(2).collect();
    let output = command("generate moe --max-tokens 12 --ignore-eos --json --prompt")
        .args(["one two", "--stop", &stop])
        .output();
    let stopped: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    agrees(&stopped, &json!({ "text": text[..text.find(&stop).unwrap()], "finish": "stop" }));
    assert!(number(&stopped["generated_tokens"]) < 12.0);
}

#[test]
fn the_precision_is_the_one_asked_for_or_that_of_the_weights() {
    succeeds("export moe --as native --dtype bf16 --out narrow");
    for (rest, dtype) in
        [("moe", "f32"), ("moe --dtype bf16", "bf16"), ("narrow", "bf16"), ("narrow --dtype f32", "f32")]
    {
        let report = json_of(&format!("generate {rest} --prompt one --max-tokens 3"));
        assert_eq!(report["dtype"], dtype, "{rest}");
    }
    let eval = |more: &str| json_of(&format!("eval narrow --data text.txt --limit-tokens 300 {more}"));
    let (wide, half) = (eval(""), eval("--dtype bf16"));
    assert_eq!((&wide["dtype"], &half["dtype"]), (&"f32".into(), &"bf16".into()));
    assert_ne!(wide["nll"], half["nll"]);
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let mut child = spawn("generate dense --prompt x --max-tokens 100 --ignore-eos --quiet");
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]));
}

#[test]
fn doctor_names_what_is_missing() {
    let report = json_of("doctor --data . --threads 1");
    has(&report, "cpu features isa cores memory_total_bytes data");
    assert_eq!(report["threads"], 1);
    let items = list(&report["data"]["items"]);
    assert!(items.len() > 10 && items.iter().all(|item| item["ok"] == false));
    let human = succeeds("doctor --data nowhere");
    shows(&human, &["missing  the folder itself"]);
    let gpu = &report["gpu"];
    has(gpu, "built devices driver nvrtc cublaslt nccl problems");
    assert_eq!(gpu["built"], cfg!(feature = "cuda"));
    for problem in list(&gpu["problems"]) {
        shows(&human, &[problem.as_str().unwrap()]);
    }
    if cfg!(feature = "cuda") {
        let found = !list(&gpu["devices"]).is_empty();
        let told = human.lines().any(|line| line.contains("cuda:0 "));
        assert_eq!((found, found), (told, gpu["driver"].is_string()), "{human}");
        for (library, key) in [("libnvrtc", "nvrtc"), ("libcublasLt", "cublaslt")] {
            assert_eq!(gpu["problems"].to_string().contains(library), gpu[key].is_null(), "{library}");
        }
    } else {
        shows(&human, &["built without CUDA; build it with the feature `cuda`"]);
    }

    let mpi = &report["mpi"];
    has(mpi, "library interface version launcher problem");
    assert_eq!(mpi["problem"].is_null(), mpi["version"].is_string(), "{mpi}");
    let shown = ["version", "problem"].into_iter().find_map(|key| mpi[key].as_str()).unwrap();
    shows(&human, &[shown]);
    let mut without = command("doctor --data nowhere");
    without.env("DSMOE_MPI_LIB", "/nowhere/libmpi.so");
    shows(
        &finish(without).stdout,
        &["/nowhere/libmpi.so is not found", "openmpi-bin or mpich, or set DSMOE_MPI_LIB"],
    );

    let mut wrong = command("doctor --json");
    wrong.env("DSMOE_ISA", "sse9");
    let run = finish(wrong);
    check_failure(&run, "DSMOE_ISA=sse9", &["DSMOE_ISA=sse9", "scalar"]);
    shows(&run.stderr, &[run.json()["error"].as_str().unwrap()]);
}

/// A short run on the text.
fn training(model: &str, out: &str, more: &str) -> String {
    format!(
        "train {model} {} --out {out} --batch 2 --seq 16 --lr 1e-3 --valid-fraction 0.1 {more}",
        on_text()
    )
}

#[test]
fn train_makes_a_model_and_resumes_to_the_same_one() {
    let report = json_of(&training("moe", "run-whole", "--steps 8 --active-target 0.5"));
    has(&report, "seconds tokens_per_s out checkpoint sparsity_loss valid_active_ratio");
    agrees(&report, &json!({ "finished": true, "step": 8, "tokens": 256 }));
    assert!(number(&report["valid_nll"]) > 0.0 && number(&report["activation_ratio"]) > 0.0);
    assert_eq!(json_of("inspect run-whole")["model_type"], "dsmoe");
    succeeds("generate run-whole --prompt a --max-tokens 2");

    let parts = |more: &str| {
        training("moe", "run-parts", &format!("--steps 8 --active-target 0.5 --threads 1 {more}"))
    };
    let first = run(&parts("--stop-after 3"));
    assert_eq!(first.code, 0, "{}", first.stderr);
    shows(&first.stderr, &["continue with: ", "--resume"]);
    agrees(&json_of(&parts("--resume")), &json!({ "finished": true, "step": 8 }));
    assert!(weights("run-whole") == weights("run-parts"), "one thread and a resumption change the weights");
}

#[test]
fn settings_come_from_file_flags_and_set() {
    write("run.toml", "steps = 50\nlr = 5e-3\nweight_decay = 0.2\naccumulate = 2\n");
    let more = "--config run.toml --steps 7 --set weight_decay=0 --set seq=8 --dry-run";
    let plan = json_of(&training("dense", "planned", more));
    let config = json!({ "lr": 1e-3, "weight_decay": 0.0 });
    agrees(&plan, &json!({ "steps": 7, "tokens_per_step": 32, "config": config }));
    has(&plan, "params memory memory_bytes flops_per_step budget");
    assert!(!path("planned").exists(), "a dry run writes nothing");
    assert_eq!(json_of(&training("dense", "planned", "--tokens 1k --dry-run"))["steps"], 32);
    // Without --seq a sequence has the positions of the model, if these are few.
    let line = format!("train dense {} --steps 1 --out planned --dry-run", on_text());
    assert_eq!(json_of(&line)["config"]["seq"], json_of("inspect dense")["context"]);
    fails(&format!("{line} --seq 1024"), &["1024"]);
    fails(&format!("{line} --set seq=1024"), &["1024"]);
    let human = succeeds(&training("moe", "planned", "--tokens 1k --dry-run"));
    shows(&human, &["sparsity loss of weight 1", "on this machine", "on one H100 80GB"]);
    // The rate of this machine is that of a product, so that hours are FLOPs over it.
    let (flops, time) = (number(&plan["flops"]), &plan["time"]);
    assert!((number(&time["hours"]) * 3600.0 * number(&time["flops_per_second"]) / flops - 1.0).abs() < 1e-6);
    assert!(number(&time["hours_h100"]) < number(&time["hours"]), "{time}");
}

#[test]
fn a_plan_says_which_inactive_pairs_the_routers_learn_from() {
    let line = |model: &str, rule: &str| {
        let more = format!("--tokens 1k --active-target 0.5 --set router_gradient={rule} --dry-run");
        training(model, "planned-gradient", &more)
    };
    let [full, some] = ["full", "sample:12.5%"].map(|rule| json_of(&line("moe", rule)));
    assert_eq!(some["config"]["router_gradient"], "sample:0.125");
    assert!(number(&some["flops"]) < number(&full["flops"]), "{some}");
    shows(&succeeds(&line("moe", "every:4")), &["router gradient", "of a layer in one of 4 micro-batches"]);
    fails(&line("dense", "every:4"), &["router_gradient is every:4", "full for a model without gates"]);
    fails(&line("moe", "every:0"), &["router_gradient is every:0; use full, every:K"]);
}
