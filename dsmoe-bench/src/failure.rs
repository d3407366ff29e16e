//! Errors of commands as values of one type, for programs that run them.

use std::io;

use dsmoe_core::Error as Core;
use dsmoe_datasets::Error as Data;
use dsmoe_train::Error as Train;

use crate::ui::one_line;

/// The kind of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An argument or an option: unknown, out of range, or not with another one.
    Argument,
    /// A file that is there and is not what it should be.
    Format,
    /// The file system, with the system's error.
    File(io::ErrorKind),
    /// The caller stopped the work.
    Stopped,
    /// Anything else.
    Other,
}

/// An error with the text that the command prints.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of the error.
    pub kind: Kind,
    /// The text, one line.
    pub message: String,
}

impl Failure {
    pub(crate) fn of(error: &anyhow::Error) -> Failure {
        let file = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
        let kind = match file {
            Some(cause) => Kind::File(cause.kind()),
            None => error.chain().map(kind_of).find(|kind| *kind != Kind::Other).unwrap_or(Kind::Other),
        };
        Failure { kind, message: one_line(error) }
    }

    pub(crate) fn argument(message: String) -> Failure {
        Failure { kind: Kind::Argument, message }
    }

    pub(crate) fn stopped() -> Failure {
        Failure { kind: Kind::Stopped, message: "stopped".to_owned() }
    }
}

impl From<Core> for Failure {
    fn from(error: Core) -> Failure {
        Failure::of(&error.into())
    }
}

/// Returns what one error of a chain is about.
fn kind_of(cause: &(dyn std::error::Error + 'static)) -> Kind {
    if let Some(error) = cause.downcast_ref() {
        return of_core(error);
    }
    if let Some(error) = cause.downcast_ref() {
        return of_data(error);
    }
    match (cause.downcast_ref::<Train>(), cause.downcast_ref::<dsmoe_baselines::Error>()) {
        (Some(error), _) => of_train(error),
        (_, Some(dsmoe_baselines::Error::Core(error))) => of_core(error),
        _ => Kind::Other,
    }
}

fn of_core(error: &Core) -> Kind {
    match error {
        Core::Argument { .. } | Core::Indivisible { .. } | Core::OutputNotEmpty { .. } | Core::Router(_) => {
            Kind::Argument
        }
        Core::Path { path, .. } if !path.exists() => Kind::File(io::ErrorKind::NotFound),
        Core::Field { .. } | Core::Tensor { .. } | Core::Path { .. } => Kind::Format,
        _ => Kind::Other,
    }
}

fn of_data(error: &Data) -> Kind {
    match error {
        Data::Io { .. } => Kind::Other,
        Data::File { path, .. } if !path.exists() => Kind::File(io::ErrorKind::NotFound),
        _ if error.setting().is_some() => Kind::Argument,
        _ => Kind::Format,
    }
}

fn of_train(error: &Train) -> Kind {
    match error {
        Train::Core(error) => of_core(error),
        Train::Data(error) => of_data(error),
        Train::OutNotEmpty(_) | Train::OutToResume(_) | Train::OutIsFile(_) | Train::NotARun(_) => {
            Kind::Argument
        }
        Train::Setting { .. }
        | Train::Field { .. }
        | Train::ResumeMismatch { .. }
        | Train::OutHoldsSource(_)
        | Train::Router(_) => Kind::Argument,
        Train::ConfigFile { .. } | Train::BadCheckpoint { .. } | Train::BadResponses { .. } => Kind::Format,
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn errors_keep_their_text_and_say_what_they_are_about() {
        let kind = |error: anyhow::Error| {
            let failure = Failure::of(&error);
            assert_eq!(failure.message, one_line(&error));
            failure.kind
        };
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let core = |cause: io::Error| Core::io(Path::new("a"))(cause);
        assert_eq!(kind(core(missing()).into()), Kind::File(io::ErrorKind::NotFound));
        assert_eq!(kind(Train::Core(core(missing())).into()), Kind::File(io::ErrorKind::NotFound));
        assert_eq!(kind(Core::argument("seq", "less").into()), Kind::Argument);
        assert_eq!(kind(Train::Core(Core::argument("seq", "less")).into()), Kind::Argument);
        let there = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(kind(Core::path(there.path(), "is damaged", "copy it").into()), Kind::Format);
        let gone = Core::path(Path::new("/no/such"), "there is no such file", "name one");
        assert_eq!(kind(gone.into()), Kind::File(io::ErrorKind::NotFound));
        let seq = dsmoe_datasets::eval_windows(9, 1, 1).unwrap_err();
        assert_eq!(kind(seq.into()), Kind::Argument);
        assert_eq!(kind(anyhow::anyhow!("other")), Kind::Other);
    }
}
