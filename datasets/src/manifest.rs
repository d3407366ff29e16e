//! Manifests: the files of a folder with their sizes and SHA-256, and the public datasets that folders are made from.

use crate::error::{Error, Result, shown};
use crate::files::{read_regular, replace, sha256_of};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Name of the manifest in its folder.
pub const MANIFEST: &str = "dsmoe-manifest.json";

const FORMAT_VERSION: u32 = 1;

/// Largest manifest that is read, bytes.
const MAX_MANIFEST: u64 = 256 << 20;

/// A public dataset and how a user fetches it; nothing is fetched here.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PublicDataset {
    /// Its name here.
    pub name: &'static str,
    /// The kind of text.
    pub domain: &'static str,
    /// The repository of its publisher.
    pub repository: &'static str,
    /// The files taken of it.
    pub files: &'static str,
    /// The column of the text.
    pub text_column: &'static str,
    /// A note for users who fetch it.
    pub note: &'static str,
}

/// The datasets that the paper trains on.
pub const PUBLIC: [PublicDataset; 4] = [
    PublicDataset {
        name: "fineweb-edu",
        domain: "educational web",
        repository: "HuggingFaceFW/fineweb-edu",
        files: "sample/10BT/*.parquet",
        text_column: "text",
        note: "a sample of about 10 billion tokens; other samples and all of it lie beside it",
    },
    PublicDataset {
        name: "open-web-math",
        domain: "mathematics",
        repository: "open-web-math/open-web-math",
        files: "data/*.parquet",
        text_column: "text",
        note: "about 15 billion tokens",
    },
    PublicDataset {
        name: "starcoder",
        domain: "code",
        repository: "bigcode/starcoderdata",
        files: "python/*.parquet",
        text_column: "content",
        note: "accept its terms and log in first (hf auth login); one folder per language",
    },
    PublicDataset {
        name: "cosmopedia",
        domain: "synthetic text",
        repository: "HuggingFaceTB/cosmopedia",
        files: "data/*/*.parquet",
        text_column: "text",
        note: "about 25 billion tokens",
    },
];

impl PublicDataset {
    /// Returns the command that fetches it into `folder`/NAME.
    pub fn command(&self, folder: &str) -> String {
        format!(
            "hf download {} --repo-type dataset --include '{}' --local-dir {folder}/{}",
            self.repository, self.files, self.name
        )
    }
}

/// A file of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Path within the folder, with `/` between names.
    pub path: String,
    /// Size, bytes.
    pub bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format_version: u32,
    files: Vec<Entry>,
}

/// The comparison of a folder with its manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// The number of files that are as the manifest says.
    pub good: usize,
    /// Bytes of all files of the manifest.
    pub bytes: u64,
    /// Files that are not there.
    pub missing: Vec<String>,
    /// Files of another size or content.
    pub changed: Vec<String>,
    /// Files that the manifest does not name.
    pub extra: Vec<String>,
}

impl Verification {
    /// Returns true if every file of the manifest exists as it says.
    pub fn holds(&self) -> bool {
        self.missing.is_empty() && self.changed.is_empty()
    }
}

/// Writes the manifest of `folder` from its files; hidden ones are left out. `progress`
/// receives the bytes hashed and the bytes of all files.
///
/// # Errors
/// An empty folder, a file that cannot be read or whose name is not UTF-8, or a folder that cannot be written.
pub fn write(folder: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<Entry>> {
    let path = folder.join(MANIFEST);
    let files = files(folder)?;
    if files.is_empty() {
        return Err(Error::file(folder, "no file to hash in this folder", "fetch the dataset first"));
    }
    let total: u64 = files.iter().map(|(_, bytes)| bytes).sum();
    let mut done = 0;
    let mut entries = Vec::new();
    for (name, bytes) in files {
        let path = folder.join(&name);
        let mut hashed = |more| {
            done += more;
            progress(done, total);
        };
        let sha256 = sha256_of(&path, &mut hashed).map_err(Error::io(&path))?;
        entries.push(Entry { path: name, bytes, sha256 });
    }
    let manifest = Manifest { format_version: FORMAT_VERSION, files: entries };
    let saved = replace(&path, |file| {
        serde_json::to_writer_pretty(&mut *file, &manifest)?;
        file.write_all(b"\n")
    });
    saved.map_err(Error::io(&path))?;
    Ok(manifest.files)
}

/// Compares `folder` with its manifest. `progress` receives the bytes hashed and the bytes of all files.
///
/// # Errors
/// No manifest, one that is not sound, or a file that cannot be read.
pub fn verify(folder: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Verification> {
    let manifest = read(&folder.join(MANIFEST))?;
    let total = manifest.files.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.bytes));
    let mut found = Verification { bytes: total, ..Verification::default() };
    let mut names = BTreeSet::new();
    let mut done = 0;
    for entry in &manifest.files {
        names.insert(entry.path.clone());
        let path = folder.join(&entry.path);
        let metadata = match fs::metadata(&path) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                found.missing.push(entry.path.clone());
                continue;
            }
            metadata => metadata.map_err(Error::io(&path))?,
        };
        // A file of another size need not be read, and a pipe cannot.
        let same = metadata.is_file()
            && metadata.len() == entry.bytes
            && sha256_of(&path, &mut |more| progress(done + more, total))
                .map_err(Error::io(&path))?
                .eq_ignore_ascii_case(&entry.sha256);
        done += entry.bytes;
        progress(done, total);
        match same {
            true => found.good += 1,
            false => found.changed.push(entry.path.clone()),
        }
    }
    found.extra =
        files(folder)?.into_iter().map(|(name, _)| name).filter(|name| !names.contains(name)).collect();
    Ok(found)
}

