//! The f64 reference against numbers worked by hand and finite differences; the f32 code against the reference.

use dsmoe_kernels::testing::{assert_close, assert_close_f64, f64s, finite_differences, normals};
use dsmoe_router::reference::{self, RoutedF64};
use dsmoe_router::{
    GateValue, Pull, Rescale, RouterConfig, SparsityGrad, SparsityOver, ZeroActive, route, sparsity, ste,
};
use ndarray::{Array2, array};

const NO_SPARSITY: SparsityGrad = SparsityGrad { weight: 0.0, over: SparsityOver::Active };

/// Every combination of settings, at thresholds on both sides of a half.
fn configs(num_experts: usize) -> Vec<RouterConfig> {
    let mut configs = Vec::new();
    for threshold in [0.0, 0.3, 0.5, 0.7, 1.0] {
        for bits in 0..16 {
            let gate_value = [GateValue::Sigmoid, GateValue::Binary][bits & 1];
            let rescale = [Rescale::None, Rescale::Eq8][bits >> 1 & 1];
            let zero_active = [ZeroActive::Skip, ZeroActive::ForceArgmax][bits >> 2 & 1];
            let ste = bits >> 3 == 0;
            configs.push(RouterConfig { num_experts, threshold, gate_value, rescale, zero_active, ste });
        }
    }
    configs
}

/// The layer with d = D = n = 2, W = V = I, U = [[1, 2], [0, 1]], Y = [[1, -0.5], [0, 0.5]], x = [1, -1]: the
/// experts' outputs, one row each, and the logits.
fn hand_layer() -> ([[f64; 2]; 2], [f64; 2]) {
    let silu = |s: f64| s / (1.0 + (-s).exp());
    let x = [1.0, -1.0];
    // Hidden neuron j has gate input x_j and up input (x U)_j; expert j writes output j alone.
    let up = [x[0], 2.0 * x[0] + x[1]];
    let outputs = [[silu(x[0]) * up[0], 0.0], [0.0, silu(x[1]) * up[1]]];
    (outputs, [x[0], -0.5 * x[0] + 0.5 * x[1]])
}

fn combine(coef: &[f64], outputs: &[[f64; 2]; 2]) -> [f64; 2] {
    [0, 1].map(|j| coef[0] * outputs[0][j] + coef[1] * outputs[1][j])
}

#[test]
fn the_hand_example() {
    let (outputs, logits) = hand_layer();
    let config = RouterConfig::new(2);
    let routed = reference::route(&config, &logits);
    assert_close_f64("dense", &combine(&[1.0, 1.0], &outputs), &[0.731059, -0.268941], 1e-6);
    assert_close_f64("gates", &routed.gates, &[0.731059, 0.268941], 1e-6);
    assert_eq!(routed.mask, [true, false]);
    assert_close_f64("eq. 11", &combine(&routed.coef, &outputs), &[0.534447, 0.0], 1e-6);
    let rescaled = reference::route(&RouterConfig { rescale: Rescale::Eq8, ..config.clone() }, &logits);
    assert_close_f64("eq. 8", &combine(&rescaled.coef, &outputs), &[1.068893, 0.0], 1e-6);

    // loss = sum(h), so <dy, o_i> is the sum of o_i.
    let dcoef = outputs.map(|o| o[0] + o[1]);
    for (ste, want) in [(true, [0.143735, -0.052877]), (false, [0.143735, 0.0])] {
        let config = RouterConfig { ste, ..config.clone() };
        let dlogits = reference::backward(&config, &routed, &dcoef, 0.0, SparsityOver::Active);
        assert_close_f64(&format!("dz, ste {ste}"), &dlogits, &want, 1e-6);
    }
    for (over, loss, want) in
        [(SparsityOver::Active, 0.365529, [0.098306, 0.0]), (SparsityOver::All, 0.5, [0.098306, 0.098306])]
    {
        assert_close_f64(&format!("{over:?}"), &[reference::sparsity(&routed, over)], &[loss], 1e-6);
        let dlogits = reference::backward(&config, &routed, &[0.0, 0.0], 0.5, over);
        assert_close_f64(&format!("dz of {over:?}"), &dlogits, &want, 1e-6);
    }
}

