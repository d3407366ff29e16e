//! The layer of LLaMA-MoE against PyTorch (golden/llama_moe_layer.py).

use dsmoe_baselines::TopkMoeFfn;
use dsmoe_baselines::topk::{GateNetwork, GateSpec, TopkSpec};
use dsmoe_core::ffn::{Ffn, FfnBackward, FfnForward, FfnScratch, GateTraining, block_len, split, split_mut};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::assert_close;
use dsmoe_router::topk::TopKConfig;
use dsmoe_router::{SparsityGrad, SparsityOver};
use serde_json::Value;

const HIDDEN: usize = 6;
const WIDTH: usize = 20;
const TOKENS: usize = 7;

#[test]
fn output_balance_loss_and_gradients_are_those_of_pytorch() {
    let golden: Value = serde_json::from_str(include_str!("../golden/llama_moe_layer.json")).unwrap();
    let wide = |name: &str| -> Vec<f64> { serde_json::from_value(golden[name].clone()).unwrap() };
    let read = |name: &str| -> Vec<f32> { wide(name).iter().map(|&x| x as f32).collect() };
    let spec = TopkSpec {
        router: TopKConfig { num_residual: 1, ..TopKConfig::new(4, 2).unwrap() },
        gate: GateSpec {
            network: GateNetwork::Mlp,
            normalize: false,
            noise: false,
            bias: false,
            hidden: None,
        },
        balance_weight: 0.05,
    };
    let ffn = TopkMoeFfn::new(HIDDEN, WIDTH, spec);
    let lens = [WIDTH * HIDDEN, WIDTH * HIDDEN, WIDTH * HIDDEN, 4 * HIDDEN, 16];
    let names = ["gate", "up", "down", "first", "second"];
    let mut params = Buf::zeros(block_len(&ffn.tensors()));
    for (part, name) in split_mut(&mut params, lens).into_iter().zip(names) {
        part.copy_from_slice(&read(name));
    }

    let (x, dy) = (read("x"), read("dy"));
    let (mut saved, mut scratch) = (ffn.new_saved(TOKENS), FfnScratch::default());
    let (mut y, mut dx, mut grads) = (vec![0.0; x.len()], vec![0.0; x.len()], Buf::zeros(params.len()));
    let (training, scratch) = (GateTraining::default(), &mut scratch);
    let (x, params) = (&x[..], &params[..]);
    let args = FfnForward { y: &mut y, saved: &mut *saved, x, params, training, record: None, scratch };
    let report = ffn.forward_train(args);
    assert_close("y", &y, &wide("y"), 1e-5);
    let balance = golden["balance"].as_f64().unwrap();
    assert!((report.balance_loss - balance).abs() < 1e-6, "{} {balance}", report.balance_loss);
    let sparsity = SparsityGrad { weight: 0.0, over: SparsityOver::Active };
    let (saved, scratch) = (&mut *saved, &mut FfnScratch::default());
    {
        let (dx, grads, dy) = (&mut dx[..], &mut grads[..], &dy[..]);
        ffn.backward(FfnBackward { dx, grads, dy, saved, x, params, sparsity, training, scratch });
    }
    assert_close("dx", &dx, &wide("dx"), 1e-5);
    for (part, name) in split(&grads, lens).into_iter().zip(names) {
        assert_close(name, part, &wide(&format!("d{name}")), 1e-5);
    }
}
