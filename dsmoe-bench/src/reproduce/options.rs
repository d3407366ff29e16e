//! The choices of a user that are not part of a profile: places, devices, and which part of the work to do.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use dsmoe_core::Device;
use dsmoe_datasets::CorpusOptions;
use dsmoe_datasets::mixture::{from_toml, from_words};

use super::outputs::Output;
use crate::texts::{Text, find};

/// Options of a reproduction.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The name of an embedded profile, or a TOML file.
    pub(crate) profile: String,
    /// Only these outputs and what they need; empty for all.
    pub(crate) only: Vec<Output>,
    /// Only these methods of the profile; empty for all.
    pub(crate) methods: Vec<String>,
    /// Runs of every method in place of the profile's.
    pub(crate) seeds: Option<u64>,
    /// Directory of the results.
    pub(crate) out: Option<PathBuf>,
    /// Directory of the stages; `cache` in the directory of the results by default.
    pub(crate) stages: Option<PathBuf>,
    /// Continue in a directory that is not empty.
    pub(crate) resume: bool,
    /// Print the plan and compute nothing.
    pub(crate) dry_run: bool,
    pub(crate) shard: Option<Shard>,
    /// Stop as if interrupted after this many training steps.
    pub(crate) stop_after: Option<u64>,
    /// Dense model to start from.
    pub(crate) model: Option<PathBuf>,
    /// Text in place of the embedded world's.
    pub(crate) text: Option<TextSource>,
    /// Folder of token caches.
    pub(crate) token_cache: Option<PathBuf>,
    pub(crate) device: Device,
    /// Folder of benchmark files.
    pub(crate) task_data: Option<PathBuf>,
}

/// Text that the user names.
#[derive(Clone, Debug)]
pub(crate) enum TextSource {
    /// Paths, or `NAME=PATH:WEIGHT` words.
    Words(Vec<String>),
    /// A TOML file of sources.
    Mixture(PathBuf),
}

impl TextSource {
    /// Finds the files of all sources. `defaults` are the options of sources that do not set their own.
    pub(crate) fn open(&self, defaults: &CorpusOptions) -> Result<Vec<Text>> {
        find(match self {
            TextSource::Words(words) => from_words(words, defaults)?,
            TextSource::Mixture(path) => from_toml(path, defaults)?,
        })
    }
}

/// One of several parts of a reproduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    /// Counts from 1; 0 is the work that all parts need.
    pub(crate) index: usize,
    pub(crate) of: usize,
}

impl Shard {
    /// Reports whether job number `job` belongs to this part.
    pub(crate) fn has(self, job: usize) -> bool {
        self.index > 0 && job % self.of == self.index - 1
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Shard, Self::Err> {
        let wrong = || format!("`{text}` is not a part; write 1/4 for the first of four");
        let (index, of) = text.split_once('/').ok_or_else(wrong)?;
        let (index, of) = (index.parse().map_err(|_| wrong())?, of.parse().map_err(|_| wrong())?);
        if of == 0 || index > of {
            return Err(wrong());
        }
        Ok(Shard { index, of })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_jobs_once() {
        let parts: Vec<Shard> = (1..=3).map(|i| format!("{i}/3").parse().unwrap()).collect();
        assert!((0..20).all(|job| parts.iter().filter(|part| part.has(job)).count() == 1));
        assert!(!(0..20).any(|job| "0/3".parse::<Shard>().unwrap().has(job)));
        for bad in ["", "1", "4/3", "1/0", "a/b", "-1/2"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }
}
