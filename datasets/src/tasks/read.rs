//! Reads rows of the files that benchmarks come in: JSON lines, JSON arrays, CSV, lines of text, also as .gz, .zst, .bz2 and
//! .xz; Parquet.

use std::fmt;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::content::{AHEAD, Content, Reading, SPLIT_ROW, many_values};
use super::csv;
use super::row::Row;
use crate::error::{Error, Result};
use crate::files::json_values;
use crate::format::MAX_DOCUMENT;
use crate::parquet_rows::ParquetRows;
use crate::reader::{Packing, Records};

/// The largest row, in bytes: a line, an object or a record.
const MAX_ROW: u64 = MAX_DOCUMENT;
/// Most keys and values of a row of JSON. Each takes some 72 bytes, and about twice as much in objects of one field.
const MAX_VALUES: usize = 1 << 21;

/// Receives rows one after the other.
pub(crate) type Sink<'a> = dyn FnMut(Row) -> Result<()> + 'a;

/// Receives the fields of rows one after the other.
pub(super) type Take<'a> = dyn FnMut(Map<String, Value>) -> Result<()> + 'a;

/// The content of a file, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    JsonLines,
    Json,
    Csv,
    /// Each line is the text of a row.
    Lines,
    Parquet,
}

/// Derives the format of `path` from its name; none for a file that holds no rows.
pub(crate) fn format_of(path: &Path) -> Option<(Format, Packing)> {
    let (extension, packing) = Packing::of(path);
    let format = match &extension[..] {
        "jsonl" | "ndjson" => Format::JsonLines,
        "json" => Format::Json,
        "csv" => Format::Csv,
        "txt" => Format::Lines,
        "parquet" if packing == Packing::Plain => Format::Parquet,
        _ => return None,
    };
    Some((format, packing))
}

/// Returns the name of `path` without the endings that say its format.
pub(crate) fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let packed = match Packing::of(path).1 {
        Packing::Plain => &name,
        _ => name.rsplit_once('.').map_or(&*name, |(packed, _)| packed),
    };
    packed.rsplit_once('.').map_or(packed, |(stem, _)| stem).to_owned()
}

/// Hands every row of the file to `sink`, with its label where a file `<stem>-labels.lst` lies beside it. Returns
/// how many there were.
pub(crate) fn read_rows(path: &Path, wrong_file: &'static str, sink: &mut Sink<'_>) -> Result<u64> {
    let Some((format, packing)) = format_of(path) else {
        let help = "give a .jsonl, .json, .csv, .txt (also .gz, .zst, .bz2, .xz) or .parquet file";
        return Err(Error::file(path, "not a file of rows by its name", help));
    };
    let mut labels = Labels::beside(path)?;
    let path: Arc<Path> = path.into();
    let mut number = 0;
    let mut take = |fields| {
        number += 1;
        let mut row = Row::new(fields, Arc::clone(&path), number, wrong_file);
        row.label = labels.as_mut().map(|labels| labels.next(&row)).transpose()?;
        sink(row)
    };
    match format {
        Format::JsonLines => lines(&path, packing, &mut |line, row| {
            if json_values(line.as_bytes()) > MAX_VALUES {
                return Err(Error::row(&path, row, many_values(MAX_VALUES), SPLIT_ROW));
            }
            take(serde_json::from_str(line).map_err(|cause| not_json(&path, row, cause))?)
        })?,
        Format::Lines => lines(&path, packing, &mut |line, _| {
            take(Map::from_iter([("text".to_owned(), Value::from(line.strip_suffix('\r').unwrap_or(line)))]))
        })?,
        Format::Json => {
            let content = Content::open(&path, packing, MAX_ROW, Some(MAX_VALUES))?;
            streamed(&path, content, &mut take, |content, take| json(&path, content, take))?;
        }
        Format::Csv => {
            let content = Content::open(&path, packing, MAX_ROW, None)?;
            streamed(&path, content, &mut take, |content, take| csv::rows(&path, content, take))?;
        }
        Format::Parquet => {
            let mut rows = ParquetRows::open(&path, Arc::default())?;
            while let Some(fields) = rows.next_object()? {
                take(fields)?;
            }
        }
    }
    if let Some(labels) = labels {
        labels.check_end(number)?;
    }
    Ok(number)
}

/// Labels in a file of their own, one on a line.
struct Labels {
    path: PathBuf,
    lines: Records,
    used: u64,
}

impl Labels {
    fn beside(path: &Path) -> Result<Option<Labels>> {
        let path = path.with_file_name(format!("{}-labels.lst", stem(path)));
        if !path.is_file() {
            return Ok(None);
        }
        let lines = Records::open(&path, Packing::Plain, "\n", ("line", MAX_ROW), Arc::default())?;
        Ok(Some(Labels { path, lines, used: 0 }))
    }

