//! Every gradient of a whole two-layer model against the `autograd` crate, which shares no code with ours.
//!
//! The oracle is written from the formulas, in f64, with operands of equal shapes only (sums and broadcasts are
//! products with constant matrices), because that crate's gradients of broadcasts are not to be trusted. The
//! straight-through estimator is stated with its stop-gradient (eq. 10).

use std::collections::HashMap;

use autograd as ag;
use autograd::ndarray::Array2;
use autograd::tensor_ops as t;
use dsmoe_core::config::Config;
use dsmoe_core::model::{Batch, Model, StepArgs};
use dsmoe_core::params::Entry;
use dsmoe_kernels::Precision;
use dsmoe_kernels::matmul::reference::transpose;
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::{assert_close, f64s};
use dsmoe_router::SparsityOver;

use crate::{step_args, train};

const HIDDEN: usize = 12;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 6;
const INTERMEDIATE: usize = 20;
const LAYERS: usize = 2;
const VOCAB: usize = 11;
const EXPERTS: usize = 4;
const BATCH: usize = 2;
const SEQ: usize = 5;
const TOKENS: usize = BATCH * SEQ;
const EPS: f64 = 1e-5;
const THETA: f64 = 100.0;

#[derive(Clone, Copy, Debug)]
struct Case {
    moe: bool,
    tied: bool,
    bias: bool,
    ste: bool,
    eq8: bool,
    threshold: f64,
    over: SparsityOver,
    sparsity_weight: f64,
}

const CASES: [Case; 6] = {
    let base = Case {
        moe: true,
        tied: true,
        bias: true,
        ste: true,
        eq8: false,
        threshold: 0.5,
        over: SparsityOver::Active,
        sparsity_weight: 3.0,
    };
    [
        base,
        Case { over: SparsityOver::All, sparsity_weight: -2.0, ..base },
        Case { tied: false, bias: false, eq8: true, ..base },
        Case { ste: false, threshold: 0.4, ..base },
        Case { ste: false, eq8: true, bias: false, sparsity_weight: 0.0, ..base },
        Case { moe: false, bias: false, sparsity_weight: 0.0, tied: false, ..base },
    ]
};

fn model(case: Case) -> Model {
    let mut config = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": {VOCAB},
        "hidden_size": {HIDDEN}, "intermediate_size": {INTERMEDIATE}, "num_hidden_layers": {LAYERS},
        "num_attention_heads": {HEADS}, "num_key_value_heads": {KV_HEADS}, "head_dim": {HEAD_DIM},
        "max_position_embeddings": 16, "rms_norm_eps": {EPS}, "rope_theta": {THETA}, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": {}}}"#,
        case.tied
    );
    if case.moe {
        let moe = format!(
            r#""model_type": "dsmoe", "dsmoe": {{"format_version": 1, "num_experts": {EXPERTS}, "threshold": {},
            "partition": "contiguous", "router_bias": {}, "gate_value": "sigmoid", "rescale": "{}",
            "zero_active": "skip", "ste": {}}}"#,
            case.threshold,
            case.bias,
            if case.eq8 { "eq8" } else { "none" },
            case.ste
        );
        config =
            config.replace(r#""model_type": "llama""#, &moe).replace("LlamaForCausalLM", "DsmoeForCausalLM");
    }
    let config = Config::from_json("config.json".as_ref(), &config).expect("configuration");
    let mut model = Model::new(config);
    let layout = model.layout().clone();
    for (i, entry) in layout.entries().iter().enumerate() {
        let mut rng = Rng::new(11, i as u64);
        for p in &mut model.params_mut()[entry.range.clone()] {
            *p = if entry.spec.name.contains("norm") { 1.0 + 0.2 * rng.normal() } else { 0.4 * rng.normal() };
        }
    }
    model
}

/// A parameter as the oracle sees it.
struct Leaf {
    name: String,
    value: Array2<f64>,
    transposed: bool,
}

