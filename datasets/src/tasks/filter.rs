//! Filters for generated answers before they are compared.

use std::sync::LazyLock;

use regex::Regex;

use super::text::{strip, strip_start};

/// The answer line of GSM8K.
pub(crate) static STRICT_ANSWER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"#### (\-?[0-9\.\,]+)").expect("a constant"));
static FLEXIBLE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(-?[$0-9.,]{2,})|(-?[0-9]+)").expect("a constant"));

/// The result of a filter that finds nothing.
const INVALID: &str = "[invalid]";

/// A way to find the answer in a generated text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filter {
    /// The text as it is.
    None,
    /// Without spaces around it.
    Strip,
    /// Without spaces before it.
    StripStart,
    /// The number behind the first `#### `.
    Strict,
    /// The last number.
    Flexible,
    /// Filters as `Strict` does and removes commas, from the right answer too.
    FirstNumber,
}

impl Filter {
    /// Returns the name in the keys of results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Filter::None | Filter::FirstNumber => "none",
            Filter::Strip | Filter::StripStart => "remove_whitespace",
            Filter::Strict => "strict-match",
            Filter::Flexible => "flexible-extract",
        }
    }

    pub(crate) fn apply(self, text: &str) -> String {
        let found = match self {
            Filter::None => Some(text),
            Filter::Strip => Some(strip(text)),
            Filter::StripStart => Some(strip_start(text)),
            Filter::Strict => STRICT_ANSWER.captures(text).and_then(|found| found.get(1)).map(|m| m.as_str()),
            Filter::Flexible => FLEXIBLE.find_iter(text).last().map(|m| m.as_str()),
            Filter::FirstNumber => {
                return Filter::Strict.apply(text).replace(',', "");
            }
        };
        found.unwrap_or(INVALID).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_where_they_are_looked_for() {
        let text = "He has $12.50 left, so #### 1,234. Then #### 9";
        assert_eq!(Filter::Strict.apply(text), "1,234.");
        assert_eq!(Filter::FirstNumber.apply(text), "1234.");
        assert_eq!(Filter::Flexible.apply(text), "9");
        assert_eq!(Filter::Flexible.apply("costs -$3.00, yes"), "-$3.00,");
        for filter in [Filter::Strict, Filter::Flexible, Filter::FirstNumber] {
            assert_eq!(filter.apply("no number"), INVALID);
        }
        assert_eq!([Filter::Strip.apply(" a "), Filter::StripStart.apply(" a ")], ["a", "a "]);
    }
}
