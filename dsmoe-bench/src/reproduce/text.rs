//! The training text, the held-out text and the tokenizer.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dsmoe_core::config::Config;
use dsmoe_datasets::mixture::{SourceTable, from_tables, from_toml, from_words};
use dsmoe_datasets::overlap::TokenTexts;
use dsmoe_datasets::tasks::sha256;
use dsmoe_datasets::tokens::identity;
use dsmoe_datasets::world::{Domain, World};
use dsmoe_datasets::{
    Bos, Corpus, CorpusOptions, Mixture, SplitOptions, TokenSource, TokenStream, Tokenizer, train_bpe,
};
use dsmoe_train::config::{NearDuplicates, TrainConfig};
use dsmoe_train::run::TrainData;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cache::{Cache, IfBusy, Key};
use super::profile::{Profile, WORLD_TOKEN, WorldText};
use crate::cli::reproduce::Reproduce;
use crate::texts;
use crate::ui::Ui;

/// Number of the first held-out document of the world; no training text reaches it.
const HELD_OUT: u64 = 1 << 40;
/// Number of the first held-out document of the world that requests are cut from. Measured windows come nowhere near it.
const REQUESTS: u64 = 1 << 41;
/// Most bytes of text that the tokenizer is trained on.
const TOKENIZER_BYTES: u64 = 4_000_000;

/// Held-out text of one source.
#[derive(Debug)]
pub(crate) struct HeldOut {
    pub(crate) name: String,
    /// Share of the weights of all sources.
    pub(crate) share: f64,
    /// Whole windows.
    pub(crate) ids: Vec<u32>,
    /// The document that each window begins in; empty if that is not known.
    pub(crate) documents: Vec<u32>,
}

/// The files of a reproduction's text.
pub(super) struct Files {
    train: Vec<texts::Text>,
    /// Text to measure on; none if a share of the training text is.
    held_out: Option<Vec<texts::Text>>,
}

impl Files {
    /// Returns the number of sources that models are measured on.
    pub(super) fn measured(&self) -> usize {
        self.held_out.as_ref().unwrap_or(&self.train).len()
    }
}

/// Where held-out text is, of which the measured windows may be a part.
enum Rest {
    /// The world of that seed, whose documents begin as the rule says.
    World(u64, Bos),
    /// The held-out sides of the mixture.
    Split,
    /// Sources that are measured on alone.
    Sources(Vec<TokenSource>),
}

/// All text of a reproduction.
pub(crate) struct Text {
    sources: Vec<TokenSource>,
    rest: Rest,
    texts: Option<TokenTexts>,
    split: SplitOptions,
    pub(crate) held_out: Vec<HeldOut>,
    pub(crate) tokenizer: Tokenizer,
    /// A directory with the tokenizer's files.
    pub(crate) tokenizer_dir: PathBuf,
    /// The training side, from which calibration text is drawn.
    pub(crate) mixture: Mixture,
    pub(crate) key: Key,
    /// Hashes of the inputs, for reports.
    pub(crate) inputs: Value,
}

/// The result of the stage that writes the world.
#[derive(Serialize, Deserialize)]
struct Written {
    vocab_size: usize,
}

impl Text {
    /// Loads the world's text, which is written once, with its tokenizer or that of `model`.
    pub(crate) fn of_world(
        world: &WorldText,
        profile: &Profile,
        model: Option<&Path>,
        cache: &Cache,
        ui: &Ui,
    ) -> Result<Text> {
        let key = Key::of("text", &json!(world));
        let dir = cache.dir("text", &key);
        let land = World::new(world.seed);
        let written: Written = cache.stage("text", &key, IfBusy::Wait, |dir| {
            ui.note(format_args!("writing {} of text and a tokenizer", crate::format::bytes(world.bytes)));
            land.write_text(&dir.join("text"), world.bytes, &mut |_| {})?;
            let sample = |domain| land.documents(domain, world.bytes.min(TOKENIZER_BYTES));
            let vocab_size = train_bpe(Domain::ALL.into_iter().flat_map(sample), world.vocab, dir)?;
            Ok(Written { vocab_size })
        })?;
        let (tokenizer_dir, tokenizer) = match model {
            Some(model) => (model.to_path_buf(), crate::models::tokenizer(model, &Config::load(model)?, ui)?),
            None => (dir.clone(), Tokenizer::load(&dir, Some(WORLD_TOKEN), written.vocab_size)?),
        };
        let train = profile.train()?;
        let mut parts = Vec::new();
        let mut held_out = Vec::new();
        for domain in Domain::ALL {
            let path = dir.join("text").join(format!("{}.jsonl", domain.name()));
            let corpus = Corpus::open(&[path], CorpusOptions::default())?;
            let tokens = dsmoe_datasets::tokenize(&corpus, &tokenizer, train.bos, None, &mut |_| {})?;
            let share = domain.share() as f64 / 100.0;
            parts.push(TokenSource { name: domain.name().to_owned(), weight: share, tokens: tokens.into() });
            let wanted = profile.measure.windows * (train.seq + 1);
            let mut ids = Vec::with_capacity(wanted);
            let mut documents = (HELD_OUT..).map(|index| land.document(domain, index));
            while let (true, Some(document)) = (ids.len() < wanted, documents.next()) {
                ids.extend(tokenizer.encode(&document, train.bos)?);
            }
            ids.truncate(wanted);
            let (name, documents) = (domain.name().to_owned(), Vec::new());
            held_out.push(HeldOut { name, share, ids, documents });
        }
        let split = train.split_options();
        let mixture = Mixture::new(&parts, split, None)?;
        let (key, inputs) = hashed(&parts, &held_out, &tokenizer, &train)?;
        Ok(Text {
            sources: parts,
            rest: Rest::World(world.seed, train.bos),
            texts: None,
            split,
            held_out,
            tokenizer,
            tokenizer_dir,
            mixture,
            key,
            inputs,
        })
    }

