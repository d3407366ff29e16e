//! Removes text that held-out and training sides have in common.
//!
//! Text is compared by its words: letters and digits, ASCII letters in lower case; all else only separates. A piece of
//! text is the set of its *shingles*, eight words in a row each; a piece of fewer words is one shingle. The shingles of
//! all held-out pieces of all sources go into one table, then the training text passes by once:
//!
//! - a training piece of which at least half of the shingles are in the table is not trained on;
//! - a held-out piece of which at least half of the shingles occur in what is trained on is not evaluated.
//!
//! The first takes out near copies of held-out documents, the second held-out text that lies inside longer training
//! text. Held-out text is small, so the table holds its shingles themselves, where sketches of both sides (MinHash)
//! would estimate the same shares; when there are more than a million, those with the smallest hashes stand for all.

use crate::error::Result;
pub use crate::token_texts::TokenTexts;
use crate::tokens::Tokens;
use crate::windows::mix;
use rayon::prelude::*;
use serde::Serialize;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Words of a shingle.
pub const SHINGLE_WORDS: usize = 8;

/// The largest number of shingles in the table, roughly.
const MAX_SHINGLES: usize = 1 << 20;

/// Training pieces read at a time by one thread.
const PIECES: usize = 256;

impl TokenTexts {
    /// Hands the shingles of `ids` to `take`, each a hash of its words.
    fn shingles(&self, ids: &[u32], take: &mut dyn FnMut(u64)) {
        const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;
        let (mut ring, mut words, mut word) = ([0u64; SHINGLE_WORDS], 0usize, EMPTY);
        let mut end_word = |word: &mut u64| {
            if *word == EMPTY {
                return;
            }
            ring[words % SHINGLE_WORDS] = mix(*word);
            words += 1;
            *word = EMPTY;
            if words >= SHINGLE_WORDS {
                let first = words % SHINGLE_WORDS;
                let in_order = ring[first..].iter().chain(&ring[..first]);
                take(in_order.fold(0, |hash, &word| mix(hash ^ word)));
            }
        };
        for &id in ids {
            for &byte in self.of(id) {
                if byte.is_ascii_alphanumeric() || !byte.is_ascii() {
                    word = (word ^ u64::from(byte.to_ascii_lowercase())).wrapping_mul(0x0100_0000_01b3);
                } else {
                    end_word(&mut word);
                }
            }
        }
        end_word(&mut word);
        if (1..SHINGLE_WORDS).contains(&words) {
            take(ring[..words].iter().fold(words as u64, |hash, &word| mix(hash ^ word)));
        }
    }
}

/// The text removed from one source. A piece is a document, or a part of a long one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Training pieces that are near copies of held-out ones.
    pub train_pieces: u64,
    /// The pieces among them with all of their shingles held out: copies up to case, punctuation and order.
    pub train_copies: u64,
    /// Tokens of these pieces.
    pub train_tokens: u64,
    /// Held-out pieces whose text occurs in training text.
    pub valid_pieces: u64,
    /// Tokens of these pieces.
    pub valid_tokens: u64,
}

/// The pieces of one source.
pub(crate) struct Sides<'a> {
    pub(crate) tokens: &'a Tokens,
    pub(crate) train: Vec<Range<usize>>,
    pub(crate) valid: Vec<Range<usize>>,
}

