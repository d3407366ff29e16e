//! The text and the probes as files.

use std::path::Path;

use serde::Serialize;

use super::land::{Domain, Probe, World};
use crate::error::{Error, Result};
use crate::files::replace;
use crate::tasks::Split;

#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    domain: &'static str,
}

/// The amount of text written of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The domain.
    pub domain: Domain,
    /// Its documents.
    pub documents: u64,
    /// Their bytes of text.
    pub bytes: u64,
}

impl World {
    /// Writes about `bytes` bytes of text to `facts.jsonl`, `math.jsonl`, `code.jsonl` and `stories.jsonl` in `dir`,
    /// as [`World::documents`] gives it: one document a line, as `text`, beside its `domain`. Files of these names are
    /// replaced, each when its successor is complete. `progress` receives the number of bytes done.
    ///
    /// # Errors
    /// The file system refuses; the message names the file.
    pub fn write_text(&self, dir: &Path, bytes: u64, progress: &mut dyn FnMut(u64)) -> Result<Vec<Written>> {
        let mut before = 0;
        let domain = |domain: Domain| {
            let mut written = Written { domain, documents: 0, bytes: 0 };
            write(&dir.join(format!("{}.jsonl", domain.name())), self.documents(domain, bytes), |text| {
                written.documents += 1;
                written.bytes += text.len() as u64;
                progress(before + written.bytes);
                serde_json::to_vec(&Line { text, domain: domain.name() })
            })?;
            before += written.bytes;
            Ok(written)
        };
        Domain::ALL.into_iter().map(domain).collect()
    }

    /// Writes `items` items of each probe to `dir` as the files of a folder of benchmarks, which
    /// [`TaskFiles::folder`](crate::tasks::TaskFiles::folder) reads: `piqa/validation.jsonl` and the like, and
    /// `gsm8k/train.jsonl` where a prompt shows examples. Returns how many items there are to be answered.
    ///
    /// # Errors
    /// The file system refuses; the message names the file.
    pub fn write_probes(&self, dir: &Path, items: usize) -> Result<Vec<(Probe, usize)>> {
        let probe = |probe: Probe| {
            let task = probe.task();
            let path = |split: Split| dir.join(task.name).join(format!("{}.jsonl", split.name()));
            let set = self.probe(probe, items);
            let count = set.test.len();
            write(&path(task.split), set.test.into_iter(), serde_json::to_vec)?;
            if task.shots > 0 {
                write(&path(Split::Train), set.train.into_iter(), serde_json::to_vec)?;
            }
            Ok((probe, count))
        };
        Probe::ALL.into_iter().map(probe).collect()
    }
}

/// Writes a line for every one of `rows` to `path`, which appears when it is complete.
fn write<T>(
    path: &Path,
    rows: impl Iterator<Item = T>,
    mut line: impl FnMut(&T) -> serde_json::Result<Vec<u8>>,
) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let written = replace(path, |file| {
        for row in rows {
            file.write_all(&line(&row)?)?;
            file.write_all(b"\n")?;
        }
        Ok(())
    });
    written.map_err(Error::io(path))
}
