//! Every public type of the libraries has an example in its documentation, which names it.

use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

use crate::source_folder;

/// A public type and its documentation.
struct Documented {
    place: PathBuf,
    name: String,
    /// The code of its examples.
    code: String,
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
    found
}

/// Returns the code of the examples in the lines of a documentation comment, without its comments, which use nothing. Blocks
/// of text are no code.
fn code_of(documentation: &[&str]) -> String {
    let comment = Regex::new(r"(?:^|\s)//.*$").expect("a pattern");
    let mut code = String::new();
    let mut block: Option<bool> = None;
    for line in documentation {
        block = match (line.trim().strip_prefix("```"), block) {
            (Some(kind), None) => Some(["", "no_run"].contains(&kind)),
            (Some(_), Some(_)) => None,
            (None, Some(true)) => {
                let statement = comment.replace(line, "");
                if !statement.trim().is_empty() {
                    code.extend([&*statement, "\n"]);
                }
                block
            }
            (None, _) => block,
        };
    }
    code
}

/// The public types of a crate. A type that is declared public can be reached: the lint `unreachable_pub` sees to that.
fn types(package: &str) -> Vec<Documented> {
    let declared = Regex::new(r"^ {0,4}pub (?:struct|enum|trait|type|union) (\w+)").expect("a pattern");
    let mut found = Vec::new();
    for path in sources(&source_folder(package)) {
        let text = fs::read_to_string(&path).expect("a source");
        let text = text.split("#[cfg(test)]\nmod tests {").next().expect("the text before the tests");
        let mut documentation: Vec<&str> = Vec::new();
        for line in text.lines() {
            if let Some(words) = line.trim_start().strip_prefix("///") {
                documentation.push(words.strip_prefix(' ').unwrap_or(words));
            } else if let Some(found_in) = declared.captures(line) {
                let (place, name) = (path.clone(), found_in[1].to_owned());
                found.push(Documented { place, name, code: code_of(&documentation) });
                documentation.clear();
            } else if !line.trim_start().starts_with(['#', ')']) {
                documentation.clear();
            }
        }
    }
    found
}

#[test]
fn every_public_type_of_the_libraries_has_an_example() {
    let mut without = Vec::new();
    let mut count = 0;
    for package in ["dsmoe-core", "dsmoe-router", "dsmoe-train"] {
        for Documented { place, name, code } in types(package) {
            count += 1;
            let word = Regex::new(&format!(r"\b{name}\b")).expect("a pattern");
            if !word.is_match(&code) {
                without.push(format!("{}: {name}", place.display()));
            }
        }
    }
    assert!(count > 200, "{count} types");
    assert!(without.is_empty(), "no example in the documentation of\n{}", without.join("\n"));
}

#[test]
fn comments_of_an_example_are_no_code() {
    let documentation =
        ["A type.", "```", "// Of `A`.", "let b = \"a://b\"; // and C", "```", "```text", "D", "```"];
    assert_eq!(code_of(&documentation), "let b = \"a://b\";\n");
}
