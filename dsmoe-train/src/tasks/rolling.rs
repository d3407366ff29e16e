//! Computes perplexity by word and byte of whole documents.

use dsmoe_datasets::tasks::{Request, Response, count_words};
use serde::Serialize;

use super::{Ran, Responder};
use crate::error::{Error, Result};

/// The approximate size of the text that is held as tokens at a time, in bytes.
const PIECE_BYTES: usize = 8 << 20;

/// Perplexity by units that do not depend on a tokenizer. Every document is scored by itself from the start token on,
/// in windows as long as the model that do not overlap, as lm-evaluation-harness does.
///
/// ```
/// use dsmoe_train::tasks::{Responder, RollingReport, rolling};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # use dsmoe_datasets::tasks::Profile;
/// # use dsmoe_datasets::{Bos, Tokenizer, train_bpe};
/// # let work = tempfile::tempdir()?;
/// # train_bpe(std::iter::once("a text".to_owned()), 258, work.path())?;
/// # let tokenizer = Tokenizer::load(work.path(), Some(0), 2048)?;
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
/// # let responder = Responder::new(&model, &tokenizer, Bos::Auto, Profile::default());
///
/// let texts = ["Two words.", "And three more."].map(|text| Ok(text.to_owned()));
/// // The result is none if the responder was stopped.
/// let (report, ran): (RollingReport, _) = rolling(&responder, texts, &mut |_| {})?.unwrap();
/// assert_eq!((report.documents, report.words), (2, 5));
/// assert!((report.byte_perplexity.log2() - report.bits_per_byte).abs() < 1e-9);
/// assert!(ran.tokens > 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RollingReport {
    /// Documents.
    pub documents: usize,
    /// Pieces between white space.
    pub words: usize,
    /// UTF-8 bytes.
    pub bytes: usize,
    /// exp of the negative log-likelihood per word.
    pub word_perplexity: f64,
    /// exp of the negative log-likelihood per byte.
    pub byte_perplexity: f64,
    /// Negative log-likelihood per byte in bits.
    pub bits_per_byte: f64,
}

/// Measures the documents that `texts` gives; none if the responder was stopped. `progress` receives the number of
/// bytes done.
///
/// # Errors
/// A text cannot be read or scored, or there is none.
pub fn rolling(
    responder: &Responder<'_>,
    texts: impl IntoIterator<Item = Result<String>>,
    progress: &mut dyn FnMut(usize),
) -> Result<Option<(RollingReport, Ran)>> {
    let mut texts = texts.into_iter();
    let mut ran = Ran::default();
    let (mut documents, mut words, mut bytes, mut sum) = (0, 0, 0, 0.0);
    loop {
        let mut piece = Vec::new();
        let mut held = 0;
        while held < PIECE_BYTES
            && let Some(text) = texts.next().transpose()?
        {
            words += count_words(&text);
            held += text.len();
            piece.push([Request::Rolling { text }]);
        }
        if piece.is_empty() {
            break;
        }
        bytes += held;
        let requests: Vec<&[Request]> = piece.iter().map(|request| &request[..]).collect();
        let Some(answers) = responder.answer(&requests, None, &mut |_, _| {})? else { return Ok(None) };
        for answer in answers.documents.into_iter().flatten() {
            documents += 1;
            match answer {
                Ok(Response::Rolling { sum: one }) => sum += one,
                Ok(_) => unreachable!("the answer to another request"),
                Err(reason) => return Err(Error::Unscorable { document: documents, reason }),
            }
        }
        ran.add(&answers.ran);
        progress(bytes);
    }
    if documents == 0 {
        return Err(Error::Unscorable { document: 1, reason: "there is none".into() });
    }
    let per_byte = -sum / bytes as f64;
    let report = RollingReport {
        documents,
        words,
        bytes,
        word_perplexity: (-sum / words as f64).exp(),
        byte_perplexity: per_byte.exp(),
        bits_per_byte: per_byte / std::f64::consts::LN_2,
    };
    Ok(Some((report, ran)))
}
