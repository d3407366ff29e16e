#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bpe;
pub mod corpus;
mod encoder;
mod error;
pub mod files;
pub mod manifest;
pub mod mixture;
pub mod overlap;
mod parquet_rows;
mod reader;
mod remedy;
mod stream;
pub mod tasks;
pub mod token_cache;
mod token_texts;
pub mod tokenizer;
pub mod tokens;
pub mod windows;
pub mod world;

pub use corpus::{Corpus, CorpusOptions, DOC_SEPARATOR, Document};
pub use error::{Error, Result};
pub use mixture::{Interleaving, Mixture, Sample, SourceSpec, TokenSource};
pub use remedy::Remedy;
pub use stream::TokenStream;
pub use tokenizer::{Bos, DecodeStream, Tokenizer, train_bpe};
pub use tokens::{Tokens, tokenize};
pub use windows::{Batches, EvalWindow, Split, SplitOptions, eval_windows};
