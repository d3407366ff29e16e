//! Python functions that templates call and the template engine lacks: `json.dumps`, `strftime` and string methods.

use std::fmt::Write as _;

use chrono::NaiveDateTime;
use chrono::format::StrftimeItems;
use minijinja::Value as Item;
use minijinja::value::ValueKind;
use serde_json::{Number, Value};

/// The options of `json.dumps`.
pub(super) struct Style {
    pub(super) ensure_ascii: bool,
    pub(super) indent: Option<usize>,
    /// Between items, and between a key and its value.
    pub(super) separators: Option<[String; 2]>,
    pub(super) sort_keys: bool,
}

/// The widest indentation that is written.
const MAX_INDENT: usize = 64;

impl Style {
    /// Writes `value` as `json.dumps` does.
    pub(super) fn write(&self, value: &Value) -> String {
        let mut out = String::new();
        self.value(value, 0, &mut out);
        out
    }

    fn value(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Null => out.push_str("null"),
            Value::Bool(true) => out.push_str("true"),
            Value::Bool(false) => out.push_str("false"),
            Value::Number(number) => out.push_str(&number_text(number)),
            Value::String(text) => self.text(text, out),
            Value::Array(items) => {
                let items = items.iter().map(|item| (None, item));
                self.items(['[', ']'], items, depth, out);
            }
            Value::Object(fields) => {
                let mut fields: Vec<_> =
                    fields.iter().map(|(key, value)| (Some(key.as_str()), value)).collect();
                if self.sort_keys {
                    fields.sort_by_key(|(key, _)| *key);
                }
                self.items(['{', '}'], fields.into_iter(), depth, out);
            }
        }
    }

    fn items<'a>(
        &self,
        [open, close]: [char; 2],
        items: impl ExactSizeIterator<Item = (Option<&'a str>, &'a Value)>,
        depth: usize,
        out: &mut String,
    ) {
        let (between, after_key) = match (&self.separators, self.indent) {
            (Some([item, key]), _) => (item.as_str(), key.as_str()),
            (None, Some(_)) => (",", ": "),
            (None, None) => (", ", ": "),
        };
        let empty = items.len() == 0;
        out.push(open);
        for (at, (key, value)) in items.enumerate() {
            if at > 0 {
                out.push_str(between);
            }
            self.line(depth + 1, out);
            if let Some(key) = key {
                self.text(key, out);
                out.push_str(after_key);
            }
            self.value(value, depth + 1, out);
        }
        if !empty {
            self.line(depth, out);
        }
        out.push(close);
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent.min(MAX_INDENT) * depth));
        }
    }

    fn text(&self, text: &str, out: &mut String) {
        let quoted = Value::from(text).to_string();
        if !self.ensure_ascii {
            out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
}

/// Returns a number as Python's `repr` writes it.
fn number_text(number: &Number) -> String {
    match number.as_f64() {
        Some(x) if number.is_f64() => float_text(x),
        _ => number.to_string(),
    }
}

/// Returns a float as Python writes it; none if the value is no float.
pub(super) fn float(value: &Item) -> Option<String> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok()).flatten().map(float_text)
}

fn float_text(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if x != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => format!("{x:?}"),
    }
}

/// Most digits of a width or precision.
const WIDTH_DIGITS: usize = 5;

/// Returns whether `format` of a text would write fields of a width that no text needs, which the engine writes before it counts.
pub(super) fn is_too_wide(text: &str, arguments: &[Item]) -> bool {
    let specifications = text.split('}').filter_map(|part| part.split_once('{')?.1.split_once(':'));
    let largest = arguments.iter().filter_map(Item::as_i64).max().unwrap_or(0);
    specifications.map(|(_, specification)| specification).any(|specification| {
        let numbers = specification.split(|c: char| !c.is_ascii_digit());
        let longest = numbers.map(str::len).max().unwrap_or(0);
        // A field in the specification of another takes its width from an argument.
        longest > WIDTH_DIGITS || specification.contains('{') && largest >= 10i64.pow(WIDTH_DIGITS as u32)
    })
}

/// Calls a method of a text; none if it is not one of those here.
pub(super) fn method(text: &str, name: &str, arguments: &[Item]) -> Option<Item> {
    let part = arguments.first()?.as_str().filter(|part| !part.is_empty() || name.starts_with("remove"))?;
    let list = |parts: &[&str]| parts.iter().map(|&part| Item::from(part)).collect::<Item>();
    let three = |(before, after)| list(&[before, part, after]);
    Some(match (name, arguments) {
        ("removeprefix", [_]) => text.strip_prefix(part).unwrap_or(text).into(),
        ("removesuffix", [_]) => text.strip_suffix(part).unwrap_or(text).into(),
        ("partition", [_]) => text.split_once(part).map_or_else(|| list(&[text, "", ""]), three),
        ("rpartition", [_]) => text.rsplit_once(part).map_or_else(|| list(&["", "", text]), three),
        ("rsplit", [_]) => list(&text.split(part).collect::<Vec<_>>()),
        ("rsplit", [_, most]) => {
            let most = usize::try_from(most.as_i64()?).unwrap_or(usize::MAX);
            let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), part).collect();
            parts.reverse();
            list(&parts)
        }
        _ => return None,
    })
}

