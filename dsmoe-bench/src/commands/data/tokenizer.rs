//! `dsmoe data tokenizer`: trains a tokenizer.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use dsmoe_datasets::files::{TemporaryDir, sync_dir};
use dsmoe_datasets::train_bpe;
use serde_json::json;

use crate::cli::data::TrainTokenizer;
use crate::files::{MadeFolders, folder_of};
use crate::format;
use crate::progress::{Progress, Unit};
use crate::texts::{label, open, options, show_notices, total_bytes};
use crate::ui::Ui;

pub(crate) fn run(args: &TrainTokenizer, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let file = args.out.extension().is_some_and(|extension| extension == "json");
    let target = if file { args.out.clone() } else { args.out.join("tokenizer.json") };
    if target.exists() && !args.force {
        bail!("{} exists; choose another --out, or pass --force to replace it", target.display());
    }
    let texts = open(&args.data, &options(&args.data))?;
    let total = total_bytes(&texts);
    let (mut error, mut count, mut text_bytes, mut start) = (None, 0, 0, 0);
    let mut progress = Progress::new(ui, "counting words", Unit::Bytes, total);
    let (folder, place) = (folder_of(&target), || target.display().to_string());
    let _made = MadeFolders::make(folder)?;
    let temporary = TemporaryDir::for_path(&target).with_context(place)?;
    let documents = texts.iter().flat_map(|text| {
        let (mut documents, before, what) = (text.corpus.documents(), start, label(&texts, text));
        start += text.corpus.total_bytes();
        std::iter::from_fn(move || Some((documents.next()?, before + documents.bytes_read(), what.clone())))
    });
    let documents = documents.map_while(|(document, done, what)| match document {
        Ok(document) => {
            count += 1;
            text_bytes += document.text.len() as u64;
            if count % 64 == 0 {
                progress.set(done, total, &what);
            }
            Some(document.text)
        }
        Err(cause) => {
            error = Some(cause);
            None
        }
    });
    let vocab = train_bpe(documents, args.vocab, temporary.path());
    progress.finish();
    texts.iter().for_each(|text| show_notices(&text.corpus, ui));
    if let Some(error) = error {
        return Err(error.into());
    }
    let vocab = vocab?;
    for name in ["special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"] {
        let to = if name == "tokenizer.json" { target.clone() } else { target.with_file_name(name) };
        if name == "tokenizer.json" || !file {
            std::fs::rename(temporary.path().join(name), &to).with_context(|| format!("{}", to.display()))?;
        }
    }
    sync_dir(folder).with_context(|| folder.display().to_string())?;
    let (out, seconds) = (args.out.display().to_string(), started.elapsed().as_secs_f64());
    if vocab < args.vocab {
        ui.note(format_args!("no pair of tokens repeats any more after {vocab} tokens"));
    }
    let report = json!({
        "out": out, "vocab": vocab, "text_bytes": text_bytes, "documents": count, "seconds": seconds,
    });
    ui.result(&report, |_| {
        format!(
            "{out}: {} tokens learned from {} in {} documents, {}\n",
            format::count(vocab as u64),
            format::bytes(text_bytes),
            format::count(count),
            format::duration(seconds)
        )
    })
}
