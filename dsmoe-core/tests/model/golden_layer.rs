//! One DSMoE layer against numbers computed by PyTorch in f64: forward, both losses, every gradient by itself.

use std::collections::HashMap;

use dsmoe_core::ffn::{
    DsmoeFfn, Ffn, FfnBackward, FfnForward, FfnInference, FfnReport, FfnScratch, GateTraining, block_len,
    split, split_mut,
};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::linear::{self, reference as linear_reference};
use dsmoe_kernels::matmul::reference::transpose;
use dsmoe_kernels::testing::{assert_close, assert_close_f64, f64s, shared};
use dsmoe_kernels::{Activation, Precision, expert_ffn};
use dsmoe_router::sparsity::{SparsityGrad, SparsityOver};
use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive, reference as router_reference};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    #[serde(rename = "T")]
    tokens: usize,
    #[serde(rename = "d")]
    hidden: usize,
    #[serde(rename = "D")]
    intermediate: usize,
    #[serde(rename = "n")]
    num_experts: usize,
    tau: f32,
    ste: bool,
    rescale: bool,
    sparse: f64,
    active: Vec<usize>,
}

impl Case {
    fn router(&self) -> RouterConfig {
        RouterConfig {
            num_experts: self.num_experts,
            threshold: self.tau,
            gate_value: GateValue::Sigmoid,
            rescale: if self.rescale { Rescale::Eq8 } else { Rescale::None },
            zero_active: ZeroActive::Skip,
            ste: self.ste,
        }
    }

    fn dims(&self) -> expert_ffn::Dims {
        expert_ffn::Dims {
            tokens: self.tokens,
            hidden: self.hidden,
            intermediate: self.intermediate,
            num_experts: self.num_experts,
            core: 0,
            all_pairs: self.ste,
            activation: Activation::Silu,
        }
    }
}

type Cases = HashMap<String, Case>;
type Tensors = HashMap<String, Vec<f64>>;

/// The tensors of every case, by `case.tensor`; masks as 0 and 1.
fn golden() -> Option<(Cases, Tensors)> {
    let dir = shared("golden_layer", "models")?.join("golden");
    let cases = std::fs::read(dir.join("layer.json")).expect("layer.json");
    let bytes = std::fs::read(dir.join("layer.safetensors")).expect("layer.safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values =
                view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes")));
            (name, values.collect())
        })
        .collect();
    Some((serde_json::from_slice(&cases).expect("JSON"), tensors))
}

#[test]
fn the_f64_definition_is_pytorchs() {
    let Some((cases, tensors)) = golden() else { return };
    assert_eq!(cases.len(), 11);
    for (name, case) in &cases {
        let get = |tensor: &str| &tensors[&format!("{name}.{tensor}")];
        let check = |what: &str, got: &[f64]| {
            assert_close_f64(&format!("{name}.{what}"), got, get(what), 1e-9);
        };
        let (d, n, config) = (case.hidden, case.num_experts, case.router());
        let (x, r) = (get("x"), get("r"));
        let (gate, up) = (get("gate_proj"), get("up_proj"));
        let down = transpose(get("down_proj"), d, case.intermediate);
        let router_dims =
            linear::Dims { rows: case.tokens, inputs: d, outputs: n, precision: Precision::F32 };

        let logits = linear_reference::forward(x, get("router"), router_dims);
        let routed = router_reference::route(&config, &logits);
        check("gates", &routed.gates);
        let mask: Vec<f64> = routed.mask.iter().map(|&m| f64::from(u8::from(m))).collect();
        check("mask", &mask);
        let active: Vec<usize> =
            routed.mask.chunks(n).map(|row| row.iter().filter(|m| **m).count()).collect();
        assert_eq!(active, case.active, "{name}: active experts");
        let (mask, coef, dims) = (&routed.mask, &routed.coef, case.dims());
        let layer = expert_ffn::reference::Layer { x, gate, up, down: &down, biases: None, mask, coef, dims };
        let y = expert_ffn::reference::forward(layer);
        check("y", &y);
        let lm = |y: &[f64]| y.iter().zip(r).map(|(y, r)| y * r).sum::<f64>();
        assert_close_f64(&format!("{name}.lm"), &[lm(&y)], &[lm(get("y"))], 1e-9);
        let sparse = router_reference::sparsity(&routed, SparsityOver::Active);
        assert_close_f64(&format!("{name}.sparse"), &[sparse], &[case.sparse], 1e-9);

        let grads = expert_ffn::reference::backward(r, layer);
        check("d_gate_proj", &grads.dgate);
        check("d_up_proj", &grads.dup);
        check("d_down_proj", &transpose(&grads.ddown, case.intermediate, d));
        let dlogits = router_reference::backward(&config, &routed, &grads.dcoef, 0.0, SparsityOver::Active);
        let (dx, drouter) = linear_reference::backward(&dlogits, x, get("router"), router_dims);
        check("d_router", &drouter);
        let dx: Vec<f64> = dx.iter().zip(&grads.dx).map(|(a, b)| a + b).collect();
        check("d_x", &dx);

        let zeros = vec![0.0; case.tokens * n];
        let weight = 1.0 / (case.tokens * n) as f64;
        let dlogits = router_reference::backward(&config, &routed, &zeros, weight, SparsityOver::Active);
        let (dx, drouter) = linear_reference::backward(&dlogits, x, get("router"), router_dims);
        check("sparse_d_router", &drouter);
        check("sparse_d_x", &dx);
    }
}

