//! Values between Rust and NumPy.

use ndarray::{Array, Dimension, ShapeBuilder};
use numpy::{Element, PyArray, PyReadonlyArray1};
use pyo3::prelude::*;

/// Token ids of an argument. They are copied: other threads may write to an array while a model reads them.
pub(crate) fn ids(argument: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    match argument.extract::<PyReadonlyArray1<'_, u32>>() {
        Ok(array) => Ok(array.as_array().to_vec()),
        Err(_) => argument.extract(),
    }
}

/// Makes an array of values whose memory it takes over, so that nothing is copied.
pub(crate) fn array<'py, T: Element, D: Dimension>(
    py: Python<'py>,
    shape: impl ShapeBuilder<Dim = D>,
    values: Vec<T>,
) -> Bound<'py, PyArray<T, D>> {
    let array = Array::from_shape_vec(shape.into_shape_with_order(), values);
    PyArray::from_owned_array(py, array.expect("as many values as the shape has"))
}

/// Joins the rows of all layers, each `[tokens, experts of the layer]`, to `[layers, tokens, experts]` with `none` behind layers
/// with fewer experts.
pub(crate) fn of_layers<'a, T: Copy + 'a>(
    layers: impl Iterator<Item = &'a [T]>,
    tokens: usize,
    experts: usize,
    none: T,
) -> Vec<T> {
    let mut joined = Vec::new();
    for layer in layers {
        let own = layer.len() / tokens.max(1);
        for row in layer.chunks(own.max(1)) {
            joined.extend_from_slice(row);
            joined.resize(joined.len() + experts - own, none);
        }
    }
    joined
}
