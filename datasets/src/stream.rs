//! Token ids of documents, one after the other.

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

    /// Appends a document; one without ids is skipped.
    pub fn push(&mut self, document: &[u32]) {
        if !document.is_empty() {
            self.doc_starts.push(self.ids.len());
            self.ids.extend_from_slice(document);
        }
    }
}