impl Leaf {
    fn new(model: &Model, name: &str, entry: &Entry) -> Leaf {
        let shape = &entry.spec.shape;
        let (rows, cols) = if shape.len() == 2 { (shape[0], shape[1]) } else { (1, shape[0]) };
        let values = f64s(&model.params()[entry.range.clone()]);
        let transposed = rows > 1 && !name.contains("embed") && !name.contains("down_proj");
        let value = if transposed {
            Array2::from_shape_vec((cols, rows), transpose(&values, rows, cols))
        } else {
            Array2::from_shape_vec((rows, cols), values)
        };
        Leaf { name: name.to_owned(), value: value.expect("shape"), transposed }
    }

    /// Its gradient in the orientation of the model's parameter.
    fn stored(&self, grad: ag::ndarray::ArrayD<f64>) -> Vec<f64> {
        let grad: Vec<f64> = grad.iter().copied().collect();
        if self.transposed { transpose(&grad, self.value.nrows(), self.value.ncols()) } else { grad }
    }
}

type Tensor<'g> = ag::Tensor<'g, f64>;

/// The graph of the loss, from the paper's formulas.
struct Oracle<'g> {
    ctx: &'g ag::Context<'g, 'g, f64>,
    params: HashMap<String, Tensor<'g>>,
    case: Case,
}

impl<'g> Oracle<'g> {
    fn constant(&self, rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Tensor<'g> {
        t::convert_to_tensor(Array2::from_shape_fn((rows, cols), |(i, j)| f(i, j)), self.ctx)
    }

