//! Text columns of JSON objects. Only these columns are read as values: the rest of a row may hold what JSON does not
//! allow (`NaN`, `Infinity`, numbers of any size) or no parser likes (lone surrogates, deep nesting).
//!
//! The scanner takes linear time and does not call itself.

use std::borrow::Cow;

use crate::row_text::{Joined, RowText};

/// Names of existing columns that a message lists.
const LISTED: usize = 20;

/// The columns that are read of each object.
#[derive(Clone, Debug)]
pub(crate) struct Columns {
    /// The setting as it was given; a column of this very name wins over its parts.
    whole: String,
    parts: Vec<String>,
}

impl Columns {
    /// Takes one name, or several with commas between them; each counts once.
    pub(crate) fn new(names: &str) -> Columns {
        let mut parts: Vec<String> = Vec::new();
        for part in names.split(',') {
            if parts.iter().all(|other| other != part) {
                parts.push(part.to_owned());
            }
        }
        Columns { whole: names.to_owned(), parts }
    }
}

/// Why a text cannot be read as rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// Not JSON, or not an object.
    Syntax(String),
    /// A text column holds something else.
    Column(String),
}

type Result<T> = std::result::Result<T, Wrong>;

fn syntax<T>(reason: &str) -> Result<T> {
    Err(Wrong::Syntax(reason.to_owned()))
}

/// Reads rows out of a text, from left to right.
pub(crate) struct Scanner<'a> {
    text: &'a str,
    at: usize,
    /// Surrogates without their other half, which became U+FFFD.
    pub(crate) surrogates: u64,
}

impl<'a> Scanner<'a> {
    /// Starts at the start of `text`.
    pub(crate) fn new(text: &'a str) -> Scanner<'a> {
        Scanner { text, at: 0, surrogates: 0 }
    }

    /// Returns the byte that is read next.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// Reads an object that is followed by nothing else.
    pub(crate) fn only_row(&mut self, columns: &Columns) -> Result<RowText> {
        let row = self.row(columns)?;
        self.end()?;
        Ok(row)
    }

    fn row(&mut self, columns: &Columns) -> Result<RowText> {
        let mut found =
            Found { columns, whole: None, parts: vec![None; columns.parts.len()], names: Vec::new() };
        self.space();
        if self.peek() != Some(b'{') {
            return syntax("expected an object");
        }
        self.at += 1;
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return found.text();
        }
        loop {
            let key = self.key()?;
            self.space();
            match found.place(&key) {
                Some(place) => *place = Some(self.part()?),
                None => self.skip_value()?,
            }
            found.note(key);
            self.space();
            match self.take() {
                Some(b',') => {}
                Some(b'}') => return found.text(),
                None => return syntax("the object does not end"),
                _ => return self.unexpected("`,` or `}`"),
            }
        }
    }

