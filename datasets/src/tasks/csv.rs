//! CSV with a header line: fields in quotes may hold commas, line ends and doubled quotes.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Hands the rows of `text` to `take`, as texts under the header's names.
pub(crate) fn rows(
    path: &Path,
    text: &str,
    take: &mut dyn FnMut(Map<String, Value>) -> Result<()>,
) -> Result<()> {
    let mut rest = text;
    let mut header: Option<Vec<String>> = None;
    let mut row = 0;
    while !rest.is_empty() {
        let wrong = |reason: String| Error::Row {
            path: path.to_path_buf(),
            row,
            reason,
            mend: "fetch the file again".into(),
        };
        let (record, after) = record(rest).map_err(|reason| wrong(reason.to_owned()))?;
        rest = after;
        if record.len() == 1 && record[0].is_empty() {
            continue;
        }
        match &header {
            None => header = Some(record),
            Some(names) if names.len() == record.len() => {
                take(names.iter().cloned().zip(record.into_iter().map(Value::String)).collect())?;
            }
            Some(names) => {
                return Err(wrong(format!("{} fields under {} columns", record.len(), names.len())));
            }
        }
        row += 1;
    }
    Ok(())
}

/// The first record of `text`, and what follows it.
fn record(text: &str) -> std::result::Result<(Vec<String>, &str), &'static str> {
    let mut fields = Vec::new();
    let mut rest = text;
    loop {
        let mut field = String::new();
        if let Some(quoted) = rest.strip_prefix('"') {
            rest = quoted;
            loop {
                let end = rest.find('"').ok_or("a quote that is never closed")?;
                field += &rest[..end];
                rest = &rest[end + 1..];
                match rest.strip_prefix('"') {
                    Some(more) => (field, rest) = (field + "\"", more),
                    None => break,
                }
            }
            if !(rest.is_empty() || rest.starts_with([',', '\n', '\r'])) {
                return Err("text behind a closing quote");
            }
        } else {
            let end = rest.find([',', '\n', '\r']).unwrap_or(rest.len());
            field += &rest[..end];
            rest = &rest[end..];
        }
        fields.push(field);
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => break,
        }
    }
    let rest = rest.strip_prefix("\r\n").or_else(|| rest.strip_prefix(['\n', '\r'])).unwrap_or(rest);
    Ok((fields, rest))
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
