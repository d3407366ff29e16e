//! The keys of a task's TOML file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::split::Split;

/// A task as its file says it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stored {
    pub(crate) name: String,
    /// The question of the task, in one line.
    #[serde(default)]
    pub(crate) about: String,
    #[serde(default)]
    pub(crate) aliases: Vec<String>,
    #[serde(default)]
    pub(crate) folders: Vec<String>,
    #[serde(default)]
    pub(crate) subset: String,
    #[serde(default = "validation")]
    pub(crate) split: Split,
    #[serde(default)]
    pub(crate) version: f64,
    /// Files to score, seen from the folder of this one.
    #[serde(default)]
    pub(crate) files: Vec<PathBuf>,
    /// Files to draw examples from, likewise.
    #[serde(default)]
    pub(crate) shot_files: Vec<PathBuf>,
    #[serde(default)]
    pub(crate) lines: bool,
    #[serde(default)]
    pub(crate) shots: usize,
    #[serde(default)]
    pub(crate) spare_shot: bool,
    /// The split of the examples, as file names say it.
    #[serde(default = "train")]
    pub(crate) shot_split: String,
    #[serde(default)]
    pub(crate) sampler: Sampler,
    #[serde(default)]
    pub(crate) alike: Option<String>,
    /// The column whose values name the tasks that this one consists of.
    #[serde(default)]
    pub(crate) group: Option<String>,
    #[serde(default)]
    pub(crate) columns: BTreeMap<String, StoredColumn>,
    #[serde(default)]
    pub(crate) cut: Vec<StoredCut>,
    pub(crate) output: Output,
    #[serde(default)]
    pub(crate) description: String,
    #[serde(default)]
    pub(crate) prompt: Option<String>,
    #[serde(default)]
    pub(crate) prompts: Option<Vec<String>>,
    #[serde(default)]
    pub(crate) prompt_filters: Vec<String>,
    #[serde(default)]
    pub(crate) choices: Option<Texts>,
    #[serde(default)]
    pub(crate) choice_filters: Vec<String>,
    #[serde(default)]
    pub(crate) log_choices: bool,
    #[serde(default)]
    pub(crate) gold: Option<StoredGold>,
    #[serde(default)]
    pub(crate) target: Option<String>,
    #[serde(default)]
    pub(crate) answers: Option<Texts>,
    #[serde(default)]
    pub(crate) counted: Option<String>,
    #[serde(default = "blank_line")]
    pub(crate) delimiter: String,
    #[serde(default)]
    pub(crate) until: Vec<String>,
    #[serde(default)]
    pub(crate) filter: Vec<StoredFilter>,
    #[serde(default)]
    pub(crate) exact: Option<StoredExact>,
    pub(crate) metrics: Vec<String>,
    /// Keys that differ in a release.
    #[serde(default)]
    pub(crate) profile: BTreeMap<String, toml::Table>,
    /// In a release: why it does not have the task.
    #[serde(default)]
    pub(crate) absent: Option<String>,
}

fn validation() -> Split {
    Split::Validation
}

fn train() -> String {
    Split::Train.name().to_owned()
}

fn blank_line() -> String {
    "\n\n".to_owned()
}

/// The kind of question, by the harness's name where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Output {
    MultipleChoice,
    PartialScoring,
    Loglikelihood,
    AnyGreedy,
    GenerateUntil,
    LoglikelihoodRolling,
}

/// How examples are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Sampler {
    /// At random, others for every document.
    #[default]
    Random,
    /// The first ones.
    First,
}

/// A list column by its name, or a template for each text.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Texts {
    Column(String),
    Templates(Vec<String>),
}

/// One name or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Names {
    One(String),
    Several(Vec<String>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredColumn {
    #[serde(default)]
    pub(crate) column: Option<Names>,
    #[serde(default)]
    pub(crate) blank: bool,
    #[serde(default)]
    pub(crate) number: bool,
    #[serde(default)]
    pub(crate) matches: Option<String>,
    #[serde(default)]
    pub(crate) otherwise: Option<String>,
    #[serde(default)]
    pub(crate) help: Option<String>,
}

/// A text that is cut into two values.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredCut {
    pub(crate) column: String,
    pub(crate) into: [String; 2],
    /// Cut before and behind its first occurrence.
    #[serde(default)]
    pub(crate) first: Option<String>,
    /// Cut before and behind its last occurrence; a text without it is the second value.
    #[serde(default)]
    pub(crate) last: Option<String>,
    /// Cut behind the last whole sentence.
    #[serde(default)]
    pub(crate) last_sentence: bool,
    /// Not where this column is there.
    #[serde(default)]
    pub(crate) unless: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredGold {
    #[serde(default)]
    pub(crate) column: Option<Names>,
    /// The same choice in every row, from 0.
    #[serde(default)]
    pub(crate) always: Option<usize>,
    #[serde(default)]
    pub(crate) first: usize,
    #[serde(default)]
    pub(crate) truth: bool,
    #[serde(default)]
    pub(crate) among: Option<Names>,
    #[serde(default)]
    pub(crate) filters: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredFilter {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) regex: Option<String>,
    #[serde(default)]
    pub(crate) take: Take,
    #[serde(default)]
    pub(crate) remove: String,
    #[serde(default)]
    pub(crate) strip: Side,
}

/// Which of several matches counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Take {
    #[default]
    First,
    Last,
}

/// Where white space is taken off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Side {
    #[default]
    None,
    Start,
    Both,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredExact {
    /// The texts that are removed before the comparison, in this order: commas, dollars, working, last_dot, articles, or a regular
    /// expression.
    #[serde(default)]
    pub(crate) remove: Vec<String>,
    #[serde(default)]
    pub(crate) ignore_case: bool,
    #[serde(default)]
    pub(crate) ignore_punctuation: bool,
}
