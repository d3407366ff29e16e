//! The text as files.

use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::NamedTempFile;

use super::{Domain, World};
use crate::{Error, Result};

#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    domain: &'static str,
}

impl World {
    /// Writes about `bytes` bytes of text to `facts.jsonl`, `math.jsonl`, `code.jsonl` and `stories.jsonl` in `dir`,
    /// each with its [`Domain::share`] of them: one document a line, as `text`, beside its `domain`. Files of these
    /// names are replaced, each when its successor is complete. Returns the paths.
    ///
    /// # Errors
    /// The file system refuses; the message names the file.
    pub fn write(&self, dir: &Path, bytes: u64) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        Domain::ALL.into_iter().map(|domain| self.write_domain(dir, domain, bytes)).collect()
    }

    fn write_domain(&self, dir: &Path, domain: Domain, bytes: u64) -> Result<PathBuf> {
        let path = dir.join(format!("{}.jsonl", domain.name()));
        let mut file = BufWriter::new(NamedTempFile::new_in(dir).map_err(Error::io(&path))?);
        let (want, mut have) = (bytes / 100 * domain.share(), 0);
        for text in self.text(domain) {
            if have >= want {
                break;
            }
            have += text.len() as u64;
            let mut line = serde_json::to_vec(&Line { text: &text, domain: domain.name() })
                .map_err(|cause| Error::io(&path)(cause.into()))?;
            line.push(b'\n');
            file.write_all(&line).map_err(Error::io(&path))?;
        }
        let file = file.into_inner().map_err(|error| Error::io(&path)(error.into_error()))?;
        file.as_file().sync_all().map_err(Error::io(&path))?;
        file.persist(&path).map_err(|error| Error::io(&path)(error.error))?;
        Ok(path)
    }
}
