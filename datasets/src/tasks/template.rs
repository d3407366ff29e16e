//! Texts with places for the columns of a row: `Question: {{question | strip}}\nAnswer:`.

use super::cleaning::{detokenized, without_markup};
use super::text::{capitalize, strip, strip_end, strip_start};

/// A text whose places are filled from a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    /// The text as it was given.
    source: String,
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Place(Place),
}

/// A value of a row, and what is done to its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The name of the value.
    pub(crate) name: String,
    /// The number of a text in a list, from 0.
    pub(crate) index: Option<usize>,
    filters: Vec<Change>,
}

/// A change of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Strip,
    StripStart,
    StripEnd,
    Lower,
    Upper,
    Capitalize,
    Spaces,
    WikiHow,
    WikiText,
}

impl Change {
    const WORDS: [(&'static str, Change); 9] = [
        ("strip", Change::Strip),
        ("strip_start", Change::StripStart),
        ("strip_end", Change::StripEnd),
        ("lower", Change::Lower),
        ("upper", Change::Upper),
        ("capitalize", Change::Capitalize),
        ("spaces", Change::Spaces),
        ("wikihow", Change::WikiHow),
        ("wikitext", Change::WikiText),
    ];

    /// Reads the name of a change.
    pub(crate) fn named(word: &str) -> Result<Change, String> {
        let found = Change::WORDS.iter().find(|(known, _)| *known == word);
        found.map(|(_, change)| *change).ok_or_else(|| {
            let known: Vec<&str> = Change::WORDS.iter().map(|(word, _)| *word).collect();
            format!("`{word}` is no filter; use {}", known.join(", "))
        })
    }

    /// Changes a text as Python's method of that name does; the last three as the harness's tasks do.
    pub(crate) fn apply(self, text: &str) -> String {
        match self {
            Change::Strip => strip(text).to_owned(),
            Change::StripStart => strip_start(text).to_owned(),
            Change::StripEnd => strip_end(text).to_owned(),
            Change::Lower => text.to_lowercase(),
            Change::Upper => text.to_uppercase(),
            Change::Capitalize => capitalize(text),
            Change::Spaces => text.replace('_', " "),
            Change::WikiHow => without_markup(text),
            Change::WikiText => detokenized(text),
        }
    }
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// The problem and its fix.
    pub(crate) fn parse(source: &str) -> Result<Template, String> {
        let (mut pieces, mut rest) = (Vec::new(), source);
        while let Some((before, after)) = rest.split_once("{{") {
            let Some((place, more)) = after.split_once("}}") else {
                return Err("`{{` is not closed; write `}}` behind the column".to_owned());
            };
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            pieces.push(Piece::Place(Place::parse(place)?));
            rest = more;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Template { source: source.to_owned(), pieces })
    }

    /// Returns the text as it was given.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Fills the places by `value`, up to `limit` bytes; none for a longer text.
    pub(crate) fn fill<E>(
        &self,
        limit: usize,
        mut value: impl FnMut(&Place) -> Result<String, E>,
    ) -> Result<Option<String>, E> {
        let mut text = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(part) => text += part,
                Piece::Place(place) => text += &place.changed(value(place)?),
            }
            if text.len() > limit {
                return Ok(None);
            }
        }
        Ok(Some(text))
    }
}

impl Place {
    /// Reads `name`, `name[2]`, each with `| filter` behind it or without.
    pub(crate) fn parse(text: &str) -> Result<Place, String> {
        let mut parts = text.split('|').map(str::trim);
        let whole = parts.next().unwrap_or_default();
        let (name, index) = match whole.strip_suffix(']').and_then(|inner| inner.split_once('[')) {
            Some((name, index)) => match index.parse() {
                Ok(index) => (name, Some(index)),
                Err(_) => return Err(format!("`{whole}` has no number in brackets; write choices[0]")),
            },
            None => (whole, None),
        };
        let fits = |c: char| c.is_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || !name.chars().all(fits) {
            return Err(format!("`{text}` is not the name of a column; name one, with filters behind `|`"));
        }
        let filters = parts.map(Change::named).collect::<Result<_, _>>()?;
        Ok(Place { name: name.to_owned(), index, filters })
    }

    /// Applies the filters to a text.
    pub(crate) fn changed(&self, text: String) -> String {
        self.filters.iter().fold(text, |text, filter| filter.apply(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_filled() {
        let fill = |template: &str| {
            let value = |place: &Place| {
                Ok::<String, ()>(format!(
                    " {}{} ",
                    place.name,
                    place.index.map_or(String::new(), |i| i.to_string())
                ))
            };
            Template::parse(template).unwrap().fill(100, value).unwrap()
        };
        for (template, wanted) in [
            ("", ""),
            ("plain {text}", "plain {text}"),
            ("{{a}}", " a "),
            ("Q: {{ a.b | strip }}?\nA: {{c[2]|strip|upper}}", "Q: a.b?\nA: C2"),
            ("{{a_b | spaces}}", " a b "),
        ] {
            assert_eq!(fill(template).as_deref(), Some(wanted), "{template}");
        }
        assert_eq!(fill(&"{{a}}".repeat(60)), None);
    }

    #[test]
    fn wrong_templates_say_what_helps() {
        for (template, part) in [
            ("{{a", "is not closed; write `}}` behind"),
            ("{{}}", "`` is not the name of a column"),
            ("{{a + b}}", "is not the name of a column; name one"),
            ("{{a[b]}}", "has no number in brackets"),
            ("{{a | title}}", "`title` is no filter; use strip, strip_start"),
        ] {
            let error = Template::parse(template).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
