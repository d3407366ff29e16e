//! The files of a model on the Hub, and which of them a model directory needs.

use anyhow::{Result, bail};
use dsmoe_core::files::HubName;
use serde::Deserialize;

/// The Hub's answer about a model at one commit.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    pub(super) sha: String,
    siblings: Vec<File>,
}

/// A file of a model.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct File {
    #[serde(rename = "rfilename")]
    pub(super) name: String,
    pub(super) size: Option<u64>,
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Clone, Debug, Deserialize)]
struct Lfs {
    sha256: String,
}

impl File {
    /// Returns the SHA-256 of the file, which the Hub tells of large ones.
    pub(super) fn sha256(&self) -> Option<&str> {
        self.lfs.as_ref().map(|lfs| lfs.sha256.as_str())
    }

    /// Returns the name of the file in the folder of blobs.
    pub(super) fn blob(&self) -> Option<&str> {
        self.sha256().or(self.blob.as_deref()).filter(|blob| is_hash(blob))
    }
}

/// Files beside weights that a model directory needs or keeps, by the end or the start of their names.
const ENDS: [&str; 4] = [".json", ".jinja", ".model", ".txt"];
const STARTS: [&str; 6] = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING", "README.md"];

impl Listing {
    /// Returns the files that `name` needs.
    pub(super) fn needed(&self, name: &HubName) -> Result<Vec<File>> {
        if !is_hash(&self.sha) {
            bail!("{}: the Hub names the commit `{}`, which is none", name.id, self.sha);
        }
        match &name.file {
            Some(file) => self.parts(name, file),
            None => self.model(name),
        }
    }

    /// Returns one file; of a split GGUF file all parts.
    fn parts(&self, name: &HubName, file: &str) -> Result<Vec<File>> {
        let parts = parts_of(file);
        let found: Vec<File> = self.siblings.iter().filter(|f| parts.contains(&f.name)).cloned().collect();
        if found.len() < parts.len() {
            let others = self.named(|name| name.ends_with(".gguf"));
            bail!("{}: the model has no file {file} on the Hub{others}", name.id);
        }
        Ok(found)
    }

    /// Returns the files of a model directory.
    fn model(&self, name: &HubName) -> Result<Vec<File>> {
        let is_weights = |file: &File| file.name.ends_with(".safetensors");
        let (weights, others): (Vec<File>, Vec<File>) =
            self.siblings.iter().filter(|file| is_plain(&file.name)).cloned().partition(is_weights);
        // Some models have their weights once more, under other names or in another precision.
        let has_usual = weights.iter().any(|file| is_usual(&file.name));
        let mut needed: Vec<File> = weights.into_iter().filter(|f| !has_usual || is_usual(&f.name)).collect();
        if needed.is_empty() {
            let files = self.named(|name| name.ends_with(".gguf"));
            bail!("{}: the model has no safetensors on the Hub, which this program needs{files}", name.id);
        }
        needed.extend(others.into_iter().filter(|file| {
            ENDS.iter().any(|end| file.name.ends_with(end))
                || STARTS.iter().any(|start| file.name.starts_with(start))
        }));
        if !needed.iter().any(|file| file.name == "config.json") {
            bail!(
                "{}: the model has no config.json on the Hub; name one that transformers can load",
                name.id
            );
        }
        Ok(needed)
    }

    /// Returns words that name some of these files, or nothing where there are none.
    fn named(&self, is_one: impl Fn(&str) -> bool) -> String {
        let names: Vec<&str> =
            self.siblings.iter().map(|f| f.name.as_str()).filter(|n| is_one(n)).take(6).collect();
        if names.is_empty() {
            String::new()
        } else {
            format!("; it has {}: name one as OWNER/NAME/FILE", names.join(", "))
        }
    }
}

/// Returns whether transformers loads weights of this name: `model.safetensors`, or its parts.
fn is_usual(name: &str) -> bool {
    let middle = name.strip_prefix("model").and_then(|rest| rest.strip_suffix(".safetensors"));
    middle.is_some_and(|middle| middle.chars().all(|c| c.is_ascii_digit() || c == '-' || "of".contains(c)))
}

/// Returns whether a file lies beside config.json, under a name that is safe in every file system.
fn is_plain(name: &str) -> bool {
    !name.starts_with('.')
        && name.len() <= 200
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._- ".contains(c))
}

/// Returns whether a text is a hash in hexadecimal digits.
pub(super) fn is_hash(text: &str) -> bool {
    (7..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_hexdigit())
}

/// Returns the names of all parts of a file that ends like `-00001-of-00003.gguf`, otherwise its own name.
fn parts_of(file: &str) -> Vec<String> {
    let split = || {
        let (rest, number) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (start, part) = rest.rsplit_once('-')?;
        let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        let parts =
            if is_number(number) && is_number(part) { number.parse::<usize>().ok()? } else { return None };
        (1..=1000)
            .contains(&parts)
            .then(|| (1..=parts).map(|i| format!("{start}-{i:05}-of-{number}.gguf")).collect())
    };
    split().unwrap_or_else(|| vec![file.to_owned()])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(files: &str) -> Listing {
        let siblings: Vec<_> =
            files.split(' ').map(|name| serde_json::json!({ "rfilename": name })).collect();
        serde_json::from_value(serde_json::json!({ "sha": "0123456789abcdef", "siblings": siblings }))
            .unwrap()
    }

    fn needed(files: &str, name: &str) -> Result<String> {
        let files = listing(files).needed(&HubName::of(name).unwrap())?;
        Ok(files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn a_model_directory_needs_no_second_copy_of_its_weights() {
        let all = ".gitattributes config.json consolidated.safetensors model-00001-of-00002.safetensors \
            model-00002-of-00002.safetensors model.fp16.safetensors model.safetensors.index.json LICENSE.txt README.md \
            original/params.json pytorch_model.bin tokenizer.json ../config.json";
        let wanted = "model-00001-of-00002.safetensors model-00002-of-00002.safetensors config.json \
            model.safetensors.index.json LICENSE.txt README.md tokenizer.json";
        assert_eq!(needed(all, "a/b").unwrap(), wanted);
        assert_eq!(needed("config.json other.safetensors", "a/b").unwrap(), "other.safetensors config.json");
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = needed("config.json pytorch_model.bin", "a/b").unwrap_err().to_string();
        assert!(error.contains("no safetensors") && !error.contains("OWNER"), "{error}");
        let error = needed("README.md x.Q4_0.gguf", "a/b").unwrap_err().to_string();
        assert!(error.contains("no safetensors") && error.contains("x.Q4_0.gguf"), "{error}");
        let error = needed("model.safetensors", "a/b").unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        let error = needed("x.gguf", "a/b/y.gguf").unwrap_err().to_string();
        assert!(error.contains("y.gguf") && error.contains("x.gguf"), "{error}");
    }

    #[test]
    fn a_part_of_a_file_needs_the_others() {
        let all = "q-00001-of-00002.gguf q-00002-of-00002.gguf q.gguf";
        assert_eq!(
            needed(all, "a/b/q-00002-of-00002.gguf").unwrap(),
            "q-00001-of-00002.gguf q-00002-of-00002.gguf"
        );
        assert_eq!(needed(all, "a/b/q.gguf").unwrap(), "q.gguf");
        assert!(needed("q-00001-of-00002.gguf", "a/b/q-00001-of-00002.gguf").is_err());
    }
}
