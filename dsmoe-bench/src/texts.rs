//! The text that a user names: one source or a mixture, read into memory or through a cache.

use std::path::Path;

use anyhow::{Result, bail};
use dsmoe_datasets::corpus::MOST_FILES;
use dsmoe_datasets::mixture::{from_toml, from_words};
use dsmoe_datasets::tokens::{Prepared, Stage, prepare};
use dsmoe_datasets::{Bos, Corpus, CorpusOptions, SourceSpec, TokenSource, Tokenizer};
use dsmoe_kernels::comm::{Communicator, What};

use crate::cli::data::DataArgs;
use crate::processes::agree;
use crate::progress::{Progress, Unit};
use crate::remedies::flag;
use crate::ui::Ui;

/// A source and its files.
pub(crate) struct Text {
    pub(crate) spec: SourceSpec,
    pub(crate) corpus: Corpus,
}

/// Finds the files of all sources; `defaults` apply to sources without their own options.
pub(crate) fn open(args: &DataArgs, defaults: &CorpusOptions) -> Result<Vec<Text>> {
    let specs = match &args.mixture {
        Some(path) => from_toml(path, defaults)?,
        None => from_words(&args.data, defaults)?,
    };
    find(specs)
}

/// Finds the files of sources.
pub(crate) fn find(specs: Vec<SourceSpec>) -> Result<Vec<Text>> {
    let mut found = 0;
    let open = |spec: SourceSpec| {
        let corpus = Corpus::open(&spec.paths, spec.options.clone())?;
        found += corpus.files().len();
        if found > MOST_FILES {
            bail!(
                "source {}: with it the text has more than {MOST_FILES} files; join small files into larger ones",
                spec.name
            );
        }
        Ok(Text { spec, corpus })
    };
    specs.into_iter().map(open).collect()
}

/// Returns the options by which documents are found, from the flags alone.
pub(crate) fn options(args: &DataArgs) -> CorpusOptions {
    let defaults = CorpusOptions::default();
    CorpusOptions {
        doc_separator: args.doc_separator.clone(),
        text_column: args.text_column.clone().unwrap_or(defaults.text_column),
        selection: defaults.selection,
    }
}

/// Returns the bytes of all files of all sources.
pub(crate) fn total_bytes(texts: &[Text]) -> u64 {
    texts.iter().fold(0, |sum, text| sum.saturating_add(text.corpus.total_bytes()))
}

/// Returns the name of a source for a message; empty if it is the only one.
pub(crate) fn label(texts: &[Text], text: &Text) -> String {
    if texts.len() > 1 { format!(" of {}", text.spec.name) } else { String::new() }
}

/// Loads the ids of all sources: into memory, or with `cache` into files there.
pub(crate) fn load(
    texts: &[Text],
    tokenizer: &Tokenizer,
    bos: Bos,
    cache: Option<&Path>,
    ui: &Ui,
) -> Result<Vec<TokenSource>> {
    let load = |text: &Text| {
        let tokens = match cache {
            Some(dir) => prepare_one(texts, text, tokenizer, bos, dir, ui)?.tokens,
            None => {
                let total = text.corpus.total_bytes();
                let what = format!("reading text{}", label(texts, text));
                let mut progress = Progress::new(ui, what, Unit::Bytes, total);
                let stream = dsmoe_datasets::tokenize(&text.corpus, tokenizer, bos, None, &mut |done| {
                    progress.set(done, total, "");
                });
                progress.finish();
                let stream = stream?;
                show_notices(&text.corpus, ui);
                stream.into()
            }
        };
        Ok(TokenSource { name: text.spec.name.clone(), weight: text.spec.weight, tokens })
    };
    texts.iter().map(load).collect()
}

/// Loads the ids of all sources in all processes of `comm`. A cache is filled by the first one, while the others wait.
pub(crate) fn load_on(
    comm: &dyn Communicator,
    texts: &[Text],
    (tokenizer, bos): (&Tokenizer, Bos),
    cache: Option<&Path>,
    ui: &Ui,
) -> Result<Vec<TokenSource>> {
    let of = What::of("the tokens of the text");
    let read = || load(texts, tokenizer, bos, cache, ui);
    let first = cache.is_some() && comm.size() > 1;
    if !first {
        return agree(comm, of, read());
    }
    let of_first = if comm.rank() == 0 { read().map(Some) } else { Ok(None) };
    let of_others = match agree(comm, of, of_first)? {
        Some(sources) => Ok(sources),
        None => read(),
    };
    agree(comm, of, of_others)
}

/// Tokenizes a source into the cache unless it is there.
pub(crate) fn prepare_one(
    texts: &[Text],
    text: &Text,
    tokenizer: &Tokenizer,
    bos: Bos,
    cache: &Path,
    ui: &Ui,
) -> Result<Prepared> {
    let total = text.corpus.total_bytes();
    let of = label(texts, text);
    let progress = |what: &str| Some(Progress::new(ui, format!("{what}{of}"), Unit::Bytes, total));
    let (mut stage, mut shown) = (Stage::Hashing, progress("hashing text"));
    let prepared = prepare(&text.corpus, tokenizer, bos, cache, &mut |now, done| {
        if now != stage {
            if let Some(shown) = shown.take() {
                shown.finish();
            }
            (stage, shown) = (now, progress("reading text"));
        }
        if let Some(shown) = &mut shown {
            shown.set(done, total, "");
        }
    });
    if let Some(shown) = shown {
        shown.finish();
    }
    let prepared = prepared?;
    show_notices(&text.corpus, ui);
    Ok(prepared)
}

/// Shows what reading a corpus found that a user should know.
pub(crate) fn show_notices(corpus: &Corpus, ui: &Ui) {
    for notice in corpus.notices() {
        ui.note(format_args!("note: {}", notice.worded(flag)));
    }
}
