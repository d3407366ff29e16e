//! Findings about a corpus that the user should know.

use std::path::Path;

use serde::Serialize;

use crate::remedy::Remedy;
use crate::selection::Deselected;

/// A text file without a separator may have this many bytes before a user is asked whether it is one document.
const LARGE_DOCUMENT: usize = 1 << 20;

/// Texts that are customary between documents.
const CUSTOMARY: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>", "</s>", "<|im_end|>"];

/// The characters of which lines between documents are made.
const RULES: [char; 6] = ['=', '-', '*', '#', '~', '_'];

/// Separators that a message names at the most.
const NAMED: usize = 3;

/// Findings about one file.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileNotes {
    /// Rows with text, and rows without.
    pub(crate) texts: u64,
    pub(crate) null: u64,
    pub(crate) missing: u64,
    /// Surrogates without their other half.
    pub(crate) surrogates: u64,
    /// Separators in a text file; none for another file, or without a separator.
    pub(crate) separators: Option<u64>,
    /// Lists possible separators of a large text file that is read as one document.
    pub(crate) undivided: Option<Undivided>,
    /// Documents that the selection left out.
    pub(crate) deselected: Deselected,
}

/// A large text file that is read as one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Undivided {
    bytes: usize,
    /// Texts that might separate documents, with how often each occurs.
    candidates: Vec<(String, usize)>,
}

impl Undivided {
    /// Looks at a text that is read as one document; none if it is small.
    pub(crate) fn of(text: &str) -> Option<Undivided> {
        (text.len() > LARGE_DOCUMENT).then(|| Undivided { bytes: text.len(), candidates: candidates(text) })
    }
}

/// Finds texts that might separate documents.
fn candidates(text: &str) -> Vec<(String, usize)> {
    let mut found: Vec<(String, usize)> =
        CUSTOMARY.iter().map(|&customary| (customary.to_owned(), text.matches(customary).count())).collect();
    for rule in RULES {
        let is_rule = |line: &&str| line.len() >= 3 && line.chars().all(|c| c == rule);
        let mut rules = text.lines().filter(is_rule);
        if let Some(first) = rules.next() {
            found.push((first.to_owned(), 1 + rules.filter(|line| *line == first).count()));
        }
    }
    found.push(("\n\n\n".to_owned(), text.matches("\n\n\n").count()));
    found.push(("\n\n".to_owned(), text.matches("\n\n").count()));
    found.retain(|(_, count)| *count > 0);
    found.truncate(NAMED);
    found
}

/// Rows that gave no document, and characters that were replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Rows whose text is null.
    pub null: u64,
    /// Rows without the text column.
    pub missing: u64,
    /// Lone surrogates of JSON texts, which became U+FFFD.
    pub surrogates: u64,
}

impl std::ops::AddAssign for Skipped {
    fn add_assign(&mut self, other: Skipped) {
        self.null += other.null;
        self.missing += other.missing;
        self.surrogates += other.surrogates;
    }
}

/// Adds up what was skipped in all files.
pub(crate) fn skipped<'a>(notes: impl Iterator<Item = &'a FileNotes>) -> Skipped {
    let mut sum = Skipped::default();
    for &FileNotes { null, missing, surrogates, .. } in notes {
        sum += Skipped { null, missing, surrogates };
    }
    sum
}

/// Words what a user should know about files and their notes. `separator` is the one that was asked for.
pub(crate) fn notices(files: &[(&Path, FileNotes)], separator: Option<&str>) -> Vec<Remedy> {
    let mut notices = Vec::new();
    let all = skipped(files.iter().map(|(_, notes)| notes));
    let of = name(files.iter().map(|(path, _)| *path));
    if all.null + all.missing > 0 {
        let rows = all.null + all.missing;
        notices.push(Remedy::from(format!(
            "{of}: {rows} {} left out: the text is null in {} and absent in {}",
            if rows == 1 { "row was" } else { "rows were" },
            all.null,
            all.missing
        )));
    }
    if all.surrogates > 0 {
        notices.push(Remedy::from(format!(
            "{of}: {} lone surrogates in JSON texts became U+FFFD; their characters were cut when the file was made",
            all.surrogates
        )));
    }
    let mut deselected = Deselected::default();
    files.iter().for_each(|(_, notes)| deselected += notes.deselected);
    let texts: u64 = files.iter().map(|(_, notes)| notes.texts).sum();
    notices.extend(selected(deselected, texts).map(|found| Remedy::from(format!("{of}: {found}"))));
    let separators: Vec<u64> = files.iter().filter_map(|(_, notes)| notes.separators).collect();
    if let Some(separator) = separator
        && !separators.is_empty()
        && separators.iter().all(|&count| count == 0)
    {
        let texts = files.iter().filter(|(_, notes)| notes.separators.is_some()).map(|(path, _)| *path);
        notices.push(Remedy::from(format!(
            "{}: the separator {separator:?} never occurs, each text file is one document; check {{doc_separator}}",
            name(texts)
        )));
    }
    let undivided: Vec<_> =
        files.iter().filter_map(|(path, notes)| Some((*path, notes.undivided.as_ref()?))).collect();
    if let Some((_, first)) = undivided.first() {
        notices.push(Remedy::from(format!(
            "{}: {} bytes of text are one document; {}",
            name(undivided.iter().map(|(path, _)| *path)),
            first.bytes,
            advice(&first.candidates)
        )));
    }
    notices
}