    /// Loads text that the user names, with the tokenizer of `model`.
    pub(crate) fn of_user(args: &Reproduce, profile: &Profile, ui: &Ui) -> Result<Text> {
        let model = args.model.as_deref().context("no model to take the tokenizer of")?;
        let train = profile.train()?;
        let options = CorpusOptions {
            doc_separator: train.doc_separator.clone(),
            text_column: train.text_column.clone(),
            ..CorpusOptions::default()
        };
        let found = find(args, profile, &options)?;
        let tokenizer = crate::models::tokenizer(model, &Config::load(model)?, ui)?;
        let parts = texts::load(&found.train, &tokenizer, train.bos, args.cache.as_deref(), ui)?;
        let drop = match train.near_duplicates {
            Some(rule) => rule == NearDuplicates::Drop,
            None => parts.len() > 1,
        };
        let held = found.held_out.as_deref();
        let held = held
            .map(|held| texts::load(held, &tokenizer, train.bos, args.cache.as_deref(), ui))
            .transpose()?;
        let texts = drop.then(|| tokenizer.token_texts());
        let split = train.split_options();
        let mixture = Mixture::new(&parts, split, texts.as_ref())?;
        let (window, windows) = (train.seq + 1, profile.measure.windows);
        let (held_out, rest) = match held {
            Some(held) => (of_documents(&held, window, windows)?, Rest::Sources(held)),
            None => (of_split(&mixture, window, windows)?, Rest::Split),
        };
        let (key, inputs) = hashed(&parts, &held_out, &tokenizer, &train)?;
        let tokenizer_dir = model.to_path_buf();
        let sources = parts;
        Ok(Text { sources, rest, texts, split, held_out, tokenizer, tokenizer_dir, mixture, key, inputs })
    }

    /// Returns the text of a training.
    pub(crate) fn train_data(&self) -> TrainData {
        TrainData { sources: self.sources.clone(), texts: self.texts.clone() }
    }

    /// Returns held-out text of every source, in the order of [`Text::held_out`]: `tokens` of each, or what there is. That of the
    /// world shares no document with the measured windows.
    pub(crate) fn held_out_sources(&self, tokens: usize) -> Result<Vec<TokenSource>> {
        let of = |(number, part): (usize, &HeldOut)| -> Result<TokenSource> {
            let mut stream = TokenStream::default();
            match &self.rest {
                Rest::Sources(sources) => return Ok(sources[number].clone()),
                Rest::Split => {
                    let ids = self.mixture.parts()[number].split.valid_tokens();
                    stream.push(&ids[..ids.len().min(tokens)]);
                }
                Rest::World(seed, bos) => {
                    let land = World::new(*seed);
                    let mut documents = (REQUESTS..).map(|index| land.document(Domain::ALL[number], index));
                    while let (true, Some(document)) = (stream.ids.len() < tokens, documents.next()) {
                        stream.push(&self.tokenizer.encode(&document, *bos)?);
                    }
                }
            }
            Ok(TokenSource { name: part.name.clone(), weight: part.share, tokens: stream.into() })
        };
        self.held_out.iter().enumerate().map(of).collect()
    }

    /// Returns the first sequences that a training of this seed reads.
    pub(crate) fn calibration(&self, samples: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
        Ok(self.mixture.sequences(samples, seed)?)
    }

