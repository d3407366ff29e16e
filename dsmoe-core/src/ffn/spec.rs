//! FFN kinds of other crates: how config.json names one, and how it is built.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use dsmoe_router::RouterConfig;
use serde_json::{Map, Value};

use super::{DenseFfn, DsmoeFfn, Ffn};
use crate::config::Config;
use crate::error::{Error, Result, shown};

/// Configuration of the FFNs of a model: the `ffn` object of config.json.
pub trait FfnSpec: Debug + Send + Sync {
    /// Returns the object's key `type`.
    fn kind(&self) -> &'static str;

    /// Returns the object's other keys.
    fn settings(&self) -> Map<String, Value>;

    /// Makes the FFN of a layer, whose sizes are [`Config::layer`]'s. Tensors that only training reads are
    /// [`crate::params::TensorSpec::training_only`].
    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn>;

    /// Returns the number of experts per layer.
    fn num_experts(&self) -> usize;

    /// Returns the number of experts that every token runs, mean over layers, where it is fixed.
    fn active_experts(&self) -> Option<f64>;
}

/// The entry of config.json that describes an FFN.
#[derive(Clone, Debug, PartialEq)]
pub enum FfnKind {
    /// No entry: the FFN of a plain LLaMA.
    Dense,
    /// The `dsmoe` object with these gates.
    Dsmoe {
        /// The gates.
        router: RouterConfig,
        /// Whether the router has a bias.
        router_bias: bool,
    },
    /// The `ffn` object of this spec.
    Spec(Arc<dyn FfnSpec>),
}

impl PartialEq for dyn FfnSpec {
    fn eq(&self, other: &dyn FfnSpec) -> bool {
        self.kind() == other.kind() && self.settings() == other.settings()
    }
}

/// Makes a [`FfnSpec`] of the `ffn` object of the config.json at the path, `type` left out; the configuration is the
/// rest of the file, all of it checked.
pub type ReadSpec = fn(&Path, &Config, &Map<String, Value>) -> Result<Arc<dyn FfnSpec>>;

static KINDS: RwLock<BTreeMap<&'static str, ReadSpec>> = RwLock::new(BTreeMap::new());

/// Registers a reader for FFNs of type `kind`. Idempotent.
pub fn register(kind: &'static str, read: ReadSpec) {
    KINDS.write().unwrap_or_else(PoisonError::into_inner).insert(kind, read);
}

/// Reads the spec of an `ffn` object.
pub(crate) fn read_spec(
    path: &Path,
    kind: &str,
    config: &Config,
    settings: &Map<String, Value>,
) -> Result<Arc<dyn FfnSpec>> {
    let kinds = KINDS.read().unwrap_or_else(PoisonError::into_inner);
    let Some(read) = kinds.get(kind).copied() else {
        let known = kinds.keys().copied().collect::<Vec<_>>().join(", ");
        let known =
            if known.is_empty() { "no type is known here".to_owned() } else { format!("use {known}") };
        return Err(Error::field(path, "ffn.type", format!("is {:?} and not known", shown(kind)), known));
    };
    drop(kinds);
    read(path, config, settings)
}

/// Makes the FFN that `config` asks for in a layer.
pub(crate) fn of_layer(config: &Config, layer: usize) -> Box<dyn Ffn> {
    let (hidden, intermediate) = (config.hidden, config.layer(layer).intermediate);
    match (&config.moe, &config.ffn) {
        (Some(moe), _) => Box::new(DsmoeFfn::new(hidden, intermediate, moe.router.clone(), moe.router_bias)),
        (None, Some(spec)) => spec.build(config, layer),
        (None, None) => Box::new(DenseFfn::new(hidden, intermediate)),
    }
}
