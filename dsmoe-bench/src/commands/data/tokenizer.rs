//! `dsmoe data tokenizer`: trains a tokenizer.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dsmoe_datasets::train_bpe;
use serde::Serialize;

use crate::cli::data::TrainTokenizer;
use crate::format;
use crate::progress::{Progress, Unit};
use crate::texts::{label, open, options, show_notices, total_bytes};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct TokenizerReport {
    out: PathBuf,
    vocab: usize,
    text_bytes: u64,
    documents: u64,
    seconds: f64,
}

pub(crate) fn run(args: &TrainTokenizer, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let file = args.out.extension().is_some_and(|extension| extension == "json");
    let target = if file { args.out.clone() } else { args.out.join("tokenizer.json") };
    if target.exists() && !args.force {
        bail!("{} exists; choose another --out, or pass --force to replace it", target.display());
    }
    let texts = open(&args.data, &options(&args.data))?;
    let total = total_bytes(&texts);
    let mut report =
        TokenizerReport { out: args.out.clone(), vocab: 0, text_bytes: 0, documents: 0, seconds: 0.0 };
    let (mut error, mut before) = (None, 0);
    let mut progress = Progress::new(ui, "counting words", Unit::Bytes, total);
    let temporary =
        tempfile::tempdir_in(parent(&target)?).with_context(|| format!("{}", target.display()))?;
    let documents = texts.iter().flat_map(|text| {
        let mut documents = text.corpus.documents();
        let size = text.corpus.total_bytes();
        let what = label(&texts, text);
        std::iter::from_fn(move || {
            let next = documents.next()?;
            Some((next, documents.bytes_read(), size, what.clone()))
        })
    });
    let mut last = String::new();
    let mut last_size = 0;
    let documents = documents.map_while(|(document, done, size, what)| {
        if what != last {
            before += last_size;
            last = what;
        }
        last_size = size;
        match document {
            Ok(document) => {
                report.documents += 1;
                report.text_bytes += document.text.len() as u64;
                if report.documents.is_multiple_of(64) {
                    progress.set(before + done, total, &last);
                }
                Some(document.text)
            }
            Err(cause) => {
                error = Some(cause);
                None
            }
        }
    });
    let vocab = train_bpe(documents, args.vocab, temporary.path());
    progress.finish();
    texts.iter().for_each(|text| show_notices(&text.corpus, ui));
    if let Some(error) = error {
        return Err(error.into());
    }
    report.vocab = vocab?;
    for name in ["special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"] {
        let to = if name == "tokenizer.json" { target.clone() } else { target.with_file_name(name) };
        if name == "tokenizer.json" || !file {
            std::fs::rename(temporary.path().join(name), &to).with_context(|| format!("{}", to.display()))?;
        }
    }
    report.seconds = started.elapsed().as_secs_f64();
    if report.vocab < args.vocab {
        ui.note(format_args!("no pair of tokens repeats any more after {} tokens", report.vocab));
    }
    ui.result(&report, |report| {
        format!(
            "{}: {} tokens learned from {} in {} documents, {}\n",
            report.out.display(),
            format::count(report.vocab as u64),
            format::bytes(report.text_bytes),
            format::count(report.documents),
            format::duration(report.seconds)
        )
    })
}

/// Returns the folder of `target`, and creates it if it does not exist.
fn parent(target: &Path) -> Result<PathBuf> {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("{}", parent.display()))?;
    Ok(parent.to_path_buf())
}
