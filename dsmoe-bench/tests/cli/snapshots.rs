//! The help of every command and a few dozen error texts, word for word.
//!
//! `DSMOE_SNAPSHOTS=update cargo test -p dsmoe-bench --test cli snapshots` writes the files anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::{Run, config, copy, path, read, run, succeeds, weights, write};

/// Command lines that fail, run in the folder of the models `dense` and `moe` and the text `text.txt`.
const WRONG: [&str; 102] = [
    "",
    "nonsense",
    "inspect nowhere",
    "inspect dense --mean-active 2",
    "convert nowhere --experts 4 --out out-snapshot",
    "convert dense --experts 3 --out out-snapshot",
    "convert dense --experts 0 --out out-snapshot",
    "convert dense --experts 4",
    "convert moe --experts 4 --out out-snapshot",
    "convert dense --experts 4 --router-init sideways --out out-snapshot",
    "convert dense --experts 4 --partition nowhere.json --out out-snapshot",
    "convert dense --experts 4 --threshold 2 --out out-snapshot",
    "prune dense --method nonsense --budget 0.5 --out out-snapshot",
    "prune dense --method wanda --budget 2 --out out-snapshot",
    "prune dense --method wanda --budget 0.001 --out out-snapshot",
    "prune dense --method wanda --budget 0.7 --out out-snapshot",
    "export moe --as nonsense --out out-snapshot",
    "export dense --as dense --out out-snapshot",
    "export dense --as llama-moe --out out-snapshot",
    "train dense --data nowhere.txt --steps 1 --out out-snapshot",
    "train dense --data text.txt --out out-snapshot",
    "train dense --data text.txt --steps 1 --set nonsense=1 --out out-snapshot",
    "train dense --data text.txt --steps 1 --set lr=fast --out out-snapshot",
    "train dense --data text.txt --steps 1 --seq 4096 --out out-snapshot",
    "train dense --data text.txt --steps 1 --batch 0 --out out-snapshot",
    "train dense --data text.txt --steps 1 --batch 100000000 --seq 64 --out out-snapshot",
    "train dense --data text.txt --steps 1 --seq 16 --active-target 0.5 --out out-snapshot",
    "train dense --data text.txt --steps 1 --seq 16 --valid-fraction 2 --out out-snapshot",
    "train dense --data text.txt --steps 1 --sparsity 1 --active-target 0.5 --out out-snapshot",
    "train dense --data text.txt --steps 1 --seq 16 --out dense",
    "eval dense",
    "eval dense --data nowhere.txt",
    "eval dense --data text.txt --seq 1",
    "eval moe --data text.txt --threshold 2",
    "eval dense --data text.txt --perplexity window --stride 4",
    "eval dense --tasks nonsense",
    "eval dense --tasks piqa",
    "generate dense --prompt-file nowhere.txt",
    "generate dense --prompt x --temperature=-1",
    "generate dense --prompt x --top-p 2",
    "init --preset nonsense --out out-snapshot",
    "bench ffn --experts 3 --repeats 1",
    "bench compare text.txt text.txt",
    "reproduce --profile nonsense",
    "inspect nowhere/name",
    "inspect nowhere/name/",
    "inspect nowhere/name/x.gguf",
    "inspect https://huggingface.co/nowhere/name",
    "inspect hf://nowhere/name",
    "inspect wrong/nothing",
    "inspect wrong/adapter",
    "inspect wrong/models--a--b",
    "inspect wrong/pointer.gguf",
    "inspect wrong/nan",
    "eval dense --data wrong/pointer.txt",
    "eval dense --data wrong/pointer.txt.gz",
    "eval dense --data wrong/pointer.parquet",
    "eval dense --data wrong/text.txt.gz",
    "eval dense --data wrong/lzma.txt.lzma",
    "eval dense --data wrong/utf32.txt",
    "eval dense --data wrong/array.jsonl",
    "eval dense --data wrong/pretty.json",
    "generate wrong/pointer --prompt x",
    "generate wrong/panic --prompt x",
    "generate wrong/list --chat --prompt x",
    "generate wrong/number --chat --prompt x",
    "generate wrong/empty --chat --prompt x",
    "export wrong/bias --as gguf --out out-snapshot",
    "export wrong/untied --as gguf --out out-snapshot",
    "export wrong/infinite --as hf --out out-snapshot",
    "export wrong/large --as hf --dtype bf16 --out out-snapshot",
    "train dense --data text.txt --steps 1 --seq 16 --out moe --dry-run",
    "train dense --data text.txt --steps 1 --seq 16 --active-target 25%..100% --out out-snapshot",
    "reproduce --out moe --dry-run",
    "reproduce --budgets 25% --dry-run",
    "convert dense --active-target 40 --experts 4 --out out-snapshot",
    "generate dense --prompt x --top-p 140%",
    "train moe --data text.txt --steps 1 --active-target 40 --out out-snapshot",
    "train moe --data text.txt --steps 1 --active-target 25..100 --out out-snapshot",
    "train moe --data text.txt --steps 1 --set active_target=40 --out out-snapshot",
    "eval moe --data text.txt --active 40",
    "reproduce --budgets 40 --dry-run",
    "bench ffn --active 40 --repeats 1",
    "bench compare text.txt text.txt --fail-above 3",
    "prune dense --method wanda --budget 25",
    "prune dense --method dense --budget 25 --dry-run",
    "prune dense --method dense --budget 100% --out moe --dry-run",
    "prune dense --method wanda --budget 60% --calib nowhere.txt --dry-run",
    "prune dense --method thresholds --budget 1% --dry-run",
    "grow dense --layers 3 --out moe --dry-run",
    "reproduce --profile related --out moe --dry-run",
    "reproduce --out text.txt --dry-run",
    "train dense --data text.txt --steps 1 --seq 16 --out text.txt --dry-run",
    "train dense --data text.txt --steps 1 --seq 16 --cache text.txt --out out-snapshot --dry-run",
    "train dense --data text.txt --steps 1 --seq 16 --teacher wrong/other --out out-snapshot --dry-run",
    "reproduce --mixture text.txt --dry-run",
    "reproduce --data text.txt --dry-run",
    "inspect wrong/unfinished",
    "convert wrong/unfinished --experts 4 --out out-snapshot",
    "prune wrong/unfinished --method dense --budget 100% --out out-snapshot",
    "generate wrong/unfinished --prompt x",
    "bench decode wrong/unfinished",
];

