//! The header of a safetensors file, believed only as far as the file is long.
//!
//! ```text
//! u64 little-endian length of the header | JSON {name: {dtype, shape, data_offsets}} | data
//! ```

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::Dtype;
use crate::error::{Error, Result, shown};
use crate::files::{is_lfs_pointer, lfs_pointer};

const LARGEST_HEADER: u64 = 100_000_000;
const TRUNCATED: &str = "copy the file again";
const FOREIGN: &str = "write the file again with the safetensors library";

/// A checked header.
///
/// ```
/// use dsmoe_core::checkpoint::{Dtype, Header, HeaderEntry};
///
/// let json = br#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#;
/// let header = Header::parse("model.safetensors".as_ref(), json, 8 + json.len() as u64 + 8)?;
/// let HeaderEntry { name, dtype, len, .. } = &header.entries[0];
/// assert_eq!((&name[..], *dtype, *len), ("a", Dtype::F32, 8));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Header {
    /// All tensors, in the order of their data.
    pub entries: Vec<HeaderEntry>,
    /// Offset of the data in the file.
    pub data_start: u64,
}

/// One tensor of a header.
///
/// ```
/// use dsmoe_core::checkpoint::{Header, HeaderEntry};
///
/// let json = br#"{"b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
///     "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}"#;
/// let header = Header::parse("model.safetensors".as_ref(), json, 8 + json.len() as u64 + 14)?;
/// // Entries are in the order of their data.
/// let places = header.entries.iter().map(|HeaderEntry { name, offset, len, .. }| (&name[..], *offset, *len));
/// assert_eq!(places.collect::<Vec<_>>(), [("a", 0, 8), ("b", 8, 6)]);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// First byte, from the start of the data.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

#[derive(Deserialize)]
struct StoredEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The JSON object with all its keys, duplicates too.
struct StoredHeader(Vec<(String, StoredEntry)>);

impl<'de> Deserialize<'de> for StoredHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<StoredHeader, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = StoredHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<StoredHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        let entry = map
                            .next_value()
                            .map_err(|cause| A::Error::custom(format!("tensor {}: {cause}", shown(&name))))?;
                        entries.push((name, entry));
                    }
                }
                Ok(StoredHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl Header {
    /// Reads and checks the header of `file`.
    ///
    /// # Errors
    /// The file cannot be read, or its header does not describe exactly the bytes there are.
    pub fn read(path: &Path, file: &mut File) -> Result<Header> {
        let len = file.metadata().map_err(Error::io(path))?.len();
        let mut prefix = [0; 8];
        if len < 8 {
            let problem = format!("is missing: the file has {len} bytes");
            return Err(wrong(path, problem, TRUNCATED));
        }
        file.read_exact(&mut prefix).map_err(Error::io(path))?;
        if prefix == *b"version " && is_lfs_pointer(path)? {
            return Err(lfs_pointer(path));
        }
        let header_len = u64::from_le_bytes(prefix);
        check_len(path, header_len, len)?;
        let mut json = vec![0; header_len as usize];
        file.read_exact(&mut json).map_err(Error::io(path))?;
        Header::parse(path, &json, len)
    }

    /// Checks the JSON of a header of a file of `file_len` bytes; `path` is for messages.
    ///
    /// # Errors
    /// It does not describe exactly the bytes that follow it.
    pub fn parse(path: &Path, json: &[u8], file_len: u64) -> Result<Header> {
        let header_len = json.len() as u64;
        check_len(path, header_len, file_len)?;
        let data_start = 8 + header_len;
        let data_len = file_len - data_start;
        let stored: StoredHeader = serde_json::from_slice(json).map_err(|cause| {
            wrong(path, format!("is not that of safetensors: {}", shown(&cause.to_string())), FOREIGN)
        })?;
        let mut entries = Vec::with_capacity(stored.0.len());
        for (name, stored) in stored.0 {
            entries.push(check_entry(path, name, stored)?);
        }
        entries.sort_by_key(|entry| (entry.offset, entry.len));
        let mut end = 0;
        for entry in &entries {
            if entry.offset != end {
                let what = if entry.offset < end {
                    "overlaps the tensor before it"
                } else {
                    "leaves a gap before it"
                };
                let problem = format!("{what}: it starts at byte {} of the data, not {end}", entry.offset);
                return Err(Error::tensor(path, &entry.name, problem, FOREIGN));
            }
            end = entry.offset + entry.len;
        }
        if end != data_len {
            let problem = format!("describes {end} bytes of data and the file has {data_len}");
            return Err(wrong(path, problem, TRUNCATED));
        }
        let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::tensor(path, pair[0], "is in the header twice", FOREIGN));
        }
        Ok(Header { entries, data_start })
    }
}

fn wrong(path: &Path, problem: String, help: &'static str) -> Error {
    Error::path(path, format!("header {problem}"), help)
}

fn check_len(path: &Path, header_len: u64, file_len: u64) -> Result<()> {
    let rest = file_len.saturating_sub(8);
    if header_len > rest {
        let problem = format!("says it has {header_len} bytes and the file has {rest} after its length");
        return Err(wrong(path, problem, TRUNCATED));
    }
    if header_len > LARGEST_HEADER {
        let problem = format!("has {header_len} bytes; {LARGEST_HEADER} is the most allowed");
        return Err(wrong(path, problem, FOREIGN));
    }
    Ok(())
}

fn check_entry(path: &Path, name: String, stored: StoredEntry) -> Result<HeaderEntry> {
    let fail = |problem: String| Err(Error::tensor(path, &name, problem, FOREIGN));
    let Some(dtype) = Dtype::from_stored(&stored.dtype) else {
        return fail(format!("has unknown dtype {:?}", shown(&stored.dtype)));
    };
    let [start, end] = stored.data_offsets;
    let Some(len) = end.checked_sub(start) else {
        return fail(format!("ends at byte {end}, before its start {start}"));
    };
    let elements = stored.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n));
    let wanted = elements.and_then(|n| n.checked_mul(dtype.size() as u64));
    let shape: Option<Vec<usize>> = stored.shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    match (wanted, shape) {
        (Some(wanted), Some(shape)) if wanted == len => {
            Ok(HeaderEntry { name, dtype, shape, offset: start, len })
        }
        _ => {
            let shape = shown(&format!("{:?}", stored.shape));
            fail(format!("of shape {shape} and dtype {dtype} does not fill its {len} bytes"))
        }
    }
}
