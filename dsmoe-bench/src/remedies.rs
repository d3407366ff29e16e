//! Words errors of the libraries for the command line: names of settings become flags.

use std::error::Error;

/// Words one error of a chain.
pub(crate) fn worded(error: &(dyn Error + 'static)) -> String {
    let mut message = error.to_string();
    let (help, setting) =
        match (error.downcast_ref::<dsmoe_train::Error>(), error.downcast_ref::<dsmoe_datasets::Error>()) {
            (Some(error), _) => (error.help(), error.setting()),
            (_, Some(error)) => (error.help(), error.setting()),
            _ => return message,
        };
    if let Some(help) = help {
        message = message.replace(&help.to_string(), &help.worded(flag));
    }
    match setting.and_then(|setting| Some((setting, message.strip_prefix(setting)?))) {
        Some((setting, rest)) => format!("{}{rest}", flag(setting)),
        None => message,
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
        let error = dsmoe_train::Error::OutHoldsSource { path: "run".into() };
        assert_eq!(worded(&error), "run holds the model to train; choose another --out");
        let error = dsmoe_datasets::eval_windows(9, 1, 1).unwrap_err();
        assert_eq!(worded(&error), "--seq is 1; use at least 2");
    }
}
