//! `dsmoe doctor`: shows what this machine and a data folder provide.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result};
use dsmoe_core::files::leftovers;
use dsmoe_datasets::token_cache;
use dsmoe_kernels::Isa;
use serde::{Serialize, Serializer};

use crate::cli::doctor::Doctor;
use crate::files::lossy;
use crate::format;
use crate::gpu::{Gpus, gpus};
use crate::machine::Machine;
use crate::memory;
use crate::mpi::{Mpi, mpi};
use crate::ui::Ui;

/// The models, files and corpora that the checks on real models read.
const MODELS: [&str; 3] = ["tinystories-656k", "stories-260k", "babyllama-1m"];
const MODEL_FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];
const CORPORA: [&str; 6] = ["code", "math", "stories", "synthetic", "web", "wikitext2"];
const GOLDEN: [&str; 2] = ["layer.safetensors", "stories_100.txt"];

#[derive(Debug, Serialize)]
struct DoctorReport {
    version: &'static str,
    #[serde(flatten)]
    machine: Machine,
    features: Vec<&'static str>,
    isa_available: Vec<&'static str>,
    isa_forced: Option<String>,
    memory_total_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    gpu: Gpus,
    mpi: Mpi,
    /// Parts of outputs that killed commands left.
    leftovers: Vec<Left>,
    data: Data,
}

/// A part of an output, and what becomes of it. A report has the path alone.
#[derive(Debug)]
struct Left {
    path: PathBuf,
    next: &'static str,
}

impl Serialize for Left {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        lossy(&self.path, serializer)
    }
}

#[derive(Debug, Serialize)]
struct Data {
    #[serde(serialize_with = "lossy")]
    path: PathBuf,
    found: bool,
    items: Vec<Item>,
}

#[derive(Debug, Serialize)]
struct Item {
    path: String,
    ok: bool,
}

pub(crate) fn run(args: &Doctor, ui: &mut Ui) -> Result<()> {
    let shared = || std::env::var_os("DSMOE_SHARED").map(PathBuf::from);
    let data = args.data.clone().or_else(shared).unwrap_or_else(|| PathBuf::from("../shared"));
    let mut left = Vec::new();
    for folder in &args.folders {
        left.extend(left_in(folder).with_context(|| folder.display().to_string())?);
    }
    let report = DoctorReport {
        version: env!("CARGO_PKG_VERSION"),
        machine: Machine::this(),
        features: features(),
        isa_available: Isa::available().into_iter().map(Isa::name).collect(),
        isa_forced: std::env::var("DSMOE_ISA").ok(),
        memory_total_bytes: memory::total(),
        memory_available_bytes: memory::available(),
        gpu: gpus(),
        mpi: mpi(),
        leftovers: left,
        data: look_into(data),
    };
    ui.result(&report, show)
}

/// Lists what killed commands left in a folder and in the folders in it.
fn left_in(folder: &Path) -> io::Result<Vec<Left>> {
    let mut left = left_beside(folder)?;
    let mut below = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        // A link may lead anywhere; what is left over itself is removed as a whole.
        if entry.file_type()?.is_dir() && left.iter().all(|known| known.path != path) {
            below.push(path);
        }
    }
    below.sort();
    // Folders of others, which cannot be read, are not what was asked for.
    left.extend(below.iter().filter_map(|folder| left_beside(folder).ok()).flatten());
    Ok(left)
}

fn left_beside(folder: &Path) -> io::Result<Vec<Left>> {
    let next = "the next command with that output removes it";
    let mut left: Vec<Left> =
        leftovers(folder)?.into_iter().map(|left| Left { path: left.path, next }).collect();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if token_cache::is_unfinished(&path) {
            left.push(Left { path, next: "the next command with that --cache and text continues it" });
        }
    }
    left.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(left)
}

fn look_into(path: PathBuf) -> Data {
    let models = MODELS.iter().flat_map(|m| MODEL_FILES.iter().map(move |f| format!("models/{m}/{f}")));
    let corpora = CORPORA.iter().map(|c| format!("data/corpora/{c}"));
    let golden = GOLDEN.iter().map(|f| format!("golden/{f}"));
    let nll = MODELS.iter().map(|m| format!("golden/nll_{m}.json"));
    let items = models.chain(corpora).chain(golden).chain(nll);
    let items = items.map(|item| Item { ok: has(&path.join(&item)), path: item }).collect();
    Data { found: path.is_dir(), path, items }
}

