//! Tasks that ask how likely whole documents are.

use std::sync::LazyLock;

use regex::Regex;

use super::choice::HELLASWAG;
use super::metrics::Metric;
use super::profile::Profile;
use super::row::Row;
use super::task::{Ask, Item, Rules, Split, Task};
use super::text::is_space;
use crate::error::Result;

/// WikiText-2 by whole articles, with its cut-up punctuation put together.
pub(crate) const WIKITEXT: Task = Task {
    name: "wikitext",
    folders: &["wikitext", "wikitext_document_level", "wikitext2"],
    subset: "wikitext-2-raw-v1",
    split: Split::Test,
    version: 2.0,
    read: wikitext,
    rules: |_| Rules::of(&[Metric::WordPerplexity, Metric::BytePerplexity, Metric::BitsPerByte]),
    ..HELLASWAG
};

fn wikitext(row: &Row, _: Profile) -> Result<Item> {
    let page = row.filled(&["page"])?;
    let ask = Ask::Rolling { words: count_words(page), bytes: page.len() };
    Ok(Item { prompt: detokenized(page), shown: None, ask })
}

/// Pieces of `text` between runs of white space, those at the ends too.
pub fn count_words(text: &str) -> usize {
    let mut in_space = false;
    let runs = text.chars().filter(|&c| {
        let begins = is_space(c) && !in_space;
        in_space = is_space(c);
        begins
    });
    runs.count() + 1
}

/// Undoes WikiText's separation of words and punctuation, step by step as the harness does.
fn detokenized(page: &str) -> String {
    const FIRST: [(&str, &str); 9] = [
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" : ", ": "),
        (" ; ", "; "),
        (" . ", ". "),
        (" ! ", "! "),
        (" ? ", "? "),
        (" , ", ", "),
    ];
    static PAIRS: LazyLock<[(Regex, &str); 5]> = LazyLock::new(|| {
        [
            (r"\(\s*([^\)]*?)\s*\)", "(${1})"),
            (r"\[\s*([^\]]*?)\s*\]", "[${1}]"),
            (r"\{\s*([^}]*?)\s*\}", "{${1}}"),
            (r#""\s*([^"]*?)\s*""#, "\"${1}\""),
            (r"'\s*([^']*?)\s*'", "'${1}'"),
        ]
        .map(|(pair, joined)| (Regex::new(pair).expect("a constant"), joined))
    });
    const LAST: [(&str, &str); 8] = [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u{b0} ", "\u{b0}"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ];
    let replace = |text: String, (from, to): &(&str, &str)| text.replace(from, to);
    // A pattern of the harness that was meant otherwise.
    static SLASHES: LazyLock<Regex> = LazyLock::new(|| Regex::new("/' [0-9]/").expect("a constant"));
    let text = SLASHES.replace_all(&page.replace("s '", "s'"), "/'[0-9]/").into_owned();
    let text = FIRST.iter().fold(text, replace);
    let text = PAIRS.iter().fold(text, |text, (pair, joined)| pair.replace_all(&text, *joined).into_owned());
    LAST.iter().fold(text, replace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_what_python_splits() {
        for (text, words) in [("a b", 2), (" a\n\nb ", 4), ("", 1), ("a", 1), (" ", 2)] {
            assert_eq!(count_words(text), words, "{text:?}");
        }
    }

    /// Checked with `re.sub` and `str.replace` of Python in the harness's order.
    #[test]
    fn punctuation_is_put_together() {
        let page =
            " = Robert = \n He was a guest @-@ star in 1 @,@ 000 plays ( as \" Craig \" ) , 5 \u{b0} C . \n";
        assert_eq!(
            detokenized(page),
            " = Robert =\nHe was a guest-star in 1,000 plays (as \"Craig\"), 5\u{b0}C.\n"
        );
    }
}
