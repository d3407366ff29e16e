//! Where the tensors of a model lie in its files.

use std::path::PathBuf;

use dsmoe_bench::embed;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::gguf;
use pyo3::prelude::*;

use crate::errors::{argument, raised};

/// Name, file, first byte, type and shape of a tensor.
type Place = (String, PathBuf, u64, String, Vec<usize>);

/// Returns the places of all tensors of a model directory.
#[pyfunction]
pub(crate) fn tensors(py: Python<'_>, model: PathBuf) -> PyResult<Vec<Place>> {
    if gguf::file_of(&model).map_err(embed::Failure::from).map_err(raised(py))?.is_some() {
        let place = model.display();
        return Err(argument(
            py,
            format!("{place}: a GGUF file, whose tensors are not arrays; import it to a directory first"),
        ));
    }
    let checkpoint = Checkpoint::open(&model).map_err(embed::Failure::from).map_err(raised(py))?;
    let files: Vec<PathBuf> = checkpoint.files().map(PathBuf::from).collect();
    let place = |name: &str| {
        let view = checkpoint.tensor(name)?;
        let file = files.get(view.file)?.clone();
        Some((name.to_owned(), file, view.offset, view.dtype.to_string(), view.shape.clone()))
    };
    Ok(checkpoint.names().filter_map(place).collect())
}