/// Reports whether `path` is a file or a folder that is not empty.
fn has(path: &Path) -> bool {
    path.is_file() || std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

fn show(report: &DoctorReport) -> String {
    let machine = &report.machine;
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
    let forced = report.isa_forced.as_ref().map(|name| format!("DSMOE_ISA={name}"));
    let forced = forced.unwrap_or_else(|| "DSMOE_ISA not set".to_owned());
    let [total, available] = [report.memory_total_bytes, report.memory_available_bytes]
        .map(|bytes| or_unknown(bytes.map(format::bytes)));
    let mut fields = vec![
        ("dsmoe", report.version.to_owned()),
        ("CPU", format!("{} ({})", or_unknown(machine.cpu.clone()), machine.arch)),
        ("features", report.features.join(" ")),
        ("kernels", format!("{} of {} ({forced})", machine.isa, report.isa_available.join(", "))),
        ("threads", format!("{} on {} cores", machine.threads, machine.cores)),
        ("memory", format!("{total}, {available} available")),
    ];
    fields.extend(report.gpu.fields());
    fields.extend(report.mpi.fields());
    for (i, left) in report.leftovers.iter().enumerate() {
        let title = if i == 0 { "left over" } else { "" };
        fields.push((title, format!("{}; {}", left.path.display(), left.next)));
    }
    fields.push(("data folder", report.data.path.display().to_string()));
    let mut out = format::fields(fields);
    if !report.data.found {
        out += "missing  the folder itself; only checks on real models and texts need it\n";
        return out;
    }
    for item in &report.data.items {
        out += &format!("{}  {}\n", if item.ok { "ok     " } else { "missing" }, item.path);
    }
    out
}

/// Returns the CPU features that a kernel tier or its matrix product tests for.
fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! detected {
            ($($feature:tt)+) => { [$(($feature, is_x86_feature_detected!($feature))),+] };
        }
        let all = detected!("sse4.2" "avx" "avx2" "fma" "f16c" "avx512f" "avx512vl" "avx512bw" "avx512dq" "avx512vnni" "avx512bf16");
        all.into_iter().filter(|(_, present)| *present).map(|(name, _)| name).collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! detected {
            ($($feature:tt)+) => { [$(($feature, std::arch::is_aarch64_feature_detected!($feature))),+] };
        }
        let all = detected!("neon" "fp16" "dotprod" "bf16" "i8mm" "sve" "sve2");
        all.into_iter().filter(|(_, present)| *present).map(|(name, _)| name).collect()
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

#[cfg(test)]
mod tests {
    use dsmoe_datasets::files::{Temporary, replace};

    use super::*;

    /// dsmoe-datasets names its temporary files, and dsmoe-core says which of them are left over.
    #[test]
    fn what_a_killed_write_left_is_listed_one_folder_below_until_the_next_write() {
        if !Path::new("/proc/self").exists() {
            return;
        }
        let work = tempfile::tempdir().unwrap();
        let text = work.path().join("text");
        fs::create_dir_all(text.join("deeper")).unwrap();
        let held = Temporary::for_path(&text.join("web.txt")).unwrap();
        let entries = fs::read_dir(&text).unwrap();
        let mut names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let name = names.find(|name| name.starts_with('.')).unwrap();
        // No process has the largest number.
        let left = name.replace(&std::process::id().to_string(), "4294967295");
        fs::write(text.join(&left), "half").unwrap();
        drop(held);
        let part = work.path().join(format!("{}.part", "0a".repeat(32)));
        fs::create_dir(&part).unwrap();
        let seen = |folder: &Path| -> Vec<PathBuf> {
            left_in(folder).unwrap().into_iter().map(|left| left.path).collect()
        };
        let mut wanted = vec![text.join(&left)];
        if cfg!(unix) {
            wanted.insert(0, part);
        }
        assert_eq!(seen(work.path()), wanted);
        replace(&text.join("web.txt"), |_| Ok(())).unwrap();
        assert_eq!(seen(&text), Vec::<PathBuf>::new());
    }
}