    /// Reads the next label.
    fn line(&mut self) -> Result<Option<String>> {
        let line = self.lines.next().map_err(|cause| at_row(&self.path, self.used + 1, cause))?;
        self.used += u64::from(line.is_some());
        Ok(line.map(|line| line.strip_suffix('\r').map(str::to_owned).unwrap_or(line)))
    }

    fn next(&mut self, row: &Row) -> Result<String> {
        self.line()?.ok_or_else(|| {
            let reason = format!("{} has {} labels only", self.path.display(), self.used);
            row.wrong(reason, "take both files from the original")
        })
    }

    fn check_end(mut self, rows: u64) -> Result<()> {
        while self.line()?.is_some() {}
        if self.used == rows {
            return Ok(());
        }
        let reason = format!("{} labels for {rows} rows", self.used);
        Err(Error::file(&self.path, reason, "take both files from the original"))
    }
}

/// Hands the rows to `take` that `read` finds in the content of the file `path`. One of them is in memory at a time.
fn streamed(
    path: &Path,
    content: Content,
    take: &mut Take<'_>,
    read: impl FnOnce(Reading<'_>, &mut Take<'_>) -> Result<()>,
) -> Result<()> {
    let mut found = 0;
    let outcome = read(content.reader(), &mut |fields| {
        found += 1;
        content.row_taken();
        take(fields)
    });
    match content.failure() {
        Some(cause) => Err(at_row(path, found + 1, cause)),
        None => outcome,
    }
}

/// Names the row that a failure of reading is about.
fn at_row(path: &Path, row: u64, cause: Error) -> Error {
    let message = cause.to_string();
    // The reader's messages are `path: reason; help`.
    let message = message.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&message);
    match message.split_once("; ") {
        Some((reason, help)) => {
            let help = cause.help().cloned().unwrap_or_else(|| help.to_owned().into());
            Error::row(path, row, reason, help)
        }
        None => cause,
    }
}

fn not_json(path: &Path, row: u64, reason: impl fmt::Display) -> Error {
    Error::row(path, row, format!("not a JSON object ({reason})"), "fetch the file again")
}

/// Hands the lines that are not blank to `take`, each with its number as a row.
fn lines(path: &Path, packing: Packing, take: &mut dyn FnMut(&str, u64) -> Result<()>) -> Result<()> {
    let mut records = Records::open(path, packing, "\n", ("line", MAX_ROW), Arc::default())?;
    let mut row = 1;
    while let Some(line) = records.next().map_err(|cause| at_row(path, row, cause))? {
        if line.trim().is_empty() {
            continue;
        }
        take(&line, row)?;
        row += 1;
    }
    Ok(())
}

/// Reads one array of objects, an object with such an array under `Data`, or objects one after the other.
fn json(path: &Path, content: Reading<'_>, take: &mut Take<'_>) -> Result<()> {
    let mut found = 0u64;
    let mut failure = None;
    let mut counted = |fields| {
        found += 1;
        take(fields).map_err(|cause| failure = Some(cause)).is_ok()
    };
    let mut values = serde_json::Deserializer::from_reader(BufReader::with_capacity(AHEAD, content));
    let parsed = loop {
        if let Err(cause) = (Top { take: &mut counted }).deserialize(&mut values) {
            break Err(cause);
        }
        // Only objects may follow one another.
        if values.end().is_ok() {
            break Ok(());
        }
    };
    match (failure, parsed) {
        (Some(failure), _) => Err(failure),
        (None, Err(cause)) => Err(not_json(path, found + 1, cause)),
        (None, Ok(())) => Ok(()),
    }
}

/// The key under which a file's one object holds its rows.
const CONTAINER: &str = "Data";

/// A value at the top of a file. `take` returns true to continue.
struct Top<'a> {
    take: &'a mut dyn FnMut(Map<String, Value>) -> bool,
}

impl<'de> DeserializeSeed<'de> for Top<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Top<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, or an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> std::result::Result<(), A::Error> {
        while let Some(row) = rows.next_element::<Map<String, Value>>()? {
            if !(self.take)(row) {
                return Err(A::Error::custom("a row was refused"));
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> std::result::Result<(), A::Error> {
        let mut row = Map::new();
        while let Some(key) = fields.next_key::<String>()? {
            if key == CONTAINER {
                fields.next_value_seed(Top { take: self.take })?;
                while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                return Ok(());
            }
            row.insert(key, fields.next_value()?);
        }
        if (self.take)(row) { Ok(()) } else { Err(A::Error::custom("a row was refused")) }
    }
}
