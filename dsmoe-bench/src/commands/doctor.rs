//! `dsmoe doctor`: what this machine and a data folder have.

use std::path::{Path, PathBuf};

use anyhow::Result;
use dsmoe_kernels::Isa;
use serde::Serialize;

use crate::cli::doctor::Doctor;
use crate::format;
use crate::gpu::{Gpus, gpus};
use crate::machine::cpu_model;
use crate::memory;
use crate::ui::Ui;

/// What the checks on real models and texts read.
const MODELS: [&str; 3] = ["tinystories-656k", "stories-260k", "babyllama-1m"];
const MODEL_FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];
const CORPORA: [&str; 6] = ["code", "math", "stories", "synthetic", "web", "wikitext2"];
const GOLDEN: [&str; 2] = ["layer.safetensors", "stories_100.txt"];

#[derive(Debug, Serialize)]
struct Machine {
    version: &'static str,
    cpu: Option<String>,
    arch: &'static str,
    features: Vec<&'static str>,
    isa: String,
    isa_available: Vec<&'static str>,
    isa_forced: Option<String>,
    cores: usize,
    threads: usize,
    memory_total_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    gpu: Gpus,
    data: Data,
}

#[derive(Debug, Serialize)]
struct Data {
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
    let data = args
        .data
        .clone()
        .or_else(|| std::env::var_os("DSMOE_SHARED").map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from("../shared"));
    let machine = Machine {
        version: env!("CARGO_PKG_VERSION"),
        cpu: cpu_model(),
        arch: std::env::consts::ARCH,
        features: features(),
        isa: Isa::current().name().to_owned(),
        isa_available: Isa::available().into_iter().map(Isa::name).collect(),
        isa_forced: std::env::var("DSMOE_ISA").ok(),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        threads: rayon::current_num_threads(),
        memory_total_bytes: memory::total(),
        memory_available_bytes: memory::available(),
        gpu: gpus(),
        data: look_into(data),
    };
    ui.result(&machine, show)
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

/// Whether there is a file, or a folder with something in it.
fn has(path: &Path) -> bool {
    path.is_file() || std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

fn show(machine: &Machine) -> String {
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
    let forced = match &machine.isa_forced {
        Some(name) => format!("DSMOE_ISA={name}"),
        None => "DSMOE_ISA not set".to_owned(),
    };
    let mut fields = vec![
        ("dsmoe", machine.version.to_owned()),
        ("CPU", format!("{} ({})", or_unknown(machine.cpu.clone()), machine.arch)),
        ("features", machine.features.join(" ")),
        ("kernels", format!("{} of {} ({forced})", machine.isa, machine.isa_available.join(", "))),
        ("threads", format!("{} on {} cores", machine.threads, machine.cores)),
        (
            "memory",
            format!(
                "{}, {} available",
                or_unknown(machine.memory_total_bytes.map(format::bytes)),
                or_unknown(machine.memory_available_bytes.map(format::bytes))
            ),
        ),
    ];
    fields.extend(machine.gpu.fields());
    fields.push(("data folder", machine.data.path.display().to_string()));
    let mut out = format::fields(fields);
    if !machine.data.found {
        out += "missing  the folder itself; only checks on real models and texts need it\n";
        return out;
    }
    for item in &machine.data.items {
        out += &format!("{}  {}\n", if item.ok { "ok     " } else { "missing" }, item.path);
    }
    out
}

/// The CPU features that a kernel tier or its matrix product looks at.
fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! detected {
            ($($feature:tt),+) => {
                [$(($feature, is_x86_feature_detected!($feature))),+]
            };
        }
        let all = detected!(
            "sse4.2",
            "avx",
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512vl",
            "avx512bw",
            "avx512dq",
            "avx512vnni",
            "avx512bf16"
        );
        all.into_iter().filter(|(_, present)| *present).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}
