//! A task in one release: from a row to a document.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::cleaning::{count_words, divide, without_longer};
use super::column::{Column, Gold};
use super::item::{Ask, Item};
use super::row::Row;
use super::rules::Rules;
use super::template::{Change, Place, Template};
use crate::error::{Result, shown};

/// The longest text that a template makes, in bytes.
const LONGEST: usize = 64 << 20;

/// How a release prompts and scores a task.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub(crate) columns: BTreeMap<String, Column>,
    pub(crate) cuts: Vec<Cut>,
    pub(crate) question: Question,
    pub(crate) rules: Rules,
}

/// A text that is cut into two values.
#[derive(Clone, Debug)]
pub(crate) struct Cut {
    pub(crate) column: String,
    pub(crate) into: [String; 2],
    pub(crate) at: CutAt,
    /// Not where this column is there.
    pub(crate) unless: Option<String>,
}

/// The place of a cut.
#[derive(Clone, Debug)]
pub(crate) enum CutAt {
    First(String),
    Last(String),
    LastSentence,
}

/// The requests that a task makes of a row, by kind of output.
#[derive(Clone, Debug)]
pub(crate) enum Question {
    Choice { prompt: Prompt, choices: Choices, gold: Gold },
    Gap { prompts: Vec<Template>, ending: Template, gold: Gold },
    Target { prompt: Prompt, target: Template },
    AnyGreedy { prompt: Prompt, answers: Column, shown: Template },
    Generate { prompt: Prompt, answers: Answers, shown: Template },
    Rolling { prompt: Prompt, counted: String },
}

/// The text before an answer.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    pub(crate) template: Template,
    /// Changes of the whole text.
    pub(crate) filters: Vec<Change>,
}

/// The texts to choose among.
#[derive(Clone, Debug)]
pub(crate) struct Choices {
    pub(crate) texts: TextList,
    pub(crate) filters: Vec<Change>,
}

/// A list column, or a template for each text.
#[derive(Clone, Debug)]
pub(crate) enum TextList {
    Column(Column),
    Templates(Vec<Template>),
}

/// The right answers to a question that is answered by a text.
#[derive(Clone, Debug)]
pub(crate) enum Answers {
    Column(Column),
    One(Template),
}

impl Form {
    /// Makes the document of a row.
    pub(crate) fn item(&self, row: &Row) -> Result<Item> {
        let fill = |template: &Template| self.fill(row, template);
        let asked = |prompt: &Prompt| {
            let text = fill(&prompt.template)?;
            Ok::<String, crate::error::Error>(
                prompt.filters.iter().fold(text, |text, filter| filter.apply(&text)),
            )
        };
        Ok(match &self.question {
            Question::Choice { prompt, choices, gold } => {
                let (prompt, choices) = (asked(prompt)?, self.choices(row, choices)?);
                let gold = gold.of(row, choices.len())?;
                Item {
                    prompt,
                    shown: Some(format!(" {}", choices[gold])),
                    ask: Ask::Choice { choices, gold },
                }
            }
            Question::Gap { prompts, ending, gold } => {
                let prompts = prompts.iter().map(fill).collect::<Result<Vec<_>>>()?;
                let (gold, ending) = (gold.of(row, prompts.len())?, fill(ending)?);
                let (prompt, shown) = (prompts[gold].clone(), Some(ending.clone()));
                Item { prompt, shown, ask: Ask::Gap { prompts, ending, gold } }
            }
            Question::Target { prompt, target } => {
                let (prompt, word) = (asked(prompt)?, fill(target)?);
                Item { prompt, shown: Some(word.clone()), ask: Ask::LastWord { word } }
            }
            Question::AnyGreedy { prompt, answers, shown } => {
                let (prompt, (_, answers)) = (asked(prompt)?, answers.texts(row, 1)?);
                Item {
                    prompt,
                    shown: Some(fill(shown)?),
                    ask: Ask::AnyGreedy { answers: without_longer(answers) },
                }
            }
            Question::Generate { prompt, answers, shown } => {
                let prompt = asked(prompt)?;
                let (answers, list) = match answers {
                    Answers::Column(column) => (column.texts(row, 1)?.1, true),
                    Answers::One(answer) => (vec![fill(answer)?], false),
                };
                Item { prompt, shown: Some(fill(shown)?), ask: Ask::Generate { answers, list } }
            }
            Question::Rolling { prompt, counted } => {
                let text = self.value(row, counted)?;
                let ask = Ask::Rolling { words: count_words(&text), bytes: text.len() };
                Item { prompt: asked(prompt)?, shown: None, ask }
            }
        })
    }

