//! The expert FFN against reverse-mode differentiation by the `autograd` crate, which shares no code with it.
//!
//! The layer is written there with dense masks: `y = (coef E * silu(x Wg^T) * (x Wu^T)) Wd`, where E `[n, D]`
//! spreads an expert's coefficient over its neurons.

use autograd as ag;
use autograd::tensor_ops as T;
use dsmoe_kernels::expert_ffn::{
    Backward, Dims, ForwardPacked, ForwardTrain, PackedWeights, Pairs, Routes, Saved, Scratch, WeightGrads,
    Weights, reference,
};
use dsmoe_kernels::testing::{assert_close, assert_close_f64, f64s, normals};
use dsmoe_kernels::{Activation, Precision};

const DIMS: Dims = Dims {
    tokens: 12,
    hidden: 10,
    intermediate: 21,
    num_experts: 3,
    all_pairs: true,
    activation: Activation::Silu,
};

/// y and the gradients of `sum(dy * y)`: x, gate, up, down, and the coefficient of every pair.
struct Oracle {
    y: Vec<f64>,
    dx: Vec<f64>,
    dgate: Vec<f64>,
    dup: Vec<f64>,
    ddown: Vec<f64>,
    dcoef: Vec<f64>,
}

struct Inputs {
    x: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    dy: Vec<f32>,
    mask: Vec<bool>,
    coef: Vec<f32>,
}

impl Inputs {
    fn new() -> Inputs {
        let (activations, weights) = (DIMS.tokens * DIMS.hidden, DIMS.intermediate * DIMS.hidden);
        let pairs = DIMS.tokens * DIMS.num_experts;
        Inputs {
            x: normals(activations, 1),
            gate: normals(weights, 2),
            up: normals(weights, 3),
            down: normals(weights, 4),
            dy: normals(activations, 5),
            // Token 2 has no expert; the others have one to three.
            mask: (0..pairs).map(|pair| pair / 3 != 2 && !(pair * 7).is_multiple_of(3 + pair % 2)).collect(),
            coef: normals(pairs, 6).iter().map(|z| 0.25 + z.abs()).collect(),
        }
    }

    /// The straight-through rule's gradient is the one at coefficients that the mask scales in value alone:
    /// inactive coefficients enter as 0, and their derivative is taken there.
    fn oracle(&self) -> Oracle {
        let Dims { tokens, hidden, intermediate, num_experts, .. } = DIMS;
        let array = |x: Vec<f64>, rows: usize, cols: usize| {
            ag::ndarray::Array::from_shape_vec(ag::ndarray::IxDyn(&[rows, cols]), x).expect("shape")
        };
        let width = DIMS.expert_width();
        // The leaves of gate and up are transposed: autograd's own `transpose` indexes past a Vec's length.
        let transposed = |x: &[f64], rows: usize, cols: usize| -> Vec<f64> {
            (0..cols * rows).map(|k| x[k % rows * cols + k / rows]).collect()
        };
        let columns = |x: &[f32]| array(transposed(&f64s(x), intermediate, hidden), hidden, intermediate);
        let spread = (0..num_experts * intermediate)
            .map(|k| if k % intermediate / width == k / intermediate { 1.0 } else { 0.0 })
            .collect();
        let gated =
            self.coef.iter().zip(&self.mask).map(|(&c, &m)| if m { f64::from(c) } else { 0.0 }).collect();
        ag::run(|ctx: &mut ag::Context<'_, '_, f64>| {
            let x = T::convert_to_tensor(array(f64s(&self.x), tokens, hidden), ctx);
            let gate = T::convert_to_tensor(columns(&self.gate), ctx);
            let up = T::convert_to_tensor(columns(&self.up), ctx);
            let down = T::convert_to_tensor(array(f64s(&self.down), intermediate, hidden), ctx);
            let dy = T::convert_to_tensor(array(f64s(&self.dy), tokens, hidden), ctx);
            let coef = T::convert_to_tensor(array(gated, tokens, num_experts), ctx);
            let spread = T::convert_to_tensor(array(spread, num_experts, intermediate), ctx);
            let a = T::matmul(x, gate);
            let b = T::matmul(x, up);
            let c = a * T::sigmoid(a) * b;
            let y = T::matmul(T::matmul(coef, spread) * c, down);
            let loss = T::sum_all(y * dy);
            let grads = T::grad(&[loss], &[x, gate, up, down, coef]);
            let values = |t: ag::Tensor<'_, f64>| -> Vec<f64> {
                t.eval(ctx).expect("the graph evaluates").iter().copied().collect()
            };
            Oracle {
                y: values(y),
                dx: values(grads[0]),
                dgate: transposed(&values(grads[1]), hidden, intermediate),
                dup: transposed(&values(grads[2]), hidden, intermediate),
                ddown: values(grads[3]),
                dcoef: values(grads[4]),
            }
        })
    }
}

