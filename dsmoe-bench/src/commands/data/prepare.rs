//! `dsmoe data prepare` and `dsmoe data stats`: tokenize sources and count their tokens.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use dsmoe_core::config::Config;
use dsmoe_datasets::{Skipped, Tokenizer};
use serde::Serialize;
use serde_json::json;

use crate::cli::data::{Prepare, Stats};
use crate::format::{self, Table};
use crate::models::tokenizer;
use crate::progress::{Progress, Unit};
use crate::texts::{Text, label, open, options, prepare_one, show_notices};
use crate::ui::Ui;

fn tokenizer_of(model: &Path, ui: &Ui) -> Result<Tokenizer> {
    tokenizer(model, &Config::load(model)?, ui)
}

pub(crate) fn run(args: &Prepare, ui: &mut Ui) -> Result<()> {
    let cache = args.data.cache.as_deref().context("no folder for the caches; use --cache DIR")?;
    let started = Instant::now();
    let tokenizer = tokenizer_of(&args.model, ui)?;
    let texts = open(&args.data, &options(&args.data))?;
    let header = "source | weight | files | bytes | documents | tokens | MB/s | ";
    let (mut table, mut sources) = (Table::new(header.split(" | ")), Vec::new());
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
        let (name, weight, files) = (&text.spec.name, text.spec.weight, text.corpus.files().len());
        let (file_bytes, seconds) = (text.corpus.total_bytes(), started.elapsed().as_secs_f64());
        let (documents, tokens) = (prepared.tokens.doc_starts().len(), prepared.tokens.len());
        let rate = format!("{:.1}", file_bytes as f64 / 1e6 / seconds.max(1e-9));
        let [rate, state] = if prepared.reused { ["-", "was there"] } else { [&rate, ""] };
        table.row([
            name.clone(),
            weight.to_string(),
            format::count(files as u64),
            format::bytes(file_bytes),
            format::count(documents as u64),
            format::count(tokens as u64),
            rate.to_owned(),
            state.to_owned(),
        ]);
        sources.push(json!({
            "name": name, "weight": weight, "path": prepared.path.display().to_string(), "files": files,
            "file_bytes": file_bytes, "documents": documents, "tokens": tokens, "reused": prepared.reused,
            "skipped": (!prepared.reused).then(|| text.corpus.skipped()), "resumed_tokens": prepared.resumed, "seconds": seconds,
        }));
    }
    let (cache, seconds) = (cache.display().to_string(), started.elapsed().as_secs_f64());
    ui.result(&json!({ "cache": cache, "sources": sources, "seconds": seconds }), |_| {
        format!("{}caches in {cache}, {}\n", table.show(), format::duration(seconds))
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
    /// Counts what was left out of the documents.
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
    let tokens = Progress::during(ui, format!("encoding{}", label(texts, text)), Unit::Bytes, |show| {
        dsmoe_datasets::tokens::count(&text.corpus, tokenizer, args.bos, &mut |done| show(done, total))
    });
    Ok(tokens?)
}

fn show_stats(report: &StatsReport) -> String {
    let header = "source | share | files | file bytes | documents | text bytes | tokens | bytes/token";
    let mut table = Table::new(header.split(" | "));
    let mut row = |name: &str, share: f64, counts: &Counts| {
        table.row([
            name.to_owned(),
            format::percent(share),
            format::count(counts.files as u64),
            format::bytes(counts.file_bytes),
            format::count(counts.documents),
            format::bytes(counts.text_bytes),
            format::or_dash(counts.tokens, format::count),
            format::or_dash(counts.bytes_per_token, |rate| format!("{rate:.2}")),
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
