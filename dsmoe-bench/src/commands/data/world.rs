//! `dsmoe data world`: writes the text, the tokenizer and the probes of the embedded world.

use anyhow::{Result, bail};
use dsmoe_datasets::train_bpe;
use dsmoe_datasets::world::{Domain, World, Written};
use serde_json::json;

use crate::cli::data as args;
use crate::files::make_folder;
use crate::format::{self, Table};
use crate::memory;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// Largest number of bytes that the tokenizer is trained on; more text only takes more time.
const TOKENIZER_BYTES: u64 = 4_000_000;
const MIN_BYTES: u64 = 10_000;
/// Bytes of an item of a probe with its row.
const ITEM_BYTES: u64 = 2 << 10;

pub(crate) fn run(args: &args::World, ui: &mut Ui) -> Result<()> {
    if args.bytes < MIN_BYTES {
        bail!("--bytes {} is too little for four domains; give {MIN_BYTES} or more", args.bytes);
    }
    let (out, items) = (&args.out, args.items as usize);
    if let Some(free) = memory::free_disk(out).filter(|free| args.bytes > *free) {
        let [asked, free] = [args.bytes, free].map(format::bytes);
        bail!("--bytes is {asked} and the disk has {free} free; give less");
    }
    let needed = (items as u64).saturating_mul(ITEM_BYTES);
    memory::check(&format!("--items {items}"), needed, memory::total(), "give less")?;
    make_folder(out, args.force, "choose another --out, or pass --force to write the world's files anew")?;
    let world = World::new(args.seed);
    let written = Progress::during(ui, "writing text", Unit::Bytes, |show| {
        world.write_text(&out.join("text"), args.bytes, &mut |done| show(done, args.bytes))
    })?;
    ui.note("training the tokenizer");
    let sample = |domain| world.documents(domain, args.bytes.min(TOKENIZER_BYTES));
    let vocab_size = train_bpe(Domain::ALL.into_iter().flat_map(sample), args.vocab as usize, out)?;
    let (mut text, mut domains) = (Table::new(["domain", "documents", "text"]), Vec::new());
    for Written { domain, documents, bytes } in written {
        text.row([domain.name().to_owned(), format::count(documents), format::bytes(bytes)]);
        domains.push(json!({ "domain": domain.name(), "documents": documents, "bytes": bytes }));
    }
    let (mut tasks, mut probes) = (Table::new(["probe", "items", "examples before each"]), Vec::new());
    for (probe, items) in world.write_probes(&out.join("probes"), items)? {
        let (name, shots) = (probe.name(), probe.task().shots);
        tasks.row([name.to_owned(), format::count(items as u64), shots.to_string()]);
        probes.push(json!({ "probe": name, "items": items, "shots": shots }));
    }
    let place = out.display().to_string();
    let report = json!({
        "out": place, "seed": args.seed, "vocab_size": vocab_size, "domains": domains, "probes": probes,
    });
    ui.result(&report, |_| {
        format!(
            "{}\n{}\n{place}: text in text/, probes in probes/, tokenizer.json of {} tokens\n",
            text.show(),
            tasks.show(),
            format::count(vocab_size as u64),
        )
    })
}
