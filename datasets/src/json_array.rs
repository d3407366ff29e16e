//! This module finds the ends of the objects in a JSON array, and tracks the position of its reader.

/// A place in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The line, from 1.
    pub(crate) line: u64,
    /// The bytes of the line before it.
    pub(crate) column: usize,
}

impl Place {
    /// The start of a text.
    pub(crate) const START: Place = Place { line: 1, column: 0 };

    /// Moves behind `bytes`.
    pub(crate) fn pass(&mut self, bytes: &[u8]) {
        let is_end = |byte: &u8| *byte == b'\n';
        self.line += bytes.iter().filter(|&byte| is_end(byte)).count() as u64;
        self.column = match bytes.iter().rposition(is_end) {
            Some(at) => bytes.len() - at - 1,
            None => self.column + bytes.len(),
        };
    }
}

/// Finds the end of an object in pieces of text, the first of which starts with it. Of a text that is no object it finds an
/// end that is not before what is wrong with it.
#[derive(Debug, Default)]
pub(crate) struct Extent {
    /// Brackets that are open.
    depth: u64,
    in_text: bool,
    is_escaped: bool,
}

impl Extent {
    /// Reads the next piece of the text. Returns the number of its bytes up to the end of the object, or none if the object does
    /// not end in this piece.
    pub(crate) fn end_in(&mut self, bytes: &[u8]) -> Option<usize> {
        for (at, &byte) in bytes.iter().enumerate() {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.in_text => self.is_escaped = true,
                b'"' => self.in_text = !self.in_text,
                _ if self.in_text => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_ends_at_its_bracket_however_its_text_is_cut() {
        for object in
            ["{}", r#"{"a": [1, {"b": "}"}], "c": "\"]}\\"}"#, r#"{"é\\\"": "🦊\\", "x": [[], {}]}"#]
        {
            let text = format!("{object}, {{}}]");
            let bytes = text.as_bytes();
            for cut in 0..=object.len() {
                let mut extent = Extent::default();
                let found =
                    extent.end_in(&bytes[..cut]).or_else(|| Some(cut + extent.end_in(&bytes[cut..])?));
                assert_eq!(found, Some(object.len()), "{object} cut at {cut}");
            }
        }
        for open in ["{", "{\"a\": [", "{\"}", "{\"a\\\"}"] {
            assert_eq!(Extent::default().end_in(open.as_bytes()), None, "{open}");
        }
    }

    #[test]
    fn a_place_moves_over_lines() {
        let mut place = Place::START;
        for (piece, line, column) in [("ab", 1, 2), ("c\n", 2, 0), ("\n\nde", 4, 2), ("", 4, 2), ("f", 4, 3)]
        {
            place.pass(piece.as_bytes());
            assert_eq!((place.line, place.column), (line, column), "{piece:?}");
        }
    }
}
