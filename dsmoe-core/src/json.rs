//! Reads JSON files of bounded size.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result, shown};

/// The largest JSON file that is read, in bytes.
const LARGEST: u64 = 64 << 20;

/// Reads the text of a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<String> {
    let len = std::fs::metadata(path).map_err(Error::io(path))?.len();
    if len > LARGEST {
        let problem = format!("{len} bytes are too many for a JSON file");
        return Err(Error::Path { path: path.to_path_buf(), problem, help: "copy the file again".into() });
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|cause| Error::Json {
        path: path.to_path_buf(),
        message: format!("not UTF-8 at byte {}", cause.utf8_error().valid_up_to()),
        help: "copy the file again".into(),
    })
}

/// Parses a JSON object; `path` is for messages.
pub(crate) fn parse_object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(text).map_err(|cause| Error::Json {
        path: path.to_path_buf(),
        message: format!("not a JSON object: {}", shown(&cause.to_string())),
        help: "copy the file again".into(),
    })
}
