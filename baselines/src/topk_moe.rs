//! LLaMA-MoE's FFN: experts cut from the dense FFN, a softmax gate that gives every token exactly k of them.

use std::any::Any;

use dsmoe_core::ffn::{Ffn, FfnReport, FfnScratch, PackedFfn, Record, projections, routes, split, split_mut};
use dsmoe_core::params::TensorSpec;
use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Saved, WeightGrads, Weights};
use dsmoe_kernels::{Precision, linear};
use dsmoe_router::SparsityGrad;
use dsmoe_router::topk::{self, TopKConfig, TopKRouted};
use ndarray::{ArrayView2, ArrayViewMut2};

/// `y = sum over the k selected experts of score_scale p_i o_i`, p the softmax over the selected logits.
#[derive(Clone, Debug)]
pub struct TopkMoeFfn {
    hidden: usize,
    intermediate: usize,
    config: TopKConfig,
    balance_weight: f64,
}

/// What the backward needs.
#[derive(Debug)]
struct TopkSaved {
    experts: Saved,
    routed: Option<TopKRouted>,
}

impl TopkMoeFfn {
    /// For inputs of width `hidden` and `intermediate` neurons; `balance_weight` (LLaMA-MoE: 0.01) weighs the balance
    /// loss of this layer.
    ///
    /// # Panics
    /// The experts do not divide `intermediate`.
    pub fn new(hidden: usize, intermediate: usize, config: TopKConfig, balance_weight: f64) -> TopkMoeFfn {
        assert!(
            intermediate.is_multiple_of(config.num_experts),
            "top-k ffn: {intermediate} neurons in {} experts",
            config.num_experts
        );
        TopkMoeFfn { hidden, intermediate, config, balance_weight }
    }

    fn lens(&self) -> [usize; 4] {
        let projection = self.hidden * self.intermediate;
        [projection, projection, projection, self.config.num_experts * self.hidden]
    }

    /// Only selected experts take part in the gradient (LLaMA-MoE has no straight-through rule).
    fn dims(&self, tokens: usize) -> Dims {
        Dims {
            tokens,
            hidden: self.hidden,
            intermediate: self.intermediate,
            num_experts: self.config.num_experts,
            all_pairs: false,
        }
    }

    fn gate_dims(&self, x: &[f32]) -> linear::Dims {
        let rows = x.len() / self.hidden;
        linear::Dims {
            rows,
            inputs: self.hidden,
            outputs: self.config.num_experts,
            precision: Precision::F32,
        }
    }

    fn route(
        &self,
        x: &[f32],
        gate: &[f32],
        record: Option<Record<'_>>,
        scratch: &mut FfnScratch,
    ) -> TopKRouted {
        let dims = self.gate_dims(x);
        scratch.logits.resize(dims.rows * dims.outputs);
        linear::forward(&mut scratch.logits, x, gate, dims);
        let logits = matrix(&scratch.logits, dims);
        let routed = topk::route(&self.config, logits, None);
        if let Some(Record { stats, layer }) = record {
            stats.add(layer, &routed.routing);
        }
        routed
    }
}

/// A top-k FFN for inference; the router stays f32.
#[derive(Debug)]
struct PackedTopk {
    ffn: TopkMoeFfn,
    weights: PackedWeights,
    router: Vec<f32>,
}

impl PackedFfn for PackedTopk {
    fn forward(&self, y: &mut [f32], x: &[f32], record: Option<Record<'_>>, scratch: &mut FfnScratch) {
        let routed = self.ffn.route(x, &self.router, record, scratch);
        let routes = routes(&routed.routing);
        expert_ffn::forward_packed(
            y,
            x,
            &self.weights,
            &routes,
            self.ffn.dims(x.len() / self.ffn.hidden),
            &mut scratch.experts,
        );
    }

    fn bytes(&self) -> usize {
        self.weights.bytes() + 4 * self.router.len()
    }

    fn num_experts(&self) -> Option<usize> {
        self.ffn.num_experts()
    }
}

fn matrix(values: &[f32], dims: linear::Dims) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((dims.rows, dims.outputs), values).expect("rows * experts values")
}

