//! The text of a token sequence that grows.

use super::Tokenizer;
use crate::error::Result;

/// Tokens that a [`DecodeStream`] holds back at most: more than one character can need.
const MAX_HELD: usize = 16;

/// Text of a token sequence that grows; made by [`Tokenizer::stream`].
///
/// The pieces it gives, put together, are the text that [`Tokenizer::decode`] gives for the whole sequence. A token
/// that ends inside a character is held back until the character is complete. There is one difference: among byte tokens
/// (`<0xE2>`) a byte that is no UTF-8 turns its neighbours into U+FFFD, those included that have been given already.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the last piece, for context, then those held back.
    ids: Vec<u32>,
    /// The number of `ids` that have been shown.
    shown: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> DecodeStream<'a> {
        DecodeStream { tokenizer, ids: Vec::new(), shown: 0 }
    }

    /// Adds a token and returns the text that it completes, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        self.advance(self.ids.len() - self.shown >= MAX_HELD)
    }

    /// Returns the text that is still held back, with an incomplete character as U+FFFD.
    pub fn finish(mut self) -> Result<Option<String>> {
        self.advance(true)
    }

    fn advance(&mut self, incomplete_too: bool) -> Result<Option<String>> {
        let before = self.tokenizer.decode(&self.ids[..self.shown], true)?;
        let now = self.tokenizer.decode(&self.ids, true)?;
        if now.len() <= before.len() || (now.ends_with('\u{FFFD}') && !incomplete_too) {
            return Ok(None);
        }
        // Invalid bytes can change how the bytes before them decode: then only the number of characters is common.
        let delta = match now.strip_prefix(&before) {
            Some(rest) => rest.to_string(),
            None => now.chars().skip(before.chars().count()).collect(),
        };
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(Some(delta))
    }
}