#[test]
fn zero_router_shuts_all_experts_without_nan() {
    let config = RouterConfig { rescale: Rescale::Eq8, ..RouterConfig::new(4) };
    let routed = route(&config, Array2::zeros((3, 4)).view());
    assert_eq!(routed.routing.num_routed(), 0);
    assert_eq!(sparsity::loss(&routed, SparsityOver::Active), 0.0);
    let mut dlogits = Array2::zeros((3, 4));
    ste::backward(&config, &routed, Array2::ones((3, 4)).view(), NO_SPARSITY, dlogits.view_mut());
    // c = n / max(k, 1) = 4, q (1 - q) = 1/4.
    assert_eq!(dlogits, Array2::<f32>::ones((3, 4)));
}

/// sum of r c S + weight * sum of the counted gates, with mask, k and (for `S = G`) the value of inactive gates
/// held at `frozen`: what the STE declares the loss to be around this point.
fn surrogate(
    config: &RouterConfig,
    frozen: &RoutedF64,
    z: &[f64],
    r: &[f64],
    weight: f64,
    over: SparsityOver,
) -> f64 {
    let n = config.num_experts;
    let mut loss = 0.0;
    for (pair, &z) in z.iter().enumerate() {
        let q = 1.0 / (1.0 + (-z).exp());
        let active = frozen.mask[pair];
        let token = &frozen.mask[pair / n * n..pair / n * n + n];
        let k = token.iter().filter(|m| **m).count().max(1);
        let scale = if config.rescale == Rescale::Eq8 { n as f64 / k as f64 } else { 1.0 };
        let value = match (config.ste, config.gate_value) {
            (true, _) => q,
            (false, GateValue::Sigmoid) => q * f64::from(u8::from(active)),
            (false, GateValue::Binary) => f64::from(u8::from(active)),
        };
        loss += r[pair] * scale * value;
        if active || over == SparsityOver::All {
            loss += weight * q;
        }
    }
    loss
}

#[test]
fn reference_gradient_is_finite_differences_with_the_mask_frozen() {
    let n = 5;
    let (logits, dcoef) = (f64s(&normals(6 * n, 3)), f64s(&normals(6 * n, 4)));
    for config in configs(n) {
        for over in [SparsityOver::Active, SparsityOver::All] {
            let routed = reference::route(&config, &logits);
            let got = reference::backward(&config, &routed, &dcoef, 0.3, over);
            let loss = |z: &[f64]| surrogate(&config, &routed, z, &dcoef, 0.3, over);
            let want = finite_differences(&logits, 1e-5, loss);
            assert_close_f64(&format!("{config:?} {over:?}"), &got, &want, 1e-9);
        }
    }
}

#[test]
fn f32_agrees_with_the_reference() {
    for (num_tokens, n) in [(0, 8), (1, 1), (7, 3), (33, 8)] {
        let shape = (num_tokens, n);
        let logits = Array2::from_shape_vec(shape, normals(num_tokens * n, 5)).unwrap() * 3.0;
        let dcoef = Array2::from_shape_vec(shape, normals(num_tokens * n, 6)).unwrap();
        for config in configs(n) {
            let name = |what: &str| format!("{what} of {config:?}");
            let got = route(&config, logits.view());
            let want = reference::route(&config, &f64s(logits.as_slice().unwrap()));
            assert_eq!(got.mask.as_slice().unwrap(), want.mask, "{}", name("mask"));
            assert_close(&name("gates"), got.gates.as_slice().unwrap(), &want.gates, 2e-7);

            let mut coef = vec![0.0f32; num_tokens * n];
            for expert in 0..n {
                for slot in got.routing.offsets[expert]..got.routing.offsets[expert + 1] {
                    coef[got.routing.tokens[slot] as usize * n + expert] = got.routing.coefficients[slot];
                }
            }
            assert_close(&name("coefficients"), &coef, &want.coef, 2e-7);

            for over in [SparsityOver::Active, SparsityOver::All, SparsityOver::Held] {
                let value = sparsity::loss(&got, over);
                assert_close_f64(&name("sparsity"), &[value], &[reference::sparsity(&want, over)], 2e-7);
                let mut dlogits = Array2::from_elem(shape, f32::NAN);
                let sparsity = SparsityGrad { weight: 0.25, over };
                let pull = ste::backward(&config, &got, dcoef.view(), sparsity, dlogits.view_mut());
                let dcoef = f64s(dcoef.as_slice().unwrap());
                let dwant = reference::backward(&config, &want, &dcoef, 0.25, over);
                let [force, slope] = reference::pull(&config, &want, &dcoef);
                assert_close_f64(&name("pull"), &[pull.force, pull.slope], &[force, slope], 2e-6);
                assert_close(&name("dlogits"), dlogits.as_slice().unwrap(), &dwant, 1e-6);
            }
        }
    }
}

