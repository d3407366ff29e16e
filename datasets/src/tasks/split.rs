//! The parts of a dataset.

use serde::Deserialize;

/// A part of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Shown in prompts, never scored.
    Train,
    /// Scored.
    Validation,
    /// Scored.
    Test,
}

impl Split {
    /// Returns the name in results.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }

    /// Returns the words that name the split in file names.
    pub(crate) fn words(self) -> &'static [&'static str] {
        match self {
            Split::Train => &["train"],
            Split::Validation => &["validation", "valid", "val", "dev"],
            Split::Test => &["test"],
        }
    }

    /// Returns words of file names that may stand for the split.
    pub(crate) fn stand_ins(self) -> &'static [&'static str] {
        match self {
            Split::Train => &["trainmodel", "pool"],
            Split::Validation | Split::Test => &["eval"],
        }
    }
}
