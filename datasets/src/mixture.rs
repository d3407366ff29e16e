//! Mixtures: several sources of text, each split into two sides, and the order in which steps see their windows.
//!
//! A mixture file:
//! ```toml
//! [[source]]
//! name = "web"                # letters, digits, '.', '_' and '-'
//! data = ["web", "more.jsonl.zst"]  # files or folders, seen from the file's folder; one may stand without brackets
//! weight = 0.5                # default 1; only ratios count
//! text_column = "text"        # the rest as on the command line
//! doc_separator = "<|end|>"
//! language = "en"             # only documents of this language, see [`Language`]
//! document_chars = 20000      # the rest of longer documents is left out
//! part = "train"              # only documents of this part by a hash of their text: train, search or final
//! part_seed = 0               # of that hash
//! ```

use crate::corpus::CorpusOptions;
use crate::error::{Error, Result};
use crate::files::read_at_most;
use crate::overlap::{self, Removed, Sides, TokenTexts};
use crate::selection::{DocumentPart, Language, Selection};
use crate::tokens::Tokens;
use crate::windows::Pieces;
use crate::windows::{Batches, Split, SplitOptions};
use rand_pcg::rand_core::Rng;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The name of a source that was not given one.
pub const UNNAMED: &str = "text";

/// Samples over which weights are kept: in each block every source has its share to one part in so many.
pub const BLOCK: usize = 10_000;

/// The largest number of sources.
const MAX_SOURCES: usize = 1000;

/// The form of a mixture.
const TABLES: &str = "write [[source]] tables with name, data and weight";

/// The largest mixture file, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// One source of a mixture, as a user states it.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceSpec {
    /// Its name in reports.
    pub name: String,
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// Its weight: samples are drawn in these ratios.
    pub weight: f64,
    /// Options for finding documents.
    pub options: CorpusOptions,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    source: Vec<SourceTable>,
}

