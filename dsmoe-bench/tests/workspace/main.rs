//! The architecture's invariants, read from the manifests and the sources.

mod documents;
mod examples;
mod flags;
mod imports;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Lists the packages of the workspace that each of them may use.
const LAYERS: [(&str, &[&str]); 7] = [
    ("dsmoe-kernels", &[]),
    ("dsmoe-router", &["dsmoe-kernels"]),
    ("dsmoe-core", &["dsmoe-kernels", "dsmoe-router"]),
    ("dsmoe-datasets", &[]),
    ("dsmoe-train", &["dsmoe-kernels", "dsmoe-router", "dsmoe-core", "dsmoe-datasets"]),
    ("dsmoe-baselines", &["dsmoe-kernels", "dsmoe-router", "dsmoe-core"]),
    (
        "dsmoe-bench",
        &["dsmoe-kernels", "dsmoe-router", "dsmoe-core", "dsmoe-train", "dsmoe-baselines", "dsmoe-datasets"],
    ),
];

/// The folder of a package's sources.
fn source_folder(package: &str) -> PathBuf {
    let folder = package.strip_prefix("dsmoe-").filter(|folder| Path::new(ROOT).join(folder).exists());
    Path::new(ROOT).join(folder.unwrap_or(package)).join("src")
}

fn metadata() -> Value {
    let rustc = Command::new("rustc").arg("-vV").output().expect("rustc -vV");
    let version = String::from_utf8(rustc.stdout).expect("UTF-8");
    let host = version.lines().find_map(|l| l.strip_prefix("host: ")).expect("host line");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--locked", "--filter-platform", host])
        .current_dir(ROOT)
        .output()
        .expect("cargo metadata");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn crates_depend_downwards_only() {
    let metadata = metadata();
    let members: Vec<&Value> =
        metadata["packages"].as_array().expect("packages").iter().filter(|p| p["source"].is_null()).collect();
    let names: BTreeSet<&str> = members.iter().map(|p| p["name"].as_str().expect("name")).collect();
    assert_eq!(names, LAYERS.iter().map(|(name, _)| *name).collect(), "packages of the workspace");
    for (name, allowed) in LAYERS {
        let package = members.iter().find(|p| p["name"] == name).expect("checked above");
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let used = dependency["name"].as_str().expect("name");
            assert!(
                !names.contains(used) || allowed.contains(&used),
                "{name} depends on {used}; ARCHITECTURE.md forbids it"
            );
        }
    }
}

#[test]
fn the_default_tree_builds_with_cargo_and_a_c_compiler_alone() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let nodes = metadata["resolve"]["nodes"].as_array().expect("nodes");
    // A build of the members takes normal and build dependencies, not those of tests.
    let mut reached: BTreeSet<&str> = BTreeSet::new();
    let mut queue: Vec<&str> =
        metadata["workspace_members"].as_array().expect("members").iter().filter_map(Value::as_str).collect();
    while let Some(id) = queue.pop() {
        if !reached.insert(id) {
            continue;
        }
        let node = nodes.iter().find(|n| n["id"] == id).expect("node");
        for dependency in node["deps"].as_array().expect("deps") {
            let kinds = dependency["dep_kinds"].as_array().expect("kinds");
            if kinds.iter().any(|k| k["kind"].is_null() || k["kind"] == "build") {
                queue.push(dependency["pkg"].as_str().expect("pkg"));
            }
        }
    }
    assert!(reached.len() > 50, "only {} packages reached", reached.len());
    let forbidden = "cmake bindgen clang-sys pkg-config vcpkg openblas-build ureq reqwest cudarc";
    for package in packages.iter().filter(|p| reached.contains(p["id"].as_str().expect("id"))) {
        let name = package["name"].as_str().expect("name");
        assert!(!forbidden.split(' ').any(|other| other == name), "{name} is in the default tree");
        // rayon-core's `links` only keeps two versions of its thread pool apart; it links nothing.
        assert!(
            package["links"].is_null() || name == "rayon-core",
            "{name} links the native library {}",
            package["links"]
        );
    }
}

#[test]
fn unsafe_code_is_forbidden_everywhere_but_in_the_kernels() {
    for (package, _) in LAYERS.iter().filter(|(name, _)| *name != "dsmoe-kernels") {
        let src = source_folder(package);
        for root in ["lib.rs", "main.rs"].map(|f| src.join(f)).iter().filter(|f| f.exists()) {
            let text = std::fs::read_to_string(root).expect("source file");
            assert!(text.contains("#![forbid(unsafe_code)]"), "{} does not forbid unsafe", root.display());
        }
    }
}

#[test]
fn every_package_is_publishable() {
    for package in
        metadata()["packages"].as_array().expect("packages").iter().filter(|p| p["source"].is_null())
    {
        for field in ["description", "license", "repository", "readme", "rust_version"] {
            assert!(package[field].is_string(), "{} has no {field}", package["name"]);
        }
        let readme = Path::new(package["manifest_path"].as_str().expect("path")).with_file_name("README.md");
        assert!(readme.exists(), "{} is missing", readme.display());
        assert!(package["metadata"]["docs"]["rs"].is_object(), "{} has no docs.rs metadata", package["name"]);
    }
}
