//! `dsmoe data verify`: verifies manifests and token caches.

use std::process::ExitCode;

use anyhow::Result;
use dsmoe_datasets::manifest::{self, MANIFEST, Verification};
use dsmoe_datasets::token_cache::TokenFile;
use serde_json::json;

use crate::cli::data::Verify;
use crate::format;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// The exit status for a file that differs from its manifest.
const OUT_OF_TOLERANCE: u8 = 3;

pub(crate) fn run(args: &Verify, ui: &mut Ui) -> Result<ExitCode> {
    let (mut holds, mut checked, mut out) = (true, Vec::new(), String::new());
    for path in &args.paths {
        let place = path.display().to_string();
        let is_cache = path.extension().is_some_and(|extension| extension == "tokens") && path.is_file();
        let mut found = json!({ "path": place });
        Progress::during(ui, format!("hashing {place}"), Unit::Bytes, |show| -> Result<()> {
            if is_cache {
                let tokens = TokenFile::open(path)?.len();
                found["tokens"] = tokens.into();
                out += &format!("{place}: whole, {} tokens\n", format::count(tokens as u64));
            } else if args.write {
                let files = manifest::write(path, show)?.len();
                found["written"] = files.into();
                out += &format!("{place}: {MANIFEST} written, {} files\n", format::count(files as u64));
            } else {
                let verification = manifest::verify(path, show)?;
                holds &= verification.holds();
                out += &described(&place, &verification);
                let fields = serde_json::to_value(verification)?;
                fields.as_object().into_iter().flatten().for_each(|(key, value)| found[key] = value.clone());
            }
            Ok(())
        })?;
        checked.push(found);
    }
    ui.result(&json!({ "holds": holds, "checked": checked }), |_| out)?;
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::from(OUT_OF_TOLERANCE) })
}

fn described(place: &str, found: &Verification) -> String {
    let mut out = String::new();
    for (what, names) in
        [("missing", &found.missing), ("changed", &found.changed), ("not in the manifest", &found.extra)]
    {
        out.extend(names.iter().map(|name| format!("{place}: {what}: {name}\n")));
    }
    let state = if found.holds() { "as its manifest says" } else { "NOT as its manifest says" };
    out + &format!(
        "{place}: {state}; {} files good, {} missing, {} changed, {} not in the manifest\n",
        found.good,
        found.missing.len(),
        found.changed.len(),
        found.extra.len()
    )
}
