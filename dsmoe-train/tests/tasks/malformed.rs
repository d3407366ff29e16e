//! Edited journals and settings. Longer searches: `fuzz/` of the repository.

use dsmoe_datasets::tasks::{Request, Response};
use dsmoe_kernels::testing::edited_copies;
use dsmoe_train::tasks::{Journal, Ran};
use proptest::prelude::*;

use crate::bodies;

/// A journal of two answers.
fn journal() -> &'static str {
    static MADE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    MADE.get_or_init(|| {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("answers.jsonl");
        let mut journal = Journal::open(&path, "this", None).unwrap();
        for (text, tokens) in [("a", 12), ("b", 5)] {
            let request = Request::LogLikelihood { context: text.into(), continuation: " c".to_owned() };
            let response = Response::LogLikelihood { sum: -1.5, greedy: true };
            journal.put([(&request, &response)], Ran { tokens, routing: None }).unwrap();
        }
        std::fs::read_to_string(&path).unwrap()
    })
}

const SETTINGS: &str =
    "steps = 9\nseq = 128\nbatch = 4\nlr = 1e-3\nactive_target = 0.375\nwarmup_steps = 2\n";

/// One to five edits: a byte replaced, a range removed, or digits inserted.
fn edited(good: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let edit = (any::<prop::sample::Index>(), any::<u8>(), 0u8..3, 0usize..24);
    proptest::collection::vec(edit, 1..6).prop_map(move |edits| {
        let mut bytes = good.as_bytes().to_vec();
        for (at, byte, kind, span) in edits {
            let at = at.index(bytes.len() + 1);
            let end = bytes.len().min(at + span);
            match kind {
                0 if at < bytes.len() => bytes[at] = byte,
                1 => drop(bytes.drain(at..end)),
                _ => drop(bytes.splice(at..at, b"9".repeat(span))),
            }
        }
        bytes
    })
}

/// Returns how many inputs of every kind are tried; `DSMOE_FUZZ_CASES` asks for more.
fn cases(default: u32) -> u32 {
    std::env::var("DSMOE_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default)
}

#[test]
fn the_unedited_files_are_accepted() {
    assert!(bodies::journal(journal().as_bytes()) && bodies::settings(SETTINGS.as_bytes()));
    let changed = journal().replacen("-1.5", "-1.7", 1);
    assert!(changed != journal() && !bodies::journal(changed.as_bytes()), "a changed answer is taken");
}

const MIXTURE: &str = "[[source]]\nname = \"web\"\ndata = [\"a\", \"b\"]\nweight = 4\ntext_column = \"q,a\"\nlanguage = \"en\"\n\
    document_chars = 20000\npart = \"train\"\npart_seed = 3\n[[source]]\nname = \"x\"\ndata = \"c\"\ndoc_separator = \"--\"\n";

/// Edits that know words, numbers and brackets.
#[test]
fn edited_copies_are_read_or_refused() {
    edited_copies("journal", journal().as_bytes(), 500, |bytes| {
        bodies::journal(bytes);
    });
    edited_copies("settings", SETTINGS.as_bytes(), 500, |bytes| {
        bodies::settings(bytes);
    });
    edited_copies("mixture", MIXTURE.as_bytes(), 500, bodies::mixture);
    for (name, text) in dsmoe_datasets::tasks::definitions() {
        // Its own name is taken.
        let text = text.replacen("name = \"", "name = \"other_", 1).replace("\naliases", "\n# aliases");
        edited_copies(name, text.as_bytes(), 50, bodies::definition);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(500)))]

    #[test]
    fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
        bodies::journal(&bytes);
        bodies::settings(&bytes);
    }

    #[test]
    fn edited_files_are_read_or_refused(journal in edited(journal()), settings in edited(SETTINGS)) {
        bodies::journal(&journal);
        bodies::settings(&settings);
    }
}
