//! Shares in files, as numbers or percentages: `0.4` or `"40%"`. The functions are for `#[serde(deserialize_with)]`; their fields
//! are serialised as numbers.
//!
//! ```
//! #[derive(serde::Deserialize)]
//! struct Row {
//!     #[serde(deserialize_with = "dsmoe_train::config::share::one")]
//!     active: f64,
//! }
//!
//! let row: Row = toml::from_str("active = '37.5%'").unwrap();
//! assert_eq!(row.active, 0.375);
//! ```

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};

/// A share as it is written.
struct Written(f64);

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Written, D::Error> {
        from.deserialize_any(Reader)
    }
}

struct Reader;

impl Visitor<'_> for Reader {
    type Value = Written;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a share such as 0.4 or \"40%\"")
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Written, E> {
        Ok(Written(number))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Written, E> {
        Ok(Written(number as f64))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Written, E> {
        Ok(Written(number as f64))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Written, E> {
        let percent = text.trim().strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
        let wrong = || E::invalid_value(serde::de::Unexpected::Str(text), &self);
        percent.map(|percent| Written(percent / 100.0)).ok_or_else(wrong)
    }
}

/// Reads a share.
///
/// # Errors
/// It is neither a number nor a percentage.
pub fn one<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Written::deserialize(from).map(|share| share.0)
}

/// Reads a share that may be absent.
///
/// # Errors
/// It is neither a number nor a percentage.
pub fn option<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    Ok(Option::<Written>::deserialize(from)?.map(|share| share.0))
}

/// Reads a list of shares.
///
/// # Errors
/// One is neither a number nor a percentage.
pub fn list<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
    Ok(Vec::<Written>::deserialize(from)?.into_iter().map(|share| share.0).collect())
}

/// Reads two shares, the ends of a range, which may be absent.
///
/// # Errors
/// There are not two, or one is neither a number nor a percentage.
pub fn range<'de, D: Deserializer<'de>>(from: D) -> Result<Option<[f64; 2]>, D::Error> {
    Ok(Option::<[Written; 2]>::deserialize(from)?.map(|ends| ends.map(|share| share.0)))
}
