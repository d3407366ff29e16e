//! AdamW over a model's arena against its formula in f64, and the gradient's norm.

use crate::common::config;
use dsmoe_core::Model;
use dsmoe_train::TrainConfig;
use dsmoe_train::optim::{AdamW, Update, clip_scale, grad_norms, last_non_finite};

fn model() -> Model {
    Model::new(config(true))
}

#[test]
fn every_tensor_gets_its_own_decay_and_rate() {
    let mut model = model();
    let layout = model.layout().clone();
    let settings = TrainConfig { router_lr_scale: 3.0, weight_decay: 0.1, ..TrainConfig::default() };
    let mut optimizer = AdamW::new(&layout);
    model.params_mut().fill(0.5);
    let steps = [(1e-2, 0.25, [2.0f32, -0.5]), (5e-3, 1.0, [-1.0, -0.5])];
    for (step, (lr, scale, values)) in (1..).zip(steps) {
        let grads: Vec<f32> = (0..layout.len()).map(|i| values[i % 2]).collect();
        let update = Update { config: &settings, lr, scale, step };
        optimizer.step(Some(model.params_mut()), &grads, &layout, &update);
    }
    for entry in layout.entries() {
        let name = &entry.spec.name;
        let (router, norm) = (name.contains("router"), name.contains("norm"));
        for at in [entry.range.start, entry.range.start + 1] {
            let (mut p, mut m, mut v) = (0.5f64, 0.0, 0.0);
            for (step, (lr, scale, values)) in (1..).zip(steps) {
                let g = f64::from(scale * values[at % 2]);
                let lr = if router { 3.0 * lr } else { lr };
                p *= 1.0 - lr * if router || norm { 0.0 } else { 0.1 };
                m = 0.9 * m + 0.1 * g;
                v = 0.95 * v + 0.05 * g * g;
                let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(step)), v / (1.0 - 0.95f64.powi(step)));
                p -= lr * m_hat / (v_hat.sqrt() + 1e-8);
            }
            let got = f64::from(model.params()[at]);
            assert!((got - p).abs() < 1e-6, "{name}: {got} is not {p}");
        }
    }
}

#[test]
fn norms_and_clipping_by_hand() {
    let model = model();
    let layout = model.layout();
    let mut grads = vec![0.0; layout.len()];
    assert_eq!(grad_norms(layout, &grads).all, 0.0);
    let first = |name: &str| layout.get(name).unwrap().range.start;
    grads[first("model.layers.1.mlp.router.weight")] = 3.0;
    grads[first("model.embed_tokens.weight")] = -4.0;
    let norms = grad_norms(layout, &grads);
    assert_eq!((norms.all, norms.router), (5.0, 3.0));
    assert_eq!((clip_scale(5.0, 10.0), clip_scale(5.0, 0.0), clip_scale(0.0, 1.0)), (1.0, 1.0, 1.0));
    assert!((clip_scale(5.0, 1.0) - 0.2).abs() < 1e-6);

    assert_eq!(last_non_finite(layout, &grads), None);
    grads[first("model.embed_tokens.weight")] = f32::NAN;
    grads[first("model.layers.0.input_layernorm.weight")] = f32::INFINITY;
    assert_eq!(last_non_finite(layout, &grads).unwrap().layer, Some(0));
    assert!(!grad_norms(layout, &grads).all.is_finite());
}
