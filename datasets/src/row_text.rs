//! The text of one row of a file.

/// The contents of a row's text columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowText {
    /// The text.
    Text(String),
    /// All columns hold null.
    Null,
    /// A column is absent; the reason names it and those that exist.
    Missing(String),
}

/// Joins the columns of a row by line ends, without those that hold null or nothing.
#[derive(Default)]
pub(crate) struct Joined(Option<String>);

impl Joined {
    pub(crate) fn push(&mut self, part: &str) {
        let text = self.0.get_or_insert_default();
        if !text.is_empty() && !part.is_empty() {
            text.push('\n');
        }
        text.push_str(part);
    }

    pub(crate) fn finish(self) -> RowText {
        self.0.map_or(RowText::Null, RowText::Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_joined_by_line_ends() {
        let joined = |parts: &[&str]| {
            let mut joined = Joined::default();
            parts.iter().for_each(|part| joined.push(part));
            joined.finish()
        };
        assert_eq!(joined(&["a", "", "b"]), RowText::Text("a\nb".into()));
        assert_eq!(joined(&["", "b"]), RowText::Text("b".into()));
        assert_eq!(joined(&[""]), RowText::Text(String::new()));
        assert_eq!(joined(&[]), RowText::Null);
    }
}
