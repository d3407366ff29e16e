//! `dsmoe data prepare` and `dsmoe data stats`: tokenize sources and count their tokens.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use dsmoe_core::config::Config;
use dsmoe_datasets::{Skipped, Tokenizer};
use serde::Serialize;

use crate::cli::data::{Prepare, Stats};
use crate::format::{self, Table};
use crate::models::tokenizer;
use crate::progress::{Progress, Unit};
use crate::texts::{Text, label, open, options, prepare_one, show_notices};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct PrepareReport {
    cache: PathBuf,
    sources: Vec<PreparedSource>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct PreparedSource {
    name: String,
    weight: f64,
    path: PathBuf,
    files: usize,
    file_bytes: u64,
    documents: usize,
    tokens: usize,
    /// What was left out of the documents; none when the cache existed before.
    skipped: Option<Skipped>,
    /// Is true when the cache existed before.
    reused: bool,
    /// Tokens that an interrupted run had written.
    resumed_tokens: u64,
    seconds: f64,
}

fn tokenizer_of(model: &Path, ui: &Ui) -> Result<Tokenizer> {
    tokenizer(model, &Config::load(model)?, ui)
}

pub(crate) fn run(args: &Prepare, ui: &mut Ui) -> Result<()> {
    let cache = args.data.cache.as_deref().context("no folder for the caches; use --cache DIR")?;
    let started = Instant::now();
    let tokenizer = tokenizer_of(&args.model, ui)?;
    let texts = open(&args.data, &options(&args.data))?;
    let mut sources = Vec::new();
    for text in &texts {
        let started = Instant::now();
        let prepared = prepare_one(&texts, text, &tokenizer, args.bos, cache, ui)?;
        if prepared.resumed > 0 {
            ui.note(format_args!(
                "resumed{} after {} tokens",
                label(&texts, text),
                format::count(prepared.resumed)
            ));
        }
        sources.push(PreparedSource {
            name: text.spec.name.clone(),
            weight: text.spec.weight,
            path: prepared.path,
            files: text.corpus.files().len(),
            file_bytes: text.corpus.total_bytes(),
            documents: prepared.tokens.doc_starts().len(),
            tokens: prepared.tokens.len(),
            skipped: (!prepared.reused).then(|| text.corpus.skipped()),
            reused: prepared.reused,
            resumed_tokens: prepared.resumed,
            seconds: started.elapsed().as_secs_f64(),
        });
    }
    let seconds = started.elapsed().as_secs_f64();
    ui.result(&PrepareReport { cache: cache.to_path_buf(), sources, seconds }, |report| {
        let mut table = Table::new(["source", "weight", "files", "bytes", "documents", "tokens", "MB/s", ""]);
        for source in &report.sources {
            let rate = source.file_bytes as f64 / 1e6 / source.seconds.max(1e-9);
            table.row([
                source.name.clone(),
                source.weight.to_string(),
                format::count(source.files as u64),
                format::bytes(source.file_bytes),
                format::count(source.documents as u64),
                format::count(source.tokens as u64),
                if source.reused { "-".to_owned() } else { format!("{rate:.1}") },
                if source.reused { "was there".to_owned() } else { String::new() },
            ]);
        }
        format!(
            "{}caches in {}, {}\n",
            table.show(),
            report.cache.display(),
            format::duration(report.seconds)
        )
    })
}

#[derive(Debug, Serialize)]
struct StatsReport {
    sources: Vec<SourceStats>,
    total: Counts,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct SourceStats {
    name: String,
    weight: f64,
    /// Share of the sum of all weights.
    share: f64,
    #[serde(flatten)]
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Counts {
    files: usize,
    /// Bytes of the files as stored.
    file_bytes: u64,
    documents: u64,
    /// What was left out of the documents.
    skipped: Skipped,
    /// Bytes of the text in UTF-8.
    text_bytes: u64,
    tokens: Option<u64>,
    bytes_per_token: Option<f64>,
}

impl Counts {
    fn with_rate(mut self) -> Counts {
        self.bytes_per_token =
            self.tokens.filter(|&tokens| tokens > 0).map(|tokens| self.text_bytes as f64 / tokens as f64);
        self
    }
}

pub(crate) fn stats(args: &Stats, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let tokenizer = args.model.as_deref().map(|model| tokenizer_of(model, ui)).transpose()?;
    let texts = open(&args.data, &options(&args.data))?;
    let all_weights: f64 = texts.iter().map(|text| text.spec.weight).sum();
    let mut total = Counts { tokens: tokenizer.as_ref().map(|_| 0), ..Counts::default() };
    let mut sources = Vec::new();
    for text in &texts {
        let mut counts = count(&texts, text, ui)?;
        if let Some(tokenizer) = &tokenizer {
            counts.tokens = Some(match &args.data.cache {
                Some(cache) => prepare_one(&texts, text, tokenizer, args.bos, cache, ui)?.tokens.len() as u64,
                None => tokens(&texts, text, tokenizer, args, ui)?,
            });
        }
        let counts = counts.with_rate();
        total.files += counts.files;
        total.file_bytes += counts.file_bytes;
        total.documents += counts.documents;
        total.skipped += counts.skipped;
        total.text_bytes += counts.text_bytes;
        total.tokens = total.tokens.zip(counts.tokens).map(|(sum, tokens)| sum + tokens);
        let (name, weight) = (text.spec.name.clone(), text.spec.weight);
        sources.push(SourceStats { name, weight, share: weight / all_weights, counts });
    }
    let report = StatsReport { sources, total: total.with_rate(), seconds: started.elapsed().as_secs_f64() };
    ui.result(&report, show_stats)
}

/// Counts without a tokenizer.
fn count(texts: &[Text], text: &Text, ui: &Ui) -> Result<Counts> {
    let total = text.corpus.total_bytes();
    let mut counts = Counts { files: text.corpus.files().len(), file_bytes: total, ..Counts::default() };
    let mut progress = Progress::new(ui, format!("counting{}", label(texts, text)), Unit::Bytes, total);
    let mut documents = text.corpus.documents();
    while let Some(document) = documents.next().transpose()? {
        counts.documents += 1;
        counts.text_bytes += document.text.len() as u64;
        if counts.documents.is_multiple_of(256) {
            progress.set(documents.bytes_read(), total, "");
        }
    }
    progress.finish();
    counts.skipped = text.corpus.skipped();
    show_notices(&text.corpus, ui);
    Ok(counts)
}

/// Counts tokens without keeping them.
fn tokens(texts: &[Text], text: &Text, tokenizer: &Tokenizer, args: &Stats, ui: &Ui) -> Result<u64> {
    let total = text.corpus.total_bytes();
    let mut progress = Progress::new(ui, format!("encoding{}", label(texts, text)), Unit::Bytes, total);
    let tokens = dsmoe_datasets::tokens::count(&text.corpus, tokenizer, args.bos, &mut |done| {
        progress.set(done, total, "");
    });
    progress.finish();
    Ok(tokens?)
}

fn show_stats(report: &StatsReport) -> String {
    let mut table = Table::new([
        "source",
        "share",
        "files",
        "file bytes",
        "documents",
        "text bytes",
        "tokens",
        "bytes/token",
    ]);
    let mut row = |name: &str, share: f64, counts: &Counts| {
        table.row([
            name.to_owned(),
            format::percent(share),
            format::count(counts.files as u64),
            format::bytes(counts.file_bytes),
            format::count(counts.documents),
            format::bytes(counts.text_bytes),
            counts.tokens.map_or("-".to_owned(), format::count),
            counts.bytes_per_token.map_or("-".to_owned(), |rate| format!("{rate:.2}")),
        ]);
    };
    for source in &report.sources {
        row(&source.name, source.share, &source.counts);
    }
    if report.sources.len() > 1 {
        row("all", 1.0, &report.total);
    }
    table.show()
}
