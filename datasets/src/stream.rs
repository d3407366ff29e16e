//! Token ids of documents, one after the other.

use std::collections::TryReserveError;

/// The ids of all documents of a corpus, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenStream {
    /// All ids.
    pub ids: Vec<u32>,
    /// The start of each document in `ids`: ascending, from 0.
    pub doc_starts: Vec<usize>,
}

impl TokenStream {
    /// Returns the ids of each document.
    pub fn documents(&self) -> impl Iterator<Item = &[u32]> {
        let ends = self.doc_starts.iter().skip(1).copied().chain([self.ids.len()]);
        self.doc_starts.iter().zip(ends).map(|(&start, end)| &self.ids[start..end])
    }

    /// Makes room for a document of that many ids.
    ///
    /// # Errors
    /// The memory does not have it.
    pub(crate) fn try_reserve(&mut self, ids: usize) -> Result<(), TryReserveError> {
        self.ids.try_reserve(ids)?;
        self.doc_starts.try_reserve(1)
    }

    /// Appends a document; one without ids is skipped.
    pub fn push(&mut self, document: &[u32]) {
        if !document.is_empty() {
            self.doc_starts.push(self.ids.len());
            self.ids.extend_from_slice(document);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_no_memory_holds_are_an_error() {
        let mut stream = TokenStream::default();
        assert!(stream.try_reserve(usize::MAX).is_err());
        stream.try_reserve(3).unwrap();
        stream.push(&[1, 2, 3]);
        assert_eq!(stream, TokenStream { ids: vec![1, 2, 3], doc_starts: vec![0] });
    }
}
