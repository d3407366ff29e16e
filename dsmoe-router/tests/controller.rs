//! The budget controller on simulated training.

use dsmoe_kernels::rng::Rng;
use dsmoe_router::BudgetController;

/// The course of a run, in shares.
struct Outcome {
    /// Furthest beyond the target, seen from the start.
    overshoot: f64,
    /// |mean of the last third - target|.
    offset: f64,
    /// Root-mean-square distance from the target in the last third.
    swing: f64,
}

fn run(
    target: f64,
    steps: usize,
    delay: usize,
    seed: u64,
    mut plant: impl FnMut(f64, &mut Rng) -> f64,
) -> Outcome {
    let mut controller = BudgetController::new(target as f32, steps as u64 / 3).unwrap();
    let mut rng = Rng::new(seed, 1);
    let mut shares = vec![plant(0.0, &mut rng)];
    for step in 0..steps {
        let noise = 1.0 + 0.02 * f64::from(rng.normal());
        let measured = (shares[step.saturating_sub(delay)] * noise).clamp(0.0, 1.0);
        let weight = f64::from(controller.update(measured as f32));
        assert!(weight.abs() <= 50.0);
        shares.push(plant(weight, &mut rng));
    }
    // A run that starts at the target has no approach, so nothing to overshoot.
    let start = shares[0] - target;
    let side = if start.abs() > 0.05 { start.signum() } else { 0.0 };
    let last = &shares[steps * 2 / 3..];
    let mean = |f: &dyn Fn(f64) -> f64| last.iter().map(|&s| f(s)).sum::<f64>() / last.len() as f64;
    Outcome {
        overshoot: shares.iter().map(|s| side * (target - s)).fold(0.0, f64::max),
        offset: mean(&|s| s - target).abs(),
        swing: mean(&|s| (s - target) * (s - target)).sqrt(),
    }
}

/// Adds a line to `failures` unless the outcome is within 3 points of overshoot and 1 point at the end.
fn check(failures: &mut Vec<String>, name: String, outcome: &Outcome) {
    let Outcome { overshoot, offset, swing } = outcome;
    if !(*overshoot < 0.03 && *offset < 0.01 && *swing < 0.01) {
        failures.push(format!("{name}: overshoot {overshoot:.4}, offset {offset:.4}, swing {swing:.4}"));
    }
}

#[test]
fn integrator_with_a_saturating_actuator_and_delay() {
    let mut failures = Vec::new();
    for target in [0.25, 0.375, 0.5] {
        for start in [0.05, 0.6, 1.0] {
            for (speed, steps) in [(0.01, 600), (0.002, 3000), (0.0003, 20_000)] {
                for (push, delay) in [(0.0, 0), (2.0, 2), (4.0, 5)] {
                    let mut share: f64 = start;
                    // The language-model loss pushes harder the fewer experts are left.
                    let outcome = run(target, steps, delay, 1, |weight, _| {
                        share -= speed * ((weight - push * (1.0 - share)) / 5.0).tanh();
                        share = share.clamp(0.0, 1.0);
                        share
                    });
                    let name =
                        format!("target {target} start {start} speed {speed} push {push} delay {delay}");
                    check(&mut failures, name, &outcome);
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Adam on 64 gate shifts, with a language-model gradient of its own and noise on each.
struct Gates {
    shifts: [Gate; 64],
    learning_rate: f64,
    noise: f64,
    step: i32,
}

#[derive(Clone, Copy, Default)]
struct Gate {
    logit: f64,
    push: f64,
    mean: f64,
    square: f64,
}

impl Gates {
    fn new(logit: f64, learning_rate: f64, noise: f64, rng: &mut Rng) -> Gates {
        let shifts = [(); 64].map(|()| Gate {
            logit: logit + 0.3 * f64::from(rng.normal()),
            push: 4.0 * f64::from(rng.uniform()),
            ..Gate::default()
        });
        Gates { shifts, learning_rate, noise, step: 0 }
    }

    fn share(&self) -> f64 {
        self.shifts.iter().map(|gate| 1.0 / (1.0 + (-2.0 * gate.logit).exp())).sum::<f64>() / 64.0
    }

    fn train(&mut self, weight: f64, rng: &mut Rng) -> f64 {
        let closed = 1.0 - self.share();
        self.step += 1;
        for gate in &mut self.shifts {
            let q = 1.0 / (1.0 + (-gate.logit).exp());
            let push = gate.push * (0.3 + closed);
            let gradient = (q * (1.0 - q) + 0.01) * (weight - push + self.noise * f64::from(rng.normal()));
            gate.mean = 0.9 * gate.mean + 0.1 * gradient;
            gate.square = 0.95 * gate.square + 0.05 * gradient * gradient;
            let (mean, square) =
                (gate.mean / (1.0 - 0.9f64.powi(self.step)), gate.square / (1.0 - 0.95f64.powi(self.step)));
            gate.logit -= self.learning_rate * mean / (square.sqrt() + 1e-12);
        }
        self.share()
    }
}

#[test]
fn gates_trained_by_adam() {
    let mut failures = Vec::new();
    for target in [0.25, 0.375, 0.5] {
        for logit in [2.94, 0.0, -2.0] {
            for (learning_rate, steps) in [(0.02, 3000), (0.005, 5000), (0.002, 15_000)] {
                for noise in [0.5, 5.0] {
                    let mut setup = Rng::new(2, 0);
                    let mut gates = Gates::new(logit, learning_rate, noise, &mut setup);
                    let outcome = run(target, steps, 1, 3, |weight, rng| gates.train(weight, rng));
                    let name = format!("target {target} logit {logit} lr {learning_rate} noise {noise}");
                    check(&mut failures, name, &outcome);
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn resume_is_bit_exact() {
    let mut rng = Rng::new(4, 0);
    let mut controller = BudgetController::new(0.375, 100).unwrap();
    for _ in 0..50 {
        controller.update(0.4 + 0.3 * rng.uniform());
    }
    let text = serde_json::to_string(&controller).unwrap();
    let mut resumed: BudgetController = serde_json::from_str(&text).unwrap();
    for _ in 0..50 {
        let share = rng.uniform();
        assert_eq!(controller.update(share).to_bits(), resumed.update(share).to_bits());
    }
    assert_eq!(controller, resumed);
}

#[test]
fn bad_arguments_and_measurements() {
    let error = BudgetController::new(1.5, 100).unwrap_err().to_string();
    assert_eq!(error, "active target is 1.5; use a share from 0 to 1");
    assert!(BudgetController::new(f32::NAN, 100).is_err());
    assert!(BudgetController::new(0.5, 0).unwrap_err().to_string().starts_with("ramp_steps is 0; use"));
    let mut controller = BudgetController::new(0.5, 100).unwrap();
    controller.update(0.9);
    let before = controller.clone();
    controller.update(f32::NAN);
    assert_eq!(controller, before);
}

/// The first steps of a router at a high learning rate can throw a share that starts beside its target far off, where
/// the other losses hold it.
#[test]
fn a_share_held_far_from_the_target_is_pushed_as_hard_wherever_the_run_began() {
    let growth = |start: f32| {
        let mut controller = BudgetController::new(0.375, 80).unwrap();
        controller.update(start);
        let mut weights = (0..80).map(|_| controller.update(0.575));
        let early = weights.nth(39).unwrap();
        weights.last().unwrap() - early
    };
    let (far, beside) = (growth(0.575), growth(0.38));
    assert!(far > 1.0 && beside > 0.95 * far, "weight grows by {far} from afar, {beside} from beside");
}
