//! Every command with a tiny model of every family of dense models, as the table of docs/families.md states it, and the perplexity that
//! transformers has for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::family;
use serde_json::{Map, Value, json};

use crate::common::{copy, json_of, path, run, succeeds};

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
    let mut cases: Vec<Case> = index.iter().map(case).collect();
    cases.push(own_case(test, &zoo, "ministral"));
    Some((golden, cases))
}

/// Copies a model of a family that the zoo lacks, with a tokenizer of the zoo.
fn own_case(test: &str, zoo: &Path, name: &str) -> Case {
    let (families, dir) = ("../dsmoe-core/tests/data/families", format!("{test}/{name}"));
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(families).join(name);
    fs::create_dir_all(path(&dir)).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), path(&dir).join(file)).unwrap();
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::write(path(&dir).join(file), read_linked(&zoo.join("llama").join(file))).unwrap();
    }
    Case { name: name.to_owned(), is_base: true, dir, golden: json!({ "model_type": name }) }
}

/// A row of the table of docs/families.md: cells by the heads of their columns.
type Row = BTreeMap<String, String>;

/// The table of docs/families.md, by family.
fn table() -> BTreeMap<String, Row> {
    let text = include_str!("../../../docs/families.md");
    let cells = |line: &str| -> Vec<String> {
        line.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let mut lines = text.lines().skip_while(|line| !line.starts_with("| | inspect")).map(cells);
    let heads = lines.next().unwrap();
    let mut table = BTreeMap::new();
    for row in lines.skip(1).take_while(|row| row.len() == heads.len()) {
        let of_row: Row = heads.iter().cloned().zip(row.clone()).skip(1).collect();
        for family in row[0].split(", ") {
            assert!(table.insert(family.to_owned(), of_row.clone()).is_none(), "{family} has two rows");
        }
    }
    table
}

/// The tests below read what they expect from the table, so that it has no other words than they know.
#[test]
fn the_table_of_the_docs_names_all_families_and_commands() {
    let table = table();
    let dense = family::all().filter(|family| !family.has_experts());
    let mut families: Vec<&str> = dense.map(|family| family.model_type).collect();
    families.sort_unstable();
    assert!(table.keys().eq(families), "{:?}", table.keys());
    for (family, row) in &table {
        for (column, cell) in row {
            let known = match column.as_str() {
                "inspect" | "eval" | "generate" | "train" | "convert" | "HF export" => cell == "yes",
                "prune" => cell == "yes" || cell == "all but `llm-pruner-channel`",
                "GGUF" => cell == "yes" || cell == "without windows",
                // The refusals of a GPU are tested in dsmoe-core/tests/zoo.
                "GPU" => ["yes", "no", "without ", "wired"].iter().any(|start| cell.starts_with(start)),
                _ => false,
            };
            assert!(known, "{family}, {column}: {cell}");
        }
        assert_eq!(row.len(), 9, "{family}");
    }
}

#[test]
fn windows_of_text_have_the_nll_of_transformers() {
    let Some((golden, cases)) = zoo("families-nll") else { return };
    let text = golden.join("zoo/text.txt");
    let data = format!("--data '{}' --doc-separator <|endoftext|> --bos auto", text.display());
    let mut failures = Vec::new();
    for Case { name, dir, golden, .. } in cases.into_iter().filter(|case| case.golden["nll"].is_object()) {
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
    let (mut seen, table) = (Vec::new(), table());
    for Case { name, dir, golden, .. } in
        cases.into_iter().filter(|case| case.is_base || case.name == "olmo3")
    {
        let family = golden["model_type"].as_str().unwrap().to_owned();
        if !chosen.contains(&family.as_str()) {
            continue;
        }
        let row = &table[&family];
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
        let all_but_channels = row["prune"].contains("llm-pruner-channel");
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
            if method == "llm-pruner-channel" && all_but_channels {
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
        check_exports(&Exported { dir: &dir, experts: &experts, family: &family, row }, &nll);
        seen.push(family);
    }
    chosen
        .iter()
        .for_each(|family| assert!(seen.iter().any(|seen| seen == family), "{family} is in the zoo"));
}

/// A dense model and one with experts, to be exported.
struct Exported<'a> {
    dir: &'a str,
    experts: &'a str,
    family: &'a str,
    row: &'a Row,
}

/// Checks the columns of exports: what dsmoe reads back has the perplexity of the model.
fn check_exports(model: &Exported<'_>, nll: &dyn Fn(&str) -> f64) {
    let Exported { dir, experts, family, row } = *model;
    assert_eq!(row["HF export"], "yes");
    for (from, has_code) in [(dir, false), (experts, true)] {
        let out = format!("{from}-hf");
        succeeds(&format!("export {from} --as hf --out {out}"));
        assert!((nll(&out) - nll(from)).abs() < 1e-6, "{out}");
        assert_eq!(path(&out).join("modeling_dsmoe.py").exists(), has_code, "{out}");
    }

    // In the zoo windows are in other layers, and scales of attention are others, than llama.cpp has in its graph.
    let plain = format!("{dir}-plain");
    copy(dir, &plain);
    let mut config: Map<String, Value> =
        serde_json::from_slice(&fs::read(path(dir).join("config.json")).unwrap()).unwrap();
    config.remove("layer_types");
    if family == "qwen3" && config.get("attention_bias") == Some(&json!(true)) {
        let refused = run(&format!("export {plain} --as gguf --out {plain}.gguf"));
        assert!(refused.stderr.contains("llama.cpp reads no bias of o_proj for qwen3"), "{}", refused.stderr);
        return;
    }
    if row["GGUF"] == "without windows" {
        config.insert("sliding_window".into(), 5.into());
        config.insert("use_sliding_window".into(), true.into());
        config.insert("max_window_layers".into(), 1.into());
        fs::write(path(&plain).join("config.json"), Value::Object(config.clone()).to_string()).unwrap();
        let refused = run(&format!("export {plain} --as gguf --out {plain}.gguf"));
        assert!(
            refused.stderr.contains("sliding_window is of layers that have none in llama.cpp"),
            "{}",
            refused.stderr
        );
        config.insert("sliding_window".into(), Value::Null);
        config.insert("use_sliding_window".into(), false.into());
    }
    if family.starts_with("gemma") {
        config.insert("query_pre_attn_scalar".into(), config["head_dim"].clone());
        config.remove("sliding_window_pattern");
    }
    fs::write(path(&plain).join("config.json"), Value::Object(config).to_string()).unwrap();
    succeeds(&format!("export {plain} --as gguf --dtype f32 --out {plain}.gguf"));
    let (written, read) = (nll(&plain), nll(&format!("{plain}.gguf")));
    assert!((written - read).abs() < 1e-6, "{plain}: {written} and {read} from GGUF");
}

/// The text model of a model that also reads images runs. Models made from it need no vision tower.
#[test]
fn text_models_of_models_that_read_images_run() {
    let test = "families-images";
    let Some(shared) = dsmoe_kernels::testing::shared(test, "golden/zoo") else { return };
    for (name, family) in [("gemma3", "gemma3_text"), ("mistral3", "mistral")] {
        let Case { dir, .. } = own_case(test, &shared.join("golden/zoo"), name);
        let text = shared.join("golden/stories_100.txt");
        let text = format!("'{}' --doc-separator <|endoftext|> --bos auto", text.display());
        let nll = |dir: &str| {
            let report = json_of(&format!("eval {dir} --data {text} --seq 32 --limit-tokens 300"));
            report["nll"].as_f64().unwrap()
        };
        let seen = json_of(&format!("inspect {dir}"));
        assert_eq!(seen["family"], family);
        let note = format!("{name} reads images, too: its vision tower and projector are left out");
        assert_eq!(seen["notices"], json!([note]));
        for (command, out) in [
            (format!("export {dir} --as native"), format!("{dir}-alone")),
            (format!("export {dir} --as hf"), format!("{dir}-hf")),
            (
                format!("convert {dir} --experts 4 --router-init open --gate-value binary"),
                format!("{dir}-experts"),
            ),
        ] {
            let run = run(&format!("{command} --out {out}"));
            assert_eq!((run.code, run.stderr.contains(&note)), (0, true), "{command}: {}", run.stderr);
            assert!((nll(&out) - nll(&dir)).abs() < 1e-5, "{command}");
            assert_eq!(family_of(&out).1, family, "{command}");
        }
        succeeds(&format!("train {dir} --data {text} --steps 2 --batch 2 --seq 32 --out {dir}-trained"));
        assert_eq!(family_of(&format!("{dir}-trained")).0, family);
    }
}

#[test]
fn every_command_runs_llama_mistral_and_granite() {
    run_all("families-llama", &["llama", "mistral", "ministral", "granite"]);
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
