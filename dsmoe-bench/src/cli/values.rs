//! Parsers of values that several commands take.

use std::str::FromStr;

use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};

/// A parser of the enum whose words these are.
pub(crate) fn words<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: FromStr + Clone + Send + Sync + 'static,
    T::Err: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    PossibleValuesParser::new(words).try_map(|word| word.parse::<T>())
}

/// The word of a value on the command line.
pub(crate) fn word(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// A whole number with an optional decimal suffix: `1000`, `1_000`, `1.5M`, `10B`, `500MB`, `5GB`.
pub(crate) fn quantity(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not an amount; write 1000, 500MB, 1.5M or 10B");
    let plain = text.replace('_', "");
    let split = plain.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(plain.len());
    let (number, suffix) = plain.split_at(split);
    let scale = match suffix.to_ascii_uppercase().as_str() {
        "" => 1u64,
        "K" | "KB" => 1000,
        "M" | "MB" => 1_000_000,
        "B" | "G" | "GB" => 1_000_000_000,
        "T" | "TB" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).ok_or_else(wrong);
    }
    let value = number.parse::<f64>().map_err(|_| wrong())? * scale as f64;
    // Whole numbers up to 2^53 are exact.
    if value.is_finite() && value >= 0.0 && value.fract() == 0.0 && value < 9e15 {
        Ok(value as u64)
    } else {
        Err(wrong())
    }
}

/// A separator of documents, in which `\n`, `\t`, `\r` and `\\` stand for a line end, a tab, a carriage return and a backslash;
/// other characters after a backslash stand for themselves, as does the backslash.
pub(crate) fn separator(text: &str) -> Result<String, std::convert::Infallible> {
    let mut separator = String::new();
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        let escape = if c == '\\' { rest.clone().next() } else { None };
        let meant = match escape {
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some('\\') => '\\',
            _ => {
                separator.push(c);
                continue;
            }
        };
        rest.next();
        separator.push(meant);
    }
    Ok(separator)
}

/// A share of active experts, or the least and the largest of a range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Active {
    Share(f64),
    Range([f64; 2]),
}

/// A share, 0 to 1, as `0.4` or `40%`.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    match ratio(text)? {
        share if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err(format!("`{text}` is not a share from 0 to 1; write 0.4 or 40%")),
    }
}

/// A ratio as `0.4` or `40%`. Whoever uses it checks its range.
pub(crate) fn ratio(text: &str) -> Result<f64, String> {
    let wrong = || format!("`{text}` is not a share; write 0.4 or 40%");
    let text_of = text.trim();
    let (number, divisor) = match text_of.strip_suffix('%') {
        Some(number) => (number.trim_end(), 100.0),
        None => (text_of, 1.0),
    };
    let value: f64 = number.parse().map_err(|_| wrong())?;
    if value.is_finite() { Ok(value / divisor) } else { Err(wrong()) }
}

/// A share for a setting in single precision.
pub(crate) fn share_f32(text: &str) -> Result<f32, String> {
    share(text).map(|share| share as f32)
}

/// A share, or two shares as `LOW..HIGH`.
pub(crate) fn active(text: &str) -> Result<Active, String> {
    let share = |part: &str| {
        let wrong =
            || format!("`{text}` is not a share from 0 to 1; write 0.4 or 40%, or a range such as 0.25..1.0");
        self::share(part).map_err(|_| wrong())
    };
    match text.split_once("..") {
        None => Ok(Active::Share(share(text)?)),
        Some((low, high)) => Ok(Active::Range([share(low)?, share(high)?])),
    }
}

/// A time in seconds, as `0.2`, `0.2s` or `200ms`.
pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    let wrong = || format!("`{text}` is not a time; write 0.2 or 200ms");
    let text_of = text.trim();
    let (number, scale) = match (text_of.strip_suffix("ms"), text_of.strip_suffix('s')) {
        (Some(number), _) => (number, 1e-3),
        (None, Some(number)) => (number, 1.0),
        (None, None) => (text_of, 1.0),
    };
    let value: f64 = number.trim_end().parse().map_err(|_| wrong())?;
    if value.is_finite() && value >= 0.0 { Ok(value * scale) } else { Err(wrong()) }
}