/// Writes what the lines about `wrong/` are about.
fn write_wrong() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n";
    for name in
        ["nothing", "adapter", "models--a--b/snapshots/abc", "nan", "unfinished/checkpoints/step-00000100"]
    {
        fs::create_dir_all(path(&format!("wrong/{name}"))).unwrap();
    }
    write("wrong/adapter/adapter_config.json", "{}");
    write("wrong/models--a--b/snapshots/abc/config.json", "{}");
    write("wrong/nan/config.json", "{\n \"model_type\": \"llama\",\n \"router_aux\": NaN\n}");
    for name in ["pointer.gguf", "pointer.txt", "pointer.txt.gz", "pointer.parquet"] {
        write(&format!("wrong/{name}"), pointer);
    }
    write("wrong/text.txt.gz", "once upon a time");
    write("wrong/lzma.txt.lzma", b"\x5d\0\0\x80\0\xff\xff");
    write("wrong/utf32.txt", b"\xff\xfe\0\0a\0\0\0");
    write("wrong/array.jsonl", "[{\"text\": \"a\"}]");
    write("wrong/pretty.json", "{\n \"text\": \"a\"\n}");
    for name in ["pointer", "panic", "list", "number", "empty", "infinite", "large"] {
        copy("dense", format!("wrong/{name}"));
    }
    write("wrong/pointer/tokenizer.json", pointer);
    let mut tokenizer: Value = serde_json::from_str(&read("tokenizer.json")).unwrap();
    // The tokenizers crate panics on a map that is none.
    tokenizer["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    write("wrong/panic/tokenizer.json", tokenizer.to_string());
    let templates = json!([{"name": "tool_use", "template": "x"}]);
    for (name, template) in [("list", templates), ("number", json!(5)), ("empty", json!(""))] {
        let config = json!({"bos_token": "<s>", "chat_template": template});
        write(&format!("wrong/{name}/tokenizer_config.json"), config.to_string());
    }
    for (name, value) in [("infinite", f32::INFINITY), ("large", 3.4e38)] {
        let mut bytes = weights(&format!("wrong/{name}"));
        let end = bytes.len() - 4;
        bytes[end..].copy_from_slice(&value.to_le_bytes());
        write(&format!("wrong/{name}/model.safetensors"), bytes);
    }
    let mut other = config();
    other["vocab_size"] = 999.into();
    write("wrong/other/config.json", other.to_string());
    for (name, changes) in [
        ("bias", json!({"model_type": "qwen3", "attention_bias": true})),
        ("untied", json!({"model_type": "gemma", "tie_word_embeddings": false})),
    ] {
        let mut config = config();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        write(&format!("wrong/{name}.json"), config.to_string());
        succeeds(&format!("init --config wrong/{name}.json --tokenizer tokenizer.json --out wrong/{name}"));
    }
}

