//! How a user can fix an error.

use std::borrow::Cow;
use std::fmt;

/// Tells how to fix an error. The text names settings in braces, such as `{batch}`, so that each program can word them
/// in its own way, for example as flags of its command line.
///
/// ```
/// use dsmoe_datasets::Remedy;
///
/// let remedy = Remedy::fixed("use a smaller {batch}");
/// assert_eq!(remedy.to_string(), "use a smaller batch");
/// assert_eq!(remedy.worded(|setting| format!("--{setting}")), "use a smaller --batch");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy(Cow<'static, str>);

impl Remedy {
    /// Makes a remedy of a constant text.
    pub const fn fixed(text: &'static str) -> Remedy {
        Remedy(Cow::Borrowed(text))
    }

    /// Words the remedy; `name` returns the name of a setting.
    pub fn worded(&self, name: impl Fn(&str) -> String) -> String {
        let (mut text, mut rest) = (String::new(), &*self.0);
        while let Some((before, after)) = rest.split_once('{') {
            text += before;
            let is_name = |name: &&str| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            match after.split_once('}').filter(|(setting, _)| is_name(setting)) {
                Some((setting, more)) => {
                    text += &name(setting);
                    rest = more;
                }
                None => {
                    text.push('{');
                    rest = after;
                }
            }
        }
        text + rest
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.worded(str::to_owned))
    }
}

impl From<&'static str> for Remedy {
    fn from(text: &'static str) -> Remedy {
        Remedy::fixed(text)
    }
}

impl From<String> for Remedy {
    fn from(text: String) -> Remedy {
        Remedy(Cow::Owned(text))
    }
}
