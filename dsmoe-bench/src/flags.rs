//! The wording of library errors on the command line: settings that a remedy names become flags.

use std::error::Error as StdError;

/// Flags whose names differ from those of their settings.
const FLAGS: [(&str, &str); 4] =
    [("form", "as"), ("calibration", "calib"), ("precision", "dtype"), ("config_set", "set")];

/// Returns the flag that sets `setting`.
pub(crate) fn flag(setting: &str) -> String {
    let known = FLAGS.iter().find(|(name, _)| *name == setting);
    known.map_or_else(|| format!("--{}", setting.replace('_', "-")), |(_, flag)| format!("--{flag}"))
}

/// Returns the message of one error of a chain, with flags in place of the settings that it names.
pub(crate) fn message(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    if let Some(setting) = setting(error)
        && let Some(rest) = text.strip_prefix(setting)
    {
        text = flag(setting) + rest;
    }
    if let Some((plain, worded)) = remedy(error)
        && let Some(at) = text.rfind(&plain)
    {
        text.replace_range(at..at + plain.len(), &worded);
    }
    text
}

/// The setting with whose name the message begins.
fn setting(error: &(dyn StdError + 'static)) -> Option<&'static str> {
    if let Some(error) = error.downcast_ref::<dsmoe_train::Error>() {
        return error.setting();
    }
    error.downcast_ref::<dsmoe_datasets::Error>().and_then(dsmoe_datasets::Error::setting)
}

/// The remedy of an error as the library words it, and with flags.
fn remedy(error: &(dyn StdError + 'static)) -> Option<(String, String)> {
    if let Some(error) = error.downcast_ref::<dsmoe_core::Error>() {
        return error.help().map(|help| (help.to_string(), help.worded(flag)));
    }
    if let Some(error) = error.downcast_ref::<dsmoe_datasets::Error>() {
        return error.help().map(|help| (help.to_string(), help.worded(flag)));
    }
    match (error.downcast_ref::<dsmoe_train::Error>(), error.downcast_ref::<dsmoe_baselines::Error>()) {
        (Some(dsmoe_train::Error::Core(error)), _) | (_, Some(dsmoe_baselines::Error::Core(error))) => {
            remedy(error)
        }
        (Some(error), _) => error.help().map(|help| (help.to_string(), help.worded(flag))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn flags_of_the_table_exist() {
        fn flags(command: &clap::Command) -> Vec<String> {
            let own = command.get_arguments().filter_map(|arg| arg.get_long()).map(str::to_owned);
            own.chain(command.get_subcommands().flat_map(flags)).collect()
        }
        let all = flags(&Cli::command());
        for (_, flag) in FLAGS {
            assert!(all.iter().any(|other| other == flag), "--{flag}");
        }
        assert_eq!(flag("doc_separator"), "--doc-separator");
        assert_eq!(flag("form"), "--as");
    }

    #[test]
    fn remedies_of_libraries_name_flags() {
        let error =
            dsmoe_core::Error::argument("model: too large", "use a smaller {batch} and {max_new_tokens} 1");
        let wrapped = dsmoe_train::Error::Core(dsmoe_core::Error::argument("x", "set {form}"));
        assert_eq!(message(&error), "model: too large; use a smaller --batch and --max-new-tokens 1");
        assert_eq!(message(&wrapped), "x; set --as");
    }
}
