//! A task: its files, prompts and scores, and the question of each document.

use super::filter::Filter;
use super::metrics::{ExactMatch, Metric};
use super::profile::Profile;
use super::row::Row;
use crate::error::{Error, Result};

/// For tasks that came after the oldest release.
pub(crate) const NOT_IN_030: &[(Profile, &str)] = &[(Profile::LmEval030, "has no such task")];

/// A benchmark, as lm-evaluation-harness defines it.
#[derive(Debug)]
pub struct Task {
    /// The harness's name.
    pub name: &'static str,
    /// Other names of the task.
    pub(crate) aliases: &'static [&'static str],
    /// Names of its folder in a folder of benchmarks.
    pub(crate) folders: &'static [&'static str],
    /// The configuration of its dataset, where there are several.
    pub(crate) subset: &'static str,
    /// The split that is scored.
    pub split: Split,
    /// Version of the harness's definition.
    pub version: f64,
    /// Examples shown before each question.
    pub shots: usize,
    /// True if one example more is drawn, and the document itself left out if it is among them.
    pub(crate) spare_shot: bool,
    /// True if the lines of a text file are its rows.
    pub(crate) reads_lines: bool,
    /// Turns a row into a document.
    pub(crate) read: fn(&Row, Profile) -> Result<Item>,
    /// Returns how a release prompts and scores it.
    pub(crate) rules: fn(Profile) -> Rules,
    /// Releases that do not have the task or cannot run it, and why.
    pub(crate) not_in: &'static [(Profile, &'static str)],
}

impl Task {
    /// Returns true if the release that `profile` follows can run this task.
    pub fn is_in(&self, profile: Profile) -> bool {
        self.checked_rules(profile).is_ok()
    }

    /// Returns how `profile` prompts and scores this task.
    ///
    /// # Errors
    /// That release does not have the task, or cannot run it.
    pub(crate) fn checked_rules(&self, profile: Profile) -> Result<Rules> {
        match self.not_in.iter().find(|(release, _)| *release == profile) {
            None => Ok((self.rules)(profile)),
            Some((_, reason)) => {
                let help = "leave it out, or use {profile} dsmoe";
                Err(Error::task(self.name, format!("{profile} {reason}"), help))
            }
        }
    }
}

/// A part of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// The rules by which a task is prompted and scored.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// The beginning of a prompt.
    pub(crate) description: &'static str,
    /// The text after each example.
    pub(crate) delimiter: &'static str,
    /// Texts that end a generated answer.
    pub(crate) until: &'static [&'static str],
    /// The filters for generated answers. Each is scored by itself.
    pub(crate) filters: &'static [Filter],
    pub(crate) metrics: Vec<Metric>,
    pub(crate) exact: ExactMatch,
}

impl Rules {
    pub(crate) fn of(metrics: &[Metric]) -> Rules {
        Rules {
            description: "",
            delimiter: "\n\n",
            until: &[],
            filters: &[Filter::None],
            metrics: metrics.to_vec(),
            exact: ExactMatch::default(),
        }
    }
}

/// A document as it is asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    /// The question.
    pub(crate) prompt: String,
    /// The answer as an example shows it, with the space before it; none where the task shows no examples.
    pub(crate) shown: Option<String>,
    pub(crate) ask: Ask,
}

/// A question to a model with its right answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ask {
    /// Asks which of several continuations is likeliest.
    Choice { choices: Vec<String>, gold: usize },
    /// Asks after which of several texts the same continuation is likeliest.
    Gap { prompts: Vec<String>, ending: String, gold: usize },
    /// Asks how likely the last word is, and whether it would be generated.
    LastWord { word: String },
    /// Asks whether any of these would be generated.
    AnyGreedy { answers: Vec<String> },
    /// Asks for a text. The file holds one answer, or a `list` of them.
    Generate { answers: Vec<String>, list: bool },
    /// Asks how likely a whole text is. The words and bytes of the original text are counted.
    Rolling { words: usize, bytes: usize },
}

impl Ask {
    /// Returns the harness's name for this kind of question.
    pub(crate) fn output_type(&self) -> &'static str {
        match self {
            Ask::Choice { .. } | Ask::Gap { .. } | Ask::AnyGreedy { .. } => "multiple_choice",
            Ask::LastWord { .. } => "loglikelihood",
            Ask::Generate { .. } => "generate_until",
            Ask::Rolling { .. } => "loglikelihood_rolling",
        }
    }
}
