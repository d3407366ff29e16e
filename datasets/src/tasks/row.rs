//! A row of a task's file, with checks of its columns.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::remedy::Remedy;

/// One row: columns by name.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) fields: Map<String, Value>,
    /// The label from a file of labels beside the file.
    pub(crate) label: Option<String>,
    /// File and number from 1.
    place: (Arc<Path>, u64),
    /// The remedy in errors for a file of another dataset.
    pub(crate) wrong_file: &'static str,
}

impl Row {
    pub(crate) fn new(
        fields: Map<String, Value>,
        path: Arc<Path>,
        number: u64,
        wrong_file: &'static str,
    ) -> Row {
        Row { fields, label: None, place: (path, number), wrong_file }
    }

    /// Returns an error about this row.
    pub(crate) fn wrong(&self, reason: impl Into<String>, help: impl Into<Remedy>) -> Error {
        let (path, number) = &self.place;
        Error::row(path, *number, reason, help)
    }

    /// Finds the first of the columns `names` that exists.
    pub(crate) fn find<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &Value)> {
        names.iter().find_map(|&name| self.fields.get(name).filter(|v| !v.is_null()).map(|v| (name, v)))
    }

    /// Makes the error of a row without any of the columns `names`.
    pub(crate) fn no_column(&self, names: &[&str]) -> Error {
        let there = self.fields.keys().take(20).map(String::as_str).collect::<Vec<_>>().join(", ");
        let there = if there.is_empty() { "no column".to_owned() } else { there };
        self.wrong(
            format!("no column `{}`, there is {there}", names.join("` or `")),
            self.wrong_file.to_owned(),
        )
    }

    /// Makes the error of a value that is not what is `expected`.
    pub(crate) fn kind(&self, name: &str, value: &Value, expected: &str) -> Error {
        let found = match value {
            Value::Null => "null",
            Value::Bool(_) => "a truth value",
            Value::Number(_) => "a number",
            Value::String(_) => "a text",
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
        };
        self.wrong(format!("`{name}` is {found}, not {expected}"), self.wrong_file.to_owned())
    }

    /// Reads a list of at least `least` texts, none of them blank, from a value inside the row.
    pub(crate) fn list(&self, name: &str, value: &Value, least: usize) -> Result<Vec<String>> {
        let Value::Array(values) = value else { return Err(self.kind(name, value, "a list of texts")) };
        let help = "remove the row or take it from the original";
        if values.len() < least {
            return Err(
                self.wrong(format!("`{name}` has {} texts, at least {least} needed", values.len()), help)
            );
        }
        let texts = values.iter().enumerate().map(|(i, value)| match value.as_str() {
            Some(text) if !text.trim().is_empty() => Ok(text.to_owned()),
            Some(_) => Err(self.wrong(format!("text {i} of `{name}` is empty"), help)),
            None => Err(self.kind(name, value, "a list of texts")),
        });
        texts.collect()
    }

    /// Returns which of `count` choices is right, from 0. Labels in the file count from `first`.
    pub(crate) fn label(&self, names: &[&str], first: usize, count: usize) -> Result<usize> {
        let (name, number) = match (self.find(names), &self.label) {
            (None, Some(label)) => ("label", label.trim().to_owned()),
            _ => match self.find(names).ok_or_else(|| self.no_column(names))? {
                (name, Value::String(text)) => (name, text.trim().to_owned()),
                (name, value @ Value::Number(_)) => (name, value.to_string()),
                (name, value) => return Err(self.kind(name, value, "a label")),
            },
        };
        let last = first + count - 1;
        let help = match number.is_empty() || number == "-1" {
            true => "public test splits come without labels: give the validation split".to_owned(),
            false => "take the row from the original".to_owned(),
        };
        match number.parse::<usize>() {
            Ok(label) if (first..=last).contains(&label) => Ok(label - first),
            _ => Err(self.wrong(format!("`{name}` is {number:?}, not one of {first} to {last}"), help)),
        }
    }
}
