//! Text for DSMoE: tokenizers, corpora, token streams with a cache, evaluation and training windows, synthetic text.
//!
//! The path of a text: [`Corpus`] reads documents from files, [`Tokenizer`] turns each into ids, [`tokenize`]
//! concatenates them to one [`TokenStream`], or [`tokens::prepare`] puts them into a hashed cache file. From there
//! either [`eval_windows`] lays out what is scored, or a [`Mixture`] of sources, each a [`Split`], what is trained on. Everything is a function of its inputs alone: no
//! clock, no thread count, no path enters a result.
#![forbid(unsafe_code)]

mod bpe;
pub mod corpus;
mod encoder;
mod error;
pub mod manifest;
pub mod mixture;
pub mod overlap;
mod parquet_texts;
mod reader;
pub mod synthetic;
pub mod tasks;
pub mod token_cache;
pub mod tokenizer;
pub mod tokens;
pub mod windows;
pub mod world;

pub use corpus::{Corpus, CorpusOptions, Document};
pub use error::{Error, Result};
pub use mixture::{Interleaving, Mixture, Sample, Source, SourceSpec};
pub use synthetic::{DOC_SEPARATOR, synthetic_text};
pub use tokenizer::{Bos, DecodeStream, Tokenizer, train_bpe};
pub use tokens::{TokenStream, Tokens, tokenize};
pub use windows::{Batches, EvalWindow, Split, SplitOptions, eval_windows};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
