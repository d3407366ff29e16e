//! The controller of thresholds on simulated training.

use dsmoe_kernels::rng::Rng;
use dsmoe_router::{Knot, LogitCounts, Pull, ThresholdController};
use ndarray::Array2;

const LAYERS: usize = 3;
const EXPERTS: usize = 8;
const TOKENS: usize = 100;

/// Router logits that training moves: each layer's centre drifts, and each batch of text has a centre of its own.
struct Plant {
    centres: [f64; LAYERS],
    spread: f64,
    /// Logits per step.
    drift: f64,
    /// Deviation of the centre of a batch.
    variation: f64,
    rng: Rng,
}

impl Plant {
    fn new(centre: f64, spread: f64, drift: f64) -> Plant {
        let centres = [centre, centre + 0.5 * spread, centre - 0.5 * spread];
        Plant { centres, spread, drift, variation: 0.05 * spread, rng: Rng::new(7, 0) }
    }

    /// Returns the logits of a batch.
    fn batch(&mut self) -> LogitCounts {
        let mut counts = LogitCounts::new(LAYERS);
        for layer in 0..LAYERS {
            let centre = self.centres[layer] + self.variation * f64::from(self.rng.normal());
            let logit = |_| (centre + self.spread * f64::from(self.rng.normal())) as f32;
            let logits =
                Array2::from_shape_vec((TOKENS, EXPERTS), (0..TOKENS * EXPERTS).map(logit).collect());
            counts.add(layer, 1, logits.unwrap().view());
        }
        counts
    }

    fn train(&mut self) {
        self.centres.iter_mut().zip([1.0, 0.5, 0.8]).for_each(|(centre, part)| *centre += part * self.drift);
    }

    /// Returns the share of much other text under the thresholds of `knot`.
    fn held_out(&mut self, controller: &ThresholdController, knot: usize) -> f64 {
        let mut all = LogitCounts::new(LAYERS);
        (0..40).for_each(|_| all.merge(&self.batch()));
        all.curves().share(&controller.knots()[knot].bars)
    }
}

fn single(target: f64, start: f64, steps: u64) -> ThresholdController {
    ThresholdController::new(vec![Knot { active: target, bars: vec![start; LAYERS] }], steps / 3).unwrap()
}