/// Removes from all sources what the two sides have in common, and returns what was removed, by source.
///
/// # Errors
/// Tokens that cannot be read.
pub(crate) fn remove(sources: &mut [Sides<'_>], texts: &TokenTexts) -> Result<Vec<Removed>> {
    let mut removed = vec![Removed::default(); sources.len()];
    let mut held = Vec::new();
    for (source, sides) in sources.iter().enumerate() {
        let mut ids = Vec::new();
        for (piece, range) in sides.valid.iter().enumerate() {
            ids.clear();
            sides.tokens.read(range.clone(), &mut ids)?;
            let mut shingles = Vec::new();
            texts.shingles(&ids, &mut |shingle| shingles.push(shingle));
            held.push((source, piece, shingles));
        }
    }
    let count: usize = held.iter().map(|(.., shingles)| shingles.len()).sum();
    let largest = u64::MAX / count.div_ceil(MAX_SHINGLES).max(1) as u64;
    let mut table: HashMap<u64, usize> = HashMap::new();
    for shingle in held.iter_mut().flat_map(|(.., shingles)| {
        shingles.retain(|&shingle| shingle <= largest);
        shingles.iter().copied()
    }) {
        let next = table.len();
        table.entry(shingle).or_insert(next);
    }
    let trained: Vec<AtomicBool> = (0..table.len()).map(|_| AtomicBool::new(false)).collect();

    for (sides, removed) in sources.iter_mut().zip(&mut removed) {
        let tokens = sides.tokens;
        let judge = |pieces: &[Range<usize>]| -> Result<Vec<(bool, bool)>> {
            let (mut ids, mut found): (Vec<u32>, Vec<usize>) = (Vec::new(), Vec::new());
            let mut verdicts = Vec::with_capacity(pieces.len());
            for range in pieces {
                ids.clear();
                found.clear();
                tokens.read(range.clone(), &mut ids)?;
                let mut all = 0;
                texts.shingles(&ids, &mut |shingle| {
                    if shingle <= largest {
                        all += 1;
                        found.extend(table.get(&shingle).copied());
                    }
                });
                let near = all > 0 && 2 * found.len() >= all;
                verdicts.push((near, near && found.len() == all));
                if !near {
                    found.iter().for_each(|&shingle| trained[shingle].store(true, Ordering::Relaxed));
                }
            }
            Ok(verdicts)
        };
        let verdicts: Vec<(bool, bool)> =
            sides.train.par_chunks(PIECES).map(judge).collect::<Result<Vec<_>>>()?.concat();
        let mut verdicts = verdicts.into_iter();
        sides.train.retain(|range| {
            let (near, copy) = verdicts.next().unwrap_or_default();
            removed.train_pieces += u64::from(near);
            removed.train_copies += u64::from(copy);
            removed.train_tokens += if near { range.len() as u64 } else { 0 };
            !near
        });
    }

    let mut known = vec![Vec::new(); sources.len()];
    for (source, _, shingles) in &held {
        let found = shingles.iter().filter(|shingle| trained[table[shingle]].load(Ordering::Relaxed)).count();
        known[*source].push(!shingles.is_empty() && 2 * found >= shingles.len());
    }
    for ((sides, removed), known) in sources.iter_mut().zip(&mut removed).zip(known) {
        let mut known = known.into_iter();
        sides.valid.retain(|range| {
            let near = known.next().unwrap_or(false);
            removed.valid_pieces += u64::from(near);
            removed.valid_tokens += if near { range.len() as u64 } else { 0 };
            !near
        });
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenStream;
    use std::collections::HashSet;

    /// One token per character.
    fn texts() -> TokenTexts {
        let bytes: Vec<[u8; 1]> = (0..=255u8).map(|byte| [byte]).collect();
        TokenTexts::new(bytes.iter().enumerate().map(|(id, byte)| (id != 1).then_some(&byte[..])))
    }

    fn shingles(text: &str) -> Vec<u64> {
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        let mut all = Vec::new();
        texts().shingles(&ids, &mut |shingle| all.push(shingle));
        all
    }

    #[test]
    fn shingles_are_eight_words_whatever_stands_between() {
        let ten = "one two three four five six seven eight nine ten";
        assert_eq!(shingles(ten).len(), 3);
        assert_eq!(shingles(ten), shingles("One, two -- THREE four.five\nsix\tseven (eight) nine\u{1}ten!"));
        assert_ne!(shingles(ten)[1..], shingles(&ten.replace("nine", "wine"))[1..]);
        assert_eq!(shingles(ten)[0], shingles(&ten.replace("nine", "wine"))[0]);
        let swapped = "two one three four five six seven eight";
        assert_ne!(shingles(ten)[0], shingles(swapped)[0], "order counts");
        assert_eq!((shingles("a b").len(), shingles("a").len(), shingles(" ...").len()), (1, 1, 0));
        assert_ne!(shingles("a b"), shingles("ab"));
        assert_ne!(shingles("é"), shingles("è"));
    }

    /// Documents of distinct words, from `first` on.
    fn document(first: usize, words: usize) -> String {
        (first..first + words).map(|word| format!("w{word} ")).collect()
    }

    /// Runs the filter over one source of these documents; which remain.
    fn filtered(train: &[String], valid: &[String]) -> (Vec<usize>, Vec<usize>, Removed) {
        let mut stream = TokenStream::default();
        let mut ranges = Vec::new();
        for document in train.iter().chain(valid) {
            let start = stream.ids.len();
            stream.ids.extend(document.bytes().map(u32::from));
            ranges.push(start..stream.ids.len());
        }
        let tokens = Tokens::from(stream);
        let held = ranges.split_off(train.len());
        let mut sources = [Sides { tokens: &tokens, train: ranges.clone(), valid: held.clone() }];
        let removed = remove(&mut sources, &texts()).unwrap();
        let kept = |all: &[Range<usize>], side: &[Range<usize>]| {
            let side: HashSet<_> = side.iter().cloned().collect();
            (0..all.len()).filter(|&at| side.contains(&all[at])).collect()
        };
        (kept(&ranges, &sources[0].train), kept(&held, &sources[0].valid), removed[0])
    }

    #[test]
    fn copies_near_copies_and_contained_text_go() {
        let held = document(0, 100);
        let copy = held.to_uppercase().replace(' ', "; ");
        let near = held.replace("w30 ", "other ").replace("w60 ", "");
        let far = format!("{} {}", document(0, 30), document(1000, 90));
        let short = "A short one.".to_owned();
        let around = format!("{}{}{}", document(2000, 300), document(500, 60), document(3000, 300));
        let inside = document(500, 60);
        let (train, valid, removed) = filtered(
            &[copy, near, far, document(5000, 50), "a SHORT one".to_owned(), around, "...".to_owned()],
            &[held, short, inside, document(7000, 20), "!!".to_owned()],
        );
        assert_eq!(train, [2, 3, 5, 6]);
        assert_eq!(valid, [0, 1, 3, 4], "what lies inside longer training text is not evaluated");
        assert_eq!((removed.train_pieces, removed.train_copies, removed.valid_pieces), (3, 2, 1));
        assert_eq!(removed.valid_tokens as usize, document(500, 60).len());
    }

    #[test]
    fn many_shingles_are_thinned_out_and_copies_still_go() {
        // 1,100,000 words in the held-out side: every second shingle is kept.
        let held: Vec<String> = (0..220).map(|at| document(at * 10_000, 5_000)).collect();
        let train = [document(30_000, 5_000), document(35_000, 5_000)];
        let (train, valid, removed) = filtered(&train, &held);
        assert_eq!((train, valid.len()), (vec![1], held.len()));
        assert_eq!((removed.train_pieces, removed.train_copies), (1, 1));
    }
}
