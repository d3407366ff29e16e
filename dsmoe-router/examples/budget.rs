//! Drives the active share of a router to a target: the budget controller sets the weight of the sparsity loss, and plain
//! gradient steps move the logits.
//!
//! ```text
//! cargo run -p dsmoe-router --example budget
//! ```
#![expect(clippy::print_stdout, reason = "an example shows its results")]

use dsmoe_kernels::rng::Rng;
use dsmoe_router::{BudgetController, RouterConfig, SparsityGrad, SparsityOver, route, ste};
use ndarray::Array2;

const TOKENS: usize = 512;
const EXPERTS: usize = 8;
const STEPS: u64 = 400;
const LEARNING_RATE: f32 = 0.08;
/// Push of the language-model loss, which opens gates.
const PUSH: f32 = 0.5;

fn main() -> Result<(), dsmoe_router::Error> {
    let config = RouterConfig::new(EXPERTS);
    let mut controller = BudgetController::new(0.375, STEPS / 3)?;
    let mut rng = Rng::new(1, 0);
    let mut logits = Array2::from_shape_simple_fn((TOKENS, EXPERTS), || rng.normal());
    let dcoefficients = Array2::zeros((TOKENS, EXPERTS));
    let mut dlogits = Array2::zeros((TOKENS, EXPERTS));

    for step in 0..=STEPS {
        let routed = route(&config, logits.view());
        let share = routed.routing.active_ratio() as f32;
        let weight = controller.update(share);
        if step % 50 == 0 {
            println!("step {step:3}: {:4.1} % of pairs active, weight {weight:6.2}", 100.0 * share);
        }
        // An optimiser bounds the pull of the loss, whatever its weight.
        let pull = (weight / 3.0).clamp(-1.0, 1.0) - PUSH;
        let sparsity = SparsityGrad { weight: pull, over: SparsityOver::All };
        ste::backward(&config, &routed, dcoefficients.view(), sparsity, dlogits.view_mut());
        logits.scaled_add(-LEARNING_RATE, &dlogits);
    }
    let share = route(&config, logits.view()).routing.active_ratio();
    println!("target {:.1} %, reached {:.1} %", 100.0 * controller.target(), 100.0 * share);
    Ok(())
}