/// Gates that are held are neither opened nor closed as a whole, and a weight moves them as it moves all gates.
#[test]
fn held_gates_move_against_each_other_alone() {
    let (tokens, n) = (37, 5);
    let shaped =
        |seed, scale: f32| Array2::from_shape_vec((tokens, n), normals(tokens * n, seed)).unwrap() * scale;
    let (logits, dcoef) = (shaped(3, 2.0), shaped(4, 1.0) - 3.0);
    for config in configs(n) {
        let routed = route(&config, logits.view());
        let dlogits = |weight: f32, over: SparsityOver| {
            let mut dlogits = Array2::zeros((tokens, n));
            ste::backward(&config, &routed, dcoef.view(), SparsityGrad { weight, over }, dlogits.view_mut());
            dlogits
        };
        let held = dlogits(0.0, SparsityOver::Held);
        assert!(held.sum().abs() < 1e-3, "{config:?}: {}", held.sum());
        let (pushed, all) = (dlogits(0.5, SparsityOver::Held), dlogits(0.5, SparsityOver::All));
        let moved = &all - &dlogits(0.0, SparsityOver::All);
        let push = (pushed - &held).sum();
        assert!((push - moved.sum()).abs() < 1e-3 * moved.sum(), "{config:?}: {push} for {}", moved.sum());
        // The differences between gates of one value of q are those that they have otherwise.
        let open = dlogits(0.0, SparsityOver::All);
        let slope = |at: (usize, usize)| routed.gates[at] * (1.0 - routed.gates[at]);
        let [a, b] = [(0, 0), (1, 1)].map(|at| (held[at] - open[at]) / slope(at));
        assert!((a - b).abs() < 1e-3 * a.abs().max(1.0), "{config:?}: {a} {b}");
    }
    // Gates that are all open have no slope.
    let open = RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(n) };
    let mut routed = route(&open, logits.view());
    routed.rebuild_above(&open, Some(f32::NEG_INFINITY), f32::NEG_INFINITY, logits.view());
    let mut dlogits = Array2::from_elem((tokens, n), f32::NAN);
    let held = SparsityGrad { weight: 0.0, over: SparsityOver::Held };
    ste::backward(&open, &routed, dcoef.view(), held, dlogits.view_mut());
    assert!(dlogits.iter().all(|&dz| dz == 0.0));
}

/// One weight for two layers leaves their gates together as they are, and lets one open as the other closes.
#[test]
fn one_multiplier_moves_shares_between_layers() {
    let (tokens, n) = (37, 5);
    let shaped =
        |seed, scale: f32| Array2::from_shape_vec((tokens, n), normals(tokens * n, seed)).unwrap() * scale;
    let layers = [(shaped(3, 2.0), shaped(4, 1.0) - 3.0, 1.0), (shaped(5, 2.0), shaped(6, 1.0) - 1.0, 1.5)];
    for config in configs(n).into_iter().filter(|config| config.ste) {
        let backward = |(logits, dcoef, factor): &(Array2<f32>, Array2<f32>, f32), weight: f32| {
            let mut dlogits = Array2::zeros((tokens, n));
            let sparsity = SparsityGrad { weight: weight * factor, over: SparsityOver::All };
            let routed = route(&config, logits.view());
            let pull = ste::backward(&config, &routed, dcoef.view(), sparsity, dlogits.view_mut());
            (pull, dlogits.sum())
        };
        let mut pull = Pull::default();
        layers.iter().for_each(|layer| pull.add(backward(layer, 0.0).0, f64::from(layer.2)));
        let multiplier = pull.multiplier().unwrap() as f32;
        let [a, b] = layers.each_ref().map(|layer| backward(layer, multiplier).1);
        assert!((a + b).abs() < 1e-3 && a < -1.0 && b > 1.0, "{config:?}: {a} {b}");
    }
    assert_eq!(Pull::default().multiplier(), None);
}

