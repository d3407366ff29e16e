//! Words errors of the libraries for the command line: names of settings become flags.

use std::error::Error;

/// Words one error of a chain.
pub(crate) fn worded(error: &(dyn Error + 'static)) -> String {
    let message = error.to_string();
    if let Some(help) = core_of(error).and_then(dsmoe_core::Error::help) {
        return message.replace(&help.to_string(), &help.worded(flag));
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

/// Returns the error of dsmoe-core that an error is or carries.
fn core_of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a dsmoe_core::Error> {
    match (error.downcast_ref::<dsmoe_train::Error>(), error.downcast_ref::<dsmoe_baselines::Error>()) {
        (Some(dsmoe_train::Error::Core(error)), _) | (_, Some(dsmoe_baselines::Error::Core(error))) => {
            Some(error)
        }
        _ => error.downcast_ref(),
    }
}

/// Returns the flag of a setting.
fn flag(setting: &str) -> String {
    format!("--{}", setting.replace('_', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_named_as_flags() {
        let error = dsmoe_core::Error::argument("a GPU computes in bf16", "set {dtype} to bf16");
        let wrapped = dsmoe_baselines::Error::Core(error);
        assert_eq!(worded(&wrapped), "a GPU computes in bf16; set --dtype to bf16");
        let error = dsmoe_train::Error::OutHoldsSource { path: "run".into() };
        assert_eq!(worded(&error), "run holds the model to train; choose another --out");
        let error = dsmoe_datasets::eval_windows(9, 1, 1).unwrap_err();
        assert_eq!(worded(&error), "--seq is 1; use at least 2");
        assert_eq!(worded(&std::fmt::Error), std::fmt::Error.to_string());
    }
}