/// A `[[source]]` table, as it is written; see the module for the keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceTable {
    /// The name.
    pub name: String,
    data: Paths,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text_column: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    doc_separator: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    language: Option<Language>,
    #[serde(skip_serializing_if = "Option::is_none")]
    document_chars: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<DocumentPart>,
    #[serde(default)]
    part_seed: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Paths {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

/// Reads a mixture file. `defaults` fill in what an entry leaves out.
///
/// # Errors
/// A file that cannot be read or is no such table, names that are wrong or occur twice, weights that are not positive.
pub fn from_toml(path: &Path, defaults: &CorpusOptions) -> Result<Vec<SourceSpec>> {
    let bytes = read_at_most(path, MAX_FILE).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes).map_err(|cause| Error::NotUtf8 {
        path: path.to_path_buf(),
        offset: cause.utf8_error().valid_up_to() as u64,
    })?;
    let wrong = |reason: String| Error::mixture(path.display().to_string(), reason, TABLES);
    let file: File = toml::from_str(&text).map_err(|cause| {
        let line = cause.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        wrong(format!("line {line}: {}", cause.message().split_whitespace().collect::<Vec<_>>().join(" ")))
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    from_tables(&file.source, folder, defaults, &path.display().to_string())
}

/// Reads the sources of `tables`, whose paths are seen from `folder`. `place` names where they are written.
///
/// # Errors
/// Those of [`from_toml`], but for the file.
pub fn from_tables(
    tables: &[SourceTable],
    folder: &Path,
    defaults: &CorpusOptions,
    place: &str,
) -> Result<Vec<SourceSpec>> {
    let sources = tables.iter().map(|table| table.spec(folder, defaults, place));
    let sources = sources.collect::<Result<Vec<_>>>()?;
    check(&sources, place)?;
    Ok(sources)
}

impl SourceTable {
    fn spec(&self, folder: &Path, defaults: &CorpusOptions, place: &str) -> Result<SourceSpec> {
        let paths = match &self.data {
            Paths::One(path) => std::slice::from_ref(path),
            Paths::Many(paths) => paths,
        };
        if paths.is_empty() {
            let reason = format!("source {:?} names no data", self.name);
            return Err(Error::mixture(place, reason, TABLES));
        }
        if self.doc_separator.as_deref() == Some("") {
            let reason = format!("doc_separator of {:?} is empty", self.name);
            return Err(Error::mixture(place, reason, "use at least one character, or leave it out"));
        }
        if self.document_chars == Some(0) {
            let reason = format!("document_chars of {:?} is 0", self.name);
            return Err(Error::mixture(place, reason, "use 1 or more, or leave it out"));
        }
        let selection = Selection {
            language: self.language,
            document_chars: self.document_chars,
            part: self.part,
            part_seed: self.part_seed,
        };
        Ok(SourceSpec {
            name: self.name.clone(),
            paths: paths.iter().map(|path| folder.join(path)).collect(),
            weight: self.weight.unwrap_or(1.0),
            options: CorpusOptions {
                doc_separator: self.doc_separator.clone().or_else(|| defaults.doc_separator.clone()),
                text_column: self.text_column.clone().unwrap_or_else(|| defaults.text_column.clone()),
                selection,
            },
        })
    }
}

/// Parses sources from words: `PATH ...` for one source without a name, or `NAME=PATH[:WEIGHT] ...`, where words of
/// one name go together.
///
/// # Errors
/// Words of both kinds, names that are wrong, weights that are not positive or contradict each other.
pub fn from_words(words: &[PathBuf], options: &CorpusOptions) -> Result<Vec<SourceSpec>> {
    let wrong = |word: &Path, reason: &str, help: &'static str| {
        Err(Error::mixture(format!("data {}", word.display()), reason, help))
    };
    let mut sources: Vec<SourceSpec> = Vec::new();
    let mut weighted: Vec<bool> = Vec::new();
    for word in words {
        let (name, path, weight) = parts(word);
        let mixed = sources.iter().any(|source| (source.name == UNNAMED) != (name == UNNAMED));
        if mixed {
            return wrong(word, "some sources have names and some do not", "give all as NAME=PATH:WEIGHT");
        }
        let at = sources.iter().position(|source| source.name == name);
        let at = at.unwrap_or_else(|| {
            let (name, options) = (name.to_owned(), options.clone());
            sources.push(SourceSpec { name, paths: vec![], weight: 1.0, options });
            weighted.push(false);
            sources.len() - 1
        });
        sources[at].paths.push(path.into());
        if let Some(weight) = weight {
            if weighted[at] && sources[at].weight != weight {
                return wrong(word, "its source has another weight already", "give each source one weight");
            }
            (sources[at].weight, weighted[at]) = (weight, true);
        }
    }
    check(&sources, "data")?;
    Ok(sources)
}

/// Splits a word into name, path and weight. A path that is not UTF-8 has neither of the others.
fn parts(word: &Path) -> (&str, &Path, Option<f64>) {
    let named = word.to_str().and_then(|text| text.split_once('=')).filter(|(name, _)| is_name(name));
    let Some((name, path)) = named.filter(|_| !word.exists()) else { return (UNNAMED, word, None) };
    let weighted = path.rsplit_once(':').filter(|_| !Path::new(path).exists());
    match weighted.and_then(|(before, weight)| Some((before, weight.parse().ok()?))) {
        Some((before, weight)) => (name, Path::new(before), Some(weight)),
        None => (name, Path::new(path), None),
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 64
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn check(sources: &[SourceSpec], place: &str) -> Result<()> {
    let wrong = |reason: String, help: &'static str| Err(Error::mixture(place, reason, help));
    if sources.is_empty() || sources.len() > MAX_SOURCES {
        return wrong(format!("{} sources", sources.len()), "name 1 to 1000");
    }
    for (at, source) in sources.iter().enumerate() {
        if !is_name(&source.name) {
            return wrong(format!("name {:?}", source.name), "use letters, digits, '.', '_' and '-'");
        }
        if sources[..at].iter().any(|other| other.name == source.name) {
            return wrong(format!("two sources {:?}", source.name), "give each a name of its own");
        }
        if !(source.weight > 0.0 && source.weight <= 1e9) {
            return wrong(format!("weight {} of {:?}", source.weight, source.name), "use a number above 0");
        }
    }
    Ok(())
}

/// A source of a mixture as token ids.
#[derive(Clone, Debug)]
pub struct TokenSource {
    /// Its name in reports.
    pub name: String,
    /// Its weight.
    pub weight: f64,
    /// Its text.
    pub tokens: Tokens,
}

/// One source of a [`Mixture`].
#[derive(Debug)]
pub struct Part {
    /// The source's name.
    pub name: String,
    /// Its share of all weights.
    pub share: f64,
    /// Its two sides.
    pub split: Split,
    /// The text that the filter removed.
    pub removed: Removed,
}

/// Sources, each split into a training side and a held-out side.
#[derive(Debug)]
pub struct Mixture {
    parts: Vec<Part>,
    filtered: bool,
}

/// One training window of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sample {
    /// Index of the part.
    pub part: usize,
    /// Index of its window.
    pub window: usize,
}

impl Mixture {
    /// Splits every source. `filter` holds the bytes of the tokens; with it, text that the two sides have in common is
    /// removed (see [`overlap`]).
    ///
    /// # Errors
    /// No source, options out of range, a source with too little text, tokens that cannot be read.
    pub fn new(
        sources: &[TokenSource],
        options: SplitOptions,
        filter: Option<&TokenTexts>,
    ) -> Result<Mixture> {
        let total: f64 = sources.iter().map(|source| source.weight).sum();
        let mut sides = Vec::new();
        for source in sources {
            let Pieces { train, valid } =
                Pieces::of(&source.tokens, options).map_err(|error| of_source(error, source, sources))?;
            sides.push(Sides { tokens: &source.tokens, train, valid });
        }
        let removed = match filter {
            Some(texts) => overlap::remove(&mut sides, texts)?,
            None => vec![Removed::default(); sides.len()],
        };
        let parts = sources.iter().zip(sides).zip(removed).map(|((source, sides), removed)| {
            let pieces = Pieces { train: sides.train, valid: sides.valid };
            let split = Split::of(&source.tokens, pieces, options.seq);
            Ok(Part {
                name: source.name.clone(),
                share: source.weight / total,
                split: split.map_err(|error| of_source(error, source, sources))?,
                removed,
            })
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        if parts.is_empty() {
            return Err(Error::TooFewTokens { side: "training text", tokens: 0, window: options.seq });
        }
        Ok(Mixture { parts, filtered: filter.is_some() })
    }

    /// Returns the sources, in their order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Returns true if text that the sides have in common was removed.
    pub fn filtered(&self) -> bool {
        self.filtered
    }

    /// Returns the number of tokens of all training sides.
    pub fn train_len(&self) -> usize {
        self.parts.iter().map(|part| part.split.train_len()).sum()
    }

    /// Returns the number of tokens of all held-out sides.
    pub fn valid_len(&self) -> usize {
        self.parts.iter().map(|part| part.split.valid_tokens().len()).sum()
    }

    /// Appends the tokens of a training window to `out`; see [`Split::window`].
    ///
    /// # Errors
    /// Tokens that cannot be read.
    ///
    /// # Panics
    /// There is no such window.
    pub fn window(&self, sample: Sample, out: &mut Vec<u32>) -> Result<()> {
        self.parts[sample.part].split.window(sample.window, out)
    }

    /// Returns the inputs of the first `count` training windows of a run of this seed, as calibration text. They are in the
    /// order of their sources, so that the last ones are mostly of documents that no other is of.
    ///
    /// # Errors
    /// Fewer windows than `count`, or tokens that cannot be read.
    pub fn sequences(&self, count: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
        let found = self.parts.iter().map(|part| part.split.num_windows()).sum();
        if found < count {
            let seq = self.parts.first().map_or(0, |part| part.split.seq());
            return Err(Error::TooFewSequences { found, seq, asked: count });
        }
        let mut order = self.interleaving(count, seed)?;
        let read = |sample| {
            let mut ids = Vec::new();
            self.window(sample, &mut ids)?;
            ids.pop();
            Ok(ids)
        };
        let mut samples: Vec<Sample> = order.batch_at(0).collect();
        // By the part of its source that lies before a window.
        let place = |sample: &Sample| {
            let windows = self.parts[sample.part].split.num_windows().max(1);
            (((sample.window as u128) << 64) / windows as u128, sample.part)
        };
        samples.sort_unstable_by_key(place);
        samples.into_iter().map(read).collect()
    }

    /// Returns the order in which windows are trained on.
    ///
    /// # Errors
    /// A batch out of range.
    pub fn interleaving(&self, batch: usize, seed: u64) -> Result<Interleaving> {
        let parts: Vec<(usize, f64)> =
            self.parts.iter().map(|part| (part.split.num_windows(), part.share)).collect();
        Interleaving::new(&parts, batch, seed)
    }
}

/// Names the source that is too small, where there are several.
fn of_source(error: Error, source: &TokenSource, all: &[TokenSource]) -> Error {
    match error {
        Error::TooFewTokens { side, tokens, window } if all.len() > 1 => Error::mixture(
            format!("source {}", source.name),
            format!("{side}: {tokens} tokens are fewer than one window of {window}"),
            "give more text, or a smaller {seq}, or leave the source out",
        ),
        _ => error,
    }
}

/// The order of training windows: a function of seed and step alone says which windows of which part a step sees.
///
/// Samples come in blocks of [`BLOCK`]. In each block every part has its share of the weights, rounded to whole samples
/// and at least one, spread evenly with a jitter. The samples of a part go through its windows in epochs, each a
/// permutation, as in [`Batches`]; a single part is what [`Batches`] gives.
pub struct Interleaving {
    batch: usize,
    seed: u64,
    /// Samples of each part in a block.
    quotas: Vec<usize>,
    orders: Vec<Batches>,
    /// The block used last: for each sample its part and its rank among those of the part.
    block: Option<(u64, Vec<(usize, usize)>)>,
}

impl Interleaving {
    /// Orders the windows of parts of (windows, weight).
    ///
    /// # Errors
    /// A batch out of range, or a part without windows.
    pub fn new(parts: &[(usize, f64)], batch: usize, seed: u64) -> Result<Interleaving> {
        // Checks the batch; each order is asked for one sample at a time.
        Batches::new(1, batch, seed)?;
        let orders =
            parts.iter().map(|&(windows, _)| Batches::new(windows, 1, seed)).collect::<Result<_>>()?;
        let quotas = quotas(&parts.iter().map(|&(_, weight)| weight).collect::<Vec<_>>());
        Ok(Interleaving { batch, seed, quotas, orders, block: None })
    }

    /// Returns the samples of step `step`, counted from 0.
    pub fn batch_at(&mut self, step: u64) -> impl Iterator<Item = Sample> + '_ {
        let first = u128::from(step) * self.batch as u128;
        (first..first + self.batch as u128).map(|sample| {
            let (block, at) = ((sample / BLOCK as u128) as u64, (sample % BLOCK as u128) as usize);
            let (part, rank) = self.pattern(block)[at];
            // Below 2^64: the sample's number, which a part's number does not exceed, is a step times a batch.
            let number = block.wrapping_mul(self.quotas[part] as u64).wrapping_add(rank as u64);
            let window = self.orders[part].batch_at(number).next().unwrap_or(0);
            Sample { part, window }
        })
    }

    fn pattern(&mut self, block: u64) -> &[(usize, usize)] {
        let (kept, mut order) = self.block.take().unwrap_or_default();
        if kept != block || order.is_empty() {
            set_pattern(&mut order, &self.quotas, self.seed, block);
        }
        &self.block.insert((block, order)).1
    }
}

/// Divides [`BLOCK`] into whole numbers in the ratio of `weights`, each at least 1: the largest remainders are rounded
/// up.
fn quotas(weights: &[f64]) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| weight / total * BLOCK as f64).collect();
    let mut quotas: Vec<usize> = exact.iter().map(|&share| (share as usize).max(1)).collect();
    loop {
        let sum: usize = quotas.iter().sum();
        // The part that is furthest below its share grows, or the one furthest above it shrinks.
        let off = |at: &usize| exact[*at] - quotas[*at] as f64;
        let by = |a: &usize, b: &usize| off(a).total_cmp(&off(b)).then(b.cmp(a));
        match sum.cmp(&BLOCK) {
            std::cmp::Ordering::Equal => return quotas,
            std::cmp::Ordering::Less => {
                let Some(at) = (0..quotas.len()).max_by(by) else { return quotas };
                quotas[at] += 1;
            }
            std::cmp::Ordering::Greater => {
                let Some(at) = (0..quotas.len()).filter(|&at| quotas[at] > 1).min_by(by) else {
                    return quotas;
                };
                quotas[at] -= 1;
            }
        }
    }
}

/// Sets `order` to the parts of one block in their order, each with its rank.
fn set_pattern(order: &mut Vec<(usize, usize)>, quotas: &[usize], seed: u64, block: u64) {
    // Another stream than that of the windows.
    let mut rng = crate::windows::stream(seed, block, 1);
    let mut places: Vec<(u128, usize, usize)> = Vec::with_capacity(BLOCK);
    for (part, &quota) in quotas.iter().enumerate() {
        for rank in 0..quota {
            // (rank + jitter) / quota, with the jitter in [0, 1).
            let place = (((rank as u128) << 64) + u128::from(rng.next_u64())) / quota as u128;
            places.push((place, part, rank));
        }
    }
    places.sort_unstable();
    order.clear();
    order.extend(places.into_iter().map(|(_, part, rank)| (part, rank)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenStream;
    use proptest::prelude::*;
    use std::fs;

    fn samples(parts: &[(usize, f64)], seed: u64, count: usize) -> Vec<Sample> {
        let mut order = Interleaving::new(parts, 4, seed).unwrap();
        (0..count.div_ceil(4) as u64).flat_map(|step| order.batch_at(step).collect::<Vec<_>>()).collect()
    }

    #[test]
    fn sequences_are_the_first_inputs_of_a_run_in_order() {
        let stream = TokenStream { ids: (0..100).collect(), doc_starts: vec![0] };
        let source = TokenSource { name: "a".into(), weight: 1.0, tokens: stream.into() };
        let options = SplitOptions { seq: 8, valid_fraction: 0.0, valid_samples: 0 };
        let mixture = Mixture::new(&[source], options, None).unwrap();
        let sequences = mixture.sequences(3, 7).unwrap();
        let mut first: Vec<Sample> = mixture.interleaving(3, 7).unwrap().batch_at(0).collect();
        first.sort_by_key(|sample| sample.window);
        for (ids, sample) in sequences.iter().zip(first) {
            let mut window = Vec::new();
            mixture.window(sample, &mut window).unwrap();
            assert_eq!(ids[..], window[..8]);
        }
        let message = mixture.sequences(13, 7).unwrap_err().to_string();
        assert!(message.contains("12 sequences of 8 tokens and 13 are needed"), "{message}");
    }

    #[test]
    fn one_part_is_what_batches_give() {
        let mut batches = Batches::new(7, 3, 5).unwrap();
        let mut order = Interleaving::new(&[(7, 0.3)], 3, 5).unwrap();
        for step in (0..5000).chain([1 << 40]) {
            let ours: Vec<Sample> = order.batch_at(step).collect();
            let wanted: Vec<Sample> =
                batches.batch_at(step).map(|window| Sample { part: 0, window }).collect();
            assert_eq!(ours, wanted, "step {step}");
        }
    }

    #[test]
    fn weights_are_kept_in_every_stretch() {
        let parts = [(50, 4.0), (70, 3.0), (11, 2.0), (3, 1.0)];
        let all = samples(&parts, 9, 2 * BLOCK);
        for (stretch, slack) in [(100, 3), (1000, 3), (BLOCK, 0)] {
            for chunk in all.chunks(stretch) {
                for (part, &(_, weight)) in parts.iter().enumerate() {
                    let count = chunk.iter().filter(|sample| sample.part == part).count();
                    let wanted = weight / 10.0 * stretch as f64;
                    let off = (count as f64 - wanted).abs();
                    assert!(off <= f64::from(slack), "{part}: {count} of {stretch}");
                }
            }
        }
        // Every epoch of every part has each window once.
        for (part, &(windows, _)) in parts.iter().enumerate() {
            let of_part: Vec<usize> = all.iter().filter(|s| s.part == part).map(|s| s.window).collect();
            for epoch in of_part.chunks_exact(windows) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                assert_eq!(epoch, (0..windows).collect::<Vec<_>>());
            }
        }
        assert_ne!(all, samples(&parts, 10, 2 * BLOCK));
        let mut late = Interleaving::new(&parts, 4, 9).unwrap();
        assert_eq!(late.batch_at(3000).collect::<Vec<_>>(), all[12_000..12_004], "any step at once");
        let memory =
            |order: &Interleaving| order.block.as_ref().map(|(block, order)| (*block, order.as_ptr()));
        let (_, place) = memory(&late).unwrap();
        assert_eq!(late.batch_at(0).collect::<Vec<_>>(), all[..4], "a block after a later one");
        assert_eq!(memory(&late), Some((0, place)), "a block takes the memory of the last one");
        // Fixed for good: a checkpoint of an older version resumes on the same windows.
        let first: Vec<usize> = all[..12].iter().map(|sample| sample.part).collect();
        assert_eq!(first, [2, 1, 0, 0, 1, 0, 0, 1, 3, 2, 0, 3]);
    }

    #[test]
    fn specifications_of_words() {
        let options = CorpusOptions::default();
        let parse =
            |words: &[&str]| from_words(&words.iter().map(PathBuf::from).collect::<Vec<_>>(), &options);
        let one = parse(&["a.txt", "x:y=b"]).unwrap();
        assert_eq!((one.len(), &one[0].name[..], one[0].paths.len()), (1, UNNAMED, 2));
        let two = parse(&["web=a:0.5", "math=c:\\d.txt", "web=b"]).unwrap();
        assert_eq!(two[0].paths, [PathBuf::from("a"), "b".into()]);
        assert_eq!((two[0].weight, two[1].weight), (0.5, 1.0));
        assert_eq!(two[1].paths, [PathBuf::from("c:\\d.txt")]);
        #[cfg(unix)]
        {
            use std::os::unix::ffi::OsStrExt;
            let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"web=\xff:2"));
            let odd = from_words(std::slice::from_ref(&path), &options).unwrap();
            assert_eq!(
                (&odd[0].name[..], &odd[0].paths[..]),
                (UNNAMED, &[path][..]),
                "no UTF-8: a path alone"
            );
        }
        for (words, wanted) in [
            (&["web=a", "b"][..], "some sources have names"),
            (&["web=a:0"], "weight 0"),
            (&["web=a:-1"], "weight -1"),
            (&["web=a:inf"], "weight inf"),
            (&["web=a:1", "web=b:2"], "another weight"),
            (&[], "0 sources"),
        ] {
            let message = parse(words).unwrap_err().to_string();
            assert!(message.contains(wanted) && message.starts_with("data"), "{message}");
        }
    }

    #[test]
    fn specifications_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mixture.toml");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            from_toml(
                &path,
                &CorpusOptions {
                    doc_separator: Some("S".into()),
                    text_column: "t".into(),
                    ..CorpusOptions::default()
                },
            )
        };
        let sources = read(
            "[[source]]\nname = \"web\"\ndata = \"w\"\nweight = 2\n[[source]]\nname = \"m\"\ndata = [\"/a\", \"b\"]\n\
             text_column = \"q,a\"\ndoc_separator = \"X\"",
        )
        .unwrap();
        assert_eq!(sources[0].paths, [dir.path().join("w")]);
        assert_eq!(sources[1].paths, [PathBuf::from("/a"), dir.path().join("b")]);
        assert_eq!((sources[0].weight, sources[1].weight), (2.0, 1.0));
        assert_eq!(sources[0].options.doc_separator.as_deref(), Some("S"));
        assert_eq!(sources[0].options.selection, Selection::default());
        let chosen = "[[source]]\nname = \"w\"\ndata = \"w\"\nlanguage = \"en\"\ndocument_chars = 9\npart = \"final\"\npart_seed = 4";
        let (language, part) = (Some(Language::English), Some(DocumentPart::Final));
        let selection = Selection { language, document_chars: Some(9), part, part_seed: 4 };
        assert_eq!(read(chosen).unwrap()[0].options.selection, selection);
        assert_eq!((&sources[0].options.text_column[..], &sources[1].options.text_column[..]), ("t", "q,a"));
        let one = "[[source]]\nname = \"web\"\ndata = \"w\"\n";
        for (text, wanted) in [
            ("source = 3".to_owned(), "line 1"),
            (format!("{one}wight = 2\n"), "line 4: unknown field `wight`"),
            (format!("{one}{one}"), "two sources \"web\""),
            (format!("{one}weight = 0\n"), "weight 0"),
            (one.replace("web", "a/b"), "name \"a/b\""),
            (one.replace("\"w\"", "[]"), "names no data"),
            (format!("{one}language = \"xx\"\n"), "line 4"),
            (format!("{one}document_chars = 0\n"), "document_chars of \"web\" is 0"),
            (format!("{one}doc_separator = \"\"\n"), "doc_separator of \"web\" is empty"),
            ("source = []".to_owned(), "0 sources"),
        ] {
            let message = read(&text).unwrap_err().to_string();
            assert!(message.contains(wanted) && message.contains("mixture.toml"), "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
    }

    #[test]
    fn a_source_that_is_too_small_is_named() {
        let source = |name: &str, len: u32| TokenSource {
            name: name.into(),
            weight: 1.0,
            tokens: TokenStream { ids: (0..len).collect(), doc_starts: vec![0] }.into(),
        };
        let options = SplitOptions { seq: 20, valid_fraction: 0.1, valid_samples: 100 };
        let message = |sources: &[TokenSource]| Mixture::new(sources, options, None).unwrap_err().to_string();
        let two = message(&[source("a", 900), source("b", 9)]);
        assert!(two.starts_with("source b: training text: 9 tokens"), "{two}");
        assert!(message(&[source("a", 9)]).starts_with("training text: 9 tokens"));
        let mixture = Mixture::new(&[source("a", 900), source("b", 300)], options, None).unwrap();
        assert_eq!(mixture.train_len() + mixture.valid_len(), 1200);
        let mut window = Vec::new();
        mixture.window(Sample { part: 1, window: 2 }, &mut window).unwrap();
        assert_eq!(window.len(), 21);
    }

    proptest! {
        #[test]
        fn quotas_are_whole_and_near(weights in proptest::collection::vec(1e-6f64..1e3, 1..40)) {
            let quotas = quotas(&weights);
            let total: f64 = weights.iter().sum();
            prop_assert_eq!(quotas.iter().sum::<usize>(), BLOCK);
            for (quota, weight) in quotas.iter().zip(&weights) {
                let exact = weight / total * BLOCK as f64;
                prop_assert!(*quota >= 1 && (*quota as f64 - exact).abs() <= 1.0 + 40.0 * f64::from(u8::from(exact < 1.0)) + 1.0);
            }
        }
    }
}
