//! Every command with a tiny model of every family, and the perplexity that transformers has for it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{at, command, finish, fixture, json_of, succeeds};

/// A model of the zoo.
struct Case {
    name: String,
    /// It has weights of its own.
    is_base: bool,
    dir: PathBuf,
    golden: Value,
}

/// Copies a file that may be a link, or a link that became its target's name when it was copied.
fn copy_linked(from: &Path, to: &Path) {
    let bytes = fs::read(from).unwrap();
    let bytes = match std::str::from_utf8(&bytes) {
        Ok(target) if target.starts_with("../") => fs::read(from.with_file_name(target.trim())).unwrap(),
        _ => bytes,
    };
    fs::write(to, bytes).unwrap();
}

/// The shared folder of golden data, and copies of the zoo's models; none without the shared data.
fn zoo(test: &str) -> Option<(PathBuf, Vec<Case>)> {
    let shared = dsmoe_kernels::testing::shared(test, "golden/zoo")?;
    let zoo = shared.join("golden/zoo");
    let index = fs::read(zoo.join("index.json")).unwrap();
    let index: serde_json::Map<String, Value> = serde_json::from_slice(&index).unwrap();
    let copies = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    if copies.exists() {
        fs::remove_dir_all(&copies).unwrap();
    }
    let case = |(name, case): (&String, &Value)| {
        let (from, dir) = (zoo.join(name), copies.join(name));
        fs::create_dir_all(&dir).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            copy_linked(&from.join(file), &dir.join(file));
        }
        let golden = serde_json::from_slice(&fs::read(from.join("golden.json")).unwrap()).unwrap();
        Case { name: name.clone(), is_base: case["weights_of"] == name.as_str(), dir, golden }
    };
    let cases = index.iter().map(case).collect();
    Some((shared.join("golden"), cases))
}

#[test]
fn windows_of_text_have_the_nll_of_transformers() {
    let Some((golden, cases)) = zoo("families-nll") else { return };
    let text = golden.join("zoo/text.txt");
    let mut failures = Vec::new();
    for Case { name, dir, golden, .. } in cases {
        let eval = ["eval", at(&dir), "--data", at(&text), "--seq", "64", "--bos", "auto", "--json"];
        let run = finish(command(&[&eval[..], &["--doc-separator", "<|endoftext|>"]].concat()));
        let Ok(report) = serde_json::from_str::<Value>(&run.stdout) else {
            failures.push(format!("{name}: {}", run.stderr));
            continue;
        };
        let of = |value: &Value, key: &str| value[key].as_f64().unwrap();
        let differs = (of(&report, "nll") - of(&golden["nll"], "nll")).abs();
        if report["predicted"] != golden["nll"]["predicted"] || differs.is_nan() || differs > 2e-5 {
            failures.push(format!("{name}: {} tokens, nll differs by {differs}", report["predicted"]));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The bytes of all tensors, in the order of the file.
fn weights(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let checkpoint = dsmoe_core::checkpoint::Checkpoint::open(dir).unwrap();
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    names.into_iter().map(|name| (name.clone(), checkpoint.bytes(&name).unwrap().to_vec())).collect()
}

#[test]
fn every_command_runs_every_family() {
    let Some((golden, cases)) = zoo("families-commands") else { return };
    let fixture = fixture();
    let text = fixture.dir.join("families.txt");
    fs::write(&text, fs::read_to_string(golden.join("stories_100.txt")).unwrap()).unwrap();
    let data = ["--data", at(&text), "--doc-separator", "<|endoftext|>"];
    let calib = ["--calib", at(&text), "--doc-separator", "<|endoftext|>", "--samples", "12", "--seq", "32"];
    for Case { name, is_base, dir: model, .. } in cases {
        if !is_base && !name.ends_with("-window") && name != "olmo3" {
            continue;
        }
        let out = |what: &str| fixture.out(&format!("family-{name}-{what}"));
        let nll = |model: &Path| {
            let eval = ["eval", at(model), "--seq", "32", "--limit-tokens", "300", "--bos", "auto"];
            json_of(&[&eval[..], &data].concat())["nll"].as_f64().unwrap()
        };
        let inspected = json_of(&["inspect", at(&model)]);
        let family = inspected["family"].as_str().unwrap().to_owned();
        assert_eq!(inspected["model_type"], family.as_str(), "{name}");
        let dense = nll(&model);
        succeeds(&["generate", at(&model), "--prompt", "Once", "--max-tokens", "4", "--temperature", "0"]);

        // All experts open are the dense model, and it comes back to the byte.
        let experts = out("experts");
        let convert =
            ["convert", at(&model), "--experts", "4", "--partition", "random", "--router-init", "open"];
        succeeds(&[&convert[..], &["--gate-value", "binary", "--out", at(&experts)]].concat());
        let seen = json_of(&["inspect", at(&experts)]);
        assert_eq!((&seen["model_type"], &seen["family"]), (&"dsmoe".into(), &family.as_str().into()));
        let open = nll(&experts);
        assert!((open - dense).abs() < 1e-5, "{name}: {open} with all experts, {dense} dense");
        let back = out("back");
        succeeds(&["export", at(&experts), "--as", "dense", "--out", at(&back)]);
        assert!(weights(&back) == weights(&model), "{name}: the export has other weights");
        assert_eq!(json_of(&["inspect", at(&back)])["model_type"], family.as_str(), "{name}");

        // Training runs, lowers nothing to NaN, and its directory is read again.
        for (from, what) in [(&model, "dense"), (&experts, "moe")] {
            let trained = out(&format!("trained-{what}"));
            let train =
                ["train", at(from), "--out", at(&trained), "--steps", "2", "--batch", "2", "--seq", "32"];
            succeeds(&[&train[..], &data].concat());
            assert!(nll(&trained).is_finite(), "{name} {what}");
            let of = &json_of(&["inspect", at(&trained)])["family"];
            assert_eq!(of, family.as_str(), "{name} {what}");
        }

        // Routers fitted to text, and every kind of method.
        let calibrated = out("calibrated");
        let convert =
            ["convert", at(&model), "--experts", "4", "--active-target", "0.5", "--out", at(&calibrated)];
        succeeds(&[&convert[..], &calib].concat());
        assert!(nll(&calibrated).is_finite(), "{name} calibrated");
        let tied_to_width = ["gemma", "gemma2", "gemma3_text"].contains(&family.as_str());
        for (method, budget) in [
            ("magnitude", "0.8"),
            ("wanda", "0.8"),
            ("sparsegpt", "0.8"),
            ("llm-pruner-block", "0.85"),
            ("llm-pruner-channel", "0.85"),
            ("llama-moe", "0.85"),
            ("moefication", "0.85"),
            ("random-k", "0.85"),
        ] {
            let pruned = out(method);
            let prune = ["prune", at(&model), "--method", method, "--budget", budget, "--out", at(&pruned)];
            let run = finish(command(&[&prune[..], &calib].concat()));
            if method == "llm-pruner-channel" && tied_to_width {
                assert!(
                    run.stderr.contains("multiplied by the root of hidden_size"),
                    "{name}: {}",
                    run.stderr
                );
                continue;
            }
            assert_eq!(run.code, 0, "{name} {method}: {}", run.stderr);
            assert!(nll(&pruned).is_finite(), "{name} {method}");
            assert_eq!(json_of(&["inspect", at(&pruned)])["family"], family.as_str(), "{name} {method}");
        }
    }
}
