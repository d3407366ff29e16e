//! The changes that tasks of lm-evaluation-harness make to a text before it enters a prompt.

use std::sync::LazyLock;

use regex::Regex;

use super::text::{is_space, strip};

/// Returns the whole sentences of a context, and the beginning of a sentence behind them.
pub(crate) fn divide(ctx: &str) -> (&str, &str) {
    static WHOLE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r#"[.!?]["')\]]*\s*$"#).expect("a constant"));
    match ctx.rfind(". ") {
        _ if WHOLE.is_match(ctx) => (ctx, ""),
        Some(at) => (&ctx[..=at], &ctx[at + 2..]),
        None => ("", ctx),
    }
}

/// Takes out what is left of the markup of WikiHow.
pub(crate) fn without_markup(text: &str) -> String {
    static TAG: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a constant"));
    let text = strip(text).replace(" [title]", ". ");
    TAG.replace_all(&text, "").replace("  ", " ")
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
pub(crate) fn detokenized(page: &str) -> String {
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

/// Sorts the answers and leaves out those that begin with the one kept before: a text with them has that one too.
pub(crate) fn without_longer(mut answers: Vec<String>) -> Vec<String> {
    answers.sort_unstable();
    answers.dedup_by(|answer, kept| answer.starts_with(kept.as_str()));
    answers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_goes_as_in_the_harness() {
        assert_eq!(without_markup(" [header] How to [title] Go. [step] Run.  \n"), " How to. Go. Run.");
        assert_eq!(without_markup("a   b [x\ny] c"), "a  b [x\ny] c");
    }

    #[test]
    fn a_context_is_divided_before_its_last_sentence() {
        assert_eq!(divide("A man sits. He is on a roof. he"), ("A man sits. He is on a roof.", "he"));
        assert_eq!(divide("How to win. Take the \"cup.\""), ("How to win. Take the \"cup.\"", ""));
        assert_eq!(divide("a man"), ("", "a man"));
    }

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

    #[test]
    fn an_answer_that_begins_with_a_kept_one_is_left_out() {
        let answers =
            ["New York City", "Boston", "New York", "Boston", "new york"].map(str::to_owned).to_vec();
        assert_eq!(without_longer(answers), ["Boston", "New York", "new york"]);
    }
}
