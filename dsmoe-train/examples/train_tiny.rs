//! Trains a tiny model with random weights for a few steps on the embedded world and evaluates it.
#![expect(clippy::print_stdout, reason = "an example reports")]

use std::sync::atomic::AtomicBool;

use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::init::{InitOptions, LlamaSizes, init};
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::world::{Domain, World};
use dsmoe_datasets::{Bos, TokenStream, Tokenizer, train_bpe};
use dsmoe_kernels::Precision;
use dsmoe_train::{EvalOptions, Observer, RunOptions, StepRecord, TrainConfig, Trainer, evaluate};

struct Print;

impl Observer for Print {
    fn step(&mut self, record: &StepRecord) {
        let active = record.activation_ratio.unwrap_or(1.0);
        let StepRecord { step, lm_loss, .. } = record;
        println!("step {step:2}: loss {lm_loss:.3}, {:.0} % of experts active", 100.0 * active);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let (dense, source, out) = (dir.path().join("dense"), dir.path().join("source"), dir.path().join("out"));

    // A dense model with random weights, cut into four experts.
    let texts: Vec<String> = World::new(0).documents(Domain::Stories, 200_000).collect();
    let vocab = train_bpe(texts.iter().cloned(), 512, dir.path())?;
    let (hidden, intermediate, layers, heads, kv_heads, positions) = (32, 64, 2, 4, 2, 64);
    let bos_eos = [0, 1];
    let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos };
    init(&sizes.config()?, &dense, &InitOptions::default(), &mut |_| {})?;
    convert(&dense, &source, &ConvertOptions::new(4), &mut |_| {})?;

    let tokenizer = Tokenizer::load(dir.path(), Some(0), vocab)?;
    let mut stream = TokenStream::default();
    for text in &texts {
        stream.push(&tokenizer.encode(text, Bos::Auto)?);
    }

    let mut config = TrainConfig { batch: 4, seq: 64, lr: 1e-2, ..TrainConfig::default() };
    config.set("steps=20")?;
    config.set("active_target=0.5")?;
    let model = Model::load(&source)?;
    let mut trainer = Trainer::new(model, &stream, config, RunOptions::new(&source, &out))?;
    trainer.run(&mut Print, &AtomicBool::new(false))?;

    let model = Inference::new(trainer.model(), Precision::F32);
    let report = evaluate(&model, &stream.ids[..4096], EvalOptions::new(64), &mut |_, _| {})?;
    println!("perplexity {:.1} after training", report.ppl);
    Ok(())
}