    /// Reads a key and its colon.
    fn key(&mut self) -> Result<Cow<'a, str>> {
        self.space();
        if self.peek() != Some(b'"') {
            return self.unexpected("a key");
        }
        let surrogates = self.surrogates;
        let key = self.string()?;
        self.surrogates = surrogates;
        self.space();
        if self.take() != Some(b':') {
            return self.unexpected("`:`");
        }
        Ok(key)
    }

    /// Reads the value of a text column.
    fn part(&mut self) -> Result<Part> {
        match self.peek() {
            Some(b'"') => Ok(Part::Text(self.string()?.into_owned())),
            Some(first) => {
                let start = self.at;
                self.skip_value()?;
                Ok(match first {
                    b'[' => Part::Other("an array"),
                    b'{' => Part::Other("an object"),
                    b't' | b'f' => Part::Other("a boolean"),
                    _ if &self.text[start..self.at] == "null" => Part::Null,
                    _ => Part::Other("a number"),
                })
            }
            None => syntax("the object does not end"),
        }
    }

    /// Skips a value of any kind and depth.
    fn skip_value(&mut self) -> Result<()> {
        // The brackets that have to be closed, innermost last.
        let mut open = Vec::new();
        loop {
            self.space();
            match self.peek() {
                Some(b'"') => self.skip_string()?,
                Some(bracket @ (b'{' | b'[')) => {
                    self.at += 1;
                    self.space();
                    let close = if bracket == b'{' { b'}' } else { b']' };
                    if self.peek() == Some(close) {
                        self.at += 1;
                    } else {
                        open.push(close);
                        if close == b'}' {
                            self.skip_key()?;
                        }
                        continue;
                    }
                }
                Some(_) => self.scalar()?,
                None => return syntax("a value is missing at the end"),
            }
            loop {
                let Some(&close) = open.last() else { return Ok(()) };
                self.space();
                match self.take() {
                    Some(b',') => {
                        if close == b'}' {
                            self.skip_key()?;
                        }
                        break;
                    }
                    Some(byte) if byte == close => drop(open.pop()),
                    None => return syntax("a bracket is never closed"),
                    _ => return self.unexpected("`,` or a closing bracket"),
                }
            }
        }
    }

    fn skip_key(&mut self) -> Result<()> {
        self.space();
        if self.peek() != Some(b'"') {
            return self.unexpected("a key");
        }
        self.skip_string()?;
        self.space();
        if self.take() == Some(b':') { Ok(()) } else { self.unexpected("`:`") }
    }

    /// Skips a number or a word; Python writes some that JSON does not have.
    fn scalar(&mut self) -> Result<()> {
        let rest = &self.text[self.at..];
        let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
        let word = &rest[..rest.bytes().take_while(|byte| is_part(byte)).count()];
        let known = ["null", "true", "false", "NaN", "Infinity", "-Infinity", "-NaN", "+Infinity"];
        let number = word.trim_start_matches(['-', '+']);
        let number =
            number.starts_with(|c: char| c.is_ascii_digit() || c == '.') && number.parse::<f64>().is_ok();
        if !number && !known.contains(&word) {
            return self.unexpected("a value");
        }
        self.at += word.len();
        Ok(())
    }

    fn skip_string(&mut self) -> Result<()> {
        self.at += 1;
        let bytes = self.text.as_bytes();
        while let Some(found) = bytes[self.at..].iter().position(|byte| matches!(byte, b'"' | b'\\')) {
            self.at += found + 1;
            if bytes[self.at - 1] == b'"' {
                return Ok(());
            }
            self.at = (self.at + 1).min(bytes.len());
        }
        syntax("a text is never closed")
    }

    /// Reads a text.
    fn string(&mut self) -> Result<Cow<'a, str>> {
        let start = self.at + 1;
        let bytes = self.text.as_bytes();
        let mut text = String::new();
        // Start of what is not yet in `text`.
        let mut from = start;
        self.at = start;
        while let Some(found) = bytes[self.at..].iter().position(|byte| matches!(byte, b'"' | b'\\')) {
            let end = self.at + found;
            self.at = end + 1;
            if bytes[end] == b'"' {
                if from == start {
                    return Ok(Cow::Borrowed(&self.text[start..end]));
                }
                text.push_str(&self.text[from..end]);
                return Ok(Cow::Owned(text));
            }
            text.push_str(&self.text[from..end]);
            let c = self.escape()?;
            text.push(c);
            from = self.at;
        }
        self.at = bytes.len();
        syntax("a text is never closed")
    }

    /// Reads what follows a backslash.
    fn escape(&mut self) -> Result<char> {
        Ok(match self.take() {
            Some(b'n') => '\n',
            Some(b't') => '\t',
            Some(b'r') => '\r',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(c @ (b'"' | b'\\' | b'/')) => char::from(c),
            Some(b'u') => {
                let first = self.unit()?;
                let mut units = vec![first];
                if (0xd800..0xdc00).contains(&first) && self.text[self.at..].starts_with("\\u") {
                    let before = self.at;
                    self.at += 2;
                    let second = self.unit()?;
                    if (0xdc00..0xe000).contains(&second) {
                        units.push(second);
                    } else {
                        self.at = before;
                    }
                }
                match char::decode_utf16(units).next() {
                    Some(Ok(c)) => c,
                    _ => {
                        self.surrogates += 1;
                        char::REPLACEMENT_CHARACTER
                    }
                }
            }
            None => return syntax("a text is never closed"),
            _ => return self.unexpected("an escape"),
        })
    }

    /// Reads four hexadecimal digits.
    fn unit(&mut self) -> Result<u16> {
        let digits = self.text.get(self.at..self.at + 4).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        match digits.and_then(|digits| u16::from_str_radix(digits, 16).ok()) {
            Some(unit) => {
                self.at += 4;
                Ok(unit)
            }
            None => syntax("\\u needs four hexadecimal digits"),
        }
    }

    fn end(&mut self) -> Result<()> {
        self.space();
        if self.at == self.text.len() { Ok(()) } else { syntax("more text after the end") }
    }

    fn space(&mut self) {
        let bytes = self.text.as_bytes();
        while matches!(bytes.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn take(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn unexpected<T>(&self, wanted: &str) -> Result<T> {
        match self.at < self.text.len() {
            true => Err(Wrong::Syntax(format!("expected {wanted}"))),
            false => syntax("it does not end"),
        }
    }
}

/// The value of a text column.
#[derive(Clone, Debug)]
enum Part {
    Text(String),
    Null,
    Other(&'static str),
}

/// The state of reading one object.
struct Found<'a, 'c> {
    columns: &'c Columns,
    whole: Option<Part>,
    parts: Vec<Option<Part>>,
    names: Vec<Cow<'a, str>>,
}

impl<'a> Found<'a, '_> {
    /// Returns where the value of `key` goes, if it is wanted.
    fn place(&mut self, key: &str) -> Option<&mut Option<Part>> {
        if key == self.columns.whole {
            return Some(&mut self.whole);
        }
        let at = self.columns.parts.iter().position(|part| part == key)?;
        Some(&mut self.parts[at])
    }

    fn note(&mut self, key: Cow<'a, str>) {
        if self.names.len() < LISTED {
            self.names.push(key);
        }
    }

    fn text(self) -> Result<RowText> {
        let Columns { whole, parts } = self.columns;
        let (names, values) = match self.whole {
            Some(value) => (std::slice::from_ref(whole), vec![Some(value)]),
            None => (&parts[..], self.parts),
        };
        let mut joined = Joined::default();
        let mut missing = None;
        for (name, value) in names.iter().zip(values) {
            match value {
                Some(Part::Text(text)) => joined.push(&text),
                Some(Part::Null) => {}
                Some(Part::Other(kind)) => {
                    return Err(Wrong::Column(format!("column {name:?} holds {kind}, not text")));
                }
                None => missing = missing.or(Some(name)),
            }
        }
        let Some(name) = missing else { return Ok(joined.finish()) };
        let names: Vec<String> = self.names.iter().map(|name| format!("{name:?}")).collect();
        Ok(RowText::Missing(format!("no column {name:?} (columns: {})", names.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(json: &str, columns: &str) -> (Result<RowText>, u64) {
        let mut scanner = Scanner::new(json);
        (scanner.only_row(&Columns::new(columns)), scanner.surrogates)
    }

    fn text(json: &str) -> String {
        match row(json, "text").0 {
            Ok(RowText::Text(text)) => text,
            other => panic!("{json}: {other:?}"),
        }
    }

    #[test]
    fn only_the_text_column_is_read() {
        for rest in [
            "NaN",
            "-Infinity",
            "Infinity",
            "1e999999",
            "-0.0",
            "123456789012345678901234567890",
            "null",
            "true",
            "[]",
            "{}",
            "[1, {\"x\": [NaN, \"]\\\"}\"]}, {}]",
            "\"\\ud800\"",
            "\"\\\\\"",
            ".5",
        ] {
            assert_eq!(text(&format!("{{\"a\": {rest}, \"text\": \"t\", \"b\":{rest}}}")), "t", "{rest}");
        }
        let deep = format!("{{\"a\": {}{}, \"text\": \"t\"}}", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert_eq!(text(&deep), "t");
        let deep =
            format!("{{\"a\": {}1{}, \"text\": \"t\"}}", "{\"k\":".repeat(300_000), "}".repeat(300_000));
        assert_eq!(text(&deep), "t");
        assert_eq!(text("{\"text\": \"one\", \"text\": \"two\"}"), "two", "the last one counts");
        assert_eq!(text(" {\"te\\u0078t\" :\t\"x\"} \r\n"), "x");
    }

    #[test]
    fn escapes_are_decoded_and_lone_surrogates_replaced() {
        assert_eq!(text(r#"{"text": "\"\\\/\b\f\n\r\t\u00e9\ud83e\udd8a"}"#), "\"\\/\u{8}\u{c}\n\r\té🦊");
        for (json, wanted, count) in [
            (r#"{"text": "a\ud800b"}"#, "a\u{FFFD}b", 1),
            (r#"{"text": "\udc00\udc00"}"#, "\u{FFFD}\u{FFFD}", 2),
            (r#"{"text": "\ud800\ud83e\udd8a"}"#, "\u{FFFD}🦊", 1),
            (r#"{"text": "\ud800\n"}"#, "\u{FFFD}\n", 1),
            (r#"{"k\ud800": "\ud800", "text": "x"}"#, "x", 0),
        ] {
            assert_eq!(row(json, "text"), (Ok(RowText::Text(wanted.into())), count), "{json}");
        }
    }

    #[test]
    fn null_and_absent_columns_are_told_from_wrong_ones() {
        assert_eq!(row("{\"text\": null}", "text").0, Ok(RowText::Null));
        let missing = RowText::Missing("no column \"text\" (columns: \"a\", \"b\")".into());
        assert_eq!(row("{\"a\": 1, \"b\": 2}", "text").0, Ok(missing));
        assert_eq!(row("{\"q\": null, \"a\": \"x\"}", "q,a").0, Ok(RowText::Text("x".into())));
        assert_eq!(row("{\"q\": null, \"a\": null}", "q,a").0, Ok(RowText::Null));
        assert!(matches!(row("{\"q\": \"x\"}", "q,a").0, Ok(RowText::Missing(_))));
        assert_eq!(row("{\"q,a\": \"x\"}", "q,a").0, Ok(RowText::Text("x".into())));
        for (value, kind) in [
            ("1", "a number"),
            ("NaN", "a number"),
            ("true", "a boolean"),
            ("[1]", "an array"),
            ("{}", "an object"),
        ] {
            let wanted = Wrong::Column(format!("column \"text\" holds {kind}, not text"));
            assert_eq!(row(&format!("{{\"text\": {value}}}"), "text").0, Err(wanted));
        }
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for json in [
            "",
            "1",
            "[]",
            "{",
            "{\"a\"",
            "{\"a\":",
            "{\"a\": }",
            "{\"a\": 1",
            "{\"a\": 1,}",
            "{a: 1}",
            "{\"a\": x}",
            "{\"a\": 1} 2",
            "{\"a\": [1}",
            "{\"a\": {\"b\"}}",
            "{\"a\": \"x",
            "{\"a\": \"x\\",
            "{\"text\": \"\\x\"}",
            "{\"text\": \"\\u12\"}",
            "{\"text\": \"\\é\"}",
            "{\"a\": 1 2}",
            "{\"a\" 1}",
            "{\"a\": - }",
            "{\"a\": 2e5e3}",
            "{\"a\": 2-5}",
            "{\"a\": 2.5.1}",
            "{\"a\": nul}",
        ] {
            assert!(matches!(row(json, "text").0, Err(Wrong::Syntax(_))), "{json}: {:?}", row(json, "text"));
        }
    }

    proptest! {
        /// The scanner agrees with serde_json on every row that serde_json accepts. Edited rows never panic.
        #[test]
        fn rows_are_read_as_by_serde_json(
            json in r#"\{("(text|a|é|\\u0041)":(1|-2.5e3|null|true|"(x|\\n|\\u00e9|é|\\\\|🦊)*"|\[1,\{"b":2\}\])(,| )?){0,4}\}"#,
        ) {
            let ours = row(&json, "text").0;
            if let Ok(serde_json::Value::Object(object)) = serde_json::from_str(&json) {
                match object.get("text") {
                    Some(serde_json::Value::String(text)) => prop_assert_eq!(ours, Ok(RowText::Text(text.clone()))),
                    Some(serde_json::Value::Null) => prop_assert_eq!(ours, Ok(RowText::Null)),
                    Some(_) => prop_assert!(matches!(ours, Err(Wrong::Column(_)))),
                    None => prop_assert!(matches!(ours, Ok(RowText::Missing(_)))),
                }
            } else {
                prop_assert!(ours.is_err());
            }
        }
    }
}
