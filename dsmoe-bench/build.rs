//! Tells the command which compiler and which revision of the source it was built with.

use std::process::Command;

fn main() {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let revision = std::env::var("DSMOE_REVISION").ok().or_else(packaged).unwrap_or_else(|| {
        first_line("git", &["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    });
    println!("cargo:rustc-env=DSMOE_RUSTC={}", first_line(&rustc, &["--version"]));
    println!("cargo:rustc-env=DSMOE_REVISION={revision}");
    println!("cargo:rerun-if-env-changed=DSMOE_REVISION");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src");
    for name in ["HEAD", "index"] {
        let path = first_line("git", &["rev-parse", "--git-path", name]);
        // Outside a repository there is no such file, and a missing one would mean to run every time.
        if std::path::Path::new(&path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
}

/// Returns the revision that a package was made from, which cargo writes into it.
fn packaged() -> Option<String> {
    let text = std::fs::read_to_string(".cargo_vcs_info.json").ok()?;
    let hash = text.split_once("\"sha1\"")?.1.split('"').nth(1)?;
    Some(hash.chars().take(12).collect())
}

/// Returns the output of a program, or `unknown`.
fn first_line(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success());
    let text = output.and_then(|output| String::from_utf8(output.stdout).ok()).unwrap_or_default();
    let line = text.lines().next().unwrap_or_default().trim();
    if line.is_empty() { "unknown".to_owned() } else { line.to_owned() }
}
