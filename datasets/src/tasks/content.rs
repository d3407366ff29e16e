//! The content of a file for parsers that read one row after the other: whole characters, and no more at once than a row may have.

use std::cell::RefCell;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::files::JsonValues;
use crate::reader::{Packing, Records};

/// Bytes that a parser may read ahead of the row that it takes.
pub(super) const AHEAD: usize = 1 << 16;
/// The remedy for a row that is too large.
pub(super) const SPLIT_ROW: &str = "split the row, or fetch the file again";
/// A byte-order mark.
const MARK: &[u8] = "\u{FEFF}".as_bytes();

/// The content of a file, decompressed.
pub(super) struct Content(RefCell<State>);

struct State {
    records: Records,
    path: PathBuf,
    /// The largest row, in bytes.
    limit: u64,
    /// Bytes that may be read before the next row is taken.
    left: u64,
    /// The most keys and values of a row; none where the content is no JSON.
    most_values: Option<usize>,
    /// Keys and values that were read since the last row was taken.
    values: JsonValues,
    /// Bytes that are held and known to be whole characters.
    checked: usize,
    is_started: bool,
    failure: Option<Error>,
}

/// Reads a [`Content`].
pub(super) struct Reading<'a>(&'a Content);

impl Content {
    /// Opens `path`, of which a row has at most `limit` bytes, and one of JSON at most `most_values` keys and values.
    ///
    /// # Errors
    /// The file cannot be read, or is compressed in another way than its name says.
    pub(super) fn open(
        path: &Path,
        packing: Packing,
        limit: u64,
        most_values: Option<usize>,
    ) -> Result<Content> {
        let records = Records::open(path, packing, "", ("row", limit), Arc::default())?;
        Ok(Content(RefCell::new(State {
            records,
            path: path.to_path_buf(),
            limit,
            left: limit + AHEAD as u64,
            most_values,
            values: JsonValues::default(),
            checked: 0,
            is_started: false,
            failure: None,
        })))
    }

    /// Returns the bytes.
    pub(super) fn reader(&self) -> Reading<'_> {
        Reading(self)
    }

    /// Lets the next row begin.
    pub(super) fn row_taken(&self) {
        let mut state = self.0.borrow_mut();
        state.left = state.limit + AHEAD as u64;
        state.values.found = 0;
    }

    /// Returns why the content could not be read on, if so; the parser's own error tells less.
    pub(super) fn failure(self) -> Option<Error> {
        self.0.into_inner().failure
    }
}

/// Says that a row has more than `most` keys and values.
pub(super) fn many_values(most: usize) -> String {
    format!("a row of more than {most} keys and values")
}

impl State {
    /// Copies bytes into `into`, and returns how many: none at the end.
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        if self.checked == 0 {
            self.check()?;
        }
        if self.checked > 0 && self.left == 0 {
            let reason = format!("a row of more than {} bytes", self.limit);
            return Err(Error::file(&self.path, reason, SPLIT_ROW));
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let count = self.checked.min(into.len()).min(most);
        into[..count].copy_from_slice(&self.records.held()[..count]);
        self.records.skip(count);
        self.checked -= count;
        self.left -= count as u64;
        if let Some(most) = self.most_values {
            // Values are counted before the parser gets them, since each takes memory there.
            self.values.pass(&into[..count]);
            if self.values.found > most + AHEAD {
                return Err(Error::file(&self.path, many_values(most), SPLIT_ROW));
            }
        }
        Ok(count)
    }

    /// Sets [`State::checked`] to how many of the bytes ahead are whole characters, at least one unless the content ends.
    fn check(&mut self) -> Result<()> {
        if !self.is_started {
            self.is_started = true;
            self.records.hold(MARK.len())?;
            if self.records.held().starts_with(MARK) {
                self.records.skip(MARK.len());
            }
        }
        self.records.hold(0)?;
        loop {
            let (held, whole) =
                (self.records.held().len(), str::from_utf8(self.records.held()).map(str::len));
            match whole {
                Ok(length) => self.checked = length,
                Err(cause) if cause.valid_up_to() > 0 => self.checked = cause.valid_up_to(),
                Err(cause) => {
                    // A character may go on behind what is held.
                    if cause.error_len().is_none() {
                        self.records.hold(held)?;
                        if self.records.held().len() > held {
                            continue;
                        }
                    }
                    return Err(self.records.not_utf8(cause));
                }
            }
            return Ok(());
        }
    }
}

