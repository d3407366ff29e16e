//! The card of a GGUF file: the origin and the licence that its metadata state.

use std::path::Path;

use super::container::Container;
use super::value::Value;
use crate::error::{Result, shown};

/// The line above the keys in a card.
const HEADLINE: &str = "The metadata of the GGUF file that the weights are from:";
/// The name of the model.
const NAME_KEY: &str = "general.name";

/// Keys of the origin, in the order of the card.
const KEYS: [&str; 14] = [
    NAME_KEY,
    "general.author",
    "general.organization",
    "general.license",
    "general.license.name",
    "general.license.link",
    "general.url",
    "general.repo_url",
    "general.source.url",
    "general.source.repo_url",
    "general.base_model.0.name",
    "general.base_model.0.organization",
    "general.base_model.0.repo_url",
    "general.quantized_by",
];

/// Keys of the licence, with their names in a card's front matter.
const LICENCE: [(&str, &str); 3] = [
    ("general.license", "license"),
    ("general.license.name", "license_name"),
    ("general.license.link", "license_link"),
];

/// Returns the card of a GGUF file as Markdown; none if its metadata state no origin.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn source_card(path: &Path) -> Result<Option<String>> {
    let container = Container::open(path)?;
    let text = |key: &str| {
        let text = container.metadata.get(key).and_then(Value::as_str).map(shown)?;
        (!text.trim().is_empty()).then(|| text.replace('|', " "))
    };
    let rows: Vec<String> =
        KEYS.iter().filter_map(|key| Some(format!("| {key} | {} |", text(key)?))).collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let front: Vec<String> = LICENCE
        .iter()
        .filter_map(|&(key, name)| Some(format!("{name}: {}\n", serde_json::Value::from(text(key)?))))
        .collect();
    let front = if front.is_empty() { String::new() } else { format!("---\n{}---\n", front.concat()) };
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(Some(format!(
        "{front}# {}\n\n{HEADLINE}\n\n| key | value |\n| --- | --- |\n{}\n",
        shown(&file),
        rows.join("\n")
    )))
}

/// Returns the name of the model in a card that [`source_card`] made; none in another card.
pub(crate) fn name_in_card(card: &str) -> Option<&str> {
    let start = format!("| {NAME_KEY} | ");
    let (_, rows) = card.split_once(HEADLINE)?;
    let name = rows.lines().find_map(|line| line.strip_prefix(&start))?;
    name.strip_suffix('|').map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with these texts as metadata and no tensor.
    fn file(texts: &[(&str, &str)]) -> tempfile::NamedTempFile {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(0u64.to_le_bytes());
        bytes.extend((texts.len() as u64).to_le_bytes());
        for (key, value) in texts {
            bytes.extend([text(key), 8u32.to_le_bytes().to_vec(), text(value)].concat());
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn origin_and_licence_are_those_of_the_metadata() {
        let found = file(&[("general.name", "A\n| b"), ("general.license", "apache-2.0")]);
        let card = source_card(found.path()).unwrap().unwrap();
        assert!(card.starts_with("---\nlicense: \"apache-2.0\"\n---\n# "), "{card}");
        assert!(card.contains("| general.name | A\\n  b |\n| general.license | apache-2.0 |\n"), "{card}");
        assert_eq!(name_in_card(&card), Some("A\\n  b"));
        assert_eq!(name_in_card("# Card\n| general.name | x |\n"), None);
        let unnamed = source_card(file(&[("general.license", "mit")]).path()).unwrap().unwrap();
        assert_eq!(name_in_card(&unnamed), None);
        assert_eq!(source_card(file(&[("general.type", "model")]).path()).unwrap(), None);
    }
}
