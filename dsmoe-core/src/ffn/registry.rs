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
/// [`FfnSpec`](crate::ffn::FfnSpec) has an example.
pub type ReadSpec = fn(&Path, &Config, &Map<String, Value>) -> Result<Arc<dyn FfnSpec>>;

/// A type of FFN, and what reads it.
///
/// [`FfnSpec`](crate::ffn::FfnSpec) has an example.
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
