//! An FFN type: the dense FFN times one learned factor in each layer.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use dsmoe_core::ffn::{
    DenseFfn, DeviceFfn, Ffn, FfnBackward, FfnForward, FfnInference, FfnKind, FfnReader, FfnReport,
    FfnScratch, FfnSpec, GateBackward, GateTraining, Gated, HostGate, HostRouted, PackedFfn,
};
use dsmoe_core::params::TensorSpec;
use dsmoe_core::{Config, Error, Result};
use dsmoe_kernels::Precision;
use dsmoe_router::Routing;
use ndarray::Array2;
use serde_json::{Map, Value};

/// The `type` in config.json.
const KIND: &str = "scaled";

/// The name of the factor.
pub const SCALE: &str = "scale";

/// Reads FFNs of this type.
pub static READER: FfnReader = FfnReader { kind: KIND, read };

fn read(path: &Path, config: &Config, settings: &Map<String, Value>) -> Result<Arc<dyn FfnSpec>> {
    if let Some(key) = settings.keys().next() {
        return Err(Error::field(path, format!("ffn.{key}"), "is no setting of this type", "remove it"));
    }
    if config.architecture.mlp_bias || config.architecture.output_bias {
        let problem = format!("is {KIND}, and the FFNs of this model have biases");
        return Err(Error::field(path, "ffn.type", problem, "make it again from a model without them"));
    }
    Ok(Arc::new(ScaledSpec))
}

/// The `ffn` object, which has no settings.
#[derive(Debug)]
pub struct ScaledSpec;

impl FfnSpec for ScaledSpec {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }

    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
        let gated = Gated::of_layer(config, layer);
        Box::new(ScaledFfn { gated, dense: DenseFfn::of(gated) })
    }

    /// The dense FFN is the one expert, and every token runs it.
    fn num_experts(&self, _layer: usize) -> usize {
        1
    }

    fn active_experts(&self) -> Option<f64> {
        Some(1.0)
    }
}

/// `y = s ffn(x)`, with the dense FFN of a layer and one number s.
#[derive(Clone, Debug)]
struct ScaledFfn {
    gated: Gated,
    dense: DenseFfn,
}

/// The activations that the backward pass needs: those of the dense FFN, its output, and room for the gradient of that.
struct ScaledSaved {
    dense: Box<dyn Any + Send>,
    y: Vec<f32>,
    dy: Vec<f32>,
}

/// Returns the routing of `tokens` tokens to the one expert.
fn routing(tokens: usize, scale: f32) -> Routing {
    Routing::from_mask(Array2::from_elem((tokens, 1), true).view(), |_, _| scale)
}

impl Ffn for ScaledFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = self.gated.tensors();
        tensors.push(TensorSpec::router(SCALE, vec![1]));
        tensors
    }

    fn kind(&self) -> Option<FfnKind> {
        Some(FfnKind::Spec(Arc::new(ScaledSpec)))
    }

    fn num_experts(&self) -> Option<usize> {
        Some(1)
    }

    /// A GPU runs the dense FFN as an expert, whose coefficient the host computes.
    fn on_device(&self) -> Option<DeviceFfn> {
        let gate = Arc::new(ScaleGate { hidden: self.gated.hidden });
        Some(DeviceFfn::Hosted { gated: self.gated, num_experts: 1, gate })
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        let (dense, scale) = params.split_at(self.gated.len());
        let hidden = self.gated.hidden;
        Box::new(PackedScaled { hidden, dense: self.dense.pack(dense, precision), scale: scale[0] })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        Box::new(ScaledSaved { dense: self.dense.new_saved(tokens), y: Vec::new(), dy: Vec::new() })
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        self.dense.reserve(scratch, tokens);
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, training, record, scratch } = args;
        let saved: &mut ScaledSaved = saved.downcast_mut().expect("saved by this FFN");
        let (params, scale) = params.split_at(self.gated.len());
        let dense = FfnForward { y, saved: &mut *saved.dense, x, params, training, record: None, scratch };
        let y = &mut *dense.y;
        let report = self.dense.forward_train(FfnForward { y, ..dense });
        saved.y.clear();
        saved.y.extend_from_slice(dense.y);
        dense.y.iter_mut().for_each(|y| *y *= scale[0]);
        let routed = routing(x.len() / self.gated.hidden, scale[0]);
        HostRouted { routing: &routed, balance_loss: 0.0, gate_entropy: 0.0 }.count(record);
        report
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let saved: &mut ScaledSaved = args.saved.downcast_mut().expect("saved by this FFN");
        let (params, scale) = args.params.split_at(self.gated.len());
        let (grads, dscale) = args.grads.split_at_mut(self.gated.len());
        let products = args.dy.iter().zip(&saved.y).map(|(dy, y)| f64::from(*dy) * f64::from(*y));
        dscale[0] += products.sum::<f64>() as f32;
        saved.dy.clear();
        saved.dy.extend(args.dy.iter().map(|dy| dy * scale[0]));
        self.dense.backward(FfnBackward { grads, params, dy: &saved.dy, saved: &mut *saved.dense, ..args });
    }
}

#[derive(Debug)]
struct PackedScaled {
    hidden: usize,
    dense: Box<dyn PackedFfn>,
    scale: f32,
}

