//! What fixes an error: in plain words, or as a change of settings that a program can word in its own terms.

use std::borrow::Cow;
use std::fmt;

/// A setting of an operation, by its name in plain words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Setting(pub &'static str);

impl Setting {
    /// The directory or file that an operation makes.
    pub const OUTPUT: Setting = Setting("output directory");
    /// Whether an output that exists is replaced.
    pub const REPLACE: Setting = Setting("replacement of the output directory");
    /// The number of experts of a layer.
    pub const EXPERTS: Setting = Setting("number of experts");
    /// How neurons are assigned to experts.
    pub const PARTITION: Setting = Setting("partition");
    /// The form of an export.
    pub const EXPORT_AS: Setting = Setting("export format");
    /// The device that computes.
    pub const DEVICE: Setting = Setting("device");
    /// The type of weights in memory or in files.
    pub const DTYPE: Setting = Setting("dtype");
    /// Sequences of a micro-batch.
    pub const BATCH: Setting = Setting("batch");
    /// Micro-batches of an optimiser step.
    pub const ACCUMULATE: Setting = Setting("number of accumulated micro-batches");
}

/// The action that fixes an error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// An action in plain words.
    Text(Cow<'static, str>),
    /// A value for a setting.
    Set(Setting, Cow<'static, str>),
    /// Another value of a setting.
    Another(Setting),
    /// A smaller value of a setting.
    Smaller(Setting),
    /// A larger value of a setting.
    Larger(Setting),
    /// A switch to turn on.
    Enable(Setting),
    /// Any one of several actions.
    Any(Vec<Remedy>),
    /// Several actions together.
    All(Vec<Remedy>),
}

impl Remedy {
    /// Words the action with names of the caller for settings, such as flags of a command; a setting without one keeps
    /// its plain name.
    pub fn worded(&self, name: &dyn Fn(Setting) -> Option<String>) -> String {
        let named = |setting: Setting| name(setting).unwrap_or_else(|| setting.0.to_owned());
        let joined = |remedies: &[Remedy], word| {
            remedies.iter().map(|remedy| remedy.worded(name)).collect::<Vec<_>>().join(word)
        };
        match self {
            Remedy::Text(text) => text.to_string(),
            Remedy::Set(setting, value) => match name(*setting) {
                Some(name) => format!("use {name} {value}"),
                None => format!("set the {} to {value}", setting.0),
            },
            Remedy::Another(setting) => format!("choose another {}", named(*setting)),
            Remedy::Smaller(setting) => format!("use a smaller {}", named(*setting)),
            Remedy::Larger(setting) => format!("use a larger {}", named(*setting)),
            Remedy::Enable(setting) => match name(*setting) {
                Some(name) => format!("pass {name}"),
                None => format!("enable {}", setting.0),
            },
            Remedy::Any(remedies) => joined(remedies, " or "),
            Remedy::All(remedies) => joined(remedies, " and "),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.worded(&|_| None))
    }
}

impl From<&'static str> for Remedy {
    fn from(text: &'static str) -> Remedy {
        Remedy::Text(text.into())
    }
}

impl From<String> for Remedy {
    fn from(text: String) -> Remedy {
        Remedy::Text(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_is_worded_with_and_without_flags() {
        let flags = |setting: Setting| (setting == Setting::BATCH).then(|| "--batch".to_owned());
        let both = Remedy::All(vec![Remedy::Smaller(Setting::BATCH), Remedy::Larger(Setting::ACCUMULATE)]);
        assert_eq!(
            both.to_string(),
            "use a smaller batch and use a larger number of accumulated micro-batches"
        );
        assert_eq!(Remedy::Set(Setting::BATCH, "4".into()).worded(&flags), "use --batch 4");
        assert_eq!(Remedy::Set(Setting::DTYPE, "bf16".into()).worded(&flags), "set the dtype to bf16");
        assert_eq!(Remedy::from("copy the file again").worded(&flags), "copy the file again");
    }
}
