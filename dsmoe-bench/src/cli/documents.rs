//! The commands that documents name can be parsed.

use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap::error::ErrorKind;

use super::Cli;

/// The words of a line as a shell separates them, without variables; what follows `#`, `>`, `|`, `&&` or `;` is left out.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut depth) = (Vec::new(), None::<String>, None, 0);
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            (c, Some(_)) => word.get_or_insert_default().push(c),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('$', None) if chars.peek() == Some(&'(') => {
                chars.next();
                depth += 1;
                word.get_or_insert_default().push('x');
            }
            (')', None) if depth > 0 => depth -= 1,
            (_, None) if depth > 0 => {}
            ('#', None) if word.is_none() => break,
            ('>' | '|' | ';' | '&', None) => break,
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, None) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    // An ellipsis stands for more arguments.
    words.retain(|word| !["..", "...", "…"].contains(&word.as_str()));
    if !cfg!(feature = "cuda") {
        words.iter_mut().filter(|word| word.starts_with("cuda:")).for_each(|word| *word = "cpu".to_owned());
    }
    words
}

/// The commands of a text that begin a line or follow a prompt or a command line, in fenced blocks, with continued lines joined.
fn commands(text: &str) -> Vec<String> {
    let mut inside = false;
    let mut found: Vec<String> = Vec::new();
    let mut continued = false;
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with("```") {
            inside = !inside;
        } else if inside {
            let line = line.trim_start_matches("$ ");
            match (continued, line.strip_suffix('\\')) {
                (true, rest) => {
                    let last = found.last_mut().expect("a command that goes on");
                    last.push_str(rest.unwrap_or(line));
                    continued = rest.is_some();
                }
                (false, rest) if line.starts_with("dsmoe ") => {
                    found.push(rest.unwrap_or(line).to_owned());
                    continued = rest.is_some();
                }
                _ => {}
            }
        }
    }
    found
}

/// Every `.md` file of a folder.
fn pages(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "md")).collect()
}

/// An outline leaves arguments out; only a wrong one is an error here.
fn is_wrong(kind: ErrorKind) -> bool {
    !matches!(
        kind,
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::MissingRequiredArgument
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    )
}

#[test]
fn commands_of_the_documents_can_be_parsed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    if !root.join("docs").is_dir() {
        return; // a package without the repository
    }
    let all = [&root, &root.join("docs"), &root.join("dsmoe-bench/record")];
    let (mut checked, mut wrong) = (0, Vec::new());
    for page in all.into_iter().flat_map(|folder| pages(folder)) {
        for line in commands(&fs::read_to_string(&page).expect("a document")) {
            checked += 1;
            if let Err(error) = Cli::command().try_get_matches_from(words(&line))
                && is_wrong(error.kind())
            {
                wrong.push(format!("{}: {line}: {error}", page.display()));
            }
        }
    }
    assert!(checked > 50, "{checked}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_line_is_cut_into_words_as_by_a_shell() {
    let line = "dsmoe train \"A b\" --set \"p=['f']\" $(scripts/x y)/z ... # more";
    assert_eq!(words(line), ["dsmoe", "train", "A b", "--set", "p=['f']", "x/z"]);
    assert_eq!(commands("a\n```\n$ dsmoe a \\\n  b > c\nout\n```\ndsmoe no"), ["dsmoe a b > c"]);
}
