//! Makes small models of a dense one by several methods, at one budget, and prints what each activates.
#![expect(clippy::print_stdout, reason = "an example prints its results")]

use dsmoe_baselines::{Budget, Job, Partial, SettingValues, method};
use dsmoe_core::Config;
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_kernels::comm::alone;
use dsmoe_kernels::rng::Rng;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    dsmoe_baselines::register();
    let dir = std::env::temp_dir().join(format!("dsmoe-prune-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = compare(&dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn compare(dir: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let (model, out) = (dir.join("dense"), dir.join("out"));
    let config: Config = preset("tiny")?;
    init(&config, &model, &InitOptions::default(), &mut |_| {})?;
    let mut rng = Rng::new(1, 0);
    let mut sequence = || (0..64).map(|_| rng.below(config.vocab_size as u64) as u32).collect();
    let calibration: Vec<Vec<u32>> = (0..8).map(|_| sequence()).collect();

    println!("{:<20} {:>10} {:>10}", "method", "total", "activated");
    for name in ["dsmoe", "dsmoe-paper", "llama-moe", "wanda", "llm-pruner-block", "small-dense"] {
        let configured = method(name)?.configure(&SettingValues::new())?;
        let (model, out, calibration) = (&model, &out, &calibration);
        let (budget, partial) = (Budget::Share(0.8), Partial::none());
        let job = Job { model, out, force: true, budget, calibration, seed: 0, comm: alone(), partial };
        let plan = configured.run(&job, &mut |_| {})?.plan;
        println!("{name:<20} {:>10} {:>10.0}  {}", plan.total, plan.activated, plan.reached_by);
    }
    Ok(())
}