fn read(path: &Path) -> Result<Manifest> {
    let wrong = |reason: String| Error::file(path, reason, "write it again with dsmoe data verify {write}");
    let text = match read_regular(path, MAX_MANIFEST) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Err(wrong("no manifest".into())),
        text => text.map_err(Error::io(path))?,
    };
    let manifest: Manifest =
        serde_json::from_slice(&text).map_err(|cause| wrong(shown(&cause.to_string())))?;
    if manifest.format_version != FORMAT_VERSION {
        let version = manifest.format_version;
        return Err(wrong(format!("format_version {version}, this program reads {FORMAT_VERSION}")));
    }
    for entry in &manifest.files {
        let inside = Path::new(&entry.path).components().all(|part| matches!(part, Component::Normal(_)));
        if entry.path.is_empty() || !inside {
            return Err(wrong(format!("path {:?} leads out of the folder", entry.path)));
        }
        if entry.sha256.len() != 64 || !entry.sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong(format!("sha256 {:?} of {} is none", entry.sha256, entry.path)));
        }
    }
    Ok(manifest)
}

/// Returns the files below `folder`, by name, with their sizes; hidden ones, links to folders and the manifest left
/// out.
fn files(folder: &Path) -> Result<Vec<(String, u64)>> {
    let mut files = Vec::new();
    let mut folders: Vec<(PathBuf, String)> = vec![(folder.to_path_buf(), String::new())];
    while let Some((dir, prefix)) = folders.pop() {
        for entry in fs::read_dir(&dir).map_err(Error::io(&dir))? {
            let path = entry.map_err(Error::io(&dir))?.path();
            let name = path.file_name().unwrap_or_default();
            let Some(name) = name.to_str() else {
                return Err(Error::file(&path, "a file name that is not UTF-8", "rename it"));
            };
            if name.starts_with('.') || (prefix.is_empty() && name == MANIFEST) {
                continue;
            }
            let name = format!("{prefix}{name}");
            if fs::symlink_metadata(&path).map_err(Error::io(&path))?.is_dir() {
                folders.push((path, format!("{name}/")));
            } else if let Ok(metadata) = fs::metadata(&path)
                && metadata.is_file()
            {
                files.push((name, metadata.len()));
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_finds_what_changed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("sub/.cache")).unwrap();
        for (name, text) in
            [("a.txt", "abc"), ("sub/b.txt", "bb"), ("c.txt", "c"), (".hidden", "x"), ("sub/.cache/y", "y")]
        {
            fs::write(at(name), text).unwrap();
        }
        let entries = write(dir.path(), &mut |_, _| ()).unwrap();
        let names: Vec<&str> = entries.iter().map(|entry| &entry.path[..]).collect();
        assert_eq!(names, ["a.txt", "c.txt", "sub/b.txt"]);
        // The hash of "abc" that the standard gives.
        assert_eq!(entries[0].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let mut heard = Vec::new();
        let found = verify(dir.path(), &mut |done, of| heard.push((done, of))).unwrap();
        assert!(found.holds() && found.good == 3 && found.extra.is_empty() && found.bytes == 6);
        assert_eq!(heard.last(), Some(&(6, 6)));

        fs::write(at("a.txt"), "abd").unwrap();
        fs::write(at("sub/b.txt"), "bbb").unwrap();
        fs::rename(at("c.txt"), at("d.txt")).unwrap();
        let found = verify(dir.path(), &mut |_, _| ()).unwrap();
        assert!(!found.holds());
        assert_eq!(found.changed, ["a.txt", "sub/b.txt"]);
        assert_eq!([found.missing, found.extra], [["c.txt"], ["d.txt"]]);
    }

    #[test]
    fn manifests_that_cannot_be_used() {
        let dir = tempfile::tempdir().unwrap();
        let verified = || verify(dir.path(), &mut |_, _| ()).unwrap_err().to_string();
        let message = |text: &str| {
            fs::write(dir.path().join(MANIFEST), text).unwrap();
            verified()
        };
        assert!(verified().contains("no manifest"));
        assert!(write(dir.path(), &mut |_, _| ()).unwrap_err().to_string().contains("no file to hash"));
        let with = |path: &str, sha256: &str| {
            format!(
                "{{\"format_version\":1,\"files\":[{{\"path\":\"{path}\",\"bytes\":1,\"sha256\":\"{sha256}\"}}]}}"
            )
        };
        for path in ["../x", "/etc/passwd", "a/../../b", ""] {
            assert!(message(&with(path, &"0".repeat(64))).contains("leads out of the folder"), "{path}");
        }
        assert!(message(&with("a", "xyz")).contains("is none"));
        assert!(message("{").contains("dsmoe-manifest.json"));
        assert!(message("{\"format_version\":2,\"files\":[]}").contains("format_version 2"));
    }
}
