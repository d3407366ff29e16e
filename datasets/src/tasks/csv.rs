//! CSV with a header line, of which one record is in memory at a time.

use std::io::{self, Read};
use std::path::Path;
use std::sync::LazyLock;

use csv::{ReaderBuilder, StringRecord};
use regex::Regex;
use serde_json::Value;

use super::read::Take;
use crate::error::{Error, Result, shown};

/// Most columns: a row has a key and a value for each.
const MAX_COLUMNS: usize = 1 << 20;

/// A record whose quotes are closed at the ends of fields. The reader accepts any other as well.
static QUOTED_WELL: LazyLock<Regex> = LazyLock::new(|| {
    let field = r#"(?:"(?:[^"]|"")*"|[^",\r\n][^,\r\n]*|)"#;
    Regex::new(&format!("^{field}(?:,{field})*$")).expect("a constant")
});

/// A reader that keeps what it has read.
struct Kept<R> {
    source: R,
    bytes: Vec<u8>,
}

impl<R: Read> Read for Kept<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(into)?;
        self.bytes.extend_from_slice(&into[..count]);
        Ok(count)
    }
}

/// Hands the rows of `source`, which is UTF-8, to `take`, as texts under the header's names.
pub(crate) fn rows(path: &Path, source: impl Read, take: &mut Take<'_>) -> Result<()> {
    let kept = Kept { source, bytes: Vec::new() };
    let mut reader = ReaderBuilder::new().has_headers(false).flexible(true).from_reader(kept);
    let mut names: Option<StringRecord> = None;
    let mut record = StringRecord::new();
    for row in 0.. {
        let wrong = |reason: String| Error::row(path, row, reason, "fetch the file again");
        let start = reader.position().byte();
        if !reader.read_record(&mut record).map_err(|cause| wrong(shown(&cause.to_string())))? {
            break;
        }
        let length = (reader.position().byte() - start) as usize;
        let bytes: Vec<u8> = reader.get_mut().bytes.drain(..length).collect();
        let raw = String::from_utf8_lossy(&bytes);
        let raw = raw.trim_matches(['\r', '\n']);
        if !QUOTED_WELL.is_match(raw) {
            let odd = raw.matches('"').count() % 2 == 1;
            let reason = if odd { "a quote that is never closed" } else { "text behind a closing quote" };
            return Err(wrong(reason.to_owned()));
        }
        match &names {
            None if record.len() > MAX_COLUMNS => {
                return Err(wrong(format!("{} columns, more than {MAX_COLUMNS}", record.len())));
            }
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
        rows(Path::new("a.csv"), text.as_bytes(), &mut |row| {
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
    fn records_are_cut_where_they_end_however_many_there_are() {
        // Larger together than the buffer of the reader; each is looked at alone.
        let rows: Vec<String> =
            (0..3000).map(|row| format!("\"{row},\n\"\"é\"\"\",{}", "x".repeat(row % 50))).collect();
        let found = read(&format!("a,b\r\n{}\r\n", rows.join("\r\n"))).unwrap();
        assert_eq!(found.len(), rows.len());
        let row: Value = serde_json::from_str(&found[2999]).unwrap();
        assert_eq!(row, serde_json::json!({ "a": "2999,\n\"é\"", "b": "x".repeat(49) }));
        let bad = format!("a,b\n{}\n\"1\"x,2\n", rows.join("\n"));
        assert!(
            read(&bad).unwrap_err().to_string().starts_with("a.csv: row 3001: text behind a closing quote")
        );
    }

    #[test]
    fn broken_records_are_named() {
        for (text, message) in [
            ("a,b\n1,2\n1,2,3\n", "row 2: 3 fields under 2 columns"),
            ("a,b\n1,\"2\n", "row 1: a quote that is never closed"),
            ("a,b\n\"1\"x,2\n", "row 1: text behind a closing quote"),
            (&",".repeat(MAX_COLUMNS)[..], "row 0: 1048577 columns, more than 1048576"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("a.csv: {message}; ")), "{error}");
        }
    }
}