#[test]
fn the_f32_layer_is_pytorchs() {
    let Some((cases, tensors)) = golden() else { return };
    for (name, case) in &cases {
        let get = |tensor: &str| &tensors[&format!("{name}.{tensor}")];
        let f32s = |tensor: &str| get(tensor).iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let (d, width, n) = (case.hidden, case.intermediate, case.num_experts);
        let ffn = DsmoeFfn::new(d, width, case.router(), false);
        let lens = [width * d, width * d, width * d, n * d];
        let mut params = Buf::zeros(block_len(&ffn.tensors()));
        let [gate, up, down, router] = split_mut(&mut params, lens);
        gate.copy_from_slice(&f32s("gate_proj"));
        up.copy_from_slice(&f32s("up_proj"));
        let transposed = transpose(get("down_proj"), d, width);
        down.iter_mut().zip(transposed).for_each(|(to, from)| *to = from as f32);
        router.copy_from_slice(&f32s("router"));
        let (x, r) = (f32s("x"), f32s("r"));
        let mut scratch = FfnScratch::default();
        // Sums of up to 77 products of normal values, then of up to 64 of those.
        let tolerance = 4e-6;
        let check = |what: &str, got: &[f32]| {
            assert_close(&format!("{name}.{what}"), got, get(what), tolerance);
        };

        let mut y = vec![f32::NAN; x.len()];
        ffn.pack(&params, Precision::F32).forward(FfnInference {
            y: &mut y,
            x: &x,
            record: None,
            scratch: &mut scratch,
        });
        check("y", &y);
        let mut saved = ffn.new_saved(x.len() / case.hidden);
        let training = GateTraining::default();
        let mut dx = vec![f32::NAN; x.len()];
        // A forward and a backward pass for the gradient `dy` of the outputs.
        let mut pass = |y: &mut [f32], dx: &mut [f32], dy: &[f32], weight: f32| -> (FfnReport, Buf) {
            let (params, scratch) = (&params[..], &mut scratch);
            y.fill(f32::NAN);
            let report = ffn.forward_train(FfnForward {
                y,
                saved: saved.as_mut(),
                x: &x,
                params,
                training,
                record: None,
                scratch,
            });
            let mut grads = Buf::zeros(params.len());
            ffn.backward(FfnBackward {
                dx,
                grads: &mut grads,
                dy,
                saved: saved.as_mut(),
                x: &x,
                params,
                sparsity: SparsityGrad { weight, over: SparsityOver::Active },
                training,
                scratch,
            });
            (report, grads)
        };
        let (report, grads) = pass(&mut y, &mut dx, &r, 0.0);
        check("y", &y);
        assert!((report.sparsity_loss - case.sparse).abs() < 1e-6, "{name}: {report:?}");
        check("d_x", &dx);
        let [dgate, dup, ddown, drouter] = split(&grads, lens);
        check("d_gate_proj", dgate);
        check("d_up_proj", dup);
        let ddown: Vec<f32> = transpose(&f64s(ddown), width, d).into_iter().map(|x| x as f32).collect();
        check("d_down_proj", &ddown);
        check("d_router", drouter);

        let zero = vec![0.0; x.len()];
        let (_, grads) = pass(&mut y, &mut dx, &zero, 1.0 / (case.tokens * n) as f32);
        let [dgate, dup, ddown, drouter] = split(&grads, lens);
        check("sparse_d_router", drouter);
        check("sparse_d_x", &dx);
        assert!(dgate.iter().chain(dup).chain(ddown).all(|&g| g == 0.0), "{name}: sparsity reaches experts");
    }
}