#[test]
fn help_is_as_it_was() {
    let mut texts = BTreeMap::new();
    let mut queue = vec![String::new()];
    while let Some(name) = queue.pop() {
        let text = succeeds(&format!("{name} --help"));
        let commands =
            text.split_once("Commands:\n").map_or("", |(_, rest)| rest.split("\n\n").next().unwrap_or(""));
        let names = commands.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
        let names = names.filter(|name| !name.is_empty() && *name != "help");
        queue.extend(names.map(|command| format!("{name} {command}").trim().to_owned()));
        let file = if name.is_empty() { "dsmoe".to_owned() } else { name.replace(' ', "-") };
        texts.insert(format!("help/{file}.txt"), text);
    }
    assert!(texts.len() > 15, "{:?}", texts.keys());
    compare("help", &texts);
}

#[test]
fn errors_are_as_they_were() {
    write_wrong();
    let mut text = String::new();
    for line in WRONG {
        let Run { code, stdout, stderr } = run(&format!("{line} --quiet"));
        assert!([1, 2].contains(&code), "dsmoe {line}: {code}: {stdout}{stderr}");
        let _ = writeln!(text, "$ dsmoe {line}\n{stdout}{}[{code}]\n", machine_free(&stderr));
    }
    compare("errors", &BTreeMap::from([("errors.txt".to_owned(), text)]));
}

/// Replaces the memory of this machine, which some errors name.
fn machine_free(text: &str) -> String {
    match text.split_once("this machine has ") {
        Some((before, rest)) => {
            let after = rest.split_once(';').map_or("", |(_, after)| after);
            format!("{before}this machine has MEMORY;{after}")
        }
        None => text.to_owned(),
    }
}

/// Compares with the files of tests/cli/snapshots whose names begin with `kind`, or writes them.
fn compare(kind: &str, texts: &BTreeMap<String, String>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cli/snapshots");
    if std::env::var("DSMOE_SNAPSHOTS").is_ok_and(|word| word == "update") {
        let _ = fs::remove_dir_all(folder.join(kind));
        for (name, text) in texts {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        return;
    }
    let advice = "if that is meant, run the test with DSMOE_SNAPSHOTS=update";
    for (name, text) in texts {
        let kept = fs::read_to_string(folder.join(name)).unwrap_or_default();
        let changed = kept.lines().zip(text.lines()).find(|(old, new)| old != new);
        assert!(kept == *text, "{name} is another, first in {changed:?}; {advice}");
    }
    if let Ok(entries) = fs::read_dir(folder.join(kind)) {
        for entry in entries {
            let name = format!("{kind}/{}", entry.unwrap().file_name().to_string_lossy());
            assert!(texts.contains_key(&name), "{name} belongs to no command; {advice}");
        }
    }
}
