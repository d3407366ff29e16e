//! Values of GGUF's metadata.

use std::fmt;

use crate::error::shown;

/// A value of the metadata. Integers of all widths are one variant each.
///
/// ```
/// use dsmoe_core::gguf::Value;
///
/// let value = Value::List(vec![Value::Unsigned(7), Value::Text("seven".into())]);
/// let list = value.as_list().unwrap();
/// assert_eq!((list[0].as_u64(), list[1].as_str()), (Some(7), Some("seven")));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// u8 to u64.
    Unsigned(u64),
    /// i8 to i64.
    Signed(i64),
    /// f32.
    F32(f32),
    /// f64.
    F64(f64),
    /// bool.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// An array.
    List(Vec<Value>),
}

impl Value {
    /// Returns an integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// Returns a number. An f32 becomes the shortest decimal that reads back as it, so that 1e-5 stays 1e-5.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::F32(x) => Some(shortest(*x)),
            Value::F64(x) => Some(*x),
            Value::Signed(n) => Some(*n as f64),
            Value::Unsigned(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// Returns a flag.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// Returns a text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns a list.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Value::List(list) => Some(list),
            _ => None,
        }
    }
}

/// Returns the f64 whose decimal is the shortest that reads back as `x`.
pub(crate) fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// Shows a value in one short line.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Unsigned(n) => write!(f, "{n}"),
            Value::Signed(n) => write!(f, "{n}"),
            Value::F32(x) => write!(f, "{x}"),
            Value::F64(x) => write!(f, "{x}"),
            Value::Bool(flag) => write!(f, "{flag}"),
            Value::Text(text) => write!(f, "{:?}", shown(text)),
            Value::List(list) => write!(f, "a list of {}", list.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_f32_reads_as_its_shortest_decimal() {
        for (x, expected) in [(1e-5_f32, 1e-5), (1e6, 1e6), (0.1, 0.1), (9.5, 9.5), (1e-6, 1e-6)] {
            assert_eq!(Value::F32(x).as_f64(), Some(expected));
        }
        assert_eq!(Value::Signed(-1).as_u64(), None);
        assert_eq!(Value::Text("a\nb".into()).to_string(), r#""a\\nb""#);
    }
}