    fn layer(&self, i: usize, name: &str) -> Tensor<'g> {
        self.params[&format!("model.layers.{i}.{name}")]
    }

    /// x y^T of `[TOKENS, HEAD_DIM]` matrices, as a sum of outer products: the crate's transpose reads out of
    /// bounds.
    fn products(&self, x: Tensor<'g>, y: Tensor<'g>) -> Tensor<'g> {
        let terms: Vec<Tensor<'g>> = (0..HEAD_DIM)
            .map(|c| {
                let pick = self.constant(HEAD_DIM, 1, |from, _| if from == c { 1.0 } else { 0.0 });
                let row = t::reshape(t::matmul(y, pick), &[1, TOKENS as isize]);
                t::matmul(t::matmul(x, pick), row)
            })
            .collect();
        t::add_n(&terms)
    }

    /// The row vector `w`, once per token.
    fn per_token(&self, w: Tensor<'g>) -> Tensor<'g> {
        t::matmul(self.constant(TOKENS, 1, |_, _| 1.0), w)
    }

    fn rms_norm(&self, x: Tensor<'g>, weight: Tensor<'g>) -> Tensor<'g> {
        let mean = t::matmul(x * x, self.constant(HIDDEN, HIDDEN, |_, _| 1.0 / HIDDEN as f64));
        let shifted = mean + self.constant(TOKENS, HIDDEN, |_, _| EPS);
        x / t::sqrt(shifted) * self.per_token(weight)
    }

    /// Rotation of `[TOKENS, HEAD_DIM]` by position times frequency, halves paired.
    fn rope(&self, x: Tensor<'g>) -> Tensor<'g> {
        let half = HEAD_DIM / 2;
        let angle =
            |r: usize, c: usize| (r % SEQ) as f64 * THETA.powf(-2.0 * (c % half) as f64 / HEAD_DIM as f64);
        let cos = self.constant(TOKENS, HEAD_DIM, |r, c| angle(r, c).cos());
        let sin = self.constant(TOKENS, HEAD_DIM, |r, c| angle(r, c).sin());
        // (x R)[c] = -x[c + half] in the first half, x[c - half] in the second.
        let rotate = self.constant(HEAD_DIM, HEAD_DIM, |from, to| match (from, to) {
            (f, t) if f == t + half => -1.0,
            (f, t) if f + half == t => 1.0,
            _ => 0.0,
        });
        x * cos + t::matmul(x, rotate) * sin
    }

    /// Columns of one head of `[TOKENS, heads * HEAD_DIM]`.
    fn head(&self, x: Tensor<'g>, heads: usize, head: usize) -> Tensor<'g> {
        let picks = |from, to| if from == head * HEAD_DIM + to { 1.0 } else { 0.0 };
        t::matmul(x, self.constant(heads * HEAD_DIM, HEAD_DIM, picks))
    }

    fn attention(&self, h: Tensor<'g>, i: usize) -> Tensor<'g> {
        let q = t::matmul(h, self.layer(i, "self_attn.q_proj.weight"));
        let k = t::matmul(h, self.layer(i, "self_attn.k_proj.weight"));
        let v = t::matmul(h, self.layer(i, "self_attn.v_proj.weight"));
        let scale = self.constant(TOKENS, TOKENS, |_, _| (HEAD_DIM as f64).powf(-0.5));
        let sees = |query, key| query / SEQ == key / SEQ && key <= query;
        let mask = self.constant(TOKENS, TOKENS, |query, key| if sees(query, key) { 0.0 } else { -1e9 });
        let heads: Vec<Tensor<'g>> = (0..HEADS)
            .map(|head| {
                let kv = head / (HEADS / KV_HEADS);
                let q = self.rope(self.head(q, HEADS, head));
                let k = self.rope(self.head(k, KV_HEADS, kv));
                let weights = t::softmax(self.products(q, k) * scale + mask, 1);
                let place = self.constant(HEAD_DIM, HEADS * HEAD_DIM, |from, to| {
                    if to == head * HEAD_DIM + from { 1.0 } else { 0.0 }
                });
                t::matmul(t::matmul(weights, self.head(v, KV_HEADS, kv)), place)
            })
            .collect();
        t::matmul(t::add_n(&heads), self.layer(i, "self_attn.o_proj.weight"))
    }

    /// The FFN's output, and its part of the sparsity loss when it has a router.
    fn ffn(&self, h: Tensor<'g>, i: usize) -> (Tensor<'g>, Option<Tensor<'g>>) {
        let a = t::matmul(h, self.layer(i, "mlp.gate_proj.weight"));
        let u = t::matmul(h, self.layer(i, "mlp.up_proj.weight"));
        let c = a * t::sigmoid(a) * u;
        let down = self.layer(i, "mlp.down_proj.weight");
        if !self.case.moe {
            return (t::matmul(c, down), None);
        }
        let mut z = t::matmul(h, self.layer(i, "mlp.router.weight"));
        if self.case.bias {
            z = z + self.per_token(self.layer(i, "mlp.router.bias"));
        }
        let q = t::sigmoid(z);
        let m = t::stop_gradient(t::greater(q, self.constant(TOKENS, EXPERTS, |_, _| self.case.threshold)));
        let g = q * m;
        let s = if self.case.ste { t::stop_gradient(g) + q - t::stop_gradient(q) } else { g };
        let s = match self.case.eq8 {
            false => s,
            true => {
                let k = t::matmul(m, self.constant(EXPERTS, EXPERTS, |_, _| 1.0));
                let k = t::maximum(k, self.constant(TOKENS, EXPERTS, |_, _| 1.0));
                s * t::stop_gradient(self.constant(TOKENS, EXPERTS, |_, _| EXPERTS as f64) / k)
            }
        };
        let width = INTERMEDIATE / EXPERTS;
        let spread = self.constant(EXPERTS, INTERMEDIATE, |e, j| if j / width == e { 1.0 } else { 0.0 });
        let y = t::matmul(c * t::matmul(s, spread), down);
        let counted = if self.case.over == SparsityOver::Active { g } else { q };
        (y, Some(t::sum_all(counted)))
    }

    /// scale * sum of weighted token losses + sparsity weight * mean gate
    fn loss(&self, inputs: &[u32], targets: &[u32], scale: f64) -> Tensor<'g> {
        let one_hot = |ids: &[u32]| {
            let ids = ids.to_vec();
            self.constant(TOKENS, VOCAB, move |r, c| if ids[r] as usize == c { 1.0 } else { 0.0 })
        };
        let embed = self.params["model.embed_tokens.weight"];
        let mut x = t::matmul(one_hot(inputs), embed);
        let mut gates = Vec::new();
        for i in 0..LAYERS {
            x = x + self.attention(self.rms_norm(x, self.layer(i, "input_layernorm.weight")), i);
            let h = self.rms_norm(x, self.layer(i, "post_attention_layernorm.weight"));
            let (y, gate) = self.ffn(h, i);
            x = x + y;
            gates.extend(gate);
        }
        let h = self.rms_norm(x, self.params["model.norm.weight"]);
        let log_p = t::log_softmax(t::matmul(h, self.params["lm_head.weight"]), 1);
        let mut loss = t::sum_all(log_p * one_hot(targets)) * t::scalar(-scale, self.ctx);
        if !gates.is_empty() {
            let weight = self.case.sparsity_weight / (LAYERS * TOKENS * EXPERTS) as f64;
            loss = loss + t::add_n(&gates) * t::scalar(weight, self.ctx);
        }
        loss
    }
}

#[test]
fn every_gradient_is_that_of_autograd() {
    let mut rng = Rng::new(5, 5);
    let inputs: Vec<u32> = (0..TOKENS).map(|_| rng.below(VOCAB as u64) as u32).collect();
    let mut targets: Vec<u32> = (0..TOKENS).map(|_| rng.below(VOCAB as u64) as u32).collect();
    targets[3] = dsmoe_kernels::cross_entropy::IGNORE;
    let scale = 1.0 / 9.0;
    for case in CASES {
        let model = model(case);
        let args = StepArgs {
            loss_scale: scale as f32,
            sparsity_weight: case.sparsity_weight as f32,
            sparsity_over: case.over,
            ..step_args(TOKENS)
        };
        let batch = Batch { inputs: &inputs, targets: &targets, seq: SEQ };
        let (output, grads, workspace) = train(&model, batch, &args, Precision::F32);
        assert_eq!(output.predicted, TOKENS - 1, "{case:?}");
        if let Some(stats) = workspace.stats() {
            let active = stats.active_ratio();
            assert!(active > 0.2 && active < 0.9, "{case:?}: {active} active tests little");
        }

        let entries = model.layout().entries();
        // Leaves in the orientation the formulas use: x W^T as a product with the transpose. A tied head is a leaf
        // of its own, whose gradient joins the embedding's.
        let mut leaves: Vec<Leaf> =
            entries.iter().map(|entry| Leaf::new(&model, &entry.spec.name, entry)).collect();
        if case.tied {
            leaves.push(Leaf::new(&model, "lm_head.weight", &entries[0]));
        }
        ag::run(|ctx: &mut ag::Context<f64>| {
            let ctx = &*ctx;
            let params: Vec<Tensor<'_>> = leaves
                .iter()
                .map(|leaf| ctx.placeholder("p", &[leaf.value.nrows() as isize, leaf.value.ncols() as isize]))
                .collect();
            let named = leaves.iter().map(|leaf| leaf.name.clone()).zip(params.iter().copied()).collect();
            let oracle = Oracle { ctx, params: named, case };
            let loss = oracle.loss(&inputs, &targets, scale);
            let mut wanted = t::grad(&[loss], &params);
            wanted.push(loss);
            let mut evaluator = ctx.evaluator();
            evaluator.extend(&wanted);
            for (param, leaf) in params.iter().zip(&leaves) {
                evaluator.feed(*param, leaf.value.view());
            }
            let mut results = evaluator.run();
            let loss = results.pop().expect("loss").expect("loss").into_raw_vec()[0];
            let sparsity =
                if case.over == SparsityOver::Active { output.sparsity_loss } else { output.mean_gate };
            let ours = scale * output.loss_sum + case.sparsity_weight * sparsity;
            assert!((ours - loss).abs() < 2e-6, "{case:?}: loss {ours} for {loss}");
            let mut wanted: Vec<Vec<f64>> =
                leaves.iter().zip(results).map(|(leaf, grad)| leaf.stored(grad.expect("gradient"))).collect();
            if case.tied {
                let head = wanted.pop().expect("head");
                wanted[0].iter_mut().zip(head).for_each(|(embedding, head)| *embedding += head);
            }
            for (entry, want) in entries.iter().zip(wanted) {
                let name = format!("{case:?}: d {}", entry.spec.name);
                assert!(want.iter().any(|&x| x != 0.0), "{name} is zero");
                let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                // Relative to the tensor's largest gradient: small ones must be right as well.
                let scaled: Vec<f32> =
                    grads[entry.range.clone()].iter().map(|&g| (f64::from(g) / largest) as f32).collect();
                let want: Vec<f64> = want.iter().map(|g| g / largest).collect();
                assert_close(&name, &scaled, &want, 1e-5);
            }
        });
    }
}
