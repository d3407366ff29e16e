//! The settings of the Hub's own tools, from the environment.

use std::env::{home_dir, var_os};
use std::path::{Path, PathBuf, absolute};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dsmoe_datasets::files::read_at_most;

/// The seconds without a byte after which a download has failed, unless `HF_HUB_DOWNLOAD_TIMEOUT` says otherwise.
const PATIENCE: f64 = 60.0;

/// The largest file of one line, in bytes.
const LONGEST_LINE: u64 = 1 << 16;

/// Where models come from and where they go.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Address without a slash at its end.
    pub(super) endpoint: String,
    /// The folder `hub` of the cache.
    pub(super) cache: PathBuf,
    pub(super) token: Option<String>,
    /// True where only the cache may be asked.
    pub(super) offline: bool,
    pub(super) patience: Duration,
}

impl Settings {
    /// Reads the variables of the Hub's Python library.
    pub(super) fn from_env() -> Result<Settings> {
        Settings::of(&|name| var_os(name)?.into_string().ok().filter(|value| !value.is_empty()), home_dir())
    }

    fn of(variable: &dyn Fn(&str) -> Option<String>, user: Option<PathBuf>) -> Result<Settings> {
        let user_cache =
            variable("XDG_CACHE_HOME").map(PathBuf::from).or(user.map(|user| user.join(".cache")));
        let home =
            variable("HF_HOME").map(PathBuf::from).or(user_cache.map(|cache| cache.join("huggingface")));
        let cache = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let cache = cache.or(home.as_ref().map(|home| home.join("hub")));
        let cache =
            cache.context("there is no home directory for the Hub's cache; set HF_HOME to a folder")?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            bail!("HF_ENDPOINT is `{endpoint}`; set it to an address that begins with https://");
        }
        let token_file = variable("HF_TOKEN_PATH").map(PathBuf::from).or(home.map(|home| home.join("token")));
        let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
        let seconds = match variable("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => PATIENCE,
            Some(text) => match text.parse() {
                Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => seconds,
                _ => bail!("HF_HUB_DOWNLOAD_TIMEOUT is `{text}`; set it to seconds, such as 60"),
            },
        };
        Ok(Settings {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: absolute(&cache)
                .with_context(|| format!("{}: not a folder for the Hub's cache", cache.display()))?,
            token: token
                .or_else(|| token_file.as_deref().and_then(token_of))
                .map(|token| token.trim().to_owned()),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| is_yes(&value)),
            patience: Duration::from_secs_f64(seconds),
        })
    }
}

/// Returns what `hf auth login` stored.
fn token_of(file: &Path) -> Option<String> {
    short_text(file).filter(|text| !text.trim().is_empty())
}

/// Returns the text of a file of the Hub's tools that has one line; none of a longer one.
pub(super) fn short_text(file: &Path) -> Option<String> {
    String::from_utf8(read_at_most(file, LONGEST_LINE).ok()?).ok()
}

fn is_yes(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        let variables: BTreeMap<_, _> = variables.iter().copied().collect();
        Settings::of(&|name| variables.get(name).map(|value| (*value).to_owned()), Some("/home/user".into()))
    }

    #[test]
    fn the_cache_is_where_the_hubs_tools_look() {
        for (variables, wanted) in [
            (&[][..], "/home/user/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")], "/h/hub"),
            (&[("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")], "/new"),
        ] {
            assert_eq!(settings(variables).unwrap().cache, Path::new(wanted), "{variables:?}");
        }
    }

    #[test]
    fn a_file_of_one_line_is_short() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of = |text: String| {
            std::fs::write(file.path(), text).unwrap();
            (short_text(file.path()), token_of(file.path()))
        };
        assert_eq!(of("abc\n".to_owned()), (Some("abc\n".to_owned()), Some("abc\n".to_owned())));
        assert_eq!(of(" \n".to_owned()), (Some(" \n".to_owned()), None));
        assert_eq!(of("a".repeat(1 << 17)), (None, None));
    }

    #[test]
    fn variables_are_checked() {
        let found = settings(&[
            ("HF_ENDPOINT", "http://127.0.0.1:80/"),
            ("HF_TOKEN", " abc\n"),
            ("HF_HUB_OFFLINE", "true"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5"),
        ])
        .unwrap();
        assert_eq!((found.endpoint.as_str(), found.token.as_deref()), ("http://127.0.0.1:80", Some("abc")));
        assert_eq!((found.offline, found.patience), (true, Duration::from_millis(1500)));
        for (variable, value) in [
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "inf"),
        ] {
            let error = settings(&[(variable, value)]).unwrap_err().to_string();
            assert!(error.contains(variable) && error.contains(value), "{error}");
        }
    }
}
