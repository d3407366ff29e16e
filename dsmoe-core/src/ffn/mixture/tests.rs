use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::{assert_close, f64s, normals};
use dsmoe_router::expert_map::ExpertMap;
use dsmoe_router::{Fade, SparsityGrad, SparsityOver};

use super::*;
use crate::ffn::{DenseFfn, GateTraining, block_len};
use crate::params::Layout;

/// An expert has 9 * 5 weights in each projection, which is no multiple of a cache line.
const HIDDEN: usize = 9;
const WIDTH: usize = 5;
const EXPERTS: usize = 4;
const TOKENS: usize = 6;

fn spec(renormalise: bool, shared: Option<usize>, balance_weight: f64) -> MixtureSpec {
    MixtureSpec {
        top_k: 2,
        renormalise,
        width: WIDTH,
        shared,
        balance_weight,
        experts: vec![EXPERTS],
        maps: None,
    }
}

fn ffn(spec: MixtureSpec) -> MixtureFfn {
    let (gated, weight) = (Gated::silu(HIDDEN, spec.neurons(0)), spec.balance_weight);
    MixtureFfn::new(gated, Arc::new(spec), 0, weight)
}

/// The same with gates that share experts.
fn shared_gates(spec: MixtureSpec, of_gates: &[u32]) -> MixtureSpec {
    MixtureSpec { maps: Some(vec![Arc::new(ExpertMap::new(of_gates.to_vec(), EXPERTS).unwrap())]), ..spec }
}

fn params(ffn: &MixtureFfn, seed: u64) -> Buf {
    let mut params = Buf::zeros(block_len(&ffn.tensors()));
    let values = normals(params.len(), seed);
    params.iter_mut().zip(values).for_each(|(p, v)| *p = 0.4 * v);
    params
}

fn packed(ffn: &dyn Ffn, params: &[f32], x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    let scratch = &mut FfnScratch::default();
    ffn.pack(params, Precision::F32).forward(FfnInference { y: &mut y, x, record: None, scratch });
    y
}

/// The forward pass of training: the output, the losses of gates and the saved values.
fn train(
    ffn: &MixtureFfn,
    x: &[f32],
    params: &[f32],
    training: GateTraining,
) -> (Vec<f32>, f64, Box<dyn Any + Send>) {
    let (mut y, mut saved) = (vec![0.0; x.len()], ffn.new_saved(TOKENS));
    let scratch = &mut FfnScratch::default();
    let args = FfnForward { y: &mut y, saved: &mut *saved, x, params, training, record: None, scratch };
    let report = ffn.forward_train(args);
    (y, report.balance_loss + f64::from(training.entropy) * report.gate_entropy, saved)
}

#[test]
fn experts_of_one_projection_are_one_matrix() {
    let ffn = ffn(spec(true, Some(7), 0.0));
    let layout = Layout::of(ffn.tensors());
    assert_eq!(layout.len(), block_len(&ffn.tensors()));
    for (which, whole) in ["gate", "up", "down"].iter().zip(ffn.gated.ranges()) {
        for e in 0..EXPERTS {
            let range = &layout.get(&format!("experts.{e}.{which}_proj.weight")).unwrap().range;
            let start = whole.start + e * WIDTH * HIDDEN;
            assert_eq!(*range, start..start + WIDTH * HIDDEN, "{which} {e}");
        }
    }
    let [router, shared] = ffn.starts();
    assert_eq!(layout.get("gate.weight").unwrap().range.start, router);
    assert_eq!(layout.get("shared_expert.gate_proj.weight").unwrap().range.start, shared);
    let gate = &layout.get("shared_expert_gate.weight").unwrap().range;
    assert_eq!(gate.start, shared + ffn.shared().unwrap().0.len());
}

#[test]
fn equal_experts_with_renormalised_coefficients_are_the_dense_ffn() {
    let ffn = ffn(spec(true, None, 0.0));
    let (mut params, dense) = (params(&ffn, 1), DenseFfn::new(HIDDEN, WIDTH));
    let mut of_dense = vec![0.0; block_len(&dense.tensors())];
    for (from, to) in ffn.gated.ranges().into_iter().zip(Gated::silu(HIDDEN, WIDTH).ranges()).take(3) {
        let (first, others) = params[from].split_at_mut(WIDTH * HIDDEN);
        others.chunks_exact_mut(WIDTH * HIDDEN).for_each(|expert| expert.copy_from_slice(first));
        of_dense[to].copy_from_slice(first);
    }
    let x = normals(7 * HIDDEN, 2);
    let want = f64s(&packed(&dense, &of_dense, &x));
    assert_close("y", &packed(&ffn, &params, &x), &want, 1e-6);
}

