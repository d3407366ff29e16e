//! Estimates of time: FLOPs over rates that were measured, on this machine now and on a GPU in a record.

use std::time::Instant;

use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_kernels::Precision;

use crate::timing::matmul::{Layout, Product, inputs};

/// Approximate duration of the measurement of the machine's speed.
const TRIAL_SECONDS: f64 = 0.7;
/// Tokens of the product that the speed is measured on.
const TRIAL_TOKENS: usize = 512;
/// Bytes of a parameter in training on a GPU: itself in f32 and bf16, its gradient and two moments.
const STATE_BYTES: f64 = 18.0;
/// Models of a smaller hidden size do not reach a GPU's rate.
const SMALL: usize = 1024;

/// A GPU whose rate of training a LLaMA 3.2 1B in bf16 is in a record.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) name: &'static str,
    /// FLOPs per second of training dense models, and models of which three of eight experts are active.
    dense: f64,
    gated: f64,
    /// Bytes of its memory.
    memory: f64,
}

/// The numbers of `record/gpu-h100.json`.
pub(crate) const H100: Gpu = Gpu { name: "one H100 80GB", dense: 390e12, gated: 298e12, memory: 80e9 };

impl Gpu {
    /// Returns the hours of a training.
    pub(crate) fn hours(&self, flops: f64, gated: bool) -> f64 {
        flops / if gated { self.gated } else { self.dense } / 3600.0
    }
}

/// Returns the FLOPs of a training token: three passes of everything. Of the nine products of a gated FFN, six are of the active
/// experts, whose share is `share`, and three of these and of a share `inactive` of the others.
pub(crate) fn training_flops(
    counts: &Accounting,
    gated: bool,
    (share, inactive): (f64, f64),
    seq: usize,
) -> f64 {
    let experts = counts.num_experts;
    let all = counts.mean_flops_per_token(experts, seq);
    if !gated {
        return 3.0 * all;
    }
    let none = counts.mean_flops_per_token(0.0, seq);
    3.0 * none + (all - none) * (1.0 + 2.0 * share - (1.0 - inactive) * (1.0 - share))
}

/// Measures the FLOPs per second of a product of the shape of the model's FFN.
pub(crate) fn flops_per_second(config: &Config, precision: Precision) -> f64 {
    let shape = [TRIAL_TOKENS, config.hidden, config.intermediate];
    let mut product = Product::new(Layout::Forward, shape, precision, &inputs(shape));
    let flops = 2.0 * shape.map(|size| size as f64).iter().product::<f64>();
    let (began, mut best) = (Instant::now(), 0.0f64);
    while began.elapsed().as_secs_f64() < TRIAL_SECONDS || best == 0.0 {
        let started = Instant::now();
        product.run();
        best = best.max(flops / started.elapsed().as_secs_f64().max(1e-9));
    }
    best
}

/// Words hours on this machine and on a GPU, for a model of a hidden size and of so many parameters.
pub(crate) fn words(here: f64, speed: &str, gpu: f64, (hidden, params): (usize, u64)) -> String {
    let state = STATE_BYTES * params as f64;
    let but = if hidden < SMALL {
        ", or more, since a model this small does not fill it".to_owned()
    } else if state > H100.memory {
        format!(", if it fitted: weights, gradients and moments alone are {:.0} GB", state / 1e9)
    } else {
        String::new()
    };
    format!(
        "about {} on this machine ({speed}); about {} on {}{but}",
        duration(here),
        duration(gpu),
        H100.name
    )
}

/// Formats hours in the unit that a person would use.
pub(crate) fn duration(hours: f64) -> String {
    match hours {
        _ if hours < 1.0 / 60.0 => format!("{:.0} s", (3600.0 * hours).ceil()),
        _ if hours < 1.0 => format!("{:.0} min", (60.0 * hours).ceil()),
        _ if hours < 10.0 => format!("{hours:.1} h"),
        _ if hours < 100.0 => format!("{hours:.0} h"),
        _ if hours < 24.0 * 1000.0 => format!("{:.0} days", hours / 24.0),
        _ => format!("{:.0} years", hours / 24.0 / 365.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rates_of_the_gpu_are_the_records() {
        let record = concat!(env!("CARGO_MANIFEST_DIR"), "/record/gpu-h100.json");
        let text = std::fs::read_to_string(record).unwrap();
        let record: serde_json::Value = serde_json::from_str(&text).unwrap();
        let stages = record["stages"].as_array().unwrap();
        let rows = stages.iter().find(|stage| stage["name"] == "large").unwrap()["rows"].as_array().unwrap();
        for (what, rate) in [("train 1B dense", H100.dense), ("train 1B dsmoe", H100.gated)] {
            let row = rows.iter().find(|row| row["what"].as_str().unwrap().starts_with(what)).unwrap();
            let tflops = row["tflops"].as_f64().unwrap();
            assert!((tflops * 1e12 / rate - 1.0).abs() < 0.01, "{what}: {tflops}");
        }
    }

    #[test]
    fn hours_have_units_that_people_use() {
        let shown = [0.001, 0.4, 2.34, 53.2, 480.0, 1_708_121.0].map(duration);
        assert_eq!(shown, ["4 s", "24 min", "2.3 h", "53 h", "20 days", "195 years"]);
        let words = |hidden, params| words(1.0, "x", 0.1, (hidden, params));
        assert!(words(576, 135_000_000).contains("this small"));
        assert!(words(2048, 1_236_000_000).ends_with("one H100 80GB"));
        assert!(
            words(4096, 6_738_000_000)
                .ends_with("if it fitted: weights, gradients and moments alone are 121 GB")
        );
    }
}
