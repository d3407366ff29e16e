//! A corpus as one stream of token ids, in memory or in a cache file.

use crate::corpus::{Corpus, Position};
use crate::error::{Error, Result};
use crate::files::hex;
use crate::stream::TokenStream;
use crate::token_cache;
use crate::token_cache::{TokenFile, Writer};
use crate::tokenizer::{Bos, Tokenizer};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Documents are encoded together until they have this many bytes.
const BATCH_BYTES: usize = 4 << 20;

/// A cache is synced to the disk every so many batches.
const CHECKPOINT_BATCHES: u64 = 2;

/// A token stream in memory or in a file. A clone is the same stream.
#[derive(Clone, Debug)]
pub struct Tokens(Arc<Place>);

#[derive(Debug)]
enum Place {
    Memory(TokenStream),
    File(TokenFile),
}

impl From<TokenStream> for Tokens {
    fn from(stream: TokenStream) -> Tokens {
        Tokens(Arc::new(Place::Memory(stream)))
    }
}

impl From<&TokenStream> for Tokens {
    fn from(stream: &TokenStream) -> Tokens {
        stream.clone().into()
    }
}

impl From<TokenFile> for Tokens {
    fn from(file: TokenFile) -> Tokens {
        Tokens(Arc::new(Place::File(file)))
    }
}

impl Tokens {
    /// Returns the number of ids.
    pub fn len(&self) -> usize {
        match &*self.0 {
            Place::Memory(stream) => stream.ids.len(),
            Place::File(file) => file.len(),
        }
    }

    /// Returns true if there is no id.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the start of each document: ascending, from 0.
    pub fn doc_starts(&self) -> &[usize] {
        match &*self.0 {
            Place::Memory(stream) => &stream.doc_starts,
            Place::File(file) => file.doc_starts(),
        }
    }

    /// Returns the largest id; 0 if there is none.
    pub fn max_id(&self) -> u32 {
        match &*self.0 {
            Place::Memory(stream) => stream.ids.iter().copied().max().unwrap_or(0),
            Place::File(file) => file.max_id(),
        }
    }

    /// Appends the ids `range` to `out`.
    ///
    /// # Errors
    /// The cache file cannot be read any more.
    ///
    /// # Panics
    /// A range that ends after [`Tokens::len`].
    pub fn read(&self, range: Range<usize>, out: &mut Vec<u32>) -> Result<()> {
        match &*self.0 {
            Place::Memory(stream) => {
                out.extend_from_slice(&stream.ids[range]);
                Ok(())
            }
            Place::File(file) => file.read(range, out),
        }
    }

    /// Hands all ids to `take`, some at a time.
    ///
    /// # Errors
    /// Those of [`Tokens::read`].
    pub fn for_each(&self, take: &mut dyn FnMut(&[u32])) -> Result<()> {
        const IDS: usize = 1 << 16;
        let mut ids = Vec::new();
        for start in (0..self.len()).step_by(IDS) {
            ids.clear();
            self.read(start..self.len().min(start + IDS), &mut ids)?;
            take(&ids);
        }
        Ok(())
    }
}

/// A stage of [`prepare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The files are hashed.
    Hashing,
    /// The documents are encoded.
    Encoding,
}

/// A corpus in a cache.
#[derive(Debug)]
pub struct Prepared {
    /// Its ids.
    pub tokens: Tokens,
    /// The cache file.
    pub path: PathBuf,
    /// True if it existed already.
    pub reused: bool,
    /// The number of ids that an interrupted call had written.
    pub resumed: u64,
}

/// Encodes every document of `corpus`, each with BOS as `bos` says, into memory. A `cache_dir` is used as by
/// [`prepare`]. `progress` receives how many bytes of [`Corpus::total_bytes`] are done.
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
    if let Some(dir) = cache_dir {
        let prepared = prepare(corpus, tokenizer, bos, dir, &mut |stage, bytes| {
            if stage == Stage::Encoding {
                progress(bytes);
            }
        })?;
        progress(corpus.total_bytes());
        return match Arc::into_inner(prepared.tokens.0) {
            Some(Place::File(file)) => file.into_stream(),
            Some(Place::Memory(stream)) => Ok(stream),
            None => Ok(TokenStream::default()),
        };
    }
    let mut stream = TokenStream::default();
    encode(corpus, tokenizer, bos, Position::default(), &mut |batch, _, bytes| {
        for ids in batch {
            // A small file may unpack to more than the memory holds.
            stream.try_reserve(ids.len()).map_err(|_| corpus.too_large(stream.ids.len() + ids.len()))?;
            stream.push(ids);
        }
        progress(bytes);
        Ok(())
    })?;
    if stream.ids.is_empty() { Err(corpus.empty()) } else { Ok(stream) }
}

