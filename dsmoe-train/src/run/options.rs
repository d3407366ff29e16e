//! The directories, the device and the text of a run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dsmoe_core::Device;
use dsmoe_datasets::mixture::UNNAMED;
use dsmoe_datasets::overlap::TokenTexts;
use dsmoe_datasets::{TokenSource, TokenStream};
use dsmoe_kernels::comm::{Alone, Communicator};

use crate::ranks::Zero;

/// The directories and the device of a run, and how it starts and stops.
///
/// ```
/// use dsmoe_train::RunOptions;
///
/// let options = RunOptions {
///     teacher: Some("dense".into()),
///     resume: true, // from the newest checkpoint in `run`, or from the start
///     ..RunOptions::new("converted".as_ref(), "run".as_ref())
/// };
/// assert_eq!(options.source.as_os_str(), "converted");
/// assert!(options.stop_after.is_none(), "the run goes to its end");
/// ```
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run directory.
    pub out: PathBuf,
    /// The directory the model was loaded from; its tokenizer goes into the result.
    pub source: PathBuf,
    /// Resume from the newest checkpoint in `out`, or start if there is none.
    pub resume: bool,
    /// Start over in an `out` that is not empty. Only files of runs and models are removed from it.
    pub force: bool,
    /// Stop with a checkpoint after so many steps of this invocation, as if interrupted.
    pub stop_after: Option<u64>,
    /// A model directory whose distributions of the next token the run learns too.
    pub teacher: Option<PathBuf>,
    /// A directory that keeps the teacher's most likely tokens, for later epochs and other runs.
    pub teacher_cache: Option<PathBuf>,
    /// The device to train and evaluate on. A run may resume on another; its numbers then differ in the last bits.
    pub device: Device,
    /// Keep the inputs of layers alone, and run their forward pass again in the backward pass. No number depends on it.
    pub recompute: bool,
    /// The state of which every process holds its share alone. No number depends on it, and a run may resume with another. In
    /// the last stage the model is given without its parameters ([`Model::load_outline`](dsmoe_core::Model::load_outline)), which
    /// are read from `source`.
    pub zero: Zero,
    /// The processes that share the steps. Results do not depend on their number, and a run may resume with another.
    pub comm: Arc<dyn Communicator>,
}

impl RunOptions {
    /// Starts a new run of the model in `source` into the empty directory `out`, on the processor, in this process alone, to
    /// its end.
    pub fn new(source: &Path, out: &Path) -> RunOptions {
        let (out, source, device) = (out.to_path_buf(), source.to_path_buf(), Device::Cpu);
        RunOptions {
            out,
            source,
            resume: false,
            force: false,
            stop_after: None,
            teacher: None,
            teacher_cache: None,
            device,
            recompute: false,
            zero: Zero::Moments,
            comm: Arc::new(Alone),
        }
    }
}

/// The text of a run.
///
/// ```
/// use dsmoe_datasets::{TokenSource, TokenStream};
/// use dsmoe_train::TrainData;
///
/// let mut stream = TokenStream::default();
/// stream.push(&[1, 5, 9, 2]);
/// // A single text, or several that are mixed by their weights.
/// let single = TrainData::from(&stream);
/// let source = |name: &str, weight| TokenSource { name: name.to_owned(), weight, tokens: (&stream).into() };
/// let mixed = TrainData { sources: vec![source("web", 3.0), source("code", 1.0)], texts: None };
/// assert_eq!([&single, &mixed].map(|data| data.sources.len()), [1, 2]);
/// ```
#[derive(Clone, Debug)]
pub struct TrainData {
    /// Its sources.
    pub sources: Vec<TokenSource>,
    /// The bytes of the tokens, to compare text by; without them nothing can be dropped as a near duplicate.
    pub texts: Option<TokenTexts>,
}

impl From<&TokenStream> for TrainData {
    fn from(stream: &TokenStream) -> TrainData {
        let source = TokenSource { name: UNNAMED.to_owned(), weight: 1.0, tokens: stream.into() };
        TrainData { sources: vec![source], texts: None }
    }
}
