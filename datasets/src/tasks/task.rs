//! The tasks, and what a document of each asks of a model.

use super::files::Split;
use super::filter::Filter;
use super::metrics::{ExactMatch, Metric};
use super::profile::Profile;
use super::row::Row;
use super::{answers, choice, cloze, rolling};
use crate::{Error, Result};

/// A benchmark, as lm-evaluation-harness defines it.
#[derive(Debug)]
pub struct Task {
    /// The harness's name.
    pub name: &'static str,
    /// Other names it is asked for by.
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
    /// Whether one example more is drawn, and the document itself left out if it is among them.
    pub(crate) spare_shot: bool,
    /// Whether the lines of a text file are its rows.
    pub(crate) reads_lines: bool,
    /// Makes a document of a row.
    pub(crate) read: fn(&Row, Profile) -> Result<Item>,
    /// How it is prompted and scored.
    pub(crate) rules: fn(Profile) -> Rules,
    /// Whether harness 0.3.0 has it.
    pub(crate) old: bool,
}

/// All tasks, in the order of the paper's table.
pub const TASKS: [Task; 12] = [
    choice::HELLASWAG,
    cloze::LAMBADA_OPENAI,
    cloze::LAMBADA_STANDARD,
    choice::PIQA,
    choice::SOCIAL_IQA,
    choice::STORYCLOZE,
    cloze::WINOGRANDE,
    answers::GSM8K,
    answers::NQ_OPEN,
    answers::TRIVIAQA,
    answers::WEBQS,
    rolling::WIKITEXT,
];

impl Task {
    /// The task called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<&'static Task> {
        static ALL: [Task; 12] = TASKS;
        let found = ALL.iter().find(|task| task.name == name || task.aliases.contains(&name));
        found.ok_or_else(|| Error::Task {
            task: name.into(),
            reason: "unknown".into(),
            mend: format!("use {}", ALL.iter().map(|task| task.name).collect::<Vec<_>>().join(", ")),
        })
    }

    /// Whether the release that `profile` follows can run this task.
    pub fn is_in(&self, profile: Profile) -> bool {
        self.checked_rules(profile).is_ok()
    }

    /// How `profile` prompts and scores this task.
    ///
    /// # Errors
    /// That release does not have the task, or cannot run it.
    pub(crate) fn checked_rules(&self, profile: Profile) -> Result<Rules> {
        let refused = |reason: &str| Error::Task {
            task: self.name.into(),
            reason: format!("{profile} {reason}"),
            mend: "leave it out, or use --profile dsmoe".into(),
        };
        if profile == Profile::LmEval030 && !self.old {
            return Err(refused("has no such task"));
        }
        if profile == Profile::LmEval0412 && self.name == answers::WEBQS.name {
            return Err(refused("fails on its few-shot examples"));
        }
        Ok((self.rules)(profile))
    }
}

/// How a task is prompted and scored.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// What begins a prompt.
    pub(crate) description: &'static str,
    /// What follows each example.
    pub(crate) delimiter: &'static str,
    /// Texts that end a generated answer.
    pub(crate) until: &'static [&'static str],
    /// What is done to generated answers; each filter is scored by itself.
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

/// What is asked of a model, and what is right.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ask {
    /// Which of several continuations is likeliest.
    Choice { choices: Vec<String>, gold: usize },
    /// Behind which of several texts the same continuation is likeliest.
    Gap { prompts: Vec<String>, ending: String, gold: usize },
    /// How likely the last word is, and whether it would be generated.
    LastWord { word: String },
    /// Whether any of these would be generated.
    AnyGreedy { answers: Vec<String> },
    /// A text to generate. The file holds one answer, or a `list` of them.
    Generate { answers: Vec<String>, list: bool },
    /// How likely a whole text is; counted are the words and bytes of the text it was made of.
    Rolling { words: usize, bytes: usize },
}

impl Ask {
    /// What the harness calls it.
    pub(crate) fn output_type(&self) -> &'static str {
        match self {
            Ask::Choice { .. } | Ask::Gap { .. } | Ask::AnyGreedy { .. } => "multiple_choice",
            Ask::LastWord { .. } => "loglikelihood",
            Ask::Generate { .. } => "generate_until",
            Ask::Rolling { .. } => "loglikelihood_rolling",
        }
    }
}
