//! Damaged files, leftovers of killed commands, weights that are not numbers, and numbers without bounds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::common::{
    SEPARATOR, command, copy, ends_soon, fails, finish, json_of, large_model, list, on_text, path, read, run,
    shows, spawn, succeeds, texts, wait_for_handler, wait_until, write,
};

fn files_of(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    files
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 20) as usize % n
    }
}

/// Changes one bit of `file` while `work` runs.
fn with_flipped_bit<T>(file: &Path, random: &mut Random, work: impl FnOnce(usize) -> T) -> T {
    let bytes = fs::read(file).unwrap();
    let bit = random.below(8 * bytes.len());
    let mut damaged = bytes.clone();
    damaged[bit / 8] ^= 1 << (bit % 8);
    fs::write(file, damaged).unwrap();
    let found = work(bit);
    fs::write(file, bytes).unwrap();
    found
}

/// Flips of every file of every kind of artefact; `DSMOE_FLIPS` says how many of each file.
#[test]
fn every_flipped_bit_of_a_stored_artefact_is_found() {
    let flips = std::env::var("DSMOE_FLIPS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    copy("moe", "flips-moe");
    succeeds("prune dense --method magnitude --budget 0.85 --out flips-masked");
    let text = on_text();
    succeeds(&format!(
        "train flips-masked --out flips-run --steps 2 --batch 2 --seq 32 --teacher dense --teacher-weight 0.5 \
         --teacher-cache flips-teacher {text}"
    ));
    succeeds(&format!("data prepare --model dense --cache flips-tokens {text}"));
    let folders = ["flips-moe", "flips-masked", "flips-run", "flips-teacher", "flips-tokens"];
    let kept = json_of(&format!("verify {}", folders.join(" ")));
    assert_eq!(kept["holds"], true, "{kept}");
    assert_eq!(list(&kept["unchecked"]).len(), 0, "{kept}");
    let mut random = Random(3);
    let mut count = 0;
    for checked in list(&kept["checked"]) {
        let place = PathBuf::from(checked["path"].as_str().unwrap());
        let at = path(place.to_str().unwrap());
        let files = if at.is_dir() { files_of(&at) } else { vec![at.clone()] };
        for file in files {
            let name = file.file_name().unwrap().to_str().unwrap();
            // Records of a run, which grow, are not part of its model.
            if ["run.toml", "metrics.jsonl"].contains(&name) || name.starts_with("events.") {
                continue;
            }
            for _ in 0..flips {
                let (found, bit) = with_flipped_bit(&file, &mut random, |bit| {
                    (run(&format!("verify {}", at.display())), bit)
                });
                let is_found = found.code == 3 && found.stdout.contains("DAMAGED") || found.code == 1;
                // A digit of a hash in its other case is the same hash.
                let same = found.code == 0 && name == "checksums.json" && bit % 8 == 5;
                assert!(is_found || same, "{}: bit {bit}: {}{}", file.display(), found.stdout, found.stderr);
                count += 1;
            }
        }
    }
    assert!(count >= 30, "{count}");
}

/// A link to nowhere, or to itself, in place of a manifest is damage and no absence.
#[cfg(unix)]
#[test]
fn a_manifest_that_cannot_be_reached_is_damage() {
    for (dir, target) in [("verify-dangling", "gone.json"), ("verify-loop", "checksums.json")] {
        copy("dense", dir);
        let manifest = path(dir).join("checksums.json");
        fs::remove_file(&manifest).unwrap();
        std::os::unix::fs::symlink(target, &manifest).unwrap();
        let seen = run(&format!("verify {dir}"));
        assert_eq!(seen.code, 3, "{}{}", seen.stdout, seen.stderr);
        shows(&seen.stdout, &["DAMAGED", &format!("{dir}: changed: checksums.json")]);
    }
}

#[test]
fn verify_says_what_it_did_not_check() {
    copy("dense", "verify-old");
    fs::remove_file(path("verify-old/checksums.json")).unwrap();
    let seen = succeeds("verify verify-old dense");
    shows(&seen, &["verify-old: not checked; it has no checksums.json", "dense: as it was written; "]);
    fs::create_dir_all(path("verify-none")).unwrap();
    fails("verify verify-none", &["verify-none: there is no checksums.json"]);
    fails("verify verify-nowhere", &["verify-nowhere"]);
    copy("dense", "verify-less");
    fs::remove_file(path("verify-less/tokenizer.json")).unwrap();
    let less = run("verify verify-less");
    assert_eq!(less.code, 3);
    shows(&less.stdout, &["verify-less: missing: tokenizer.json", "DAMAGED"]);
}

/// Sets one element of `tensor` in a copy of `model` to NaN.
fn poisoned(model: &str, tensor: &str, out: &str) {
    copy(model, out);
    let file = path(out).join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let entry = &header[tensor];
    let offset = entry["data_offsets"][0].as_u64().unwrap_or_else(|| panic!("{tensor} in {header}"));
    let start = 8 + header_len + offset as usize;
    // All bits of an element set is a NaN in every float type.
    bytes[start..start + 4].fill(0xff);
    fs::write(file, bytes).unwrap();
}

#[test]
fn weights_that_are_not_numbers_are_refused_by_every_command() {
    succeeds("convert dense --as mixtral --experts 4 --top-k 2 --out nan-mixture");
    let dense = [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
    ];
    let mixture =
        ["model.layers.0.block_sparse_moe.experts.1.w2.weight", "model.layers.1.self_attn.k_proj.weight"];
    let methods = json_of("methods");
    let sources = texts(&methods["methods"], "source");
    let listed: Vec<(&str, &str)> = texts(&methods["methods"], "name").into_iter().zip(sources).collect();
    let text = on_text();
    let calib = format!("--calib text.txt --doc-separator {SEPARATOR} --samples 8 --seq 32");
    let parts = ["is not finite"];
    for (i, tensor) in dense.into_iter().enumerate() {
        let name = format!("nan-{i}");
        poisoned("dense", tensor, &name);
        let parts = [parts[0], tensor];
        for (method, _) in listed.iter().filter(|(_, source)| *source != "experts") {
            let has_experts = ["llama-moe", "moefication", "random-k"].contains(method);
            let experts = if has_experts { "--set experts=4" } else { "" };
            let out = format!("nan-out/{method}");
            fails(
                &format!("prune {name} --method {method} --budget 0.85 {experts} {calib} --out {out}"),
                &parts,
            );
            assert!(!path(&out).exists(), "{method}: something is left");
        }
        for line in [
            format!("convert {name} --experts 4 --out nan-out/x"),
            format!("convert {name} --as mixtral --experts 4 --top-k 2 --out nan-out/x"),
            format!("convert {name} {calib} --active-target 0.5 --out nan-out/x"),
            format!("export {name} --as native --out nan-out/x"),
            format!("export {name} --as gguf --out nan-out/x.gguf"),
            format!("grow {name} --layers 3 --method copy --out nan-out/x"),
            format!("train {name} --out nan-out/run --steps 2 --batch 2 --seq 32 {text}"),
            format!("eval {name} --seq 32 --limit-tokens 200 {text}"),
            format!("generate {name} --prompt The --max-tokens 2"),
        ] {
            fails(&line, &parts);
        }
    }
    for (i, tensor) in mixture.into_iter().enumerate() {
        let name = format!("nan-mixture-{i}");
        poisoned("nan-mixture", tensor, &name);
        // `duo-router` takes no mixtures.
        let of_mixtures = |(method, source): &&(&str, &str)| *source == "experts" && *method != "duo-router";
        for (method, _) in listed.iter().filter(of_mixtures) {
            let line = format!("prune {name} --method {method} --budget 0.85 {calib} --out nan-out/{method}");
            fails(&line, &parts);
        }
    }
}

#[test]
fn leftovers_of_killed_commands_are_listed_and_removed() {
    if !Path::new("/proc/self").exists() {
        return;
    }
    fs::create_dir_all(path("left")).unwrap();
    for name in [".model.tmp-4294967295", ".other.tmp-4294967295", ".model.old-4294967295"] {
        fs::create_dir_all(path("left").join(name)).unwrap();
    }
    write("left/.model.gguf.tmp-4294967295", "half of a file");
    fs::create_dir_all(path("left/.tokenizer.json.tmp-4294967295")).unwrap();
    fs::create_dir_all(path("left/model")).unwrap();
    let seen = succeeds("doctor left");
    shows(
        &seen,
        &["left/.model.tmp-4294967295; the next command with that output removes it", ".other.tmp-"],
    );
    assert_eq!(list(&json_of("doctor left")["leftovers"]).len(), 5);
    succeeds("convert dense --experts 4 --out left/model");
    succeeds("export dense --as gguf --out left/model.gguf");
    succeeds(&format!("data tokenizer {} --vocab 270 --out left/tokenizer.json", on_text()));
    let mut names: Vec<String> =
        fs::read_dir(path("left")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, [".other.tmp-4294967295", "model", "model.gguf", "tokenizer.json"]);
}

/// The profile that the reproductions here change.
fn profile() -> String {
    succeeds("reproduce --print-profile quick")
}

#[test]
fn numbers_of_a_profile_have_limits_in_plans_and_in_runs() {
    let profile = profile();
    let huge = "1000000000000";
    for (key, value, wanted) in [
        ("windows = 48", huge, "measure.windows is 1000000000000"),
        ("sweep_windows = 12", huge, "measure.sweep_windows is"),
        ("items = 100", huge, "measure.items is"),
        ("resamples = 2000", huge, "measure.resamples is"),
        ("prefill = 2048", huge, "measure.prefill is"),
        ("decode = 128", huge, "measure.decode is"),
        ("samples = 64", huge, "calibration.samples is"),
        ("bytes = 6_000_000", huge, "world.bytes is"),
        ("vocab = 1536", huge, "vocab"),
        ("seeds = 1", huge, "seeds is"),
        ("late_step = 0.05", "1e-12", "late_step is"),
        ("hidden = 128", huge, "hidden"),
        ("layers = 6", huge, "layers"),
        ("positions = 512", huge, "limits.toml: model.positions"),
        ("batch = 16", huge, "batch"),
        ("seq = 128", huge, "seq"),
    ] {
        let name = key.split(' ').next().unwrap();
        assert!(profile.contains(key), "{key}");
        write("limits.toml", profile.replacen(key, &format!("{name} = {value}"), 1));
        fails("reproduce --profile limits.toml --dry-run", &[wanted]);
        fails("reproduce --profile limits.toml --out limits-out", &[wanted]);
        assert!(!path("limits-out").exists(), "{key}: something was written");
    }
}

#[test]
fn a_stage_that_takes_long_ends_soon_after_a_signal() {
    let megabytes = profile().replacen("bytes = 6_000_000", "bytes = 400_000_000", 1);
    write("slow.toml", megabytes);
    let child = spawn("reproduce --profile slow.toml --out slow-out --quiet");
    wait_until("the text stage", || path("slow-out/cache").is_dir());
    std::thread::sleep(Duration::from_millis(300));
    ends_soon(child, &["dsmoe: stopped; run the same command with --resume to continue"]);
    fs::remove_dir_all(path("slow-out")).unwrap();
}

#[test]
fn long_work_between_checkpoints_ends_soon_after_a_signal() {
    // The first layer of a reconstruction takes hours.
    let line = format!(
        "reconstruct moe --teacher dense --calib text.txt --doc-separator {SEPARATOR} --samples 8 --seq 32 --steps 1000000 \
         --out slow-layers --quiet"
    );
    let child = spawn(&line);
    wait_for_handler(&child);
    std::thread::sleep(Duration::from_millis(300));
    ends_soon(child, &["dsmoe: stopped; run the same command with --resume to continue"]);
    // So does the optimum of so many sets of 12 users.
    let child = spawn("plan offload --users 12 --samples 100000 --heads 1 --quiet");
    wait_for_handler(&child);
    std::thread::sleep(Duration::from_millis(300));
    ends_soon(child, &["dsmoe: stopped; nothing is kept of an experiment, run it again"]);
}

/// The evaluation after the only step of a training.
#[test]
fn a_training_ends_soon_after_a_signal_while_it_evaluates() {
    let model = large_model("slow-evaluation/large");
    write("slow-evaluation/text.txt", read("text.txt").repeat(4));
    let line = format!(
        "train {model} --data slow-evaluation/text.txt --doc-separator {SEPARATOR} --steps 1 --batch 1 --seq 32 \
         --valid-fraction 0.95 --out slow-evaluation/run --quiet"
    );
    let child = spawn(&line);
    let metrics = path("slow-evaluation/run/metrics.jsonl");
    wait_until("the step", || fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\"grad_norm\"")));
    std::thread::sleep(Duration::from_millis(300));
    ends_soon(child, &["--resume"]);
    assert!(!fs::read_to_string(&metrics).unwrap().contains("eval_nll"), "the evaluation was over");
    assert!(
        read("slow-evaluation/run/checkpoints/step-00000001/state.json").contains("\"left\": \"evaluation\"")
    );
    assert!(!path("slow-evaluation/run/model.safetensors").exists());
    fs::remove_dir_all(path("slow-evaluation")).unwrap();
}

