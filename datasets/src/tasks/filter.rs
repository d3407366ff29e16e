//! Filters for generated answers before they are compared.

use regex::Regex;

use super::stored::{Side, Take};
use super::text::{strip, strip_start};

/// The result of a filter that finds nothing.
const INVALID: &str = "[invalid]";

/// A way to find the answer in a generated text.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    /// The name in the keys of results.
    pub(crate) name: &'static str,
    /// A pattern, and which of its matches counts. The result is the first group that is not empty, or the whole match.
    pub(crate) regex: Option<(Regex, Take)>,
    /// Removed from what is found; nothing if empty.
    pub(crate) remove: String,
    /// Where white space is taken off.
    pub(crate) strip: Side,
}

impl Filter {
    /// The text as it is.
    pub(crate) fn none() -> Filter {
        Filter { name: "none", regex: None, remove: String::new(), strip: Side::None }
    }

    pub(crate) fn apply(&self, text: &str) -> String {
        let found = match &self.regex {
            None => text,
            Some((regex, take)) => {
                let mut all = regex.captures_iter(text);
                let found = if *take == Take::First { all.next() } else { all.last() };
                let group = |found: regex::Captures<'_>| {
                    let mut groups = found.iter().skip(1).flatten().filter(|group| !group.is_empty());
                    groups.next().or(found.get(0)).map(|group| group.range())
                };
                found.and_then(group).map_or(INVALID, |range| &text[range])
            }
        };
        let found = if self.remove.is_empty() { found.to_owned() } else { found.replace(&self.remove, "") };
        match self.strip {
            Side::None => found,
            Side::Start => strip_start(&found).to_owned(),
            Side::Both => strip(&found).to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(regex: &str, take: Take, remove: &str) -> Filter {
        let regex = Some((Regex::new(regex).unwrap(), take));
        Filter { regex, remove: remove.to_owned(), ..Filter::none() }
    }

    #[test]
    fn numbers_are_found_where_they_are_looked_for() {
        let strict = r"#### (\-?[0-9\.\,]+)";
        let text = "He has $12.50 left, so #### 1,234. Then #### 9";
        let [first, number] = ["", ","].map(|remove| filter(strict, Take::First, remove));
        let flexible = filter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", Take::Last, "");
        assert_eq!([first.apply(text), number.apply(text)], ["1,234.", "1234."]);
        assert_eq!(flexible.apply(text), "9");
        assert_eq!(flexible.apply("costs -$3.00, yes"), "-$3.00,");
        for filter in [first, number, flexible] {
            assert_eq!(filter.apply("no number"), INVALID);
        }
        let [start, both] = [Side::Start, Side::Both].map(|strip| Filter { strip, ..Filter::none() });
        assert_eq!([both.apply(" a "), start.apply(" a ")], ["a", "a "]);
    }
}
