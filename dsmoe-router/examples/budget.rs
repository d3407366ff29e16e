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
const STEPS: u64 = 240;
/// Movement of a logit in a step, as of an optimiser that scales gradients.
const STEP: f32 = 0.01;

fn main() -> Result<(), dsmoe_router::Error> {
    let config = RouterConfig::new(EXPERTS);
    let mut controller = BudgetController::new(0.375, STEPS / 3)?;
    let mut rng = Rng::new(1, 0);
    let mut logits = Array2::from_shape_simple_fn((TOKENS, EXPERTS), || rng.normal());
    // The loss of a language model would set these; here every expert is worth the same.
    let dcoefficients = Array2::zeros((TOKENS, EXPERTS));
    let mut dlogits = Array2::zeros((TOKENS, EXPERTS));

    for step in 0..=STEPS {
        let routed = route(&config, logits.view());
        let share = routed.routing.active_ratio() as f32;
        let weight = controller.update(share);
        if step % 40 == 0 {
            println!("step {step:3}: {:4.1} % of pairs active, weight {weight:6.2}", 100.0 * share);
        }
        let sparsity = SparsityGrad { weight, over: SparsityOver::All };
        ste::backward(&config, &routed, dcoefficients.view(), sparsity, dlogits.view_mut());
        let size = dlogits.iter().fold(f32::MIN_POSITIVE, |size, dz| size.max(dz.abs()));
        let pull = (weight.abs() / 10.0).min(1.0);
        logits.scaled_add(-STEP * pull / size, &dlogits);
    }
    let share = route(&config, logits.view()).routing.active_ratio();
    println!("target {:.1} %, reached {:.1} %", 100.0 * controller.target(), 100.0 * share);
    Ok(())
}
