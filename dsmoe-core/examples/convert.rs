//! Makes a small random LLaMA, converts it to a DSMoE model and generates tokens with both.
//!
//! ```text
//! cargo run -p dsmoe-core --example convert
//! ```
#![expect(clippy::print_stdout, reason = "an example shows its results")]

use dsmoe_core::Inference;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_kernels::Precision;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let work = tempfile::tempdir()?;
    let (dense, moe) = (work.path().join("dense"), work.path().join("moe"));

    let config = preset("tiny")?;
    init(&config, &dense, &InitOptions::default(), &mut |_| {})?;
    let report = convert(&dense, &moe, &ConvertOptions::new(8), &mut |_| {})?;
    println!(
        "{} layers, {} experts of {} neurons each, {} parameters in routers",
        report.num_layers, report.num_experts, report.expert_width, report.router_params
    );

    for dir in [&dense, &moe] {
        let model = Inference::load(dir, Precision::F32)?;
        let options = GenerateOptions { max_tokens: 16, ..GenerateOptions::default() };
        let text = generate(&model, &[1, 2, 3], &options, |_| true)?;
        let name = dir.file_name().unwrap_or_default().display();
        let total = model.accounting().total;
        match &text.stats {
            None => println!("{name}: {total} parameters, all active; tokens {:?}", text.tokens),
            Some(stats) => {
                let active = stats.active_ratio() * report.num_experts as f64;
                let activated = model.accounting().activated(active);
                println!("{name}: {total} parameters, {activated:.0} active; tokens {:?}", text.tokens);
            }
        }
    }
    Ok(())
}
