//! Links between the documents of the repository lead somewhere, and the book has every page.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

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
