//! The help of every command and a few dozen error texts, word for word.
//!
//! `DSMOE_SNAPSHOTS=update cargo test -p dsmoe-bench --test cli snapshots` writes the files anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use crate::common::{Run, run, succeeds};

/// Command lines that fail, run in the folder of the models `dense` and `moe` and the text `text.txt`.
const WRONG: [&str; 44] = [
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
];

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
