//! Reads JSON files of bounded size.

use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result, shown};
use crate::files::{LFS_POINTER, lfs_pointer, open_regular};

pub(crate) const COPY: &str = "copy the file again";
/// The largest JSON file that is read, in bytes.
const LARGEST: u64 = 64 << 20;
/// The largest configuration that is read, in bytes.
const LARGEST_CONFIG: u64 = 16 << 20;
/// The largest file of a tokenizer that is read, in bytes; a Unigram model of a million tokens, with indents, has some 70 million.
const LARGEST_OF_TOKENIZER: u64 = 128 << 20;
/// Most values of an object that is kept as it is. Each takes some 72 bytes, and as much again while its list grows.
const MOST_VALUES: usize = 1 << 21;
/// Most values of a tokenizer's file; the largest tokenizers in use have three million.
pub(crate) const MOST_IN_TOKENIZER: usize = 1 << 23;

/// Reads the text of a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<String> {
    read_up_to(path, LARGEST)
}

/// Reads the text of a configuration.
pub(crate) fn read_config(path: &Path) -> Result<String> {
    read_up_to(path, LARGEST_CONFIG)
}

/// Reads the text of a file of a tokenizer.
pub(crate) fn read_tokenizer(path: &Path) -> Result<String> {
    read_up_to(path, LARGEST_OF_TOKENIZER)
}

fn read_up_to(path: &Path, largest: u64) -> Result<String> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(largest + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > largest {
        let problem = format!("more than {largest} bytes, too many for such a file");
        return Err(Error::path(path, problem, COPY));
    }
    // Some editors write a byte-order mark.
    if bytes.starts_with(b"\xEF\xBB\xBF") {
        bytes.drain(..3);
    }
    if bytes.starts_with(LFS_POINTER) {
        return Err(lfs_pointer(path));
    }
    String::from_utf8(bytes).map_err(|cause| {
        Error::path(path, format!("not UTF-8 at byte {}", cause.utf8_error().valid_up_to()), COPY)
    })
}

/// Parses JSON; `path`, the name of the type and the remedy are for messages.
pub(crate) fn parse<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    what: &str,
    help: &'static str,
) -> Result<T> {
    serde_json::from_str(text).map_err(|cause| match python_number(text, &cause) {
        Some(word) => {
            let problem = format!("line {} holds {word}, which JSON does not have", cause.line());
            Error::path(path, problem, "write a number or null there")
        }
        None => Error::path(path, format!("not {what}: {}", shown(&cause.to_string())), help),
    })
}

/// Returns the number that Python writes and JSON does not have, if the parser stopped there.
fn python_number(text: &str, cause: &serde_json::Error) -> Option<&'static str> {
    let line = text.lines().nth(cause.line().checked_sub(1)?)?;
    let before = line.get(..cause.column().checked_sub(1)?)?;
    // The parser stops at the first letter, or behind it.
    let word = before.rfind(|c: char| !c.is_ascii_alphabetic() && c != '-').map_or(0, |at| at + 1);
    let word = line.get(word..).filter(|_| cause.is_syntax())?;
    ["NaN", "Infinity", "-Infinity"].into_iter().find(|number| word.starts_with(number))
}

/// Refuses a text with more than `most` values, before each of them takes memory.
pub(crate) fn check_values(path: &Path, text: &str, most: usize) -> Result<()> {
    let values = values(text);
    if values > most {
        return Err(Error::path(path, format!("has {values} values, more than {most}"), COPY));
    }
    Ok(())
}

/// Returns about how many keys and values a text has: its commas, colons and opening brackets outside of strings.
fn values(text: &str) -> usize {
    let (mut found, mut in_string, mut is_escaped) = (0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_string => is_escaped = true,
            b'"' => in_string = !in_string,
            b',' | b':' | b'[' | b'{' if !in_string => found += 1,
            _ => {}
        }
    }
    found
}

/// Parses a JSON object; `path` is for messages.
pub(crate) fn parse_object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    check_values(path, text, MOST_VALUES)?;
    parse(path, text, "a JSON object", COPY)
}

/// Parses an object that this program wrote.
///
/// # Panics
/// `text` is not a JSON object.
pub(crate) fn object(text: &str) -> Map<String, Value> {
    serde_json::from_str(text).expect("an object that was written as one")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_before_they_take_memory() {
        for (text, wanted) in [
            ("{}", 1),
            ("[0,0,0]", 3),
            (r#"{"a": [1, {"b": 2}], "c": ""}"#, 8),
            (r#"{"a,[\"{:": ",,\\"}"#, 2),
            ("[[],[]]", 4),
        ] {
            assert_eq!(values(text), wanted, "{text}");
        }
        let list = |values: usize| format!("{{\"x\":[{}0]}}", "0,".repeat(values));
        assert!(parse_object(Path::new("c"), &list(10)).is_ok());
        let message = parse_object(Path::new("c"), &list(MOST_VALUES)).unwrap_err().to_string();
        assert!(message.starts_with("c: has 2097155 values, more than 2097152; copy"), "{message}");
    }

    #[test]
    fn files_have_limits_by_their_kind() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |len: u64, read: fn(&Path) -> Result<String>| {
            file.as_file().set_len(len).unwrap();
            read(file.path()).map(|text| text.len() as u64)
        };
        assert_eq!(read(LARGEST_CONFIG, read_config).unwrap(), LARGEST_CONFIG);
        assert_eq!(read(LARGEST_CONFIG + 1, read_json).unwrap(), LARGEST_CONFIG + 1);
        let message = read(LARGEST_CONFIG + 1, read_config).unwrap_err().to_string();
        assert!(message.contains("more than 16777216 bytes"), "{message}");
        assert_eq!(read(LARGEST + 1, read_tokenizer).unwrap(), LARGEST + 1);
        let message = read(LARGEST + 1, read_json).unwrap_err().to_string();
        assert!(message.contains("more than 67108864 bytes"), "{message}");
    }

    #[test]
    fn numbers_of_python_are_named() {
        for (text, wanted) in [
            ("{\n\"a\": NaN}", "c: line 2 holds NaN, which JSON does not have; write a number or null there"),
            ("{\"a\":-Infinity}", "c: line 1 holds -Infinity, which"),
            ("{\"a\": [1, Infinity]}", "c: line 1 holds Infinity, which"),
            ("{\"a\": NaN", "c: line 1 holds NaN, which"),
            ("{\"é\": \"NaN\", x}", "c: not a JSON object: key must be a string at line 1 column"),
            ("{\"a\": nan}", "c: not a JSON object: expected"),
            ("", "c: not a JSON object: EOF"),
        ] {
            let message = parse_object(Path::new("c"), text).unwrap_err().to_string();
            assert!(message.starts_with(wanted), "{text}: {message}");
        }
    }
}
