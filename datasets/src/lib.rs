#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bpe;
pub mod chat;
pub mod corpus;
mod encoder;
mod error;
pub mod files;
mod format;
mod formats;
mod json_array;
mod json_row;
pub mod manifest;
pub mod mixture;
mod notes;
pub mod overlap;
mod panics;
mod parquet_pages;
mod parquet_rows;
mod reader;
mod remedy;
mod row_text;
mod selection;
mod stream;
pub mod tasks;
pub mod token_cache;
mod token_texts;
pub mod tokenizer;
pub mod tokens;
pub mod windows;
pub mod world;

pub use chat::{Chat, ChatTemplate};
pub use corpus::{Corpus, CorpusOptions, DOC_SEPARATOR, Document};
pub use error::{Error, Result};
pub use mixture::{Interleaving, Mixture, Sample, SourceSpec, TokenSource};
pub use notes::Skipped;
pub use reader::Records;
pub use remedy::Remedy;
pub use selection::{DocumentPart, Language, Selection};
pub use stream::TokenStream;
pub use tokenizer::{Bos, DecodeStream, Tokenizer, TokenizerFiles, train_bpe};
pub use tokens::{Tokens, tokenize};
pub use windows::{Batches, EvalWindow, Split, SplitOptions, eval_windows};
