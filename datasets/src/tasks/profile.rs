//! The release whose conventions a score follows.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::error::{Error, Result};
use crate::tokenizer::Bos;

/// The conventions of a release of lm-evaluation-harness. Scores compare only within one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Release 0.4.12, with few-shot examples of WebQuestions that show their first answer.
    #[default]
    Dsmoe,
    /// 0.4.12 and 0.4.13; these cannot run WebQuestions with few-shot examples.
    LmEval0412,
    /// 0.4.9.2: every few-shot example of WebQuestions shows the answer `0`.
    LmEval0492,
    /// 0.4.9 and 0.4.9.1: as 0.4.9.2, without a BOS token, and generated answers keep spaces at their end.
    LmEval049,
    /// 0.3.0: documents in a shuffled order, context and continuation encoded apart, no BOS token; TriviaQA and
    /// WebQuestions ask whether an answer would be generated, GSM8K is generated up to the end of the line.
    LmEval030,
}

impl Profile {
    /// All profiles.
    pub const ALL: [Profile; 5] =
        [Profile::Dsmoe, Profile::LmEval0412, Profile::LmEval0492, Profile::LmEval049, Profile::LmEval030];

    /// Returns the name on the command line and in results.
    pub const fn name(self) -> &'static str {
        match self {
            Profile::Dsmoe => "dsmoe",
            Profile::LmEval0412 => "lm-eval-0.4.12",
            Profile::LmEval0492 => "lm-eval-0.4.9.2",
            Profile::LmEval049 => "lm-eval-0.4.9",
            Profile::LmEval030 => "lm-eval-0.3.0",
        }
    }

    /// Returns the default BOS rule.
    pub fn bos(self) -> Bos {
        match self {
            Profile::Dsmoe | Profile::LmEval0412 | Profile::LmEval0492 => Bos::Auto,
            Profile::LmEval049 | Profile::LmEval030 => Bos::Never,
        }
    }

    /// Returns true if a continuation is encoded by itself instead of as the rest of the whole text.
    pub fn encodes_apart(self) -> bool {
        self == Profile::LmEval030
    }

    /// Returns true if a text without context starts from the end token instead of the BOS token.
    pub fn starts_from_end_token(self) -> bool {
        self == Profile::LmEval030
    }
}

impl FromStr for Profile {
    type Err = Error;

    fn from_str(name: &str) -> Result<Profile> {
        let profile = Profile::ALL.into_iter().find(|profile| profile.name() == name);
        let names = "dsmoe, lm-eval-0.4.12, lm-eval-0.4.9.2, lm-eval-0.4.9 or lm-eval-0.3.0";
        profile.ok_or_else(|| Error::setting_range("profile", format!("{name:?}"), names))
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Profile {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
