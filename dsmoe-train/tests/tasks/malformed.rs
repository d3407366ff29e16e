//! Edited journals and settings. Longer searches: `fuzz/` of the repository.

use proptest::prelude::*;

use crate::bodies;

const JOURNAL: &str = concat!(
    "{\"dsmoe_responses\":1,\"made_by\":\"this\"}\n",
    "{\"request\":\"00ff\",\"response\":{\"log_likelihood\":{\"sum\":-1.5,\"greedy\":true}}}\n",
    "{\"ran\":{\"tokens\":12,\"routing\":null}}\n",
    "{\"ran\":{\"tokens\":5,\"routing\":null}}\n",
);
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
    assert!(bodies::journal(JOURNAL.as_bytes()) && bodies::settings(SETTINGS.as_bytes()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(500)))]

    #[test]
    fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
        bodies::journal(&bytes);
        bodies::settings(&bytes);
    }

    #[test]
    fn edited_files_are_read_or_refused(journal in edited(JOURNAL), settings in edited(SETTINGS)) {
        bodies::journal(&journal);
        bodies::settings(&settings);
    }
}
