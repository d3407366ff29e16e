//! Typed settings: each method has a struct of settings, whose doc comments are the help.
//!
//! Values come by name from a TOML table, a command line or Rust. A value that is given is used or refused.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::method::{Configured, Counts, Method, Source};

/// Values of settings by name.
pub type SettingValues = serde_json::Map<String, Value>;

/// A setting of a method.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SettingInfo {
    /// The name.
    pub name: &'static str,
    /// The default as text; empty if the model or the budget decides.
    pub default: String,
    /// The meaning and the values that it takes.
    pub help: &'static str,
}

/// A struct of settings that the macro [`settings!`](crate::settings!) declares.
pub trait Settings: Default + Serialize + DeserializeOwned + 'static {
    /// The name and the doc comment of every field.
    const HELP: &'static [(&'static str, &'static str)];

    /// All settings by name.
    fn values(&self) -> SettingValues {
        match serde_json::to_value(self) {
            Ok(Value::Object(values)) => values,
            _ => unreachable!("a struct of settings is an object"),
        }
    }
}

/// Reads `NAME=VALUE` texts. A value is a number, a percentage such as `40%`, `true`, `false` or else a text.
///
/// # Errors
/// A text has no `=`.
pub fn read_settings<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<SettingValues> {
    let read = |text: &'a str| {
        let wrong = || Error::setting(text, "is not NAME=VALUE", "write a setting, =, and its value");
        let (name, value) = text.split_once('=').ok_or_else(wrong)?;
        let percent = value.trim().strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
        let scalar = match percent {
            Some(percent) => Some(Value::from(percent / 100.0)),
            None => serde_json::from_str::<Value>(value.trim()).ok(),
        };
        let scalar = scalar.filter(|value| !value.is_array() && !value.is_object());
        Ok((name.trim().to_owned(), scalar.unwrap_or_else(|| value.trim().into())))
    };
    texts.into_iter().map(read).collect()
}

