//! The experts that tokens run.

use dsmoe_core::model::Observed;
use numpy::{PyArray2, PyArray3};
use pyo3::prelude::*;

use crate::arrays::{array, of_layers};

/// Which experts the tokens of a text run.
#[pyclass(frozen, module = "dsmoe")]
pub(crate) struct Routing {
    active: Py<PyArray3<bool>>,
    coefficients: Py<PyArray3<f32>>,
    counts: Py<PyArray2<u32>>,
    summary: String,
}

impl Routing {
    /// Takes the routing of a pass over `tokens` tokens; none for a model without experts.
    pub(crate) fn of(py: Python<'_>, tokens: usize, seen: &Observed) -> Option<Routing> {
        let stats = seen.stats.as_ref()?;
        let routes = stats.routes()?;
        let (layers, experts) = (stats.num_layers(), stats.num_experts());
        let active = of_layers(routes.iter().map(|layer| &layer.active[..]), tokens, experts, false);
        let coefficients =
            of_layers(routes.iter().map(|layer| &layer.coefficients[..]), tokens, experts, 0.0);
        let count = |row: &[bool]| row.iter().map(|&active| u32::from(active)).sum();
        let counts = active.chunks(experts.max(1)).map(count).collect();
        Some(Routing {
            active: array(py, [layers, tokens, experts], active).unbind(),
            coefficients: array(py, [layers, tokens, experts], coefficients).unbind(),
            counts: array(py, [layers, tokens], counts).unbind(),
            summary: serde_json::to_string(&stats.summary()).unwrap_or_default(),
        })
    }
}

#[pymethods]
impl Routing {
    /// Whether an expert runs, [layers, tokens, experts].
    #[getter]
    fn active(&self, py: Python<'_>) -> Py<PyArray3<bool>> {
        self.active.clone_ref(py)
    }

    /// Factors of the experts' outputs, [layers, tokens, experts]; 0 where an expert does not run.
    #[getter]
    fn coefficients(&self, py: Python<'_>) -> Py<PyArray3<f32>> {
        self.coefficients.clone_ref(py)
    }

    /// Active experts, [layers, tokens].
    #[getter]
    fn counts(&self, py: Python<'_>) -> Py<PyArray2<u32>> {
        self.counts.clone_ref(py)
    }

    /// Shares by layer and overall.
    #[getter]
    fn summary<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import("json")?.call_method1("loads", (&self.summary,))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let shape = self.active.bind(py).getattr("shape")?;
        Ok(format!("Routing(layers, tokens, experts: {shape})"))
    }
}