#[test]
fn sixty_steps_and_thousands_land_on_the_target() {
    let mut failures = Vec::new();
    for (steps, drifts) in [(60, [0.0, 0.05, -0.1]), (300, [0.0, 0.002, -0.02])] {
        for drift in drifts {
            for (centre, spread) in [(0.0, 2.0), (3.0, 0.1), (-2.0, 4.0)] {
                for target in [0.25, 0.375, 0.75] {
                    let mut plant = Plant::new(centre, spread, drift);
                    let mut controller = single(target, 0.0, steps);
                    for _ in 0..steps {
                        controller.update(target, &plant.batch());
                        plant.train();
                    }
                    let share = plant.held_out(&controller, 0);
                    // A threshold lags behind by two steps of the drift.
                    let allowed = if drift.abs() > 0.04 * spread { 0.5 } else { 0.03 };
                    if (share - target).abs() > allowed {
                        failures.push(format!("{steps} {drift} {centre} {spread} {target}: {share}"));
                    }
                    controller.fit(0, &(0..40).map(|_| plant.batch()).reduce(merged).unwrap());
                    let share = plant.held_out(&controller, 0);
                    if (share - target).abs() > 0.01 {
                        failures.push(format!("fitted {steps} {drift} {centre} {spread} {target}: {share}"));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

fn merged(mut sum: LogitCounts, part: LogitCounts) -> LogitCounts {
    sum.merge(&part);
    sum
}

#[test]
fn a_start_from_afar_is_a_ramp_and_one_nearby_is_none() {
    let mut plant = Plant::new(3.0, 1.0, 0.0);
    plant.variation = 0.0;
    let mut controller = single(0.375, 0.0, 90);
    let mut shares = Vec::new();
    for _ in 0..90 {
        let counts = plant.batch();
        shares.push(counts.curves().share(&controller.knots()[0].bars));
        controller.update(0.375, &counts);
    }
    let largest = shares.windows(2).map(|pair| pair[0] - pair[1]).fold(0.0, f64::max);
    assert!(largest < 0.06 && shares[0] > 0.95 && (shares[45] - 0.375).abs() < 0.02, "{shares:?}");
    let mut controller = single(0.9, 0.0, 90);
    // A ramp of 90 updates would be at a sixth of its way.
    (0..16).for_each(|_| controller.update(0.9, &plant.batch()));
    let share = plant.batch().curves().share(&controller.knots()[0].bars);
    assert!((share - 0.9).abs() < 0.02, "{share}");
}

#[test]
fn several_budgets_are_held_at_once_and_mixed_between() {
    let shares = [0.25, 0.5, 0.75, 1.0];
    let knots = shares.map(|active| Knot { active, bars: vec![0.0; LAYERS] }).to_vec();
    let mut controller = ThresholdController::new(knots, 1).unwrap();
    let mut plant = Plant::new(0.5, 2.0, 0.005);
    let mut rng = Rng::new(3, 3);
    for _ in 0..200 {
        controller.update(0.25 + 0.75 * f64::from(rng.uniform()), &plant.batch());
        plant.train();
    }
    for (knot, &share) in shares.iter().enumerate() {
        controller.fit(knot, &(0..40).map(|_| plant.batch()).reduce(merged).unwrap());
        let held = plant.held_out(&controller, knot);
        assert!((held - share).abs() < 0.01, "{held} for {share}");
    }
    let bars = controller.bars(&[0.375, 1.0, 0.1]);
    let of = |knot: usize, layer: usize| controller.knots()[knot].bars[layer];
    assert_eq!(bars, [(0.5 * of(0, 0) + 0.5 * of(1, 0)) as f32, f32::NEG_INFINITY, of(0, 2) as f32]);
}

#[test]
fn micro_batches_of_one_step_move_thresholds_together() {
    let mut plant = Plant::new(0.5, 2.0, 0.0);
    let knots = || [0.25, 0.5, 1.0].map(|active| Knot { active, bars: vec![0.0; LAYERS] }).to_vec();
    let mut together = ThresholdController::new(knots(), 1).unwrap();
    let mut one_by_one = together.clone();
    // Equal logits move a knot as far as they do one after the other, whose thresholds follow the same quantile.
    let (counts, active) = (plant.batch(), [0.25, 0.375, 0.25]);
    let of_knot = |times: usize| (0..times).map(|_| counts.clone()).reduce(merged).unwrap();
    let of_knots = [of_knot(3), of_knot(1)];
    assert_eq!(together.moved_by(0.375).collect::<Vec<_>>(), [0, 1]);
    together.update_together(&active, |knot| of_knots.get(knot));
    active.iter().for_each(|&active| one_by_one.update(active, &counts));
    for (knot, (a, b)) in together.knots().iter().zip(one_by_one.knots()).enumerate() {
        assert!((a.bars[0] - b.bars[0]).abs() < 1e-6, "knot {knot}: {a:?} {b:?}");
    }
    assert_eq!(together.knots()[2].bars, [0.0; LAYERS]);
    // A ramp counts micro-batches, however they are taken.
    let mut plant = Plant::new(3.0, 1.0, 0.0);
    plant.variation = 0.0;
    let mut controller = single(0.375, 0.0, 90);
    for _ in 0..26 {
        let counts: Vec<LogitCounts> = (0..4).map(|_| plant.batch()).collect();
        let all = counts.into_iter().reduce(merged).unwrap();
        controller.update_together(&[0.375; 4], |_| Some(&all));
    }
    let share = plant.held_out(&controller, 0);
    assert!((share - 0.375).abs() < 0.02, "{share}");
}

#[test]
fn multipliers_are_means_of_their_budgets() {
    let knots = [0.25, 0.5, 0.75].map(|active| Knot { active, bars: vec![0.0; LAYERS] }).to_vec();
    let mut controller = ThresholdController::new(knots, 1).unwrap();
    let pull = |multiplier: f64| Pull { force: -2.0 * multiplier, slope: 2.0 };
    controller.pulled(0.5, Pull { force: 1.0, slope: 0.0 });
    assert_eq!(controller.multiplier(0.5), None, "gates without a slope tell nothing");
    controller.pulled(0.5, pull(4.0));
    assert_eq!([0.5, 0.25, 0.6].map(|at| controller.multiplier(at)), [Some(4.0), None, Some(4.0)]);
    controller.pulled(0.5, pull(5.0));
    assert_eq!(controller.multiplier(0.5), Some(4.2));
    controller.pulled(0.25, pull(8.2));
    let between = controller.multiplier(0.375).unwrap();
    assert!((between - 6.2).abs() < 1e-12, "{between}");
    let text = serde_json::to_string(&controller).unwrap();
    assert_eq!(serde_json::from_str::<ThresholdController>(&text).unwrap(), controller);
    // One that was stored before there were multipliers.
    let (start, rest) = text.split_once(",\"multipliers\":").unwrap();
    let old = [start, &rest[rest.find(']').unwrap() + 1..]].concat();
    let mut old: ThresholdController = serde_json::from_str(&old).unwrap();
    assert_eq!(old.multiplier(0.5), None);
    old.pulled(0.5, pull(3.0));
    assert_eq!(old.multiplier(0.5), Some(3.0));
}

#[test]
fn it_resumes_to_the_bit_and_refuses_what_does_not_fit() {
    let (mut plant, mut controller) = (Plant::new(2.0, 1.0, 0.01), single(0.375, 0.0, 60));
    (0..10).for_each(|_| controller.update(0.375, &plant.batch()));
    let text = serde_json::to_string(&controller).unwrap();
    let mut resumed: ThresholdController = serde_json::from_str(&text).unwrap();
    for _ in 0..10 {
        let counts = plant.batch();
        controller.update(0.375, &counts);
        resumed.update(0.375, &counts);
    }
    assert_eq!(controller, resumed);
    let before = controller.clone();
    controller.update(0.375, &LogitCounts::new(LAYERS));
    assert_eq!(controller, before);
    let knot = |active: f64, layers: usize| Knot { active, bars: vec![0.0; layers] };
    for knots in [
        vec![],
        vec![knot(0.5, 0)],
        vec![knot(1.5, 2)],
        vec![knot(0.5, 2), knot(0.25, 2)],
        vec![knot(0.25, 2), knot(0.5, 3)],
        vec![Knot { active: 0.5, bars: vec![f64::NAN] }],
    ] {
        let error = ThresholdController::new(knots, 10).unwrap_err().to_string();
        assert!(error.starts_with("budgets is") && error.contains("ascending"), "{error}");
    }
}
