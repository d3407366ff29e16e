//! Differences in syntax between Jinja and the template engine.

/// Rewrites a template for the engine: the tags `generation` and `endgeneration`, which only mark text, become tags that do
/// nothing either, around which white space is trimmed as around any tag; a text of a tag loses its line ends behind
/// backslashes, as in Python; and `'...' % x` becomes a call of the filter `format`.
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
            _ => push_joined(&formatted(tag), &mut text),
        }
    }
    text + rest
}

/// Returns the largest number of characters of a tag outside of its texts.
pub(super) fn longest_tag(source: &str) -> usize {
    let (mut longest, mut rest) = (0, source);
    while let Some((_, kind, tag)) = next_tag(rest) {
        let length = match kind {
            '#' => tag.find("#}").map_or(tag.len(), |end| end + 2),
            '{' => tag_length(tag, "}}"),
            _ => tag_length(tag, "%}"),
        };
        let (tag, after) = tag.split_at(length);
        if kind != '#' {
            longest = longest.max(unquoted(tag).count());
        }
        rest = after;
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

/// Returns the places of the characters outside of quoted texts.
fn unquoted(code: &str) -> impl Iterator<Item = (usize, char)> {
    let (mut quote, mut escaped) = (None, false);
    code.char_indices().filter(move |&(_, c)| match quote {
        Some(_) if std::mem::take(&mut escaped) => false,
        Some(open) => {
            escaped = c == '\\';
            quote = quote.filter(|_| c != open);
            false
        }
        None if matches!(c, '"' | '\'') => {
            quote = Some(c);
            false
        }
        None => true,
    })
}

/// Returns the length of a tag with its ending, which does not count inside a text.
fn tag_length(tag: &str, ending: &str) -> usize {
    let mut ends = unquoted(&tag[2..]).filter(|(at, _)| tag[2 + at..].starts_with(ending));
    ends.next().map_or(tag.len(), |(at, _)| 2 + at + ending.len())
}

/// Rewrites the formatting of texts by `%`, which the engine lacks, as calls of the filter `format`.
fn formatted(tag: &str) -> String {
    let (mut out, mut rest) = (String::new(), tag);
    while let Some(at) = rest.find(['"', '\'']) {
        let (before, text) = rest.split_at(at);
        let (text, after) = text.split_at(text_length(text));
        out.push_str(before);
        match operand(after) {
            Some((arguments, after)) => {
                out.extend(["(", text, "|format(", arguments, "))"]);
                rest = after;
            }
            None => {
                out.push_str(text);
                rest = after;
            }
        }
    }
    out + rest
}

/// Returns the length of the quoted text that `code` begins with.
fn text_length(code: &str) -> usize {
    let open = code.chars().next();
    let mut chars = code.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            _ if Some(c) == open => return at + 1,
            _ => {}
        }
    }
    code.len()
}

/// Returns what stands behind the operator `%` that `code` begins with, as arguments of a call, and the rest.
fn operand(code: &str) -> Option<(&str, &str)> {
    let code = code.trim_start().strip_prefix('%').filter(|code| !code.starts_with('}'))?.trim_start();
    let name = |code: &str| code.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(code.len());
    let mut end = match code.chars().next()? {
        '(' | '[' | '{' => group(code)?.0,
        '"' | '\'' => text_length(code),
        '0'..='9' => number_length(code),
        _ => Some(name(code)).filter(|&length| length > 0)?,
    };
    let tuple =
        group(code).filter(|&(length, has_comma)| code.starts_with('(') && has_comma && length == end);
    loop {
        let rest = code[end..].trim_start();
        let length = match rest.chars().next() {
            Some('(' | '[') => group(rest)?.0,
            Some(mark @ ('.' | '|')) => {
                let after = rest[1..].trim_start();
                // `||` and the like are none of the engine's.
                Some(name(after))
                    .filter(|&length| length > 0 && (mark == '|' || after.len() + 1 == rest.len()))?
                    + (rest.len() - after.len())
            }
            _ => break,
        };
        end = code.len() - rest.len() + length;
    }
    let (operand, rest) = code.split_at(end);
    match tuple {
        Some((length, _)) if length == end => {
            Some((operand[1..end - 1].trim_end().trim_end_matches(','), rest))
        }
        _ => Some((operand, rest)),
    }
}

/// Returns the length of the number that `code` begins with, which may have a point and an exponent.
fn number_length(code: &str) -> usize {
    let digits =
        |code: &str| code.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(code.len());
    let length = digits(code);
    match code[length..].strip_prefix(['+', '-']) {
        Some(exponent) if code[..length].ends_with(['e', 'E']) => length + 1 + digits(exponent),
        _ => length,
    }
}

/// Returns the length of the bracketed group that `code` begins with, and whether a comma is directly inside.
fn group(code: &str) -> Option<(usize, bool)> {
    // The closing brackets of those that are open.
    let (mut open, mut has_comma) = (Vec::new(), false);
    for (at, c) in unquoted(code) {
        match c {
            '(' => open.push(')'),
            '[' => open.push(']'),
            '{' => open.push('}'),
            ')' | ']' | '}' if open.pop() != Some(c) => return None,
            ',' if open.len() == 1 => has_comma = true,
            _ => {}
        }
        if open.is_empty() {
            return Some((at + c.len_utf8(), has_comma));
        }
    }
    None
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
            ("{{ '%s' % x }}{% if 'a' %}", "{{ ('%s'|format(x)) }}{% if 'a' %}"),
            (
                "{{ \"%s: %d\" % (m['a, b)'].c, 2,) ~ 'x' }}",
                "{{ (\"%s: %d\"|format(m['a, b)'].c, 2)) ~ 'x' }}",
            ),
            ("{{ '%s'%f(a)[0].b | upper -}}", "{{ ('%s'|format(f(a)[0].b | upper)) -}}"),
            (
                "{{ '%.2f' % 1.5 if x else '%%' % {} }}",
                "{{ ('%.2f'|format(1.5)) if x else ('%%'|format({})) }}",
            ),
            ("{{ 7 % 2 }}{{ '%s' % }}{{ '%s' % (a }}", "{{ 7 % 2 }}{{ '%s' % }}{{ '%s' % (a }}"),
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