    /// Returns the beginning of the prompt of a row.
    pub(crate) fn description(&self, row: &Row) -> Result<String> {
        self.fill(row, &self.rules.description)
    }

    fn choices(&self, row: &Row, choices: &Choices) -> Result<Vec<String>> {
        let changed = |text: String| choices.filters.iter().fold(text, |text, filter| filter.apply(&text));
        let (name, texts) = match &choices.texts {
            TextList::Column(column) => column.texts(row, 2)?,
            TextList::Templates(templates) => {
                let texts =
                    templates.iter().map(|template| self.fill(row, template)).collect::<Result<_>>()?;
                ("choices".to_owned(), texts)
            }
        };
        let texts: Vec<String> = texts.into_iter().map(changed).collect();
        match texts.iter().position(String::is_empty) {
            Some(i) => {
                Err(row
                    .wrong(format!("text {i} of `{name}` is markup alone"), "take the row from the original"))
            }
            None => Ok(texts),
        }
    }

    fn fill(&self, row: &Row, template: &Template) -> Result<String> {
        let text = template.fill(LONGEST, |place| self.place(row, place).map(Cow::into_owned))?;
        text.ok_or_else(|| {
            let reason = format!("its text is longer than {} MiB", LONGEST >> 20);
            row.wrong(reason, "remove the row, or shorten the template")
        })
    }

    fn column(&self, name: &str) -> Cow<'_, Column> {
        self.columns.get(name).map_or_else(|| Cow::Owned(Column::plain(name)), Cow::Borrowed)
    }

    fn place<'r>(&self, row: &'r Row, place: &Place) -> Result<Cow<'r, str>> {
        let Some(index) = place.index else { return self.value(row, &place.name) };
        let (name, mut texts) = self.column(&place.name).texts(row, 1)?;
        if index >= texts.len() {
            let reason =
                format!("`{name}` has {} texts, and number {index} from 0 is asked for", texts.len());
            return Err(row.wrong(reason, row.wrong_file.to_owned()));
        }
        Ok(Cow::Owned(texts.swap_remove(index)))
    }

    /// Returns the text called `name`: half of a text that is cut, or a column.
    fn value<'r>(&self, row: &'r Row, name: &str) -> Result<Cow<'r, str>> {
        let absent = |column: &String| row.find(&[column]).is_none();
        let mut cuts = self.cuts.iter().filter(|cut| cut.unless.as_ref().is_none_or(absent));
        match cuts.find(|cut| cut.into.iter().any(|half| half == name)) {
            Some(cut) => {
                let whole = self.column(&cut.column).text(row)?;
                let [before, after] = cut.halves(row, &whole)?;
                Ok(Cow::Owned(if cut.into[0] == name { before } else { after }.to_owned()))
            }
            None => self.column(name).text(row),
        }
    }
}

impl Cut {
    fn halves<'t>(&self, row: &Row, text: &'t str) -> Result<[&'t str; 2]> {
        Ok(match &self.at {
            CutAt::First(at) => match text.split_once(&at[..]) {
                Some((before, after)) => [before, after],
                None => {
                    let reason = format!("`{}` has no gap `{}`", self.column, shown(at));
                    return Err(row.wrong(reason, "take the row from the original"));
                }
            },
            CutAt::Last(at) => {
                text.rsplit_once(&at[..]).map_or(["", text], |(before, after)| [before, after])
            }
            CutAt::LastSentence => divide(text).into(),
        })
    }
}
