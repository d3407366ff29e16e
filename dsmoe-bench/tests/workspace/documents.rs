//! Links between the documents of the repository lead somewhere, the book has every page, and files that pages show can be read.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::Config;
use dsmoe_datasets::CorpusOptions;
use dsmoe_datasets::mixture::from_toml;
use regex::Regex;
use serde_json::{Map, Value, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

/// The Markdown files below a folder, but for what builds and hidden folders hold.
fn documents(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && !name.starts_with('.') && !["target", "record", "node_modules"].contains(&name) {
            found.extend(documents(&path));
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
    found
}

/// The text without fenced blocks and `code`, in which brackets are no links.
fn prose(text: &str) -> String {
    let mut inside = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        !inside && !fence
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    Regex::new(r"`[^`\n]*`").expect("a pattern").replace_all(&text, "`code`").into_owned()
}

/// The anchors of a page's headings, as GitHub and mdBook make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut found = BTreeSet::new();
    for line in text.lines() {
        inside ^= line.starts_with("```");
        if let Some(title) = line.strip_prefix('#').filter(|_| !inside) {
            let title = title.trim_start_matches('#').trim().to_lowercase();
            let kept = title.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
            found.insert(kept.map(|c| if c == ' ' { '-' } else { c }).collect());
        }
    }
    found
}

#[test]
fn links_of_documents_lead_somewhere() {
    let root = root();
    let pattern = Regex::new(r"\]\(([^)\s]+)\)").expect("a pattern");
    let (mut broken, mut links) = (Vec::new(), 0);
    for page in documents(&root) {
        let text = fs::read_to_string(&page).expect("a document");
        for link in pattern.captures_iter(&prose(&text)).map(|found| found[1].to_owned()) {
            if ["http://", "https://", "mailto:"].iter().any(|scheme| link.starts_with(scheme)) {
                continue;
            }
            links += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() { page.clone() } else { page.with_file_name(path) };
            let has_anchor = || fs::read_to_string(&target).is_ok_and(|text| anchors(&text).contains(anchor));
            // Paths of doc comments in a crate's README are names of Rust.
            let rust = path.contains("::");
            if !rust && !(target.exists() && (anchor.is_empty() || has_anchor())) {
                broken.push(format!("{}: {link}", page.strip_prefix(&root).expect("inside").display()));
            }
        }
    }
    assert!(links > 100, "{links}");
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

#[test]
fn anchors_are_those_of_headings_outside_of_code() {
    let found = anchors("# Decode `b1`, 2 threads\n```\n# no\n```\n## A-b_c");
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["a-b_c", "decode-b1-2-threads"]);
    assert_eq!(prose("[a](b) `[c](d)`\n```sh\n[e](f)\n```\nend"), "[a](b) `code`\nend");
}

/// The table of contents of the book, and the one of docs that GitHub shows, have all pages.
#[test]
fn the_book_has_every_page() {
    let docs = root().join("docs");
    let summary = fs::read_to_string(docs.join("SUMMARY.md")).expect("the book's contents");
    let index = fs::read_to_string(docs.join("README.md")).expect("the index");
    for page in documents(&docs) {
        let name =
            page.strip_prefix(&docs).expect("inside").to_str().expect("a plain name").replace('\\', "/");
        let link = format!("({name})");
        if name != "SUMMARY.md" {
            assert!(summary.contains(&link), "docs/SUMMARY.md has no {name}");
        }
        if !["SUMMARY.md", "README.md"].contains(&name.as_str()) && !name.starts_with("decisions/0") {
            assert!(index.contains(&link), "docs/README.md has no {name}");
        }
    }
    let decisions = fs::read_to_string(docs.join("decisions/README.md")).expect("the decisions' index");
    for page in documents(&docs.join("decisions")) {
        let name = page.file_name().and_then(|name| name.to_str()).expect("a plain name");
        assert!(name == "README.md" || decisions.contains(&format!("({name})")), "no {name}");
    }
}

/// Returns the fenced blocks of a page that are of this kind.
fn blocks(page: &str, kind: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(page)).expect("a document");
    let pattern = Regex::new(&format!("(?ms)^```{kind}\n(.*?)^```$")).expect("a pattern");
    pattern.captures_iter(&text).map(|found| found[1].to_owned()).collect()
}