#[test]
fn inference_is_the_forward_pass_of_training() {
    for shared in [None, Some(7)] {
        let ffn = ffn(spec(false, shared, 0.3));
        let params = params(&ffn, 3);
        let x = normals(TOKENS * HIDDEN, 4);
        let want = f64s(&train(&ffn, &x, &params, GateTraining::default()).0);
        assert_close("y", &packed(&ffn, &params, &x), &want, 1e-6);
        // A token alone is the token in a batch.
        let alone: Vec<f32> = x.chunks_exact(HIDDEN).flat_map(|x| packed(&ffn, &params, x)).collect();
        assert_close("alone", &alone, &want, 1e-6);
    }
}

/// The objective `<y, dy>` + the losses of gates, and the experts of each token.
fn loss(
    ffn: &MixtureFfn,
    [x, params, dy]: [&[f32]; 3],
    training: GateTraining,
) -> (f64, Vec<u32>, Vec<usize>) {
    let (y, of_gates, saved) = train(ffn, x, params, training);
    let saved = saved.downcast_ref::<MixtureSaved>().expect("saved by a mixture");
    let routing = saved.router.routing().expect("routed");
    let value: f64 = f64s(&y).iter().zip(f64s(dy)).map(|(y, dy)| y * dy).sum();
    (value + of_gates, routing.tokens.clone(), routing.offsets.clone())
}

#[test]
fn gradients_are_differences_while_the_selection_holds() {
    let plain = [spec(true, None, 0.0), spec(false, None, 0.5), spec(false, Some(7), 0.5)];
    let mapped =
        [true, false].map(|renormalise| shared_gates(spec(renormalise, None, 0.5), &[2, 0, 1, 2, 3, 2, 0]));
    let faded = GateTraining { entropy: 0.4, fade: Fade { kept: 1, factor: 0.6 }, ..GateTraining::default() };
    let specs = plain.into_iter().chain(mapped);
    for (spec, training) in specs.flat_map(|spec| [(spec.clone(), GateTraining::default()), (spec, faded)]) {
        let ffn = ffn(spec.clone());
        let (params, dy) = (params(&ffn, 3), normals(TOKENS * HIDDEN, 5));
        let x = normals(TOKENS * HIDDEN, 4);
        let (_, _, mut saved) = train(&ffn, &x, &params, training);
        let (mut dx, mut grads) = (vec![0.0; x.len()], Buf::zeros(params.len()));
        ffn.backward(FfnBackward {
            dx: &mut dx,
            grads: &mut grads,
            dy: &dy,
            saved: &mut *saved,
            x: &x,
            params: &params,
            sparsity: SparsityGrad { weight: 0.0, over: SparsityOver::Active },
            training,
            scratch: &mut FfnScratch::default(),
        });
        let (_, tokens, offsets) = loss(&ffn, [&x, &params, &dy], training);
        let (h, mut checked) = (1e-3f32, 0);
        let moved = |values: &[f32], i: usize, h: f32| {
            let mut moved = values.to_vec();
            moved[i] += h;
            moved
        };
        let mut check = |what: &str, got: f32, at: &dyn Fn(f32) -> (f64, Vec<u32>, Vec<usize>)| {
            let (up, down) = (at(h), at(-h));
            // The loss jumps where the step changes which experts run.
            if [&up, &down].iter().any(|side| (&side.1, &side.2) != (&tokens, &offsets)) {
                return;
            }
            let want = (up.0 - down.0) / (2.0 * f64::from(h));
            let bound = 1e-2 * want.abs().max(1.0);
            assert!((f64::from(got) - want).abs() < bound, "{spec:?} {what}: {got} {want}");
            checked += 1;
        };
        let start = ffn.starts()[0];
        let points: Vec<usize> = (0..start).step_by(13).chain((start..params.len()).step_by(3)).collect();
        for &i in &points {
            check(&format!("parameter {i}"), grads[i], &|h| {
                loss(&ffn, [&x, &moved(&params, i, h), &dy], training)
            });
        }
        for i in (0..x.len()).step_by(2) {
            check(&format!("input {i}"), dx[i], &|h| loss(&ffn, [&moved(&x, i, h), &params, &dy], training));
        }
        assert!(checked > points.len(), "{checked} of {} parameters", points.len());
    }
}

#[test]
fn a_device_runs_it_without_a_shared_expert() {
    let held = |spec: MixtureSpec, layer: usize| {
        let gated = Gated::silu(HIDDEN, spec.neurons(layer));
        let device = MixtureFfn::new(gated, Arc::new(spec), layer, 0.0).on_device();
        device.filter(DeviceFfn::is_hosted).and_then(|device| device.num_experts())
    };
    let plain = spec(true, None, 0.0);
    assert_eq!(held(plain.clone(), 0), Some(EXPERTS));
    // Gates that share experts, and layers of different numbers of experts.
    assert_eq!(held(shared_gates(plain.clone(), &[0, 1, 1, 2, 3]), 0), Some(EXPERTS));
    let uneven = MixtureSpec { experts: vec![EXPERTS, EXPERTS - 1], ..plain };
    assert_eq!([0, 1].map(|layer| held(uneven.clone(), layer)), [Some(EXPERTS), Some(EXPERTS - 1)]);
    assert!(ffn(spec(true, Some(7), 0.0)).on_device().is_none());
}
