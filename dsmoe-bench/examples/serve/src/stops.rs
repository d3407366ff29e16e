//! Text that ends where a stop text begins.

/// The text of a completion. What may be the beginning of a stop text is held back.
#[derive(Debug, Default)]
pub(crate) struct Stops {
    stops: Vec<String>,
    held: String,
    pub(crate) stopped: bool,
}

impl Stops {
    pub(crate) fn new(stops: Vec<String>) -> Stops {
        Stops { stops, ..Stops::default() }
    }

    /// Adds a piece, and returns the text that can no longer belong to a stop text.
    pub(crate) fn push(&mut self, piece: &str) -> String {
        self.held += piece;
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.held.truncate(at);
            self.stopped = true;
            return std::mem::take(&mut self.held);
        }
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let certain = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        self.held.drain(..certain).collect()
    }

    /// Returns what was held back, at the end of the text.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::Stops;

    #[test]
    fn a_stop_text_is_found_across_pieces() {
        let mut stops = Stops::new(vec!["END".into()]);
        assert_eq!([stops.push("one E"), stops.push("N"), stops.push("ough E")].concat(), "one ENough ");
        assert_eq!((stops.push("ND two"), stops.stopped), (String::new(), true));
        let mut none = Stops::new(vec!["END".into()]);
        assert_eq!((none.push("xE"), none.finish(), none.stopped), ("x".into(), "E".into(), false));
    }
}