#[test]
fn other_bars_and_centres_are_those_of_the_reference() {
    let (tokens, n) = (37, 5);
    let logits = normals(tokens * n, 3);
    let shaped = Array2::from_shape_vec((tokens, n), logits.clone()).unwrap();
    let dcoef = Array2::from_shape_vec((tokens, n), normals(tokens * n, 4)).unwrap();
    for config in configs(n) {
        for (bar, centre) in [(None, 0.0), (Some(-0.4), -0.4), (Some(0.7), 0.7), (Some(0.3), 0.0)] {
            let want = reference::route_above(&config, bar.map(f64::from), f64::from(centre), &f64s(&logits));
            let mut got = route(&config, shaped.view());
            got.rebuild_above(&config, bar, centre, shaped.view());
            let name = |what: &str| format!("{what} of {config:?} above {bar:?}");
            assert_close(&name("gates"), got.gates.as_slice().unwrap(), &want.gates, 2e-7);
            assert_eq!(got.mask.iter().copied().collect::<Vec<_>>(), want.mask, "{}", name("mask"));
            let mut dlogits = Array2::zeros((tokens, n));
            ste::backward(&config, &got, dcoef.view(), NO_SPARSITY, dlogits.view_mut());
            let dcoef = f64s(dcoef.as_slice().unwrap());
            let dwant = reference::backward(&config, &want, &dcoef, 0.0, SparsityOver::Active);
            assert_close(&name("dlogits"), dlogits.as_slice().unwrap(), &dwant, 1e-6);
        }
    }
}

#[test]
fn inference_routes_as_training_does() {
    let (tokens, n) = (37, 5);
    let logits = Array2::from_shape_vec((tokens, n), normals(tokens * n, 3)).unwrap();
    for config in configs(n) {
        let mut got = route(&config, logits.view());
        for bar in [None, Some(0.4), Some(9.0)] {
            let mut want = route(&config, logits.view());
            want.rebuild_above(&config, bar, 0.0, logits.view());
            got.rebuild_for_inference(&config, bar, logits.view());
            assert!(got.routing.is_consistent());
            assert_eq!((&got.mask, &got.routing), (&want.mask, &want.routing), "{config:?} above {bar:?}");
        }
    }
}

#[test]
fn threshold_is_strict_and_its_ends_open_and_shut_all() {
    let logits = array![[0.0f32, f32::MIN_POSITIVE, -200.0, 200.0]];
    let mask = |threshold| route(&RouterConfig { threshold, ..RouterConfig::new(4) }, logits.view()).mask;
    assert_eq!(mask(0.5), array![[false, true, false, true]]);
    assert_eq!(mask(0.0), array![[true, true, true, true]]);
    assert_eq!(mask(1.0), array![[false, false, false, false]]);
}

#[test]
fn force_argmax_opens_the_best_gate_of_a_shut_token_alone() {
    let logits = array![[-3.0f32, -1.0, -1.0], [-1.0, 2.0, -1.0]];
    let config =
        RouterConfig { zero_active: ZeroActive::ForceArgmax, rescale: Rescale::Eq8, ..RouterConfig::new(3) };
    let routed = route(&config, logits.view());
    assert_eq!(routed.mask, array![[false, true, false], [false, true, false]]);
    let q = 1.0 / (1.0 + 1f32.exp());
    assert_eq!(routed.routing.coefficients[0], 3.0 * q);
}

#[test]
fn rebuild_gives_what_route_gives() {
    let config = RouterConfig::new(4);
    let logits = |tokens: usize| Array2::from_shape_vec((tokens, 4), normals(tokens * 4, 9)).unwrap();
    let mut routed = route(&config, logits(9).view());
    routed.rebuild(&config, logits(5).view());
    assert_eq!(routed, route(&config, logits(5).view()));
}