impl Ffn for TopkMoeFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = projections(self.hidden, self.intermediate);
        tensors.push(TensorSpec::router("gate.weight", vec![self.config.num_experts, self.hidden]));
        tensors
    }

    fn num_experts(&self) -> Option<usize> {
        Some(self.config.num_experts)
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        let [gate, up, down, router] = split(params, self.lens());
        let (weights, n) = (Weights { gate, up, down }, self.config.num_experts);
        Box::new(PackedTopk {
            ffn: self.clone(),
            weights: PackedWeights::new(precision, &weights, self.hidden, self.intermediate, n),
            router: router.to_vec(),
        })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        Box::new(TopkSaved { experts: Saved::with_room(self.dims(tokens)), routed: None })
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        scratch.experts.reserve(self.dims(tokens));
    }

    fn forward_train(
        &self,
        y: &mut [f32],
        saved: &mut (dyn Any + Send),
        x: &[f32],
        params: &[f32],
        record: Option<Record<'_>>,
        scratch: &mut FfnScratch,
    ) -> FfnReport {
        let saved = saved.downcast_mut::<TopkSaved>().expect("saved by a top-k FFN");
        let [gate, up, down, router] = split(params, self.lens());
        let routed = saved.routed.insert(self.route(x, router, record, scratch));
        expert_ffn::forward_train(
            y,
            &mut saved.experts,
            x,
            &Weights { gate, up, down },
            &routes(&routed.routing),
            self.dims(x.len() / self.hidden),
            &mut scratch.experts,
        );
        FfnReport::default()
    }

    fn backward(
        &self,
        dx: &mut [f32],
        grads: &mut [f32],
        dy: &[f32],
        saved: &mut (dyn Any + Send),
        x: &[f32],
        params: &[f32],
        _sparsity: SparsityGrad,
        scratch: &mut FfnScratch,
    ) {
        let TopkSaved { experts: saved, routed } =
            saved.downcast_mut::<TopkSaved>().expect("saved by a top-k FFN");
        let routed = routed.as_ref().expect("a forward before the backward");
        let [gate, up, down, router] = split(params, self.lens());
        let [dgate, dup, ddown, drouter] = split_mut(grads, self.lens());
        let dims = self.gate_dims(x);
        let FfnScratch { experts, dcoefficients, dlogits, .. } = scratch;
        dcoefficients.resize(dims.rows * dims.outputs);
        dlogits.resize(dims.rows * dims.outputs);
        expert_ffn::backward(
            dx,
            dcoefficients,
            WeightGrads { gate: dgate, up: dup, down: ddown },
            dy,
            saved,
            x,
            &Weights { gate, up, down },
            &routes(&routed.routing),
            self.dims(x.len() / self.hidden),
            experts,
        );
        topk::backward(
            &self.config,
            routed,
            matrix(dcoefficients, dims),
            self.balance_weight,
            ArrayViewMut2::from_shape((dims.rows, dims.outputs), dlogits).expect("rows * experts values"),
            None,
        );
        linear::backward_weight(drouter, dlogits, x, dims);
        linear::backward_input_add(dx, dlogits, router, dims);
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_core::ffn::{DenseFfn, block_len};
    use dsmoe_kernels::buf::Buf;
    use dsmoe_kernels::testing::{f64s, normals};
    use dsmoe_router::SparsityOver;

    use super::*;

    const HIDDEN: usize = 12;
    const WIDTH: usize = 20;
    const EXPERTS: usize = 5;

    fn params(ffn: &TopkMoeFfn, seed: u64) -> Buf {
        let mut params = Buf::zeros(block_len(&ffn.tensors()));
        let values = normals(params.len(), seed);
        params.iter_mut().zip(values).for_each(|(p, v)| *p = 0.3 * v);
        params
    }

    fn ffn(top_k: usize) -> TopkMoeFfn {
        TopkMoeFfn::new(HIDDEN, WIDTH, TopKConfig::new(EXPERTS, top_k).expect("k of n"), 0.0)
    }

    #[test]
    fn all_experts_with_even_scores_are_the_dense_ffn() {
        let mut ffn = ffn(EXPERTS);
        ffn.config.score_scale = EXPERTS as f32;
        let mut params = params(&ffn, 1);
        let [.., gate] = split_mut(&mut params, ffn.lens());
        gate.fill(0.0);
        let x = normals(7 * HIDDEN, 2);
        let (mut y, mut want) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let mut scratch = FfnScratch::default();
        ffn.pack(&params, Precision::F32).forward(&mut y, &x, None, &mut scratch);
        let dense = DenseFfn::new(HIDDEN, WIDTH);
        let dense = dense.pack(&params[..block_len(&dense.tensors())], Precision::F32);
        dense.forward(&mut want, &x, None, &mut scratch);
        dsmoe_kernels::testing::assert_close("y", &y, &f64s(&want), 1e-5);
    }

    #[test]
    fn gradients_are_differences_while_the_selection_holds() {
        let ffn = ffn(2);
        let params = params(&ffn, 3);
        let (x, dy) = (normals(6 * HIDDEN, 4), normals(6 * HIDDEN, 5));
        let mut scratch = FfnScratch::default();
        let loss = |x: &[f32], params: &[f32]| {
            let mut y = vec![0.0; x.len()];
            ffn.pack(params, Precision::F32).forward(&mut y, x, None, &mut FfnScratch::default());
            f64s(&y).iter().zip(f64s(&dy)).map(|(y, dy)| y * dy).sum::<f64>()
        };
        let mut saved = ffn.new_saved(6);
        let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let mut grads = Buf::zeros(params.len());
        let none = SparsityGrad { weight: 0.0, over: SparsityOver::Active };
        ffn.forward_train(&mut y, saved.as_mut(), &x, &params, None, &mut scratch);
        ffn.backward(&mut dx, &mut grads, &dy, saved.as_mut(), &x, &params, none, &mut scratch);
        let check = |what: &str, got: f32, up: f64, down: f64, h: f64| {
            let want = (up - down) / (2.0 * h);
            assert!((f64::from(got) - want).abs() < 5e-3 * want.abs().max(1.0), "{what}: {got} for {want}");
        };
        let h = 2e-3f32;
        for i in (0..params.len()).step_by(17) {
            let at = |h: f32| {
                let mut moved = params.clone();
                moved[i] += h;
                loss(&x, &moved)
            };
            check(&format!("parameter {i}"), grads[i], at(h), at(-h), f64::from(h));
        }
        for i in (0..x.len()).step_by(5) {
            let at = |h: f32| {
                let mut moved = x.clone();
                moved[i] += h;
                loss(&moved, &params)
            };
            check(&format!("input {i}"), dx[i], at(h), at(-h), f64::from(h));
        }
    }
}
