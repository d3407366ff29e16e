//! `dsmoe data verify`: verifies manifests and token caches.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use dsmoe_datasets::manifest::{self, MANIFEST, Verification};
use dsmoe_datasets::token_cache::TokenFile;
use serde::Serialize;

use crate::cli::data::Verify;
use crate::format;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// The exit status for a file that differs from its manifest.
const OUT_OF_TOLERANCE: u8 = 3;

#[derive(Debug, Serialize)]
struct VerifyReport {
    holds: bool,
    checked: Vec<Checked>,
}

#[derive(Debug, Serialize)]
struct Checked {
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    written: Option<usize>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    found: Option<Verification>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<usize>,
}

pub(crate) fn run(args: &Verify, ui: &mut Ui) -> Result<ExitCode> {
    let mut report = VerifyReport { holds: true, checked: Vec::new() };
    for path in &args.paths {
        let mut checked = Checked { path: path.clone(), written: None, found: None, tokens: None };
        let mut progress = Progress::new(ui, format!("hashing {}", path.display()), Unit::Bytes, 0);
        let mut heard = |done, total| progress.set(done, total, "");
        if path.extension().is_some_and(|extension| extension == "tokens") && path.is_file() {
            checked.tokens = Some(TokenFile::open(path)?.len());
        } else if args.write {
            checked.written = Some(manifest::write(path, &mut heard)?.len());
        } else {
            let found = manifest::verify(path, &mut heard)?;
            report.holds &= found.holds();
            checked.found = Some(found);
        }
        progress.finish();
        report.checked.push(checked);
    }
    ui.result(&report, show)?;
    Ok(if report.holds { ExitCode::SUCCESS } else { ExitCode::from(OUT_OF_TOLERANCE) })
}

fn show(report: &VerifyReport) -> String {
    let mut out = String::new();
    for checked in &report.checked {
        let path = checked.path.display();
        if let Some(tokens) = checked.tokens {
            out += &format!("{path}: whole, {} tokens\n", format::count(tokens as u64));
        }
        if let Some(files) = checked.written {
            out += &format!("{path}: {MANIFEST} written, {} files\n", format::count(files as u64));
        }
        if let Some(found) = &checked.found {
            for (what, names) in [
                ("missing", &found.missing),
                ("changed", &found.changed),
                ("not in the manifest", &found.extra),
            ] {
                for name in names {
                    out += &format!("{path}: {what}: {name}\n");
                }
            }
            let state = if found.holds() { "as its manifest says" } else { "NOT as its manifest says" };
            out += &format!(
                "{path}: {state}; {} files good, {} missing, {} changed, {} not in the manifest\n",
                found.good,
                found.missing.len(),
                found.changed.len(),
                found.extra.len()
            );
        }
    }
    out
}
