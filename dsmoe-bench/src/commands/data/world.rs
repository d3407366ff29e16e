//! `dsmoe data world`: writes the text, the tokenizer and the probes of the embedded world.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use dsmoe_datasets::train_bpe;
use dsmoe_datasets::world::{Domain, Probe, World, Written};
use serde::Serialize;

use crate::cli::data as args;
use crate::format::{self, Table};
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// Largest number of bytes that the tokenizer is trained on; more text only takes more time.
const TOKENIZER_BYTES: u64 = 4_000_000;
const MIN_BYTES: u64 = 10_000;

#[derive(Debug, Serialize)]
struct WorldReport {
    out: PathBuf,
    seed: u64,
    vocab_size: usize,
    domains: Vec<DomainRow>,
    probes: Vec<ProbeRow>,
}

#[derive(Debug, Serialize)]
struct DomainRow {
    domain: &'static str,
    documents: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct ProbeRow {
    probe: &'static str,
    items: usize,
    shots: usize,
}

pub(crate) fn run(args: &args::World, ui: &mut Ui) -> Result<()> {
    if args.bytes < MIN_BYTES {
        bail!("--bytes {} is too little for four domains; give {MIN_BYTES} or more", args.bytes);
    }
    let (out, items) = (&args.out, args.items as usize);
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let mut entries = std::fs::read_dir(out).with_context(|| out.display().to_string())?;
    if entries.next().is_some() && !args.force {
        bail!(
            "{} is not empty; choose another --out, or pass --force to write the world's files anew",
            out.display()
        );
    }
    let world = World::new(args.seed);
    let mut progress = Progress::new(ui, "writing text", Unit::Bytes, args.bytes);
    let written =
        world.write_text(&out.join("text"), args.bytes, &mut |done| progress.set(done, args.bytes, ""));
    progress.finish();
    let domains = written?;
    ui.note("training the tokenizer");
    let sample = |domain| world.documents(domain, args.bytes.min(TOKENIZER_BYTES));
    let vocab_size = train_bpe(Domain::ALL.into_iter().flat_map(sample), args.vocab as usize, out)?;
    let probes = world.write_probes(&out.join("probes"), items)?;

    let domain = |written: Written| DomainRow {
        domain: written.domain.name(),
        documents: written.documents,
        bytes: written.bytes,
    };
    let probe =
        |(probe, items): (Probe, usize)| ProbeRow { probe: probe.name(), items, shots: probe.task().shots };
    let report = WorldReport {
        out: out.clone(),
        seed: args.seed,
        vocab_size,
        domains: domains.into_iter().map(domain).collect(),
        probes: probes.into_iter().map(probe).collect(),
    };
    ui.result(&report, show)
}

fn show(report: &WorldReport) -> String {
    let mut domains = Table::new(["domain", "documents", "text"]);
    for row in &report.domains {
        domains.row([row.domain.to_owned(), format::count(row.documents), format::bytes(row.bytes)]);
    }
    let mut probes = Table::new(["probe", "items", "examples before each"]);
    for row in &report.probes {
        probes.row([row.probe.to_owned(), format::count(row.items as u64), row.shots.to_string()]);
    }
    format!(
        "{}\n{}\n{}: text in text/, probes in probes/, tokenizer.json of {} tokens\n",
        domains.show(),
        probes.show(),
        report.out.display(),
        format::count(report.vocab_size as u64),
    )
}