/// A name and its value in JSON: `enable_thinking=false`.
pub(crate) fn template_arg(text: &str) -> Result<(String, serde_json::Value), String> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(format!("`{text}` has no value; write NAME=JSON, such as enable_thinking=false"));
    };
    let value = serde_json::from_str(value).map_err(|cause| {
        format!("`{value}` is not JSON ({cause}); write a text in quotes: {name}='\"{value}\"'")
    })?;
    Ok((name.trim().to_owned(), value))
}

/// A number of which 0 makes no sense.
pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match quantity(text)? {
        0 => Err("use at least 1".into()),
        count => usize::try_from(count).map_err(|cause| cause.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_templates_are_json() {
        assert_eq!(template_arg("a=[1, \"x=y\"]").unwrap(), ("a".into(), serde_json::json!([1, "x=y"])));
        assert!(template_arg("a").unwrap_err().contains("NAME=JSON"));
        assert!(template_arg("a=text").unwrap_err().contains("a='\"text\"'"));
    }

    #[test]
    fn separators_may_be_written_with_escapes() {
        for (text, wanted) in [
            ("<|end|>", "<|end|>"),
            (r"\n\n", "\n\n"),
            (r"a\tb\r\n", "a\tb\r\n"),
            (r"\\n", r"\n"),
            (r"\section\", r"\section\"),
            ("\n===\n", "\n===\n"),
            ("", ""),
        ] {
            assert_eq!(separator(text), Ok(wanted.to_owned()), "{text}");
        }
    }

    #[test]
    fn shares_are_numbers_or_percentages() {
        for (text, wanted) in
            [("0.4", 0.4), ("40%", 0.4), (" 37.5 % ", 0.375), (".5", 0.5), ("0", 0.0), ("100%", 1.0)]
        {
            assert_eq!(share(text), Ok(wanted), "{text}");
        }
        for bad in ["", "%", "x", "4 of 10", "nan", "inf%", "0,4", "40", "1.01", "140%", "-0.1"] {
            assert!(share(bad).unwrap_err().contains("write 0.4 or 40%"), "{bad}");
            assert!(active(bad).unwrap_err().contains("write 0.4 or 40%"), "{bad}");
        }
        assert_eq!([ratio("250%"), ratio("-1")], [Ok(2.5), Ok(-1.0)]);
        assert_eq!(active("25%..100%"), Ok(Active::Range([0.25, 1.0])));
    }

    #[test]
    fn times_are_seconds_or_milliseconds() {
        for (text, wanted) in [("0.2", 0.2), ("1.5s", 1.5), ("250 ms", 0.25), ("0", 0.0)] {
            assert_eq!(seconds(text), Ok(wanted), "{text}");
        }
        for bad in ["", "ms", "-1", "nan", "1m", "1e999"] {
            assert!(seconds(bad).unwrap_err().contains("200ms"), "{bad}");
        }
    }

    #[test]
    fn shares_are_one_or_a_range() {
        assert_eq!(active("0.375"), Ok(Active::Share(0.375)));
        assert_eq!(active("0.25..1.0"), Ok(Active::Range([0.25, 1.0])));
        assert_eq!(active(".5..1"), Ok(Active::Range([0.5, 1.0])));
        for bad in ["", "x", "0.5..", "..1", "0.25-1.0"] {
            assert!(active(bad).unwrap_err().contains("0.25..1.0"), "{bad}");
        }
    }

    #[test]
    fn amounts_take_suffixes() {
        let good = ["7", "1_000", "1.5M", "10B", "500MB", "5gb"].map(|text| quantity(text).unwrap());
        assert_eq!(good, [7, 1000, 1_500_000, 10_000_000_000, 500_000_000, 5_000_000_000]);
        for bad in ["", "x", "-1", "1.5", "3parsecs", "nan", "1e40", "99999999999TB", "inf"] {
            assert!(quantity(bad).is_err(), "{bad}");
        }
    }
}
