//! The types of FFN that model directories of this process may have.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use serde_json::{Map, Value};

use super::FfnSpec;
use crate::config::Config;
use crate::config::mixture::KIND as MIXTURE;
use crate::error::{Error, Result, shown};

/// Makes a [`FfnSpec`] of the `ffn` object of the config.json at the path, `type` left out; the configuration is the
/// rest of the file, all of it checked.
///
/// ```
/// use std::path::Path;
/// use std::sync::Arc;
///
/// use dsmoe_core::ffn::{FfnSpec, ReadSpec};
/// use dsmoe_core::{Config, Error, Result};
/// use serde_json::{Map, Value};
/// # use dsmoe_core::ffn::{DenseFfn, Ffn};
/// # #[derive(Debug)]
/// # struct Plain;
/// # impl FfnSpec for Plain {
/// #     fn kind(&self) -> &'static str {
/// #         "plain"
/// #     }
/// #     fn settings(&self) -> Map<String, Value> {
/// #         Map::new()
/// #     }
/// #     fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
/// #         Box::new(DenseFfn::new(config.hidden, config.layer(layer).intermediate))
/// #     }
/// #     fn num_experts(&self, _layer: usize) -> usize {
/// #         1
/// #     }
/// #     fn active_experts(&self) -> Option<f64> {
/// #         Some(1.0)
/// #     }
/// # }
///
/// /// Reads the settings of `Plain`, an `FfnSpec` that has none.
/// fn read(path: &Path, _: &Config, settings: &Map<String, Value>) -> Result<Arc<dyn FfnSpec>> {
///     match settings.keys().next() {
///         Some(key) => Err(Error::field(path, format!("ffn.{key}"), "is not known", "remove it")),
///         None => Ok(Arc::new(Plain)),
///     }
/// }
///
/// let (read, config) = (read as ReadSpec, dsmoe_core::init::preset("tiny")?);
/// let settings = Map::from_iter([("width".to_owned(), Value::from(4))]);
/// let refused = read("config.json".as_ref(), &config, &settings);
/// assert!(matches!(refused, Err(Error::Field { field, .. }) if field == "ffn.width"));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
pub type ReadSpec = fn(&Path, &Config, &Map<String, Value>) -> Result<Arc<dyn FfnSpec>>;

/// A type of FFN, and what reads it.
///
/// ```
/// use std::sync::Arc;
///
/// use dsmoe_core::ffn::{FfnReader, register};
/// # use dsmoe_core::Config;
/// # use dsmoe_core::ffn::{DenseFfn, Ffn, FfnSpec};
/// # use serde_json::{Map, Value};
/// # #[derive(Debug)]
/// # struct Plain;
/// # impl FfnSpec for Plain {
/// #     fn kind(&self) -> &'static str {
/// #         "plain"
/// #     }
/// #     fn settings(&self) -> Map<String, Value> {
/// #         Map::new()
/// #     }
/// #     fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
/// #         Box::new(DenseFfn::new(config.hidden, config.layer(layer).intermediate))
/// #     }
/// #     fn num_experts(&self, _layer: usize) -> usize {
/// #         1
/// #     }
/// #     fn active_experts(&self) -> Option<f64> {
/// #         Some(1.0)
/// #     }
/// # }
///
/// // `Plain` is an `FfnSpec` without settings.
/// static READER: FfnReader = FfnReader { kind: "plain", read: |_, _, _| Ok(Arc::new(Plain)) };
/// static ANOTHER: FfnReader = FfnReader { kind: "plain", read: |_, _, _| Ok(Arc::new(Plain)) };
/// register(&READER)?;
/// register(&READER)?; // changes nothing
/// assert!(register(&ANOTHER).is_err_and(|error| error.to_string().contains("registered twice")));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct FfnReader {
    /// The key `type` of its `ffn` objects in config.json.
    pub kind: &'static str,
    /// Reads the other keys.
    pub read: ReadSpec,
}

static READERS: RwLock<BTreeMap<&'static str, &'static FfnReader>> = RwLock::new(BTreeMap::new());

/// Makes model directories with FFNs of a type readable in this process. Registering a reader again changes nothing.
///
/// # Errors
/// Another reader has the name.
pub fn register(reader: &'static FfnReader) -> Result<()> {
    let mut readers = READERS.write().unwrap_or_else(PoisonError::into_inner);
    // Mixtures are read with the configuration itself.
    if reader.kind != MIXTURE && std::ptr::eq(*readers.entry(reader.kind).or_insert(reader), reader) {
        return Ok(());
    }
    let problem = format!("the FFN type {:?} is registered twice", reader.kind);
    Err(Error::argument(problem, "give one of the two another name"))
}

/// Reads the spec of an `ffn` object.
pub(crate) fn read_spec(
    path: &Path,
    kind: &str,
    config: &Config,
    settings: &Map<String, Value>,
) -> Result<Arc<dyn FfnSpec>> {
    let readers = READERS.read().unwrap_or_else(PoisonError::into_inner);
    let Some(reader) = readers.get(kind).copied() else {
        let known = readers.keys().copied().collect::<Vec<_>>().join(", ");
        let known =
            if known.is_empty() { "no type is known here".to_owned() } else { format!("use {known}") };
        let help = format!("{known}, or load it by a program that registers a reader of that type");
        return Err(Error::field(path, "ffn.type", format!("is {:?} and not known", shown(kind)), help));
    };
    drop(readers);
    (reader.read)(path, config, settings)
}
