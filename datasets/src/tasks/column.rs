//! Values of a row by their names in a definition.

use std::borrow::Cow;

use regex::Regex;
use serde_json::Value;

use super::row::Row;
use super::template::Change;
use crate::error::Result;

/// Where a value stands in a row, and what it has to be.
#[derive(Clone, Debug)]
pub(crate) struct Column {
    /// Names of its column, of which the first that is there counts. A dot leads into an object, `[]` through a list.
    pub(crate) paths: Vec<String>,
    /// It may be blank.
    pub(crate) blank: bool,
    /// It may be a number or a truth value.
    pub(crate) number: bool,
    /// The pattern that a text has to match, and the end of the error for one that does not.
    pub(crate) pattern: Option<(Regex, String)>,
    /// The remedy in the error for a row without this column.
    pub(crate) help: Option<String>,
}

impl Column {
    /// A text that is not blank.
    pub(crate) fn plain(name: &str) -> Column {
        Column { paths: vec![name.to_owned()], blank: false, number: false, pattern: None, help: None }
    }

    /// Finds the value; returns it with its name.
    fn find<'r>(&self, row: &'r Row) -> Result<(String, Cow<'r, Value>)> {
        let found = self.paths.iter().find_map(|path| Some((last(path), value_at(row, path)?)));
        found.ok_or_else(|| self.missing(row))
    }

    /// Makes the error of a row without the value.
    fn missing(&self, row: &Row) -> crate::error::Error {
        let roots: Vec<&str> = self.paths.iter().map(|path| root(path)).collect();
        let nested = self.paths[0].split_once('.').map(|(root, _)| (root, last(&self.paths[0])));
        let Some((first, leaf)) = nested else { return row.no_column(&roots) };
        match row.find(&roots).filter(|(_, value)| value.is_object()) {
            None => row.wrong(format!("no column `{first}` with `{leaf}`"), row.wrong_file.to_owned()),
            Some((name, _)) => {
                let help = self.help.clone().unwrap_or_else(|| row.wrong_file.to_owned());
                row.wrong(format!("`{name}` has no `{leaf}`"), help)
            }
        }
    }

    /// Reads a text.
    pub(crate) fn text<'r>(&self, row: &'r Row) -> Result<Cow<'r, str>> {
        let (name, value) = self.find(row)?;
        let text = match value {
            Cow::Borrowed(Value::String(text)) => Cow::Borrowed(&text[..]),
            Cow::Owned(Value::String(text)) => Cow::Owned(text),
            value if self.number && (value.is_number() || value.is_boolean()) => {
                Cow::Owned(value.to_string())
            }
            value => return Err(row.kind(&name, &value, "a text")),
        };
        if !self.blank && text.trim().is_empty() {
            return Err(
                row.wrong(format!("`{name}` is empty"), "remove the row or take it from the original")
            );
        }
        match &self.pattern {
            Some((pattern, otherwise)) if !pattern.is_match(&text) => {
                Err(row.wrong(format!("`{name}` {otherwise}"), "take the row from the original"))
            }
            _ => Ok(text),
        }
    }

    /// Reads a list of at least `least` texts, none of them blank; returns it with its name.
    pub(crate) fn texts(&self, row: &Row, least: usize) -> Result<(String, Vec<String>)> {
        let (name, value) = self.find(row)?;
        let texts = row.list(&name, &value, least)?;
        Ok((name, texts))
    }
}

fn root(path: &str) -> &str {
    path.split('.').next().unwrap_or(path)
}

fn last(path: &str) -> String {
    path.rsplit('.').next().unwrap_or(path).to_owned()
}

/// Follows a path into a row.
fn value_at<'r>(row: &'r Row, path: &str) -> Option<Cow<'r, Value>> {
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    // A column may have a dot in its own name.
    if let Some((_, value)) = row.find(&[path]) {
        return Some(Cow::Borrowed(value));
    }
    let (name, through_list) = first.strip_suffix("[]").map_or((first, false), |name| (name, true));
    let (_, value) = row.find(&[name])?;
    follow(value, through_list, rest)
}

fn follow<'r>(value: &'r Value, through_list: bool, rest: Option<&str>) -> Option<Cow<'r, Value>> {
    let Some(rest) = rest else { return Some(Cow::Borrowed(value)) };
    if through_list {
        let parts = value.as_array()?.iter().map(|value| Some(step(value, rest)?.into_owned()));
        return Some(Cow::Owned(Value::Array(parts.collect::<Option<_>>()?)));
    }
    step(value, rest)
}

fn step<'r>(value: &'r Value, path: &str) -> Option<Cow<'r, Value>> {
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let (name, through_list) = first.strip_suffix("[]").map_or((first, false), |name| (name, true));
    follow(value.get(name).filter(|value| !value.is_null())?, through_list, rest)
}

/// The right choice of a row.
#[derive(Clone, Debug)]
pub(crate) struct Gold {
    /// The same choice in every row, in place of a column.
    pub(crate) always: Option<usize>,
    pub(crate) column: Column,
    /// The number of the first choice.
    pub(crate) first: usize,
    /// It may be a truth value, of which true is the second choice.
    pub(crate) truth: bool,
    /// The column of labels in which it stands; none for a number.
    pub(crate) among: Option<Column>,
    pub(crate) filters: Vec<Change>,
}

impl Gold {
    /// Returns which of `count` choices is right, from 0.
    pub(crate) fn of(&self, row: &Row, count: usize) -> Result<usize> {
        if let Some(always) = self.always {
            let reason = || format!("choice {always} from 0 is right, and there are {count}");
            let help = row.wrong_file.to_owned();
            return if always < count { Ok(always) } else { Err(row.wrong(reason(), help)) };
        }
        let Some(among) = &self.among else {
            let names: Vec<&str> = self.column.paths.iter().map(String::as_str).collect();
            if let (true, Some((_, Value::Bool(right)))) = (self.truth, row.find(&names)) {
                return Ok(usize::from(*right));
            }
            return row.label(&names, self.first, count);
        };
        let text = self.column.text(row)?;
        let wanted = self.filters.iter().fold(text.into_owned(), |text, filter| filter.apply(&text));
        let (_, labels) = among.texts(row, count)?;
        labels.iter().take(count).position(|label| *label == wanted).ok_or_else(|| {
            let reason =
                format!("`{}` is {wanted:?}, not one of {}", last(&self.column.paths[0]), labels.join(", "));
            row.wrong(reason, "take the row from the original, or give a split with answers")
        })
    }
}
