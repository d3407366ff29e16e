//! A file format: subtitles (`.srt`), whose text is one document without numbers and times.

use dsmoe_datasets::corpus::{CorpusFormat, Row, RowText, Rows, SourceFile};
use dsmoe_datasets::{Error, Records, Result};

/// The format of SubRip.
pub static SUBTITLES: Subtitles = Subtitles;

/// Files of blocks: a number, a line with two times, and lines of text.
pub struct Subtitles;

struct WholeFile {
    records: Records,
    path: std::path::PathBuf,
}

impl CorpusFormat for Subtitles {
    fn name(&self) -> &'static str {
        "subtitles 1"
    }

    fn endings(&self) -> &'static [&'static str] {
        &["srt"]
    }

    fn open(&self, file: &SourceFile<'_>) -> Result<Box<dyn Rows>> {
        Ok(Box::new(WholeFile { records: file.records("")?, path: file.path().to_path_buf() }))
    }
}

impl Rows for WholeFile {
    fn next(&mut self) -> Result<Option<Row>> {
        let Some(content) = self.records.next()? else { return Ok(None) };
        let mut spoken = Vec::new();
        let mut lines = (1..).zip(content.lines().map(str::trim));
        while let Some((number, line)) = lines.next() {
            if line.is_empty() {
                continue;
            }
            let times = lines.next().map_or("", |(_, times)| times);
            if line.parse::<u64>().is_err() || !times.contains("-->") {
                let help =
                    "begin each subtitle with its number and a line of two times with --> between them";
                return Err(Error::row(&self.path, number, "no subtitle begins here", help));
            }
            spoken.extend(lines.by_ref().map(|(_, line)| line).take_while(|line| !line.is_empty()));
        }
        Ok(Some(Row { line: 1, text: RowText::Text(spoken.join(" ")) }))
    }
}
