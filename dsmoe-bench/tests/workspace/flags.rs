//! Libraries do not speak the command line: no string of theirs names a flag. An error names a setting in its remedy, and
//! dsmoe-bench words it as a flag.

use std::fs;
use std::path::PathBuf;

use regex::Captures;

use crate::imports::{comments_and_literals, files, without_tests};
use crate::{LAYERS, source_folder};

/// Flags of other programs: of cargo, of the compiler of GPU kernels, and of the download commands of datasets.
const OTHERS: &str =
    "--features --gpu-architecture --std --ptxas-options --no-cache --repo-type --include --local-dir";

#[test]
fn no_string_of_a_library_names_a_flag() {
    let mut found = Vec::new();
    for (package, _) in LAYERS.iter().filter(|(package, _)| *package != "dsmoe-bench") {
        // Tests have files or folders of their own.
        let is_test = |file: &PathBuf| {
            let within = file.strip_prefix(source_folder(package)).unwrap_or(file);
            within.iter().any(|part| part == "tests" || part == "tests.rs")
        };
        for file in files(&source_folder(package)).into_iter().filter(|file| !is_test(file)) {
            let text = fs::read_to_string(&file).expect("source file");
            let strings = strings(&text).into_iter().filter(|string| names_a_flag(string));
            found.extend(strings.map(|string| format!("{}: {string}", file.display())));
        }
    }
    assert!(found.is_empty(), "strings of libraries name flags:\n{}", found.join("\n"));
}

#[test]
fn flags_are_found_in_strings_alone() {
    let text = r##"fn f() { g("use --batch 8"); } // --not-this
        const A: &str = r#"--features x"#; const B: &str = "a -- b --- c";
        #[cfg(test)] mod tests { const C: &str = "--seq"; }"##;
    let found = strings(text);
    let named: Vec<&str> = found.into_iter().filter(|string| names_a_flag(string)).collect();
    assert_eq!(named, ["\"use --batch 8\""]);
}

/// The strings of a file outside of its tests.
fn strings(text: &str) -> Vec<&str> {
    const MARK: char = '\u{1}';
    let mut all = Vec::new();
    let code =
        comments_and_literals().replace_all(text, |found: &Captures<'_>| match found.name("comment") {
            Some(_) => " ".to_owned(),
            None => {
                all.push(&text[found.get_match().range()]);
                format!("{MARK}{}{MARK}", all.len() - 1)
            }
        });
    let (code, _) = without_tests(&code);
    let numbers = code.split(MARK).skip(1).step_by(2);
    numbers.map(|number| all[number.parse::<usize>().expect("a number")]).collect()
}

fn names_a_flag(string: &str) -> bool {
    let others = |rest: &str| OTHERS.split(' ').any(|other| rest.starts_with(other));
    string.match_indices("--").any(|(at, _)| {
        let rest = &string[at..];
        rest[2..].starts_with(|c: char| c.is_ascii_lowercase())
            && !string[..at].ends_with('-')
            && !others(rest)
    })
}
