//! A corpus as one stream of token ids, made once and kept in a cache.

use crate::tokenizer::hex;
use crate::{Bos, Corpus, Result, Tokenizer, token_cache};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Documents are encoded together until they have this many bytes.
const BATCH_BYTES: usize = 4 << 20;

/// The ids of all documents of a corpus, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenStream {
    /// All ids.
    pub ids: Vec<u32>,
    /// Where each document starts in `ids`: ascending, from 0.
    pub doc_starts: Vec<usize>,
}

impl TokenStream {
    /// The ids of each document.
    pub fn documents(&self) -> impl Iterator<Item = &[u32]> {
        let ends = self.doc_starts.iter().skip(1).copied().chain([self.ids.len()]);
        self.doc_starts.iter().zip(ends).map(|(&start, end)| &self.ids[start..end])
    }

    fn push(&mut self, document: &[u32]) {
        if !document.is_empty() {
            self.doc_starts.push(self.ids.len());
            self.ids.extend_from_slice(document);
        }
    }
}

/// Encodes every document of `corpus`, each with BOS as `bos` says. With a `cache_dir` the result is taken from there
/// if it was made before from files of the same content, the same tokenizer and the same options, wherever the files
/// lie; a cache file that is damaged or does not fit is made again. `progress` hears how many bytes of
/// [`Corpus::total_bytes`] are done.
///
/// # Errors
/// Whatever reading the corpus or encoding gives, an empty corpus, or a cache directory that cannot be written.
pub fn tokenize(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    bos: Bos,
    cache_dir: Option<&Path>,
    progress: &mut dyn FnMut(u64),
) -> Result<TokenStream> {
    let cache = cache_dir.map(|dir| cache_path(dir, corpus, tokenizer, bos)).transpose()?;
    if let Some(stream) = cache.as_deref().and_then(|path| cached(path, tokenizer)) {
        progress(corpus.total_bytes());
        return Ok(stream);
    }

    let mut stream = TokenStream::default();
    let mut documents = corpus.documents();
    let (mut batch, mut batch_bytes) = (Vec::new(), 0);
    loop {
        let document = documents.next().transpose()?;
        let last = document.is_none();
        if let Some(document) = document {
            batch_bytes += document.text.len();
            batch.push(document.text);
        }
        if last || batch_bytes >= BATCH_BYTES {
            for ids in tokenizer.encode_all(std::mem::take(&mut batch), bos)? {
                stream.push(&ids);
            }
            batch_bytes = 0;
            progress(documents.bytes_read());
        }
        if last {
            break;
        }
    }
    if stream.ids.is_empty() {
        return Err(corpus.empty());
    }
    if let Some(path) = cache {
        token_cache::write(&path, &stream)?;
    }
    Ok(stream)
}

/// The stream in the cache file, if it is whole and its ids are of this tokenizer.
fn cached(path: &Path, tokenizer: &Tokenizer) -> Option<TokenStream> {
    let stream = token_cache::read(path).ok()?;
    let fits = |id: &u32| (*id as usize) < tokenizer.vocab_size() || tokenizer.bos_id() == Some(*id);
    (!stream.ids.is_empty() && stream.ids.iter().all(fits)).then_some(stream)
}

/// The file in `dir` for this content, tokenizer and options.
fn cache_path(dir: &Path, corpus: &Corpus, tokenizer: &Tokenizer, bos: Bos) -> Result<PathBuf> {
    let options = corpus.options();
    let mut fields = vec![
        token_cache::FORMAT_VERSION.to_string(),
        tokenizer.sha256().to_string(),
        format!("{:?}", tokenizer.bos_prefix(bos)?),
        tokenizer.parses_special().to_string(),
        format!("{:?}", options.doc_separator),
        options.text_column.clone(),
    ];
    fields.extend(corpus.content_hashes()?);
    let mut hasher = Sha256::new();
    for field in fields {
        hasher.update((field.len() as u64).to_le_bytes());
        hasher.update(field);
    }
    Ok(dir.join(format!("{}.tokens", hex(&hasher.finalize()))))
}