/// Formats a time without a zone as `strftime` does. A directive that is not known is kept.
pub(super) fn strftime(format: &str, time: NaiveDateTime) -> String {
    // Python's fractions have six digits, and a time without a zone has no name and no offset of one.
    let mut own = String::new();
    let mut parts = format.split('%');
    own.push_str(parts.next().unwrap_or_default());
    while let Some(part) = parts.next() {
        match part.chars().next() {
            None => {
                own.push_str("%%");
                own.push_str(parts.next().unwrap_or_default());
            }
            Some('f') => own.extend(["%6f", &part[1..]]),
            Some('z' | 'Z') => own.push_str(&part[1..]),
            Some(_) => own.extend(["%", part]),
        }
    }
    let mut text = String::new();
    // A directive that needs a zone.
    if write!(text, "{}", time.format_with_items(StrftimeItems::new_lenient(&own))).is_err() {
        return format.to_owned();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_written_as_python_does() {
        for (x, text) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (-2.5, "-2.5"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (1.25e100, "1.25e+100"),
            (-1e22, "-1e+22"),
            (f64::NEG_INFINITY, "-inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float_text(x), text);
        }
        assert_eq!(number_text(&Number::from(u64::MAX)), "18446744073709551615");
    }

    #[test]
    fn json_has_pythons_separators() {
        let style = |indent| Style { ensure_ascii: false, indent, separators: None, sort_keys: false };
        let value = json!({"b": [1, {"é": null}], "a": {}, "t": "\u{7f}\n\u{1}\"</b>"});
        assert_eq!(
            style(None).write(&value),
            "{\"b\": [1, {\"é\": null}], \"a\": {}, \"t\": \"\u{7f}\\n\\u0001\\\"</b>\"}"
        );
        assert_eq!(
            style(Some(2)).write(&json!({"a": [1, 2], "b": []})),
            "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": []\n}"
        );
        assert_eq!(style(Some(0)).write(&json!([1, 2])), "[\n1,\n2\n]");
        let ascii = Style { ensure_ascii: true, ..style(None) };
        assert_eq!(ascii.write(&json!("é🙂")), "\"\\u00e9\\ud83d\\ude42\"");
    }

    #[test]
    fn texts_have_pythons_methods() {
        let call = |text: &str, name: &str, arguments: &[Item]| {
            method(text, name, arguments).map(|item| item.to_string())
        };
        let text = |part: &str| Item::from(part);
        for (name, arguments, wanted) in [
            ("removeprefix", vec![text("a-")], "b-c"),
            ("removeprefix", vec![text("x")], "a-b-c"),
            ("removesuffix", vec![text("-c")], "a-b"),
            ("partition", vec![text("-")], "['a', '-', 'b-c']"),
            ("partition", vec![text("x")], "['a-b-c', '', '']"),
            ("rpartition", vec![text("-")], "['a-b', '-', 'c']"),
            ("rsplit", vec![text("-")], "['a', 'b', 'c']"),
            ("rsplit", vec![text("-"), Item::from(1)], "['a-b', 'c']"),
            ("rsplit", vec![text("-"), Item::from(-1)], "['a', 'b', 'c']"),
        ] {
            assert_eq!(call("a-b-c", name, &arguments).as_deref(), Some(wanted), "{name}");
        }
        assert_eq!(call("a", "split", &[text("-")]), None);
        assert_eq!(call("a", "partition", &[]), None);
    }

    #[test]
    fn times_are_written_as_python_does() {
        let time = |text: &str| text.parse::<NaiveDateTime>().unwrap();
        let of = |text: &str| strftime("%A %d %B %Y %H:%M:%S", time(text));
        assert_eq!(of("1970-01-01T00:00:00"), "Thursday 01 January 1970 00:00:00");
        assert_eq!(of("2024-02-29T23:59:59"), "Thursday 29 February 2024 23:59:59");
        let at = time("2025-01-01T13:00:05.0625");
        assert_eq!(strftime("%-d %b %y %I%p %F %T %% %f", at), "1 Jan 25 01PM 2025-01-01 13:00:05 % 062500");
        assert_eq!(strftime("%+ %:z", at), "%+ %:z");
        assert_eq!(strftime("%j %a %e|%Z%z|%Q %%Z %", at), "001 Wed  1||%Q %Z %");
    }
}
