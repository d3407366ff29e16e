//! Text as Python sees it, where Rust sees it otherwise.

use std::fmt::Write as _;

/// Computes `str.isspace` of one character.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Computes Python's `str.strip()`.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Computes Python's `str.lstrip()`.
pub(crate) fn strip_start(text: &str) -> &str {
    text.trim_start_matches(is_space)
}

/// Computes Python's `str.rstrip()`.
pub fn strip_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// Computes Python's `str.capitalize()`: the first character in title case, the others in lower case.
pub(crate) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return String::new() };
    title(first) + &chars.as_str().to_lowercase()
}

/// Converts to title case, which differs from upper case in the Latin digraphs, in Georgian, and where upper case is
/// several letters.
fn title(c: char) -> String {
    match c {
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".into(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".into(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".into(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".into(),
        '\u{10d0}'..='\u{10ff}' => c.into(),
        'ŉ' => "ʼN".into(),
        _ => {
            let mut upper = c.to_uppercase();
            let mut title: String = upper.next().into_iter().collect();
            title.extend(upper.flat_map(char::to_lowercase));
            title
        }
    }
}

/// Computes Python's `repr(text)`.
pub(crate) fn repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out += "\\\\",
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            _ if c == quote => out.extend(['\\', c]),
            // Python calls controls not printable, and spaces other than the space.
            _ if (c.is_control() || is_space(c)) && c != ' ' => {
                let _ = match c as u32 {
                    code @ 0..=0xff => write!(out, "\\x{code:02x}"),
                    code => write!(out, "\\u{code:04x}"),
                };
            }
            _ => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Computes Python's `repr(list)` of a list of strings.
pub(crate) fn repr_list(texts: &[String]) -> String {
    format!("[{}]", texts.iter().map(|text| repr(text)).collect::<Vec<_>>().join(", "))
}

/// Computes Python's `str(number)` of a float.
pub(crate) fn float(x: f64) -> String {
    let size = x.abs();
    if x.is_finite() && size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').expect("an exponent");
        let exponent: i32 = exponent.parse().expect("a number");
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    if x.is_nan() {
        return "nan".into();
    }
    format!("{x:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capitals_are_those_of_python() {
        for (text, capital) in [
            ("", ""),
            ("he IS", "He is"),
            ("ßa", "Ssa"),
            ("ǆX", "ǅx"),
            ("ﬁN", "Fin"),
            ("éA", "Éa"),
            ("1A", "1a"),
        ] {
            assert_eq!(capitalize(text), capital);
        }
    }

    #[test]
    fn representations_are_those_of_python() {
        assert_eq!(repr("it's"), "\"it's\"");
        assert_eq!(repr("it's \"x\""), "'it\\'s \"x\"'");
        assert_eq!(repr("a\n\\\u{a0}\u{2009}é"), "'a\\n\\\\\\xa0\\u2009é'");
        assert_eq!(repr_list(&["a".into(), "b".into()]), "['a', 'b']");
        for (x, text) in [
            (-73.92759704589844, "-73.92759704589844"),
            (-1.0, "-1.0"),
            (0.0, "0.0"),
            (1e-5, "1e-05"),
            (-0.00015, "-0.00015"),
            (1.5e16, "1.5e+16"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float(x), text);
        }
    }

    #[test]
    fn spaces_are_those_of_python() {
        assert_eq!(strip("\u{1f} a\u{a0}\n"), "a");
        assert_eq!(strip_end("a\u{1c}"), "a");
        assert_eq!(strip_start("\u{200b}a"), "\u{200b}a");
    }
}