#[test]
fn the_reference_agrees_with_autograd() {
    let (inputs, want) = (Inputs::new(), Inputs::new().oracle());
    let [x, gate, up, down, dy, coef] =
        [&inputs.x, &inputs.gate, &inputs.up, &inputs.down, &inputs.dy, &inputs.coef].map(|x| f64s(x));
    let (gate, up, down, mask, coef) = (&gate, &up, &down, &inputs.mask, &coef);
    let layer = reference::Layer { x: &x, gate, up, down, biases: None, mask, coef, dims: DIMS };
    let y = reference::forward(layer);
    assert_close_f64("y", &y, &want.y, 1e-12);
    let got = reference::backward(&dy, layer);
    assert_close_f64("dx", &got.dx, &want.dx, 1e-12);
    assert_close_f64("dgate", &got.dgate, &want.dgate, 1e-12);
    assert_close_f64("dup", &got.dup, &want.dup, 1e-12);
    assert_close_f64("ddown", &got.ddown, &want.ddown, 1e-12);
    assert_close_f64("dcoef", &got.dcoef, &want.dcoef, 1e-12);
}

#[test]
fn the_kernels_agree_with_autograd() {
    let (inputs, want) = (Inputs::new(), Inputs::new().oracle());
    let (n, mask) = (DIMS.num_experts, &inputs.mask);
    let by_expert: Vec<(usize, usize)> =
        (0..n).flat_map(|i| (0..DIMS.tokens).map(move |t| (i, t))).filter(|(i, t)| mask[t * n + i]).collect();
    let offsets: Vec<usize> = (0..=n).map(|e| by_expert.iter().filter(|(i, _)| *i < e).count()).collect();
    let tokens: Vec<u32> = by_expert.iter().map(|(_, t)| *t as u32).collect();
    let coefficients: Vec<f32> = by_expert.iter().map(|(i, t)| inputs.coef[t * n + i]).collect();
    let mut slots: Vec<u32> = (0..tokens.len() as u32).collect();
    slots.sort_by_key(|&slot| tokens[slot as usize]);
    let token_offsets: Vec<usize> =
        (0..=DIMS.tokens).map(|e| tokens.iter().filter(|t| (**t as usize) < e).count()).collect();
    let routes = Routes {
        offsets: &offsets,
        tokens: &tokens,
        coefficients: &coefficients,
        token_offsets: &token_offsets,
        slots: &slots,
    };
    let weights = Weights { gate: &inputs.gate, up: &inputs.up, down: &inputs.down, biases: None };
    let (mut scratch, mut saved) = (Scratch::default(), Saved::default());
    let mut y = vec![f32::NAN; inputs.x.len()];
    let packed =
        PackedWeights::new(Precision::F32, &weights, DIMS.hidden, DIMS.intermediate, DIMS.num_experts);
    ForwardPacked {
        y: &mut y,
        x: &inputs.x,
        weights: &packed,
        pairs: Pairs::Routed(&routes),
        dims: DIMS,
        scratch: &mut scratch,
    }
    .run();
    assert_close("y", &y, &want.y, 2e-6);
    ForwardTrain {
        y: &mut y,
        saved: &mut saved,
        x: &inputs.x,
        weights: &weights,
        pairs: Pairs::Routed(&routes),
        dims: DIMS,
        scratch: &mut scratch,
    }
    .run();
    assert_close("y of training", &y, &want.y, 2e-6);
    let mut dx = vec![f32::NAN; inputs.x.len()];
    let mut dcoef = vec![f32::NAN; DIMS.tokens * n];
    let [mut gate, mut up, mut down] = [(); 3].map(|()| vec![0.0; inputs.gate.len()]);
    let grads = WeightGrads { gate: &mut gate, up: &mut up, down: &mut down, biases: None };
    let (dy, x) = (&inputs.dy, &inputs.x);
    Backward {
        dx: &mut dx,
        dcoefficients: Some(&mut dcoef),
        grads,
        dy,
        saved: &saved,
        x,
        weights: &weights,
        pairs: Pairs::Routed(&routes),
        dims: DIMS,
        scratch: &mut scratch,
    }
    .run();
    assert_close("dx", &dx, &want.dx, 2e-6);
    assert_close("dcoef", &dcoef, &want.dcoef, 2e-6);
    assert_close("dgate", &gate, &want.dgate, 2e-6);
    assert_close("dup", &up, &want.dup, 2e-6);
    assert_close("ddown", &down, &want.ddown, 2e-6);
}
