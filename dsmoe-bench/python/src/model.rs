//! A model in memory.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use dsmoe_bench::embed::{Failure, Gates, LoadOptions, Loaded, Prompt};
use dsmoe_core::generate::GenerateOptions;
use dsmoe_core::model::{Observe, Observed};
use dsmoe_core::{Config, Device};
use dsmoe_datasets::Bos;
use dsmoe_kernels::Precision;
use dsmoe_train::eval::EvalOptions;
use numpy::{PyArray1, PyArray2, PyArray3};
use pyo3::prelude::*;

use crate::arrays::{array, ids};
use crate::errors::{argument, raised};
use crate::routing::Routing;
use crate::work::Watcher;

/// Tokens of a window of text by default, as of the command.
const SEQ: usize = 1024;

/// A model in memory, with its tokenizer.
#[pyclass(frozen, subclass, module = "dsmoe")]
pub(crate) struct Model {
    path: PathBuf,
    config: Config,
    loaded: Arc<RwLock<Loaded>>,
}

/// Reads a word of an argument.
fn word<T: FromStr>(py: Python<'_>, text: &str) -> PyResult<T>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| argument(py, error.to_string()))
}

impl Model {
    fn loaded(&self) -> RwLockReadGuard<'_, Loaded> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work` with the model, without the interpreter's lock.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Loaded) -> Result<T, Failure> + Send,
    ) -> PyResult<T> {
        Watcher::new(py, None)?.run(py, || work(&self.loaded()))?.map_err(raised(py))
    }

    /// Runs the model over tokens.
    fn observe(&self, py: Python<'_>, ids: &[u32], what: Observe) -> PyResult<Observed> {
        self.with(py, |loaded| loaded.observe(ids, what))
    }
}