    /// Returns the text of a training on one source.
    pub(crate) fn train_data_of(&self, source: &str) -> Result<TrainData> {
        let found = self.sources.iter().find(|one| one.name == source);
        let found = found.with_context(|| format!("there is no text {source}"))?;
        Ok(TrainData { sources: vec![found.clone()], texts: self.texts.clone() })
    }

    /// Returns the first sequences that a training of this seed on one source reads.
    pub(crate) fn calibration_of(&self, source: &str, samples: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
        let TrainData { sources, texts } = self.train_data_of(source)?;
        Ok(Mixture::new(&sources, self.split, texts.as_ref())?.sequences(samples, seed)?)
    }
}

/// Takes the held-out windows of a mixture.
fn of_split(mixture: &Mixture, window: usize, most: usize) -> Result<Vec<HeldOut>> {
    let held_out = mixture.parts().iter().map(|part| {
        let ids = part.split.valid_tokens();
        let windows = (ids.len() / window).min(most);
        if windows == 0 {
            bail!(
                "source {}: {} held-out tokens are fewer than a window of {window}; give more text or a larger valid_fraction",
                part.name,
                ids.len()
            );
        }
        let (ids, documents) = (ids[..windows * window].to_vec(), Vec::new());
        Ok(HeldOut { name: part.name.clone(), share: part.share, ids, documents })
    });
    held_out.collect()
}

/// Takes the first windows of sources that are measured on alone.
fn of_documents(sources: &[TokenSource], window: usize, most: usize) -> Result<Vec<HeldOut>> {
    let total: f64 = sources.iter().map(|source| source.weight).sum();
    let held_out = sources.iter().map(|source| {
        let windows = (source.tokens.len() / window).min(most);
        if windows == 0 {
            let found = source.tokens.len();
            bail!("held-out text {}: {found} tokens are fewer than a window of {window}", source.name);
        }
        let mut ids = Vec::new();
        source.tokens.read(0..windows * window, &mut ids)?;
        let starts = source.tokens.doc_starts();
        let document =
            |at: usize| starts.partition_point(|start| *start <= at * window).saturating_sub(1) as u32;
        let documents = (0..windows).map(document).collect();
        Ok(HeldOut { name: source.name.clone(), share: source.weight / total, ids, documents })
    });
    held_out.collect()
}

/// Finds the files of the text that the user names, or of the profile's own tables. `defaults` are the options of sources
/// that do not set their own.
pub(super) fn find(args: &Reproduce, profile: &Profile, defaults: &CorpusOptions) -> Result<Files> {
    if !profile.source.is_empty() {
        let [folder] = &args.data[..] else {
            bail!(
                "profile {} has [[source]] tables; name the folder of their files with --data",
                profile.name
            )
        };
        let read = |tables: &[SourceTable], what: &str| {
            let place = format!("profile {}: [[{what}]]", profile.name);
            texts::find(from_tables(tables, folder, defaults, &place)?)
        };
        let held_out = Some(read(&profile.held_out, "held_out")?);
        return Ok(Files { train: read(&profile.source, "source")?, held_out });
    }
    let specs = match &args.mixture {
        Some(path) => from_toml(path, defaults)?,
        None => from_words(&args.data, defaults)?,
    };
    Ok(Files { train: texts::find(specs)?, held_out: None })
}

/// Returns the key of the tokens, and the hashes of the inputs.
fn hashed(
    sources: &[TokenSource],
    held_out: &[HeldOut],
    tokenizer: &Tokenizer,
    train: &TrainConfig,
) -> Result<(Key, Value)> {
    let hash = |source: &TokenSource| {
        let (name, weight, tokens) = (&source.name, source.weight, source.tokens.len());
        let hash = identity(&source.tokens).with_context(|| name.clone())?;
        Ok(json!({ "name": name, "weight": weight, "tokens": tokens, "sha256": hash }))
    };
    let hashes = sources.iter().map(hash).collect::<Result<Vec<Value>>>()?;
    let held = held_out.iter().map(|part| {
        let bytes: String = part.ids.iter().map(|id| format!("{id} ")).collect();
        json!({ "name": part.name, "tokens": part.ids.len(), "sha256": sha256(&bytes) })
    });
    let held: Vec<Value> = held.collect();
    let inputs = json!({ "tokenizer_sha256": tokenizer.sha256(), "sources": hashes, "held_out": held });
    let split = json!([train.seq, train.valid_fraction, train.valid_samples, train.near_duplicates]);
    Ok((Key::of("tokens", &json!([inputs, split])), inputs))
}

/// Returns the rule of BOS tokens in the texts of tasks.
pub(crate) fn task_bos() -> Bos {
    dsmoe_datasets::tasks::Profile::default().bos()
}
