//! Differences in syntax between Jinja and the template engine.

/// Rewrites a template for the engine: the tags `generation` and `endgeneration`, which only mark text, become tags that do
/// nothing either, around which white space is trimmed as around any tag; and a text of a tag loses its line ends behind
/// backslashes, as in Python.
pub(super) fn adapted(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, kind, tag)) = next_tag(rest) {
        text.push_str(before);
        let length = match kind {
            '#' => tag.find("#}").map_or(tag.len(), |end| end + 2),
            '{' => tag_length(tag, "}}"),
            _ => tag_length(tag, "%}"),
        };
        let (tag, after) = tag.split_at(length);
        let name = tag.trim_matches(|c: char| c.is_whitespace() || "{}%+-".contains(c));
        rest = after;
        match (kind, name) {
            ('#', _) => text.push_str(tag),
            ('%', "generation") => text.push_str(&tag.replace("generation", "if true")),
            ('%', "endgeneration") => text.push_str(&tag.replace("endgeneration", "endif")),
            ('%', "raw") => {
                let end = after.find("endraw").unwrap_or(after.len());
                text.push_str(tag);
                text.push_str(&after[..end]);
                rest = &after[end..];
            }
            _ => push_joined(tag, &mut text),
        }
    }
    text + rest
}

/// Returns the length of the longest tag without its texts, in bytes.
pub(super) fn longest_tag(source: &str) -> usize {
    let (mut longest, mut rest) = (0, source);
    while let Some((_, kind, tag)) = next_tag(rest) {
        let (length, texts) = match kind {
            '#' => (tag.find("#}").map_or(tag.len(), |end| end + 2), usize::MAX),
            '{' => measured(tag, "}}"),
            _ => measured(tag, "%}"),
        };
        longest = longest.max(length.saturating_sub(texts));
        rest = &tag[length..];
    }
    longest
}

/// Finds the next tag: the text before it, the second character of its opening, and the tag with all that follows.
fn next_tag(rest: &str) -> Option<(&str, char, &str)> {
    let mut from = 0;
    loop {
        let at = from + rest[from..].find('{')?;
        match rest[at + 1..].chars().next()? {
            kind @ ('%' | '{' | '#') => return Some((&rest[..at], kind, &rest[at..])),
            _ => from = at + 1,
        }
    }
}

/// Returns the length of a tag with its ending, which does not count inside a text.
fn tag_length(tag: &str, ending: &str) -> usize {
    measured(tag, ending).0
}

/// Returns the length of a tag, and how much of it is texts.
fn measured(tag: &str, ending: &str) -> (usize, usize) {
    let (mut quote, mut texts) = (None, 0);
    let mut chars = tag.char_indices().skip(2);
    while let Some((at, c)) = chars.next() {
        match quote {
            Some(_) if c == '\\' => {
                texts += 1 + chars.next().map_or(0, |(_, escaped)| escaped.len_utf8());
            }
            Some(open) if c == open => quote = None,
            Some(_) => texts += c.len_utf8(),
            None if matches!(c, '"' | '\'') => quote = Some(c),
            None if tag[at..].starts_with(ending) => return (at + ending.len(), texts),
            None => {}
        }
    }
    (tag.len(), texts)
}

/// Appends a tag without the line ends that stand behind backslashes.
fn push_joined(tag: &str, text: &mut String) {
    let mut rest = tag;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        text.push_str(before);
        if let Some(after) = escape.strip_prefix("\\\n") {
            rest = after;
            continue;
        }
        let length = 1 + escape[1..].chars().next().map_or(0, char::len_utf8);
        text.push_str(&escape[..length]);
        rest = &escape[length..];
    }
    text.push_str(rest);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tags_are_rewritten_and_texts_kept() {
        for (source, wanted) in [
            ("{%- generation -%}{% x generation %}{%", "{%- if true -%}{% x generation %}{%"),
            ("a\\\nb {{ 'c\\\nd \\\\\nx' }}\\\n", "a\\\nb {{ 'cd \\\\\nx' }}\\\n"),
            ("{{ '%} }} {% generation %}' }}{% generation %}", "{{ '%} }} {% generation %}' }}{% if true %}"),
            ("{# {% generation %} ' #}{% endgeneration %}", "{# {% generation %} ' #}{% endif %}"),
            (
                "{% raw %}{{ ' {% generation %}{% endraw %}{%+ generation %}",
                "{% raw %}{{ ' {% generation %}{% endraw %}{%+ if true %}",
            ),
            ("{ { {x} {{ 'it\\'s' }}{% generation %}", "{ { {x} {{ 'it\\'s' }}{% if true %}"),
            ("{{ 'never closed", "{{ 'never closed"),
        ] {
            assert_eq!(adapted(source), wanted);
        }
    }

    proptest! {
        #[test]
        fn what_needs_no_change_is_kept(source in "([a-z'\"\\n ]|\\{\\{|\\}\\}|\\{%|%\\}|\\{#|#\\}|é|raw|endraw){0,30}") {
            prop_assert_eq!(adapted(&source), source);
        }
    }
}
