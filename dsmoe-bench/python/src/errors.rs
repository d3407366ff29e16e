//! Failures as exceptions of the package.

use std::io::ErrorKind;

use dsmoe_bench::embed::{Failure, Kind};
use pyo3::prelude::*;

/// Turns a failure into the exception of its kind, with its text; for `map_err`.
pub(crate) fn raised(py: Python<'_>) -> impl Fn(Failure) -> PyErr {
    move |failure| {
        let class = match failure.kind {
            Kind::Argument => "ArgumentError",
            Kind::Format => "FormatError",
            Kind::File(ErrorKind::NotFound) => "NotFoundError",
            Kind::File(_) => "FileError",
            Kind::Stopped => "Stopped",
            Kind::Other => "DsmoeError",
        };
        match exception(py, class, &failure.message) {
            Ok(error) | Err(error) => error,
        }
    }
}

/// Makes an exception for an argument.
pub(crate) fn argument(py: Python<'_>, message: impl Into<String>) -> PyErr {
    raised(py)(Failure { kind: Kind::Argument, message: message.into() })
}

fn exception(py: Python<'_>, class: &str, message: &str) -> PyResult<PyErr> {
    let class = py.import("dsmoe._errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call1((message,))?))
}