#[test]
fn bad_tokenizers_are_one_line_that_names_the_file() {
    let good: Value = serde_json::from_str(&read("dense/tokenizer.json")).unwrap();
    for (at, value) in [
        (
            "/post_processor",
            r#"{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<x>","type_id":0}}],"pair":[],"special_tokens":{}}"#,
        ),
        (
            "/post_processor",
            r#"{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}}],"pair":[],"special_tokens":{"<s>":{"id":"<s>","ids":[],"tokens":[]}}}"#,
        ),
        ("/model/continuing_subword_prefix", r###""##""###),
        ("/model/continuing_subword_prefix", r#""éé""#),
        ("/model/end_of_word_suffix", "7"),
        ("/model/vocab", "{}"),
        (
            "/added_tokens",
            r#"[{"id":0,"content":"","special":true,"single_word":false,"lstrip":false,"rstrip":false,"normalized":false}]"#,
        ),
        (
            "/pre_tokenizer",
            r#"{"type":"Split","pattern":{"Regex":"("},"behavior":"Isolated","invert":false}"#,
        ),
    ] {
        copy("dense", "bad-tokenizer");
        let mut json = good.clone();
        *json.pointer_mut(at).unwrap_or_else(|| panic!("{at}")) = serde_json::from_str(value).unwrap();
        write("bad-tokenizer/tokenizer.json", json.to_string());
        for line in ["generate bad-tokenizer --prompt The --max-tokens 2", "inspect bad-tokenizer"] {
            let seen = finish(command(line));
            assert!(
                matches!(seen.code, 0 | 1) && !seen.stderr.contains("panicked"),
                "{at} {value}: {}",
                seen.stderr
            );
            if seen.code == 1 {
                shows(&seen.stderr, &["tokenizer.json"]);
            }
        }
    }
}

/// A read-only folder is one line; the superuser may write there all the same.
#[test]
#[expect(clippy::print_stdout, reason = "a test that skips says so")]
fn a_folder_that_cannot_be_written_is_one_line() {
    fs::create_dir_all(path("read-only")).unwrap();
    let protect = |mode: &str| Command::new("chmod").args([mode]).arg(path("read-only")).status().unwrap();
    assert!(protect("555").success());
    if fs::write(path("read-only/probe"), "").is_ok() {
        println!("SKIP a_folder_that_cannot_be_written_is_one_line: permissions do not bind this user");
        protect("755");
        fs::remove_file(path("read-only/probe")).unwrap();
        return;
    }
    for line in
        ["convert dense --experts 4 --out read-only/x", "export dense --as gguf --out read-only/x.gguf"]
    {
        fails(line, &["read-only", "ermission denied"]);
    }
    protect("755");
}
