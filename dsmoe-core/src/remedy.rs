//! Remedies of errors.

use std::borrow::Cow;
use std::fmt;

/// Tells how to fix an error. The text names settings in braces, such as `{dtype}`, so that each program can word them
/// in its own way, for example as flags of its command line.
///
/// ```
/// use dsmoe_core::Remedy;
///
/// let remedy = Remedy::from("set {dtype} to bf16");
/// assert_eq!(remedy.to_string(), "set dtype to bf16");
/// assert_eq!(remedy.worded(|setting| format!("--{setting}")), "set --dtype to bf16");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy(Cow<'static, str>);

impl Remedy {
    /// Words the remedy; `name` returns the name of a setting.
    pub fn worded(&self, name: impl Fn(&str) -> String) -> String {
        let mut text = String::new();
        for (i, part) in self.0.split('{').enumerate() {
            match part.split_once('}') {
                Some((setting, rest)) if i > 0 && is_name(setting) => text += &(name(setting) + rest),
                _ => text.extend([if i > 0 { "{" } else { "" }, part]),
            }
        }
        text
    }
}

/// Returns whether braces around `text` name a setting.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.worded(str::to_owned))
    }
}

impl<T: Into<Cow<'static, str>>> From<T> for Remedy {
    fn from(text: T) -> Remedy {
        Remedy(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_around_anything_but_a_name_stay() {
        for text in ["write {\"layers\": [[0, 1]]}", "{", "}{", "{}", "a {B} {"] {
            assert_eq!(Remedy::from(text).worded(|_| unreachable!()), text);
        }
        let both = Remedy::from("{a}, {b_c}; {\"x\": 1}".to_owned());
        assert_eq!(both.worded(|setting| format!("<{setting}>")), "<a>, <b_c>; {\"x\": 1}");
    }
}