impl Read for Reading<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.0.borrow_mut();
        if state.failure.is_none() {
            match state.read(into) {
                Ok(count) => return Ok(count),
                Err(cause) => state.failure = Some(cause),
            }
        }
        Err(io::Error::other("the file cannot be read on"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST_VALUES: usize = 50;

    fn open(bytes: &[u8], limit: u64) -> (tempfile::TempDir, Content) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::fs::write(&path, bytes).unwrap();
        let content = Content::open(&path, Packing::Plain, limit, Some(MOST_VALUES)).unwrap();
        (dir, content)
    }

    /// Reads all, so many bytes at a time, and calls the rest of a row taken after each.
    fn read(content: &Content, at_once: usize, is_row: bool) -> io::Result<Vec<u8>> {
        let (mut all, mut part) = (Vec::new(), vec![0; at_once]);
        loop {
            let count = content.reader().read(&mut part)?;
            if count == 0 {
                return Ok(all);
            }
            all.extend_from_slice(&part[..count]);
            if is_row {
                content.row_taken();
            }
        }
    }

    #[test]
    fn all_bytes_come_but_a_mark_at_the_start() {
        let text = format!("{}\u{FEFF}{}", "é🦊".repeat(50_000), "x".repeat(9));
        for start in ["", "\u{FEFF}"] {
            for at_once in [1, 7, 1 << 20] {
                let (_dir, content) = open(format!("{start}{text}").as_bytes(), 1 << 20);
                assert!(read(&content, at_once, false).unwrap() == text.as_bytes(), "{start:?} {at_once}");
                assert!(content.failure().is_none());
            }
        }
        let (_dir, content) = open(b"", 9);
        assert!(read(&content, 9, false).unwrap().is_empty() && content.failure().is_none());
    }

    #[test]
    fn bytes_that_are_not_text_are_named_by_their_place() {
        for (bytes, place) in [(&b"\xEF\xBB\xBFab\xFFc"[..], 5), (b"ab\xF0\x9F", 2), (b"\xFF", 0)] {
            let (_dir, content) = open(bytes, 100);
            read(&content, 100, false).unwrap_err();
            let error = content.failure().unwrap().to_string();
            assert!(error.contains(&format!("a.json: not UTF-8 at byte {place} of the text")), "{error}");
        }
    }

    #[test]
    fn a_row_is_bounded_and_the_number_of_rows_is_not() {
        let (_dir, content) = open(&vec![b' '; 3 * AHEAD], 100);
        assert_eq!(read(&content, 1000, true).unwrap().len(), 3 * AHEAD);
        let (_dir, content) = open(&vec![b' '; 3 * AHEAD], 100);
        read(&content, 1000, false).unwrap_err();
        // It stays so.
        read(&content, 1000, true).unwrap_err();
        let error = content.failure().unwrap().to_string();
        assert!(
            error.ends_with("a.json: a row of more than 100 bytes; split the row, or fetch the file again")
        );
        // The last byte of a row that is as large as it may be.
        let (_dir, content) = open(&vec![b' '; 100 + AHEAD], 100);
        assert_eq!(read(&content, 1000, false).unwrap().len(), 100 + AHEAD);
    }

    #[test]
    fn values_of_a_row_are_bounded_and_those_of_a_file_are_not() {
        let rows = "[0],".repeat(3 * AHEAD);
        let (_dir, content) = open(rows.as_bytes(), 1 << 20);
        assert_eq!(read(&content, 1000, true).unwrap().len(), rows.len());
        let (_dir, content) = open(rows.as_bytes(), 1 << 20);
        read(&content, 1000, false).unwrap_err();
        let error = content.failure().unwrap().to_string();
        assert!(error.ends_with(
            "a.json: a row of more than 50 keys and values; split the row, or fetch the file again"
        ));
        // As many as a row may have, and one more. What a text holds does not count.
        let text = format!("[\"{}\"", ",".repeat(3 * AHEAD));
        for (more, is_read) in [(MOST_VALUES + AHEAD - 1, true), (MOST_VALUES + AHEAD, false)] {
            let (_dir, content) = open(format!("{text}{}", ",".repeat(more)).as_bytes(), 1 << 20);
            assert_eq!(read(&content, 1000, false).is_ok(), is_read, "{more}");
        }
    }
}