/// Encodes every document of `corpus`, each with BOS as `bos` says, into a file of `cache_dir`, unless it is there
/// from files of the same content, the same tokenizer and the same options, wherever the files lie. Neither the text
/// nor the ids are held in memory. A cache file that is damaged or does not fit is written again. After a kill the next
/// call resumes. `progress` receives how many bytes of [`Corpus::total_bytes`] are done in a stage.
///
/// # Errors
/// Whatever reading the corpus or encoding gives, an empty corpus, files that change meanwhile, another process that
/// makes the same cache, or a directory that cannot be written.
pub fn prepare(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    bos: Bos,
    cache_dir: &Path,
    progress: &mut dyn FnMut(Stage, u64),
) -> Result<Prepared> {
    let stamps = corpus.stamps()?;
    let key = cache_key(corpus, tokenizer, bos, &mut |bytes| progress(Stage::Hashing, bytes))?;
    let path = cache_dir.join(format!("{key}.tokens"));
    let part = cache_dir.join(format!("{key}.part"));
    if let Some(file) = cached(&path, tokenizer) {
        token_cache::remove_leftover(&part);
        return Ok(Prepared { tokens: file.into(), path, reused: true, resumed: 0 });
    }
    let largest = tokenizer.vocab_size().max(tokenizer.bos_id().map_or(0, |id| id as usize + 1));
    let mut writer = Writer::open(&part, largest)?;
    let resumed = writer.len();
    let mut batches = 0;
    encode(corpus, tokenizer, bos, writer.position(), &mut |batch, position, bytes| {
        for ids in batch {
            writer.push(ids)?;
        }
        batches += 1;
        if batches % CHECKPOINT_BATCHES == 0 {
            writer.checkpoint(position)?;
        }
        progress(Stage::Encoding, bytes);
        Ok(())
    })?;
    if writer.len() == 0 {
        return Err(corpus.empty());
    }
    corpus.check_stamps(&stamps)?;
    writer.finish(&path)?;
    Ok(Prepared { tokens: TokenFile::open(&path)?.into(), path, reused: false, resumed })
}

/// Counts the ids that [`tokenize`] would give. `progress` receives how many bytes of
/// [`Corpus::total_bytes`] are done.
///
/// # Errors
/// Those of [`tokenize`].
pub fn count(corpus: &Corpus, tokenizer: &Tokenizer, bos: Bos, progress: &mut dyn FnMut(u64)) -> Result<u64> {
    let mut count = 0;
    encode(corpus, tokenizer, bos, Position::default(), &mut |batch, _, bytes| {
        count += batch.iter().map(|ids| ids.len() as u64).sum::<u64>();
        progress(bytes);
        Ok(())
    })?;
    Ok(count)
}

/// Receives the ids of some documents, the place after them, and the bytes read up to there.
type TakeIds<'a> = &'a mut dyn FnMut(&[Vec<u32>], Position, u64) -> Result<()>;

/// Hands on the ids of the documents from `start` on, batch by batch, with the place after each batch and the bytes
/// read up to there.
fn encode(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    bos: Bos,
    start: Position,
    take: TakeIds<'_>,
) -> Result<()> {
    let mut documents = corpus.documents_from(start)?;
    let (mut batch, mut sources, mut batch_bytes) = (Vec::new(), Vec::new(), 0);
    loop {
        let document = documents.next().transpose()?;
        let last = document.is_none();
        if let Some(document) = document {
            batch_bytes += document.text.len();
            batch.push(document.text);
            sources.push(document.source);
        }
        if batch_bytes >= BATCH_BYTES || (last && !batch.is_empty()) {
            let ids = tokenizer.encode_all(&batch, bos).map_err(|(at, cause)| match cause {
                Error::Memory { ids, .. } => corpus.too_large(ids),
                Error::Encoding { bytes, memory, .. } => corpus.too_long(sources[at], bytes, memory),
                cause => cause,
            })?;
            take(&ids, documents.position(), documents.bytes_read())?;
            batch.clear();
            sources.clear();
            batch_bytes = 0;
        }
        if last {
            return Ok(());
        }
    }
}

/// Opens the cache file, if it is complete and its ids fit this tokenizer.
fn cached(path: &Path, tokenizer: &Tokenizer) -> Option<TokenFile> {
    let file = TokenFile::open(path).ok()?;
    let fits = (file.max_id() as usize) < tokenizer.vocab_size() || tokenizer.bos_id() == Some(file.max_id());
    (!file.is_empty() && fits).then_some(file)
}

/// Computes the name of the cache for this content, tokenizer and options.
fn cache_key(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    bos: Bos,
    progress: &mut dyn FnMut(u64),
) -> Result<String> {
    let options = corpus.options();
    let mut fields = vec![
        token_cache::FORMAT_VERSION.to_string(),
        tokenizer.sha256().to_string(),
        format!("{:?}", tokenizer.bos_prefix(bos)?),
        tokenizer.parses_special().to_string(),
        format!("{:?}", options.doc_separator),
        options.text_column.clone(),
    ];
    fields.extend(options.selection.key());
    fields.extend(corpus.content_hashes(progress)?);
    let mut hasher = Sha256::new();
    for field in fields {
        hasher.update((field.len() as u64).to_le_bytes());
        hasher.update(field);
    }
    Ok(hex(&hasher.finalize()))
}

/// Computes the SHA-256 of all ids, each in four bytes, in hexadecimal.
///
/// # Errors
/// Those of [`Tokens::read`].
pub fn identity(tokens: &Tokens) -> Result<String> {
    let (mut hasher, mut bytes) = (Sha256::new(), Vec::new());
    tokens.for_each(&mut |ids| {
        bytes.clear();
        bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        hasher.update(&bytes);
    })?;
    Ok(hex(&hasher.finalize()))
}