#[pymethods]
impl Model {
    #[new]
    #[pyo3(signature = (path, *, dtype=None, device="cpu", threshold=None, active=None))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        dtype: Option<&str>,
        device: &str,
        threshold: Option<f32>,
        active: Option<f64>,
    ) -> PyResult<Model> {
        let precision = dtype.map(|dtype| word::<Precision>(py, dtype)).transpose()?;
        let device = word::<Device>(py, device)?;
        let options = LoadOptions { precision, device, gates: Gates { threshold, active } };
        let watcher = Watcher::new(py, None)?;
        let caller = watcher.clone();
        let loaded = watcher.run(py, || Loaded::load(&path, options, caller))?.map_err(raised(py))?;
        let config = loaded.model().config().clone();
        Ok(Model { path, config, loaded: Arc::new(RwLock::new(loaded)) })
    }

    /// The directory or file that it was loaded from.
    #[getter]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// Precision of the weights: f32 or bf16.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.loaded().model().precision().name()
    }

    /// Bytes of the weights in memory.
    #[getter]
    fn nbytes(&self) -> usize {
        self.loaded().model().bytes()
    }

    /// Decoder layers.
    #[getter]
    fn num_layers(&self) -> usize {
        self.config.num_layers
    }

    /// Width of the residual stream.
    #[getter]
    fn hidden_size(&self) -> usize {
        self.config.hidden
    }

    /// Tokens of the vocabulary.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// The largest number of positions.
    #[getter]
    fn max_positions(&self) -> usize {
        self.config.max_position
    }

    /// Experts of a layer, the largest number where layers differ; None without experts.
    #[getter]
    fn num_experts(&self) -> Option<usize> {
        self.config.num_experts()
    }

    /// Tokenizes a text.
    #[pyo3(signature = (text, bos="auto"))]
    fn encode<'py>(&self, py: Python<'py>, text: &str, bos: &str) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let bos = word::<Bos>(py, bos)?;
        let found = self.with(py, |loaded| loaded.encode(text, bos))?;
        Ok(array(py, [found.len()], found))
    }

    /// Returns the text of tokens.
    #[pyo3(signature = (ids, skip_special=true))]
    fn decode(&self, py: Python<'_>, ids: &Bound<'_, PyAny>, skip_special: bool) -> PyResult<String> {
        let ids = self::ids(ids)?;
        self.with(py, |loaded| loaded.decode(&ids, skip_special))
    }

    /// Returns the logits after the last tokens, all by default, [last, vocabulary].
    #[pyo3(signature = (ids, last=None))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        last: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let ids = self::ids(ids)?;
        let logits = last.unwrap_or(ids.len());
        let seen = self.observe(py, &ids, Observe { logits, ..Observe::default() })?;
        Ok(array(py, [logits, self.config.vocab_size], seen.logits))
    }

    /// Returns the embedded tokens and the states behind every layer, [layers + 1, tokens, hidden]; behind the last one they are
    /// normed.
    fn hidden_states<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArray3<f32>>> {
        let ids = self::ids(ids)?;
        let seen = self.observe(py, &ids, Observe { states: true, ..Observe::default() })?;
        Ok(array(py, [self.config.num_layers + 1, ids.len(), self.config.hidden], seen.states))
    }

    /// Returns which experts the tokens run.
    fn routing(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<Routing> {
        let ids = self::ids(ids)?;
        let seen = self.observe(py, &ids, Observe { routes: true, ..Observe::default() })?;
        Routing::of(py, ids.len(), &seen)
            .ok_or_else(|| argument(py, format!("{}: the model has no experts", self.path.display())))
    }

    /// Opens other gates: those above a threshold, or a share of the experts.
    #[pyo3(signature = (*, threshold=None, active=None))]
    fn set_gates(&self, py: Python<'_>, threshold: Option<f32>, active: Option<f64>) -> PyResult<()> {
        let gates = Gates { threshold, active };
        if threshold.is_some() == active.is_some() {
            return Err(argument(py, "give either threshold or active"));
        }
        // Waiting could be for a call whose callback this is.
        let Ok(mut loaded) = self.loaded.try_write() else {
            return Err(argument(py, "the model is in use; choose its gates before or after the call"));
        };
        loaded.set_gates(gates).map_err(raised(py))
    }

    /// Continues a prompt and returns the report of the command as JSON.
    #[pyo3(signature = (prompt, on_text=None))]
    fn continue_json(&self, py: Python<'_>, prompt: Asked, on_text: Option<Py<PyAny>>) -> PyResult<String> {
        let prompt = prompt.prompt(py)?;
        let watcher = Watcher::new(py, None)?;
        let caller = watcher.clone();
        let mut show = |text: &str| match &on_text {
            Some(callback) => watcher.call_back(|py| callback.call1(py, (text,))),
            None => true,
        };
        let work = || self.loaded().generate(prompt, caller, &mut show);
        watcher.run(py, work)?.map_err(raised(py))
    }

    /// Measures the perplexity of tokens and returns the report of the command as JSON.
    #[pyo3(signature = (ids, seq=None, stride=None))]
    fn evaluate_json(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        seq: Option<usize>,
        stride: Option<usize>,
    ) -> PyResult<String> {
        let ids = self::ids(ids)?;
        let seq = seq.unwrap_or(SEQ.min(self.config.max_position));
        let options = EvalOptions { stride: stride.unwrap_or(seq), ..EvalOptions::new(seq) };
        let watcher = Watcher::new(py, None)?;
        let caller = watcher.clone();
        watcher.run(py, || self.loaded().evaluate(&ids, options, caller))?.map_err(raised(py))
    }

    fn __repr__(&self) -> String {
        let Config { num_layers, hidden, .. } = self.config;
        format!("Model({:?}, {num_layers} layers of width {hidden}, {})", self.path, self.dtype())
    }
}

/// The arguments of a continuation, a dictionary.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Asked {
    prompt: String,
    max_tokens: usize,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    seed: u64,
    stop: Vec<String>,
    bos: String,
    ignore_eos: bool,
}

impl Asked {
    fn prompt(self, py: Python<'_>) -> PyResult<Prompt> {
        let Asked { prompt, max_tokens, temperature, top_k, top_p, seed, stop, bos, ignore_eos } = self;
        if stop.iter().any(String::is_empty) {
            return Err(argument(py, "stop has an empty text; leave it out"));
        }
        let options =
            GenerateOptions { max_tokens, temperature, top_k, top_p, seed, ..GenerateOptions::default() };
        Ok(Prompt { text: prompt, bos: word(py, &bos)?, options, ignore_eos, stop })
    }
}
