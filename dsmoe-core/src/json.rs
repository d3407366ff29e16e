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

/// Reads the text of a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<String> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > LARGEST {
        let problem = format!("more than {LARGEST} bytes, too many for a JSON file");
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

/// Parses a JSON object; `path` is for messages.
pub(crate) fn parse_object(path: &Path, text: &str) -> Result<Map<String, Value>> {
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