/// Words what a selection left out of `texts` documents.
fn selected(found: Deselected, texts: u64) -> Option<String> {
    let Deselected { foreign, elsewhere, shortened } = found;
    let parts = [
        (foreign, "left out as not English"),
        (elsewhere, "left out as another part's"),
        (shortened, "read in part"),
    ];
    let parts = parts.iter().filter(|(count, _)| *count > 0);
    let parts: Vec<String> = parts.map(|(count, what)| format!("{count} {what}")).collect();
    (!parts.is_empty()).then(|| format!("of {texts} documents {}", parts.join(", ")))
}

fn advice(candidates: &[(String, usize)]) -> String {
    if candidates.is_empty() {
        return "if it holds more, put a separator between them and name it with {doc_separator}".to_owned();
    }
    let named = |(text, count): &(String, usize)| format!("{text:?} ({count} times)");
    let named: Vec<String> = candidates.iter().map(named).collect();
    format!(
        "if it holds more, name what separates them with {{doc_separator}}; it contains {}",
        named.join(", ")
    )
}

/// Names one file and how many others there are.
fn name<'a>(mut files: impl Iterator<Item = &'a Path>) -> String {
    let first = files.next().map(|path| path.display().to_string()).unwrap_or_default();
    match files.count() {
        0 => first,
        others => format!("{first} and {others} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(files: &[(&str, FileNotes)], separator: Option<&str>) -> Vec<String> {
        let files: Vec<_> = files.iter().map(|(path, notes)| (Path::new(*path), notes.clone())).collect();
        notices(&files, separator).iter().map(|notice| notice.worded(|name| format!("<{name}>"))).collect()
    }

    #[test]
    fn separators_that_occur_are_found() {
        let text = "a\n===\nb\n\n\nc\n===\nd<|endoftext|>\n====\n".repeat(40_000);
        let found = Undivided::of(&text).unwrap();
        assert_eq!(
            found.candidates,
            [("<|endoftext|>".into(), 40_000), ("===".into(), 80_000), ("\n\n\n".into(), 40_000)]
        );
        assert_eq!(candidates("a b"), []);
        assert_eq!(candidates("a\n\nb"), [("\n\n".into(), 1)]);
        assert_eq!(Undivided::of("small\n\n"), None);
    }

    #[test]
    fn notices_say_what_was_found_and_what_to_do() {
        let none = FileNotes::default();
        assert!(words(&[("a.txt", none.clone())], None).is_empty());
        let rows = FileNotes { texts: 3, null: 1, missing: 2, surrogates: 4, ..none.clone() };
        assert_eq!(
            words(&[("a.jsonl", rows), ("b.jsonl", none.clone())], None),
            [
                "a.jsonl and 1 more: 3 rows were left out: the text is null in 1 and absent in 2",
                "a.jsonl and 1 more: 4 lone surrogates in JSON texts became U+FFFD; their characters were cut when the file was made",
            ]
        );
        let without = FileNotes { separators: Some(0), ..none.clone() };
        let with = FileNotes { separators: Some(1), ..none.clone() };
        let absent = words(&[("a.jsonl", none.clone()), ("a.txt", without.clone())], Some("<x>"));
        assert_eq!(
            absent,
            [
                "a.txt: the separator \"<x>\" never occurs, each text file is one document; check <doc_separator>"
            ]
        );
        assert!(words(&[("a.txt", without), ("b.txt", with)], Some("<x>")).is_empty());
        let deselected = Deselected { foreign: 5, elsewhere: 0, shortened: 1 };
        let chosen = FileNotes { texts: 9, deselected, ..none.clone() };
        assert_eq!(
            words(&[("a.jsonl", chosen)], None),
            ["a.jsonl: of 9 documents 5 left out as not English, 1 read in part"]
        );
        let undivided = |candidates| FileNotes {
            undivided: Some(Undivided { bytes: 2_000_000, candidates }),
            ..none.clone()
        };
        assert_eq!(
            words(&[("a.txt", undivided(vec![("\n\n".into(), 7)]))], None),
            [
                "a.txt: 2000000 bytes of text are one document; if it holds more, name what separates them with <doc_separator>; \
             it contains \"\\n\\n\" (7 times)"
            ]
        );
        assert!(
            words(&[("a.txt", undivided(vec![]))], None)[0].ends_with("and name it with <doc_separator>")
        );
    }
}
