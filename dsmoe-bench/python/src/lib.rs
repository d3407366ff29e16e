//! The extension module of the Python package `dsmoe`: commands and loaded models of `dsmoe_bench::embed`, with NumPy arrays. It
//! computes nothing itself.

#![forbid(unsafe_code)]

mod arrays;
mod errors;
mod model;
mod routing;
mod tensors;
mod work;

use pyo3::prelude::*;

/// Commands and models of dsmoe; use the package `dsmoe`.
#[pymodule]
mod _native {
    use std::ffi::OsString;

    use dsmoe_bench::embed;
    use pyo3::exceptions::PyKeyError;
    use pyo3::prelude::*;

    use crate::errors::raised;
    #[pymodule_export]
    use crate::model::Model;
    #[pymodule_export]
    use crate::routing::Routing;
    #[pymodule_export]
    use crate::tensors::tensors;
    use crate::work::Watcher;

    /// Runs a command and returns its report as JSON.
    #[pyfunction]
    #[pyo3(signature = (words, on_step=None))]
    fn call(py: Python<'_>, words: Vec<OsString>, on_step: Option<Py<PyAny>>) -> PyResult<String> {
        let watcher = Watcher::new(py, on_step)?;
        let caller = watcher.clone();
        watcher.run(py, || embed::call(words, caller))?.map_err(raised(py))
    }

    /// Returns the options of a command, by their long names without dashes.
    #[pyfunction]
    fn options(command: &str) -> PyResult<Vec<String>> {
        embed::options(command).ok_or_else(|| PyKeyError::new_err(format!("no command {command}")))
    }

    /// Starts the worker threads unless they run already; returns whether it did.
    #[pyfunction]
    #[pyo3(signature = (threads=None))]
    fn start_threads(py: Python<'_>, threads: Option<u16>) -> PyResult<bool> {
        embed::start_threads(threads).map_err(raised(py))
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
