//! A search for files that a reader cannot take: copies of good ones with a few edits, which know words, numbers and texts.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::rng::Rng;

/// The time that a reader may take for a small file, in a search of as many copies as `DSMOE_FUZZ_CASES` asks for.
const LONGEST: Duration = Duration::from_secs(2);
/// Bytes that edits may add.
const MOST_ADDED: usize = 1 << 20;

const NUMBERS: [&str; 28] = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "255",
    "256",
    "65536",
    "1000000",
    "16777216",
    "2147483648",
    "4294967295",
    "4294967296",
    "1000000000000",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "0.5",
    "-0.0",
    "1e-320",
    "1e-40",
    "1e18",
    "3.5e38",
    "1e308",
    "1e400",
];
const VALUES: [&str; 22] = [
    "null",
    "true",
    "false",
    "{}",
    "[]",
    "[0]",
    "[[]]",
    "[-1, 1e308]",
    "{\"a\": 1}",
    "\"\"",
    "\"a\"",
    "\"0\"",
    "\"..\"",
    "\"/dev/zero\"",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "NaN",
    "inf",
    "nan",
    "1979-05-27",
    "'''a\n'''",
    "\u{feff}",
];

/// Calls `read` with copies of `good` that have one to four edits: `default` copies, or as many as `DSMOE_FUZZ_CASES` says.
/// The copies are the same in every search.
///
/// # Panics
/// `read` panics, or takes two seconds where `DSMOE_FUZZ_CASES` is set. The number of the copy and its bytes are printed.
pub fn edited_copies(name: &str, good: &[u8], default: u64, mut read: impl FnMut(&[u8])) {
    let asked = std::env::var("DSMOE_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok());
    for case in 0..asked.unwrap_or(default) {
        let bytes = edited(good, &mut Rng::new(case, 0x6675_7a7a));
        let shown = Shown { name, case, bytes: &bytes };
        let began = Instant::now();
        read(&bytes);
        let took = began.elapsed();
        assert!(asked.is_none() || took < LONGEST, "{name}, copy {case}: {took:?}");
        drop(shown);
    }
}

/// Prints a copy that makes its reader panic.
struct Shown<'a> {
    name: &'a str,
    case: u64,
    bytes: &'a [u8],
}

impl Drop for Shown<'_> {
    #[expect(clippy::print_stderr, reason = "a test that fails says with what")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            let start = &self.bytes[..self.bytes.len().min(4000)];
            eprintln!("{}, copy {}: {}", self.name, self.case, start.escape_ascii());
        }
    }
}

/// Returns a copy of `good` with one to four edits.
fn edited(good: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..=rng.below(4) {
        let count = bytes.len();
        let place = |rng: &mut Rng| rng.below(count as u64 + 1) as usize;
        let span = |rng: &mut Rng| {
            let start = rng.below(count as u64 + 1) as usize;
            start..count.min(start + rng.below(40) as usize)
        };
        let tokens = tokens(&bytes);
        let kind = rng.below(12);
        let token = (!tokens.is_empty()).then(|| tokens[rng.below(tokens.len() as u64) as usize].clone());
        let numbers: Vec<Range<usize>> =
            tokens.iter().filter(|token| is_number(&bytes[token.start..token.end])).cloned().collect();
        match (kind, token) {
            (0, _) if count > 0 => {
                let at = rng.below(count as u64) as usize;
                bytes[at] = rng.below(256) as u8;
            }
            (1, _) => drop(bytes.drain(span(rng))),
            (2, _) => {
                let (at, digits) = (place(rng), rng.below(40) as usize);
                bytes.splice(at..at, b"9".repeat(digits)).for_each(drop);
            }
            (3, _) => {
                let (at, copy) = (place(rng), bytes[span(rng)].to_vec());
                bytes.splice(at..at, copy).for_each(drop);
            }
            (4..=6, _) if !numbers.is_empty() => {
                let at = numbers[rng.below(numbers.len() as u64) as usize].clone();
                bytes.splice(at, one_of(&NUMBERS, rng)).for_each(drop);
            }
            (4..=7, Some(token)) => drop(bytes.splice(token, one_of(&VALUES, rng))),
            (8, Some(token)) => drop(bytes.drain(token)),
            (9, Some(token)) => {
                let other = tokens[rng.below(tokens.len() as u64) as usize].clone();
                let copy = bytes[other].to_vec();
                bytes.splice(token, copy).for_each(drop);
            }
            (10, Some(token)) => {
                let times = 1 + rng.below(2000) as usize;
                let copy = bytes[token.clone()].to_vec();
                if copy.len() * times <= MOST_ADDED {
                    bytes.splice(token.end..token.end, copy.repeat(times)).for_each(drop);
                }
            }
            (_, Some(token)) => {
                let depth = 1 + rng.below(3000) as usize;
                let [open, close] = [b"[]", b"{}"][rng.below(2) as usize];
                let inner = bytes[token.clone()].to_vec();
                let nested = [vec![*open; depth], inner, vec![*close; depth]].concat();
                bytes.splice(token, nested).for_each(drop);
            }
            _ => {}
        }
    }
    bytes
}

fn one_of(texts: &[&'static str], rng: &mut Rng) -> impl Iterator<Item = u8> {
    texts[rng.below(texts.len() as u64) as usize].bytes()
}

/// Returns the places of the texts, words, numbers and signs in a file.
fn tokens(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
        match bytes[at] {
            b'"' => {
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at = bytes.len().min(at + 1);
            }
            byte if is_word(byte) => {
                while at < bytes.len() && is_word(bytes[at]) {
                    at += 1;
                }
            }
            byte => {
                at += 1;
                if byte.is_ascii_whitespace() {
                    continue;
                }
            }
        }
        found.push(start..at);
    }
    found
}

fn is_number(token: &[u8]) -> bool {
    let digits = token.strip_prefix(b"-").unwrap_or(token);
    digits.first().is_some_and(u8::is_ascii_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_differ_and_are_the_same_again() {
        let good = br#"{"a": [1, -2.5e3, "b\"c"], "d": null}"#;
        let tokens: Vec<&[u8]> = tokens(good).into_iter().map(|token| &good[token]).collect();
        let wanted = [
            "{",
            "\"a\"",
            ":",
            "[",
            "1",
            ",",
            "-2.5e3",
            ",",
            "\"b\\\"c\"",
            "]",
            ",",
            "\"d\"",
            ":",
            "null",
            "}",
        ];
        assert_eq!(tokens, wanted.map(str::as_bytes));
        let all = || {
            let mut found = Vec::new();
            edited_copies("a test", good, 2000, |copy| {
                if found.len() < 2000 {
                    found.push(copy.to_vec());
                }
            });
            found
        };
        let (first, again) = (all(), all());
        assert!(first == again && first.len() >= 2000);
        let unchanged = first.iter().filter(|copy| *copy == good).count();
        assert!(unchanged < first.len() / 10, "{unchanged}");
        for wanted in ["1e308", "[[[[", "18446744073709551616", "\"d\": "] {
            let holds = |copy: &&Vec<u8>| copy.windows(wanted.len()).any(|part| part == wanted.as_bytes());
            assert!(first.iter().any(|copy| holds(&copy)), "{wanted}");
        }
        edited_copies("nothing", b"", 100, |_| ());
    }
}