/// Declares a struct of [`Settings`](crate::Settings) with its defaults; the doc comments of its fields are their help. The
/// crate that uses it depends on `serde` and `dsmoe-core`.
///
/// ```
/// dsmoe_baselines::settings! {
///     /// Settings of a method.
///     pub struct Narrow {
///         /// First neuron that is kept, 0 or more.
///         pub first: usize = 0,
///     }
/// }
/// assert_eq!(Narrow::default().first, 0);
/// ```
#[macro_export]
macro_rules! settings {
    ($(#[$attribute:meta])* $vis:vis struct $name:ident {
        $($(#[doc = $doc:literal])+ pub $field:ident: $type:ty = $default:expr,)*
    }) => {
        dsmoe_core::with_defaults! {
            $(#[$attribute])*
            #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
            #[serde(deny_unknown_fields, default)]
            $vis struct $name { $($(#[doc = $doc])+ pub $field: $type = $default,)* }
        }

        impl $crate::Settings for $name {
            const HELP: &'static [(&'static str, &'static str)] =
                &[$((stringify!($field), concat!($($doc),+)),)*];
        }
    };
}
pub(crate) use settings;

/// Stores a type as the text of its `Display`, and reads it with its `FromStr`.
macro_rules! stored_as_text {
    ($name:ty) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(
                deserializer: D,
            ) -> std::result::Result<$name, D::Error> {
                let text: String = serde::Deserialize::deserialize(deserializer)?;
                text.parse().map_err(|_| serde::de::Error::custom("unknown value"))
            }
        }
    };
}
pub(crate) use stored_as_text;

/// A [`Method`] whose settings are of type `S`: what the methods of this crate are, and those of others may be.
#[derive(Debug)]
pub struct Entry<S> {
    /// The name.
    pub name: &'static str,
    /// The method in one line, and the budgets that it can reach.
    pub summary: &'static str,
    /// Makes the defaults.
    pub defaults: fn() -> S,
    /// The settings that the method fixes at its defaults.
    pub fixed: &'static [&'static str],
    /// The models that it changes.
    pub source: Source,
    /// The parameters that its budgets count.
    pub counts: Counts,
    /// Checks settings.
    pub configure: fn(S) -> Result<Box<dyn Configured>>,
}

impl<S: Settings> Entry<S> {
    /// Makes an entry of a method on dense models that fixes no setting, to be given its name and summary.
    pub const fn new(configure: fn(S) -> Result<Box<dyn Configured>>) -> Entry<S> {
        let (source, counts) = (Source::Dense, Counts::Activated);
        Entry { name: "", summary: "", defaults: S::default, fixed: &[], source, counts, configure }
    }
}

impl<S: Settings> Method for Entry<S> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn source(&self) -> Source {
        self.source
    }

    fn counts(&self) -> Counts {
        self.counts
    }

    fn settings(&self) -> Vec<SettingInfo> {
        let defaults = (self.defaults)().values();
        let free = S::HELP.iter().filter(|(name, _)| !self.fixed.contains(name));
        free.map(|&(name, help)| SettingInfo { name, default: shown(&defaults[name]), help: help.trim() })
            .collect()
    }

    fn configure(&self, given: &SettingValues) -> Result<Box<dyn Configured>> {
        let mut values = (self.defaults)().values();
        for (name, value) in given {
            if self.fixed.contains(&&**name) && values[name] == *value {
                continue;
            }
            let known = self.settings();
            let Some(info) = known.iter().find(|info| info.name == name) else {
                let names: Vec<&str> = known.iter().map(|info| info.name).collect();
                let problem = match values.get(name) {
                    Some(fixed) => format!("is always {} for {}", shown(fixed), self.name),
                    None => format!("is not a setting of {}", self.name),
                };
                let help = match names[..] {
                    [] => "it has none".to_owned(),
                    _ => format!("its settings are {}", names.join(", ")),
                };
                return Err(Error::Setting { name: name.clone(), problem, help });
            };
            let alone = SettingValues::from_iter([(name.clone(), value.clone())]);
            if S::deserialize(Value::Object(alone)).is_err() {
                return Err(wrong::<S>(info.name, value.clone()));
            }
            values.insert(name.clone(), value.clone());
        }
        match S::deserialize(Value::Object(values)) {
            Ok(settings) => (self.configure)(settings),
            Err(_) => unreachable!("each value was read alone"),
        }
    }
}

/// The error for a setting of `S` whose value cannot be used; its help is the doc comment.
pub(crate) fn wrong<S: Settings>(name: &str, value: impl Into<Value>) -> Error {
    let help = S::HELP.iter().find(|(known, _)| *known == name).map_or("", |(_, help)| help.trim());
    let problem = format!("cannot be {}", value.into());
    Error::setting(name, problem, help.trim_end_matches('.'))
}

/// A value as text; empty for none.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{method, methods};

    fn configure(name: &str, set: &[&str]) -> Result<Box<dyn Configured>> {
        method(name)?.configure(&read_settings(set.iter().copied())?)
    }

    #[test]
    fn settings_are_given_or_default() {
        let set = ["damp=10%", "pattern = 2:4", "true_sequential=true"];
        let resolved = configure("sparsegpt", &set).unwrap().resolved();
        assert_eq!((&resolved["damp"], &resolved["block"]), (&0.1.into(), &128.into()));
        assert_eq!((&resolved["pattern"], &resolved["true_sequential"]), (&"2:4".into(), &true.into()));
        for method in methods() {
            // All defaults, given by name, are the defaults.
            let resolved = method.configure(&SettingValues::new()).unwrap().resolved();
            assert_eq!(method.configure(&resolved).unwrap().resolved(), resolved, "{}", method.name());
            assert!(method.settings().iter().all(|info| info.help.len() > 20), "{}", method.name());
        }
    }

    #[test]
    fn a_setting_that_is_given_is_used_or_refused() {
        for (name, set, parts) in [
            ("sparsegpt", "damp", &["damp: is not NAME=VALUE"][..]),
            ("sparsegpt", "dump=1", &["dump: is not a setting of sparsegpt", "pattern, nearest, damp"]),
            ("sparsegpt", "damp=lots", &["damp: cannot be \"lots\"", "a number above 0"]),
            ("sparsegpt", "damp=0", &["damp: cannot be 0", "a number above 0"]),
            ("sparsegpt", "block=1.5", &["block: cannot be 1.5"]),
            ("random-k", "gate=mlp", &["gate: is always linear for random-k"]),
            ("dsmoe-no-threshold", "threshold=0.3", &["threshold: is always 0"]),
            ("dense", "experts=8", &["experts: is not a setting of dense; it has none"]),
            ("dsmoes", "experts=8", &["dsmoes: is not a method", "use dsmoe, dsmoe-paper", "small-dense"]),
        ] {
            let error = configure(name, &[set]).err().expect(set).to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        assert!(configure("random-k", &["gate=linear"]).is_ok());
    }
}
