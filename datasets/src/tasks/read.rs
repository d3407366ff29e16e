//! Reads rows of the files that benchmarks come in: JSON lines, JSON arrays, CSV, lines of text, also as .gz, .zst, .bz2 and
//! .xz; Parquet.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::csv;
use super::row::Row;
use crate::error::{Error, Result};
use crate::parquet_rows::ParquetRows;
use crate::reader::{Packing, Records};

/// The largest line of a JSONL file, in bytes.
const MAX_LINE: u64 = 64 << 20;
/// The largest JSON or CSV file, in bytes of its text; it is held whole.
const MAX_FILE: u64 = 1 << 30;

/// Receives rows one after the other.
pub(crate) type Sink<'a> = dyn FnMut(Row) -> Result<()> + 'a;

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
            take(serde_json::from_str(line).map_err(|cause| not_json(&path, row, cause))?)
        })?,
        Format::Lines => lines(&path, packing, &mut |line, _| {
            take(Map::from_iter([("text".to_owned(), Value::from(line.strip_suffix('\r').unwrap_or(line)))]))
        })?,
        Format::Json => json(&path, packing, &mut take)?,
        Format::Csv => csv::rows(&path, &whole(&path, packing)?, &mut take)?,
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
    path: std::path::PathBuf,
    labels: Vec<String>,
    used: usize,
}

impl Labels {
    fn beside(path: &Path) -> Result<Option<Labels>> {
        let path = path.with_file_name(format!("{}-labels.lst", stem(path)));
        if !path.is_file() {
            return Ok(None);
        }
        let text = whole(&path, Packing::Plain)?;
        Ok(Some(Labels { path, labels: text.lines().map(str::to_owned).collect(), used: 0 }))
    }

    fn next(&mut self, row: &Row) -> Result<String> {
        self.used += 1;
        self.labels.get(self.used - 1).cloned().ok_or_else(|| {
            let reason = format!("{} has {} labels only", self.path.display(), self.labels.len());
            row.wrong(reason, "take both files from the original")
        })
    }

    fn check_end(&self, rows: u64) -> Result<()> {
        if self.used == self.labels.len() {
            return Ok(());
        }
        let reason = format!("{} labels for {rows} rows", self.labels.len());
        Err(Error::file(&self.path, reason, "take both files from the original"))
    }
}

/// Returns the text of a whole file.
fn whole(path: &Path, packing: Packing) -> Result<String> {
    let mut records = Records::open(path, packing, "", ("file", MAX_FILE), Arc::default())?;
    Ok(records.next().map_err(|cause| at_row(path, 1, cause))?.unwrap_or_default())
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
    let mut records = Records::open(path, packing, "\n", ("line", MAX_LINE), Arc::default())?;
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
fn json(path: &Path, packing: Packing, take: &mut dyn FnMut(Map<String, Value>) -> Result<()>) -> Result<()> {
    let text = whole(path, packing)?;
    let mut found = 0u64;
    let mut failure = None;
    let mut counted = |fields| {
        found += 1;
        take(fields).map_err(|cause| failure = Some(cause)).is_ok()
    };
    let mut values = serde_json::Deserializer::from_str(&text);
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