impl PackedFfn for PackedScaled {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, record, scratch } = args;
        self.dense.forward(FfnInference { y, x, record: None, scratch });
        y.iter_mut().for_each(|y| *y *= self.scale);
        let routed = routing(x.len() / self.hidden, self.scale);
        HostRouted { routing: &routed, balance_loss: 0.0, gate_entropy: 0.0 }.count(record);
    }

    fn bytes(&self) -> usize {
        self.dense.bytes() + size_of::<f32>()
    }

    fn num_experts(&self) -> Option<usize> {
        Some(1)
    }
}

/// The factor as the coefficient of the one expert, for other devices than the host.
#[derive(Debug)]
struct ScaleGate {
    hidden: usize,
}

impl HostGate for ScaleGate {
    fn new_saved(&self) -> Box<dyn Any + Send> {
        Box::new(Routing::default())
    }

    fn forward<'a>(
        &self,
        saved: &'a mut (dyn Any + Send),
        x: &[f32],
        params: &[f32],
        _training: Option<GateTraining>,
    ) -> HostRouted<'a> {
        let saved: &mut Routing = saved.downcast_mut().expect("saved by this gate");
        *saved = routing(x.len() / self.hidden, params[0]);
        HostRouted { routing: saved, balance_loss: 0.0, gate_entropy: 0.0 }
    }

    fn backward(&self, args: GateBackward<'_>) {
        args.grads[0] += args.dcoefficients.iter().copied().map(f64::from).sum::<f64>() as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIDDEN: usize = 4;
    const TOKENS: usize = 3;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i + 1) * (seed + 7) * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5).collect()
    }

    /// Returns the sum of the outputs times `dy`, and the values for the backward pass.
    fn forward(ffn: &ScaledFfn, [x, params, dy]: [&[f32]; 3]) -> (f64, Box<dyn Any + Send>) {
        let (mut y, mut saved) = (vec![0.0; x.len()], ffn.new_saved(TOKENS));
        let (training, scratch) = (GateTraining::default(), &mut FfnScratch::default());
        ffn.forward_train(FfnForward {
            y: &mut y,
            saved: &mut *saved,
            x,
            params,
            training,
            record: None,
            scratch,
        });
        (y.iter().zip(dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum(), saved)
    }

    #[test]
    fn gradients_are_differences() {
        let gated = Gated::silu(HIDDEN, 8);
        let ffn = ScaledFfn { gated, dense: DenseFfn::of(gated) };
        let mut params = values(dsmoe_core::ffn::block_len(&ffn.tensors()), 1);
        params[gated.len()] = 0.7;
        let (x, dy) = (values(TOKENS * HIDDEN, 2), values(TOKENS * HIDDEN, 3));
        let (_, mut saved) = forward(&ffn, [&x, &params, &dy]);
        let (mut dx, mut grads) = (vec![0.0; x.len()], vec![0.0; params.len()]);
        ffn.backward(FfnBackward {
            dx: &mut dx,
            grads: &mut grads,
            dy: &dy,
            saved: &mut *saved,
            x: &x,
            params: &params,
            sparsity: dsmoe_router::SparsityGrad { weight: 0.0, over: dsmoe_router::SparsityOver::Active },
            training: GateTraining::default(),
            scratch: &mut FfnScratch::default(),
        });
        let h = 1e-2f32;
        let moved = |values: &[f32], i: usize, h: f32| {
            let mut moved = values.to_vec();
            moved[i] += h;
            moved
        };
        let close = |got: f32, up: f64, down: f64, what: &str| {
            let want = (up - down) / (2.0 * f64::from(h));
            assert!((f64::from(got) - want).abs() < 1e-3, "{what}: {got} {want}");
        };
        for i in (0..gated.len()).step_by(5).chain([gated.len()]) {
            let at = |h| forward(&ffn, [&x, &moved(&params, i, h), &dy]).0;
            close(grads[i], at(h), at(-h), &format!("parameter {i}"));
        }
        for (i, &dx) in dx.iter().enumerate() {
            let at = |h| forward(&ffn, [&moved(&x, i, h), &params, &dy]).0;
            close(dx, at(h), at(-h), &format!("input {i}"));
        }
    }

    /// The gate that a GPU asks the host for is the one that the host computes.
    #[test]
    fn the_gate_has_the_factor_and_its_gradient() {
        let gate = ScaleGate { hidden: HIDDEN };
        let (mut saved, x) = (gate.new_saved(), values(TOKENS * HIDDEN, 2));
        let routed = gate.forward(&mut *saved, &x, &[0.7], None);
        assert_eq!(routed.routing.coefficients, [0.7; TOKENS]);
        assert_eq!(routed.routing.tokens, [0, 1, 2]);
        let (mut dx, mut grads) = (vec![0.0; x.len()], [1.0]);
        gate.backward(GateBackward {
            dx: &mut dx,
            grads: &mut grads,
            dcoefficients: &[0.5, 0.25, -0.125],
            saved: &*saved,
            x: &x,
            params: &[0.7],
            training: GateTraining::default(),
        });
        assert_eq!((grads, dx), ([1.625], vec![0.0; TOKENS * HIDDEN]));
    }
}
