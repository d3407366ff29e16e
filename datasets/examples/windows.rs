//! Tokenizes text of the embedded world and cuts it into training and evaluation windows.
#![expect(clippy::print_stdout, reason = "an example reports")]

use dsmoe_datasets::world::{Domain, World};
use dsmoe_datasets::{
    Bos, Mixture, SplitOptions, TokenSource, TokenStream, Tokenizer, eval_windows, train_bpe,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // A tokenizer trained on the text itself.
    let dir = tempfile::tempdir()?;
    let world = World::new(0);
    let texts: Vec<String> = world.documents(Domain::Facts, 100_000).collect();
    let vocab_size = train_bpe(texts.iter().cloned(), 512, dir.path())?;
    let tokenizer = Tokenizer::load(dir.path(), Some(0), vocab_size)?;

    // One stream of ids; every document starts with BOS.
    let mut stream = TokenStream::default();
    for text in &texts {
        stream.push(&tokenizer.encode(text, Bos::Auto)?);
    }
    println!("{} documents, {} tokens of {vocab_size}", texts.len(), stream.ids.len());

    // A training side and a held-out side without common text, in windows of 32 tokens.
    let source = TokenSource { name: "facts".into(), weight: 1.0, tokens: stream.into() };
    let options = SplitOptions { seq: 32, valid_fraction: 0.05, valid_samples: 100 };
    let mixture = Mixture::new(&[source], options, Some(&tokenizer.token_texts()))?;
    let mut order = mixture.interleaving(2, 0)?;
    for sample in order.batch_at(0) {
        let mut window = Vec::new();
        mixture.window(sample, &mut window)?;
        println!("train on: {:?}", tokenizer.decode(&window, true)?);
    }
    let held_out = mixture.parts()[0].split.valid_tokens();
    let windows = eval_windows(held_out.len(), 33, 33)?;
    println!("evaluate on {} windows of {} tokens", windows.len(), held_out.len());
    Ok(())
}
