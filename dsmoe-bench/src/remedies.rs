//! Words errors of the libraries for the command line: names of settings become flags.

use std::error::Error;

/// Words one error of a chain.
pub(crate) fn worded(error: &(dyn Error + 'static)) -> String {
    let message = error.to_string();
    if let Some(core) = core_error(error) {
        return match core.help() {
            Some(help) => message.replace(&help.to_string(), &help.worded(flag)),
            None => message,
        };
    }
    let (help, setting) =
        match (error.downcast_ref::<dsmoe_train::Error>(), error.downcast_ref::<dsmoe_datasets::Error>()) {
            (Some(error), _) => (error.help(), error.setting()),
            (_, Some(error)) => (error.help(), error.setting()),
            _ => return message,
        };
    let message = match help {
        Some(help) => message.replace(&help.to_string(), &help.worded(flag)),
        None => message,
    };
    match setting.and_then(|setting| Some((setting, message.strip_prefix(setting)?))) {
        Some((setting, rest)) => format!("{}{rest}", flag(setting)),
        None => message,
    }
}

/// Returns the error of dsmoe-core that `error` is or passes on.
fn core_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a dsmoe_core::Error> {
    match (error.downcast_ref::<dsmoe_train::Error>(), error.downcast_ref::<dsmoe_baselines::Error>()) {
        (Some(dsmoe_train::Error::Core(error)), _) | (_, Some(dsmoe_baselines::Error::Core(error))) => {
            Some(error)
        }
        _ => error.downcast_ref(),
    }
}

/// Settings whose flags have other names.
const FLAGS: [(&str, &str); 1] = [("vocab_size", "--vocab")];

/// Returns the flag of a setting.
pub(crate) fn flag(setting: &str) -> String {
    let other = FLAGS.iter().find(|(name, _)| *name == setting);
    other.map_or_else(|| format!("--{}", setting.replace('_', "-")), |(_, flag)| (*flag).to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn settings_of_remedies_are_flags() {
        fn flags(command: &clap::Command) -> BTreeSet<String> {
            let own =
                command.get_arguments().filter_map(|arg| arg.get_long()).map(|long| format!("--{long}"));
            own.chain(command.get_subcommands().flat_map(flags)).collect()
        }
        let flags = flags(&Cli::command());
        let settings = "accumulate batch bos cache data device doc_separator dtype experts force hold lanes lr out partition \
            profile resume samples seq shots shots_file teacher steps stride task_file temperature text_column threads tokens top_p valid_fraction vocab_size zero";
        for setting in settings.split_whitespace() {
            assert!(flags.contains(&flag(setting)), "{setting}");
        }
    }

    #[test]
    fn remedies_and_settings_of_libraries_are_flags() {
        let error = || dsmoe_core::Error::argument("model: too large", "use a smaller {batch}");
        let worded_core = "model: too large; use a smaller --batch";
        assert_eq!(worded(&error()), worded_core);
        assert_eq!(worded(&dsmoe_train::Error::Core(error())), worded_core);
        assert_eq!(worded(&dsmoe_baselines::Error::Core(error())), worded_core);
        let error = dsmoe_train::Error::OutHoldsSource("run".into());
        assert_eq!(worded(&error), "run holds the model to train; choose another --out");
        let error = dsmoe_datasets::eval_windows(9, 1, 1).unwrap_err();
        assert_eq!(worded(&error), "--seq is 1; use at least 2");
        assert_eq!(worded(&std::fmt::Error), std::fmt::Error.to_string());
    }
}
