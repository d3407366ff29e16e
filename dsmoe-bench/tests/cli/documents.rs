//! The documents' commands run, and the page of the methods is what the program says.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::json_of;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// The blocks of a page that are marked `sh,run`, in their order.
#[cfg(unix)]
fn blocks(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line.trim() {
            "```sh,run" => {
                inside = true;
                found.push(String::new());
            }
            "```" => inside = false,
            _ if inside => *found.last_mut().expect("an open block") += &format!("{line}\n"),
            _ => {}
        }
    }
    found
}

/// Runs the blocks of every page one after the other in a folder of the page, which has a model `MODEL` and the text
/// `corpus.jsonl`.
#[test]
#[cfg(unix)]
fn the_commands_of_documents_run() {
    use std::process::{Command, Stdio};

    use crate::common::{PROGRAM, folder, path, text_of, write};

    let corpus: Vec<String> = text_of(1, 10_000)
        .split(crate::common::SEPARATOR)
        .map(|text| serde_json::json!({ "text": text }).to_string())
        .collect();
    let mut search = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect::<Vec<_>>();
    search.insert(0, Path::new(PROGRAM).parent().unwrap().to_path_buf());
    let (mut pages, mut ran) = (0, 0);
    let mut entries: Vec<PathBuf> =
        fs::read_dir(docs()).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for page in entries.into_iter().filter(|path| path.extension().is_some_and(|end| end == "md")) {
        let blocks = blocks(&fs::read_to_string(&page).unwrap());
        if blocks.is_empty() {
            continue;
        }
        let name = format!("documents/{}", page.file_stem().unwrap().display());
        write(&format!("{name}/corpus.jsonl"), corpus.join("\n"));
        std::os::unix::fs::symlink(folder().join("dense"), path(&format!("{name}/MODEL"))).unwrap();
        let run = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &blocks.concat()])
            .current_dir(path(&name))
            .env("PATH", std::env::join_paths(&search).unwrap())
            .env("RAYON_NUM_THREADS", "2")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{}: {text}", page.display());
        (pages, ran) = (pages + 1, ran + blocks.len());
    }
    assert!(pages >= 2 && ran >= 5, "{pages} pages, {ran} blocks");
}

/// docs/methods.md, written by `DSMOE_SNAPSHOTS=update`.
#[test]
fn the_page_of_methods_is_what_the_program_says() {
    let found = json_of("methods");
    let mut page = "# Methods\n\nThis page is what `dsmoe methods` prints. [The page of the crate](../baselines/README.md) says what each method \
                    is, with its paper, and [reproduce.md](reproduce.md) compares them. A setting is given by `--set NAME=VALUE`.\n"
        .to_owned();
    for method in found["methods"].as_array().unwrap() {
        let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().replace('|', "\\|");
        let source = match method["source"].as_str() {
            Some("experts") => "a mixture of experts",
            _ => "a dense model",
        };
        write!(
            page,
            "\n## {}\n\n{}.\n\nIt takes {source}; budgets count {} parameters.\n",
            text(method, "name"),
            text(method, "summary"),
            text(method, "counts")
        )
        .unwrap();
        let settings = method["settings"].as_array().unwrap();
        if !settings.is_empty() {
            page += "\n| setting | default | meaning |\n|---|---|---|\n";
        }
        for setting in settings {
            let default = match text(setting, "default") {
                empty if empty.is_empty() => "–".to_owned(),
                value => format!("`{value}`"),
            };
            writeln!(page, "| `{}` | {default} | {} |", text(setting, "name"), text(setting, "help"))
                .unwrap();
        }
    }
    let file = docs().join("methods.md");
    if std::env::var_os("DSMOE_SNAPSHOTS").is_some_and(|value| value == "update") {
        fs::write(&file, &page).unwrap();
    }
    let written = fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page, "docs/methods.md is old; run with DSMOE_SNAPSHOTS=update");
}
