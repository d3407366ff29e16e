//! The choice of documents of a source: by language, by a hash of their text, and how much of each is read.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Fewest words of a text whose language can be told.
const WORDS: usize = 60;
/// Words that English prose has many of, whatever it is about.
const FREQUENT: [&str; 6] = ["the", "of", "and", "to", "a", "in"];
/// Share of the words of an English text that is exceeded by [`FREQUENT`].
const FREQUENT_SHARE: f64 = 0.12;
/// Share of the characters of an English text that is exceeded by ASCII.
const ASCII_SHARE: f64 = 0.95;

/// The documents of a source that are read, and how much of each. The default is all of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Only documents of this language.
    pub language: Option<Language>,
    /// Characters of a document at the most; the rest is left out.
    pub document_chars: Option<usize>,
    /// Only documents of this part.
    pub part: Option<DocumentPart>,
    /// Seed of the hash that assigns documents to parts.
    pub part_seed: u64,
}

/// A language of documents.
///
/// English is a text of at least 60 words, of which more than 12 % are one of `the`, `of`, `and`, `to`, `a` and `in`, and
/// of whose characters more than 95 % are ASCII. The rule leaves out lists, tables and menus as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Language {
    /// English prose.
    #[serde(rename = "en")]
    English,
}

/// A part of the documents of a source. A hash of the text decides, so that a copy of a document is in the same part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DocumentPart {
    /// For calibration and training: 74 % of the documents.
    Train,
    /// For the choice of settings: 12 %.
    Search,
    /// For the numbers of a report, on which nothing is chosen: 14 %.
    Final,
}

impl DocumentPart {
    /// Returns the part of a text.
    pub fn of(text: &str, seed: u64) -> DocumentPart {
        let hash = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(text).finalize();
        let first: [u8; 8] = std::array::from_fn(|at| hash[at]);
        match u64::from_be_bytes(first) as f64 / 2f64.powi(64) {
            at if at < 0.74 => DocumentPart::Train,
            at if at < 0.86 => DocumentPart::Search,
            _ => DocumentPart::Final,
        }
    }
}

/// Documents that a selection left out or shortened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Deselected {
    pub(crate) foreign: u64,
    pub(crate) elsewhere: u64,
    pub(crate) shortened: u64,
}

impl std::ops::AddAssign for Deselected {
    fn add_assign(&mut self, other: Deselected) {
        self.foreign += other.foreign;
        self.elsewhere += other.elsewhere;
        self.shortened += other.shortened;
    }
}

impl Selection {
    /// Returns what is read of a document, `None` if it is left out. `counts` receives what was not read.
    pub(crate) fn of<'t>(&self, text: &'t str, counts: &mut Deselected) -> Option<&'t str> {
        let trimmed = text.trim();
        if self.language == Some(Language::English) && !is_english(trimmed) {
            counts.foreign += 1;
            return None;
        }
        if self.part.is_some_and(|part| part != DocumentPart::of(trimmed, self.part_seed)) {
            counts.elsewhere += 1;
            return None;
        }
        let end = self.document_chars.and_then(|most| text.char_indices().nth(most));
        counts.shortened += u64::from(end.is_some());
        Some(end.map_or(text, |(end, _)| text[..end].trim_end()))
    }

    /// Describes what sets the selection apart from the default, for the keys of caches.
    pub(crate) fn key(&self) -> Option<String> {
        (*self != Selection::default()).then(|| format!("{self:?}"))
    }
}

/// Reports whether a text is English; see [`Language`].
fn is_english(text: &str) -> bool {
    let (mut words, mut frequent) = (0usize, 0usize);
    for word in text.split_whitespace() {
        words += 1;
        frequent += usize::from(FREQUENT.iter().any(|known| word.eq_ignore_ascii_case(known)));
    }
    let (mut chars, mut ascii) = (0usize, 0usize);
    for char in text.chars() {
        chars += 1;
        ascii += usize::from(char.is_ascii());
    }
    words >= WORDS
        && frequent as f64 > FREQUENT_SHARE * words as f64
        && ascii as f64 > ASCII_SHARE * chars as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGLISH: &str =
        "The river ran to the south of a town in which nobody lived, and the road to it was long. ";
    const GERMAN: &str =
        "Der Fluss lief in den Süden einer Stadt, in der niemand wohnte, und der Weg war weit. ";

    #[test]
    fn english_prose_is_told_from_other_text() {
        for (text, english) in [
            (ENGLISH.repeat(4), true),
            (ENGLISH.repeat(2), false),
            (GERMAN.repeat(9), false),
            ("home about contact cart login ".repeat(40), false),
            (format!("{}{}", ENGLISH.repeat(4), "жизнь ".repeat(20)), false),
        ] {
            assert_eq!(is_english(&text), english, "{text}");
        }
    }

    #[test]
    fn parts_are_disjoint_have_their_shares_and_follow_the_seed() {
        let texts: Vec<String> = (0..4000).map(|i| format!("document {i}")).collect();
        let of = |seed| texts.iter().map(move |text| DocumentPart::of(text, seed));
        for (part, share) in
            [(DocumentPart::Train, 0.74), (DocumentPart::Search, 0.12), (DocumentPart::Final, 0.14)]
        {
            let found = of(0).filter(|of_text| *of_text == part).count() as f64 / texts.len() as f64;
            assert!((found - share).abs() < 0.02, "{part:?}: {found}");
        }
        assert!(of(0).eq(of(0)) && !of(0).eq(of(1)));
    }

    #[test]
    fn a_selection_counts_what_it_leaves_out() {
        let english = ENGLISH.repeat(4);
        let mut counts = Deselected::default();
        let selection = Selection { language: Some(Language::English), ..Selection::default() };
        assert_eq!(selection.of(&english, &mut counts), Some(&english[..]));
        assert_eq!(selection.of(&GERMAN.repeat(9), &mut counts), None);
        let part = DocumentPart::of(english.trim(), 3);
        let other = if part == DocumentPart::Train { DocumentPart::Final } else { DocumentPart::Train };
        let of =
            |part, chars| Selection { part: Some(part), part_seed: 3, document_chars: chars, ..selection };
        assert_eq!(of(other, None).of(&english, &mut counts), None);
        assert_eq!(of(part, Some(10)).of(&english, &mut counts), Some("The river"));
        assert_eq!(of(part, Some(9)).of("äöü", &mut Deselected::default()), None, "too short for English");
        assert_eq!(counts, Deselected { foreign: 1, elsewhere: 1, shortened: 1 });
        assert!(Selection::default().key().is_none() && selection.key().is_some());
    }
}
