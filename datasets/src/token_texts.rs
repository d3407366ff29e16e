//! The bytes of tokens.

/// The bytes of every token of a vocabulary.
#[derive(Clone, Debug, Default)]
pub struct TokenTexts {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl TokenTexts {
    /// Collects the bytes of every id from 0 on. A token that is not text has none, and separates words.
    pub fn new<'a>(tokens: impl Iterator<Item = Option<&'a [u8]>>) -> TokenTexts {
        let mut texts = TokenTexts::default();
        for token in tokens {
            texts.bytes.extend_from_slice(token.unwrap_or(b" "));
            texts.ends.push(texts.bytes.len());
        }
        texts
    }

    /// Returns the bytes of token `id`; a space for one that is not text.
    pub fn of(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = id.checked_sub(1).map_or(0, |before| self.ends.get(before).copied().unwrap_or(0));
        self.ends.get(id).map_or(b" ", |&end| &self.bytes[start..end])
    }
}
