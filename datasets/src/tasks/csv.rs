//! CSV with a header line.

use std::path::Path;
use std::sync::LazyLock;

use csv::{ReaderBuilder, StringRecord};
use regex::Regex;
use serde_json::{Map, Value};

use crate::error::{Error, Result, shown};

/// A record whose quotes are closed at the ends of fields. The reader accepts any other as well.
static QUOTED_WELL: LazyLock<Regex> = LazyLock::new(|| {
    let field = r#"(?:"(?:[^"]|"")*"|[^",\r\n][^,\r\n]*|)"#;
    Regex::new(&format!("^{field}(?:,{field})*$")).expect("a constant")
});

/// Hands the rows of `text` to `take`, as texts under the header's names.
pub(crate) fn rows(
    path: &Path,
    text: &str,
    take: &mut dyn FnMut(Map<String, Value>) -> Result<()>,
) -> Result<()> {
    let mut reader = ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let mut names: Option<StringRecord> = None;
    let mut record = StringRecord::new();
    for row in 0.. {
        let wrong = |reason: String| Error::row(path, row, reason, "fetch the file again");
        let start = reader.position().byte() as usize;
        if !reader.read_record(&mut record).map_err(|cause| wrong(shown(&cause.to_string())))? {
            break;
        }
        let raw = text[start..reader.position().byte() as usize].trim_matches(['\r', '\n']);
        if !QUOTED_WELL.is_match(raw) {
            let odd = raw.matches('"').count() % 2 == 1;
            let reason = if odd { "a quote that is never closed" } else { "text behind a closing quote" };
            return Err(wrong(reason.to_owned()));
        }
        match &names {
            None => names = Some(std::mem::take(&mut record)),
            Some(names) if names.len() == record.len() => {
                take(names.iter().map(str::to_owned).zip(record.iter().map(Value::from)).collect())?;
            }
            Some(names) => {
                return Err(wrong(format!("{} fields under {} columns", record.len(), names.len())));
            }
        }
    }
    Ok(())
}
#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<String>> {
        let mut found = Vec::new();
        rows(Path::new("a.csv"), text, &mut |row| {
            found.push(Value::Object(row).to_string());
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn quotes_commas_and_line_ends_are_kept() {
        let found = read("a,b\r\n\"x, \"\"y\"\"\n\",z\r\n\r\n,last").unwrap();
        assert_eq!(found, [r#"{"a":"x, \"y\"\n","b":"z"}"#, r#"{"a":"","b":"last"}"#]);
        assert!(read("").unwrap().is_empty() && read("a,b\n").unwrap().is_empty());
    }

    #[test]
    fn broken_records_are_named() {
        for (text, message) in [
            ("a,b\n1,2\n1,2,3\n", "row 2: 3 fields under 2 columns"),
            ("a,b\n1,\"2\n", "row 1: a quote that is never closed"),
            ("a,b\n\"1\"x,2\n", "row 1: text behind a closing quote"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("a.csv: {message}; ")), "{error}");
        }
    }
}
