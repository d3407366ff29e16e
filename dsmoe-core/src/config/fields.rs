//! Reading the keys of a JSON object, with errors that name file and key.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result, shown};
use crate::remedy::Remedy;

/// The largest width, vocabulary or number of positions believed.
pub(super) const LARGEST_DIMENSION: u64 = 1 << 24;

/// Returns whether `x` is positive, and neither infinite nor 0 in f32, in which the passes compute.
fn is_positive(x: f64) -> bool {
    (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&x)
}

/// Returns whether a pass can multiply by `x`, and normalise what it gives, without an overflow.
pub(super) fn is_factor(x: f64) -> bool {
    (1e-6..=1e6).contains(&x)
}

/// Access to one JSON object, with errors that name file and key.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) path: &'a Path,
    pub(crate) prefix: &'a str,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// Returns the value, unless absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn wrong(&self, key: &str, problem: impl Into<String>, help: impl Into<Remedy>) -> Error {
        Error::field(self.path, format!("{}{key}", self.prefix), problem, help)
    }

    pub(crate) fn is_not(&self, key: &str, value: &Value, help: impl Into<Remedy>) -> Error {
        self.wrong(key, format!("is {}", shown(&value.to_string())), help)
    }

    pub(crate) fn integer_opt(&self, key: &str, largest: u64) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=largest).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.is_not(key, value, format!("use an integer from 1 to {largest}"))),
        }
    }

    pub(crate) fn integer(&self, key: &str, largest: u64) -> Result<usize> {
        self.integer_opt(key, largest)?.ok_or_else(|| self.wrong(key, "is missing", "add it"))
    }

    pub(crate) fn dimension(&self, key: &str) -> Result<usize> {
        self.integer(key, LARGEST_DIMENSION)
    }

    pub(crate) fn dimension_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.integer_opt(key, LARGEST_DIMENSION)?.unwrap_or(default))
    }

    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if is_positive(x) => Ok(Some(x)),
            _ => Err(self.is_not(key, value, "use a positive number that f32 can hold")),
        }
    }

    /// Reads a factor of what a pass computes, which published models have between 0.01 and 100.
    pub(crate) fn factor(&self, key: &str) -> Result<Option<f64>> {
        match self.positive(key)? {
            Some(x) if !is_factor(x) => {
                let problem = format!("is {x}, with which a pass would overflow");
                Err(self.wrong(key, problem, "use a number from 1e-6 to 1e6"))
            }
            factor => Ok(factor),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.is_not(key, value, "use true or false"))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.is_not(key, value, "use a text"))
    }

    /// Reads a token id or a list of them.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.is_not(key, value, "use a token id or a list of them"))
    }

    /// Returns whether the key is there, even as null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(crate) fn dimension_opt(&self, key: &str) -> Result<Option<usize>> {
        self.integer_opt(key, LARGEST_DIMENSION)
    }

    /// Checks that `count` times the value `width` of a key is a dimension.
    pub(crate) fn bounded(&self, key: &str, width: usize, count: usize) -> Result<()> {
        match width.checked_mul(count) {
            Some(all) if all as u64 <= LARGEST_DIMENSION => Ok(()),
            _ => {
                let problem =
                    format!("is {width}, and {count} experts of it are more than {LARGEST_DIMENSION}");
                Err(self.wrong(key, problem, "correct one of the sizes"))
            }
        }
    }

    /// Reads an integer of at least 0.
    pub(crate) fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        let Some(value) = self.get(key) else { return Ok(default) };
        match value.as_u64() {
            Some(n) if n <= LARGEST_DIMENSION => Ok(n as usize),
            _ => Err(self.is_not(key, value, format!("use an integer from 0 to {LARGEST_DIMENSION}"))),
        }
    }

    /// Reads a number of at least 0.
    pub(crate) fn not_negative(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x == 0.0 || is_positive(x) => Ok(Some(x)),
            _ => Err(self.is_not(key, value, "use a number of at least 0")),
        }
    }

    /// Reads a list of positive numbers.
    pub(crate) fn positives(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let positive = |value: &Value| value.as_f64().filter(|&x| is_positive(x));
        let list = value.as_array().and_then(|list| list.iter().map(positive).collect());
        list.map(Some).ok_or_else(|| self.is_not(key, value, "use a list of positive numbers"))
    }

    /// Reads a list of texts.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        list.map(Some).ok_or_else(|| self.is_not(key, value, "use a list of texts"))
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.is_not(key, value, "use an object or null"))
    }
}
