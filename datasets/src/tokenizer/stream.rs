//! The text of a token sequence that grows.

use super::Tokenizer;
use crate::error::Result;

/// Tokens of an endless row of incomplete characters before its beginning is dropped, and those that are kept: more than
/// one character can have.
const MAX_HELD: usize = 64;
const KEPT: usize = 16;

/// Text of a token sequence that grows; made by [`Tokenizer::stream`].
///
/// The pieces it gives, put together, are the text that [`Tokenizer::decode`] gives for the whole sequence. A token
/// that ends inside a character is held back until the character is complete. A run of byte tokens (`<0xE2>`) is held back
/// until it ends, since one byte that is no UTF-8 makes every byte of its run a U+FFFD.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the last piece, for context, then those held back.
    ids: Vec<u32>,
    /// The number of `ids` that are context.
    context: usize,
    /// The bytes of the text of `ids` that were given.
    given: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, before: &[u32]) -> Result<DecodeStream<'a>> {
        let (ids, given) = (before.to_vec(), tokenizer.decode(before, true)?.len());
        Ok(DecodeStream { tokenizer, context: ids.len(), ids, given })
    }

    /// Adds a token and returns the text that it completes, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let Some(is_byte) = self.tokenizer.is_byte(id) else { return Ok(None) };
        self.ids.push(id);
        if is_byte {
            return Ok(None);
        }
        let text = self.tokenizer.decode(&self.ids, true)?;
        // More bytes can make the last character another one.
        let certain = text.strip_suffix('\u{FFFD}').map_or(text.len(), str::len);
        let piece = text.get(self.given..certain).filter(|piece| !piece.is_empty()).map(str::to_owned);
        if piece.is_some() && certain == text.len() {
            self.ids.drain(..self.context);
            self.given = self.tokenizer.decode(&self.ids, true)?.len();
            self.context = self.ids.len();
        } else {
            self.given = self.given.max(certain);
            if self.ids.len() > MAX_HELD && certain < text.len() {
                self.ids.drain(..self.ids.len() - KEPT);
                let kept = self.tokenizer.decode(&self.ids, true)?;
                self.given = kept.strip_suffix('\u{FFFD}').map_or(kept.len(), str::len);
                self.context = 0;
            }
        }
        Ok(piece)
    }

    /// Returns the text that is held back, with an incomplete character as U+FFFD.
    pub fn held(&self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, true)?;
        Ok(text.get(self.given..).unwrap_or_default().to_owned())
    }

    /// Returns the text that is still held back at the end, if any.
    pub fn finish(self) -> Result<Option<String>> {
        Ok(Some(self.held()?).filter(|text| !text.is_empty()))
    }
}