/// Reads a block of JSON: an object, or keys of one.
fn object(block: &str) -> Map<String, Value> {
    let whole = if block.starts_with('{') { block.to_owned() } else { format!("{{{block}}}") };
    serde_json::from_str(&whole).unwrap_or_else(|cause| panic!("{block}{cause}"))
}

/// Reads the configuration of a model of two layers with further keys.
fn config_with(keys: &Map<String, Value>) -> Config {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "dsmoe", "vocab_size": 320, "hidden_size": 64,
        "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1,
    });
    config.as_object_mut().expect("an object").extend(keys.clone());
    Config::from_json(Path::new("config.json"), &config.to_string()).unwrap_or_else(|cause| panic!("{cause}"))
}

#[test]
fn configurations_of_the_page_of_formats_are_read() {
    dsmoe_baselines::register();
    let objects: Vec<Map<String, Value>> =
        blocks("docs/formats.md", "json").iter().map(|block| object(block)).collect();
    let [dsmoe, parts, mixture, topk, duo, manifest] = &objects[..] else {
        panic!("{} blocks", objects.len())
    };
    assert_eq!(config_with(dsmoe).moe.expect("experts").router.num_experts, 8);
    // Layers have the neurons of their experts.
    let shape = |neurons: u64| json!({"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": neurons});
    let mut both = dsmoe["dsmoe"].as_object().expect("an object").clone();
    both.extend(parts.clone());
    both.extend([("format_version".to_owned(), json!(2)), ("num_experts".to_owned(), json!(4))]);
    let shapes = json!([shape(4 * 384), shape(3 * 384)]);
    let both = [("dsmoe".to_owned(), Value::Object(both)), ("layer_shapes".to_owned(), shapes)];
    let moe = config_with(&Map::from_iter(both)).moe.expect("experts");
    assert_eq!((moe.experts(0), moe.experts(1), moe.core(1), moe.budget()), (4, 3, 1, Some(0.375)));
    assert_eq!(moe.map(1).expect("a map").num_gates(), 4);
    let mut keys = mixture.clone();
    keys.extend([
        ("base_model_type".to_owned(), json!("mixtral")),
        ("intermediate_size".to_owned(), json!(6 * 352)),
        ("layer_shapes".to_owned(), json!([shape(6 * 352), shape(4 * 352)])),
    ]);
    assert_eq!(config_with(&keys).mixture().expect("a mixture").experts, [6, 4]);
    for (keys, kind) in [(topk, "topk"), (duo, "duo")] {
        assert_eq!(config_with(keys).ffn.expect("an FFN").kind(), kind);
    }
    assert_eq!(manifest["format_version"], 1);
    assert!(manifest["files"][0]["xxh3_128"].is_string());
}

#[test]
fn the_mixture_of_the_page_of_text_is_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("mixture.toml");
    let blocks = blocks("docs/text.md", "toml");
    fs::write(&path, blocks.concat()).expect("a file");
    let sources = from_toml(&path, &CorpusOptions::default()).expect("a mixture");
    let named: Vec<(&str, f64)> = sources.iter().map(|source| (&source.name[..], source.weight)).collect();
    assert_eq!(named, [("web", 4.0), ("math", 2.0)]);
}

#[test]
fn the_program_of_the_page_of_additions_is_the_example() {
    let comment = Regex::new(r"(?m)(?:^|\s)//.*$").expect("a pattern");
    let bare = |text: &str| -> String { comment.replace_all(text, "").split_whitespace().collect() };
    let program = blocks("docs/extending.md", "rust,ignore").concat();
    let example = root().join("dsmoe-bench/examples/extend/src/main.rs");
    let example = bare(&fs::read_to_string(example).expect("the example"));
    assert!(!program.is_empty() && example.ends_with(&bare(&program)), "{program}\n{example}");
}
