//! Licences, notices and model cards, which go with the weights wherever these are copied.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use crate::error::{Error, Result};

/// The card of a model directory.
pub const CARD_FILE: &str = "README.md";
/// The card of the model that a directory was made from.
pub const SOURCE_CARD_FILE: &str = "SOURCE_README.md";
/// The line that marks a card as written by this program.
pub(crate) const GENERATED: &str = "<!-- model card written by dsmoe -->";
/// Beginnings of the names of files that have to go with the weights, in capitals.
const PREFIXES: [&str; 5] = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING"];
/// The most bytes of a card that are read.
const LARGEST_CARD: u64 = 1 << 20;

/// Copies the licence files of one directory to another, and its card as the card of the source. A card that this
/// program wrote is not a source's.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    let entries = match fs::read_dir(from) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io(from))?,
    };
    for entry in entries {
        let name = entry.map_err(Error::io(from))?.file_name();
        let upper = name.to_string_lossy().to_uppercase();
        if PREFIXES.iter().any(|prefix| upper.starts_with(prefix)) {
            let (from, to) = (from.join(&name), to.join(&name));
            if from.is_dir() { copy_folder(&from, &to)? } else { copy_file(&from, &to)? }
        }
    }
    let source = from.join(SOURCE_CARD_FILE);
    if source.is_file() {
        return copy_file(&source, &to.join(SOURCE_CARD_FILE));
    }
    let card = from.join(CARD_FILE);
    if card.is_file() && !is_generated(&card)? {
        copy_file(&card, &to.join(SOURCE_CARD_FILE))?;
    }
    Ok(())
}

/// Copies the files of a folder, such as `LICENSES`; folders in it are left out.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::io(from))? {
        let path = entry.map_err(Error::io(from))?.path();
        if let Some(name) = path.file_name().filter(|_| path.is_file()) {
            fs::create_dir_all(to).map_err(Error::io(to))?;
            copy_file(&path, &to.join(name))?;
        }
    }
    Ok(())
}

/// Returns whether a directory holds licence files.
pub(crate) fn has_licences(dir: &Path) -> bool {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut names = names.map(|name| name.to_string_lossy().to_uppercase());
    names.any(|name| PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

/// Copies a file and waits until it is on the disk; anything else of that name is left out.
pub(crate) fn copy_file(from: &Path, to: &Path) -> Result<()> {
    if !from.is_file() {
        return Ok(());
    }
    let mut source = File::open(from).map_err(Error::io(from))?;
    // Only a file that is open for writing can be synced everywhere.
    let copy = |mut file: File| io::copy(&mut source, &mut file).and_then(|_| file.sync_all());
    File::create(to).and_then(copy).map_err(Error::io(to))
}

/// Returns whether this program wrote the card.
pub(crate) fn is_generated(card: &Path) -> Result<bool> {
    Ok(read_card(card)?.lines().any(|line| line == GENERATED))
}

/// Reads the start of a card.
pub(crate) fn read_card(card: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    File::open(card)
        .and_then(|file| file.take(LARGEST_CARD).read_to_end(&mut bytes))
        .map_err(Error::io(card))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names in a directory, sorted.
    fn names(dir: &Path) -> Vec<String> {
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn licences_are_copied_and_the_first_card_stays_the_source_card() {
        let work = tempfile::tempdir().unwrap();
        let [first, second, third] = ["first", "second", "third"].map(|name| work.path().join(name));
        for dir in [&first, &second, &third] {
            fs::create_dir(dir).unwrap();
        }
        for (name, text) in [
            ("LICENSE", "a"),
            ("license-MIT.txt", "b"),
            ("Notice", "c"),
            ("USE_POLICY.md", "d"),
            ("README.md", "source"),
            ("other.txt", "e"),
        ] {
            fs::write(first.join(name), text).unwrap();
        }
        fs::create_dir_all(first.join("LICENSES/deeper")).unwrap();
        fs::create_dir(first.join("Notices")).unwrap();
        assert!(!has_licences(&second));
        copy(&first, &second).unwrap();
        let expected = ["LICENSE", "Notice", "SOURCE_README.md", "USE_POLICY.md", "license-MIT.txt"];
        assert_eq!(names(&second), expected);
        assert!(has_licences(&second));
        fs::write(first.join("LICENSES/MIT.txt"), "f").unwrap();
        copy(&first, &second).unwrap();
        assert_eq!(fs::read(second.join("LICENSES/MIT.txt")).unwrap(), b"f");
        assert_eq!(names(&second.join("LICENSES")), ["MIT.txt"]);
        let expected =
            ["LICENSE", "LICENSES", "Notice", "SOURCE_README.md", "USE_POLICY.md", "license-MIT.txt"];

        fs::write(second.join("README.md"), format!("---\n---\n{GENERATED}\n# Card\n")).unwrap();
        copy(&second, &third).unwrap();
        assert_eq!(names(&third), expected);
        assert_eq!(fs::read(third.join("SOURCE_README.md")).unwrap(), b"source");

        fs::remove_file(second.join("SOURCE_README.md")).unwrap();
        fs::remove_file(third.join("SOURCE_README.md")).unwrap();
        copy(&second, &third).unwrap();
        assert!(!third.join("SOURCE_README.md").exists(), "a card of ours became the source's");
    }
}
