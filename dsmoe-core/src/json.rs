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
    serde_json::from_str(text)
        .map_err(|cause| Error::path(path, format!("not {what}: {}", shown(&cause.to_string())), help))
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
