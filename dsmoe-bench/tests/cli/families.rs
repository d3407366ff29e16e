//! Every command with a tiny model of every family, and the perplexity that transformers has for it.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::Checkpoint;
use serde_json::{Map, Value};

use crate::common::{json_of, path, run, succeeds};

/// A model of the zoo, copied to a directory below the folder of the tests.
struct Case {
    name: String,
    /// It has weights of its own.
    is_base: bool,
    dir: String,
    golden: Value,
}

/// Reads a file that may be a link, or a link that became its target's name when it was copied.
fn read_linked(file: &Path) -> Vec<u8> {
    let bytes = fs::read(file).unwrap();
    match std::str::from_utf8(&bytes) {
        Ok(target) if target.starts_with("../") => fs::read(file.with_file_name(target.trim())).unwrap(),
        _ => bytes,
    }
}

/// The shared folder of golden data, and copies of the zoo's models; none without the shared data.
fn zoo(test: &str) -> Option<(PathBuf, Vec<Case>)> {
    let golden = dsmoe_kernels::testing::shared(test, "golden/zoo")?.join("golden");
    let zoo = golden.join("zoo");
    let index: Map<String, Value> =
        serde_json::from_slice(&fs::read(zoo.join("index.json")).unwrap()).unwrap();
    let case = |(name, case): (&String, &Value)| {
        let (from, dir) = (zoo.join(name), format!("{test}/{name}"));
        fs::create_dir_all(path(&dir)).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            fs::write(path(&dir).join(file), read_linked(&from.join(file))).unwrap();
        }
        let golden = serde_json::from_slice(&fs::read(from.join("golden.json")).unwrap()).unwrap();
        Case { name: name.clone(), is_base: case["weights_of"] == name.as_str(), dir, golden }
    };
    let cases = index.iter().map(case).collect();
    Some((golden, cases))
}

#[test]
fn windows_of_text_have_the_nll_of_transformers() {
    let Some((golden, cases)) = zoo("families-nll") else { return };
    let text = golden.join("zoo/text.txt");
    let data = format!("--data '{}' --doc-separator <|endoftext|> --bos auto", text.display());
    let mut failures = Vec::new();
    for Case { name, dir, golden, .. } in cases {
        let run = run(&format!("eval {dir} {data} --seq 64 --json"));
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

/// The bytes of all tensors, in the order of their names.
fn tensors(dir: &str) -> Vec<(String, Vec<u8>)> {
    let checkpoint = Checkpoint::open(&path(dir)).unwrap();
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    names.into_iter().map(|name| (name.clone(), checkpoint.bytes(&name).unwrap().to_vec())).collect()
}

fn family_of(dir: &str) -> (Value, Value) {
    let seen = json_of(&format!("inspect {dir}"));
    (seen["model_type"].clone(), seen["family"].clone())
}

/// Runs the commands with the models of the zoo that have weights of their own and that `chosen` takes.
fn run_all(test: &str, chosen: &[&str]) {
    let Some((golden, cases)) = zoo(test) else { return };
    let text = golden.join("stories_100.txt");
    let text = format!("'{}' --doc-separator <|endoftext|> --bos auto", text.display());
    let calib = format!("--calib {text} --samples 12 --seq 32");
    let nll = |dir: &str| {
        let report = json_of(&format!("eval {dir} --data {text} --seq 32 --limit-tokens 300"));
        report["nll"].as_f64().unwrap()
    };
    let mut seen = Vec::new();
    for Case { name, dir, golden, .. } in
        cases.into_iter().filter(|case| case.is_base || case.name == "olmo3")
    {
        let family = golden["model_type"].as_str().unwrap().to_owned();
        if !chosen.contains(&family.as_str()) {
            continue;
        }
        let (dense_type, own_type) = (Value::from(family.as_str()), Value::from("dsmoe"));
        assert_eq!(family_of(&dir), (dense_type.clone(), dense_type.clone()));
        let dense = nll(&dir);
        succeeds(&format!("generate {dir} --prompt Once --max-tokens 4 --temperature 0"));

        // All experts open are the dense model, and it comes back to the byte.
        let experts = format!("{dir}-experts");
        let open = "--router-init open --gate-value binary";
        let run_of = run(&format!("convert {dir} --experts 4 --partition random {open} --out {experts}"));
        assert_eq!(run_of.code, 0, "{name}: {}", run_of.stderr);
        let norm_follows = ["olmo2", "olmo3", "gemma2", "gemma3_text"].contains(&family.as_str());
        assert_eq!(run_of.stderr.contains("a norm follows the FFN"), norm_follows, "{}", run_of.stderr);
        assert_eq!(family_of(&experts), (own_type, dense_type.clone()));
        let open = nll(&experts);
        assert!((open - dense).abs() < 1e-5, "{name}: {open} with all experts, {dense} dense");
        succeeds(&format!("export {experts} --as dense --out {dir}-back"));
        assert!(tensors(&format!("{dir}-back")) == tensors(&dir), "{name}: the export has other weights");
        assert_eq!(family_of(&format!("{dir}-back")), (dense_type.clone(), dense_type.clone()));

        for from in [&dir, &experts] {
            let trained = format!("{from}-trained");
            succeeds(&format!("train {from} --data {text} --steps 2 --batch 2 --seq 32 --out {trained}"));
            assert!(nll(&trained).is_finite(), "{trained}");
            assert_eq!(family_of(&trained).1, dense_type, "{trained}");
        }

        succeeds(&format!("convert {dir} --experts 4 --active-target 0.5 {calib} --out {dir}-calibrated"));
        assert!(nll(&format!("{dir}-calibrated")).is_finite(), "{name}");
        let tied_to_width = family.starts_with("gemma");
        for (method, budget) in [
            ("magnitude", 0.8),
            ("wanda", 0.8),
            ("sparsegpt", 0.8),
            ("llm-pruner-block", 0.85),
            ("llm-pruner-channel", 0.85),
            ("llama-moe", 0.85),
            ("moefication", 0.95),
            ("random-k", 0.85),
            ("flap", 0.9),
            ("static-core", 0.9),
            ("cmoe --set experts=4", 0.9),
            ("depth --set layers=1 --set tokens=64", 0.85),
        ] {
            let pruned = format!("{dir}-{}", method.split(' ').next().unwrap_or(method));
            let run = run(&format!("prune {dir} --method {method} --budget {budget} {calib} --out {pruned}"));
            if method == "llm-pruner-channel" && tied_to_width {
                assert!(run.stderr.contains("multiplied by the root of hidden_size"), "{}", run.stderr);
                continue;
            }
            if method.starts_with("depth") && run.stderr.contains("rotations by their number") {
                continue;
            }
            assert_eq!(run.code, 0, "{name} {method}: {}", run.stderr);
            assert!(nll(&pruned).is_finite(), "{name} {method}");
            assert_eq!(family_of(&pruned).1, dense_type, "{name} {method}");
        }
        seen.push(family);
    }
    chosen
        .iter()
        .for_each(|family| assert!(seen.iter().any(|seen| seen == family), "{family} is in the zoo"));
}

#[test]
fn every_command_runs_llama_mistral_and_granite() {
    run_all("families-llama", &["llama", "mistral", "granite"]);
}

#[test]
fn every_command_runs_qwen_and_smollm() {
    run_all("families-qwen", &["qwen2", "qwen3", "smollm3"]);
}

#[test]
fn every_command_runs_phi_and_olmo() {
    run_all("families-phi", &["phi3", "olmo2", "olmo3"]);
}

#[test]
fn every_command_runs_gemma() {
    run_all("families-gemma", &["gemma", "gemma2", "gemma3_text"]);
}
