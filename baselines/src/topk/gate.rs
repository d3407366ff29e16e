//! Gate networks and the network of noise, forward and backward: those of LLaMA-MoE (`TopKBalancedNoisyGate`), and CMoE's
//! of one neuron for each expert.
//!
//! ```text
//! u   = r x A^T               r = 1, or 1 / |x| for a normalised input (MoEfication); 0 for x = 0
//! z   = tanh(u) B^T           mlp;  z = u  linear;  z = |silu(u) v|, v = r x B^T  neuron
//! raw = x N^T                 noise, in training
//! dB += dz^T tanh(u),  du = (dz B) (1 - tanh(u)^2),  dA += (r du)^T x,  dN += draw^T x
//! z += c                      with a bias (FactorLLM): dc += sum over tokens of dz
//! neuron: with g = sign(silu(u) v) dz   du = g v silu'(u),  dv = g silu(u),  dB += (r dv)^T x,  dx += r dv B
//! dx += r du A + draw N - r^2 (<du, u> + <dv, v>) x      the last term for a normalised input
//! ```
//! x `[T, hidden]`, z and raw `[T, n]`, A and N `[n, hidden]`, B `[n, n]`, of a neuron `[n, hidden]`. An mlp that lost experts has A
//! `[m, hidden]` and B `[n, m]`. f32 throughout.

use dsmoe_core::params::TensorSpec;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, linear};

use super::spec::{GateNetwork, GateSpec, TopkSpec};

/// A gate for inputs of width `hidden` and logits of `num_experts` experts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    pub(crate) spec: GateSpec,
    pub(crate) hidden: usize,
    pub(crate) num_experts: usize,
}

/// A gate's tensors, or their gradients: A, B, the bias c and N; empty where the gate has none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GateWeights<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) noise: &'a [f32],
}

/// Gradients of [`GateWeights`], added to.
#[derive(Debug)]
pub(crate) struct GateGrads<'a> {
    pub(crate) a: &'a mut [f32],
    pub(crate) b: &'a mut [f32],
    pub(crate) bias: &'a mut [f32],
    pub(crate) noise: &'a mut [f32],
}

/// Arguments of [`Gate::backward`].
#[derive(Debug)]
pub(crate) struct NetworkBackward<'a> {
    /// Added to.
    pub(crate) dx: &'a mut [f32],
    pub(crate) grads: GateGrads<'a>,
    pub(crate) dz: &'a [f32],
    /// The gradient of raw, if the gate is noisy.
    pub(crate) draw: Option<&'a [f32]>,
    /// The values of the forward pass over `x`.
    pub(crate) acts: &'a GateActs,
    pub(crate) x: &'a [f32],
    pub(crate) weights: GateWeights<'a>,
}

/// Values of a gate's forward pass that its backward pass needs.
#[derive(Debug, Default)]
pub(crate) struct GateActs {
    /// r, `[T]`; empty when the input is not normalised.
    scales: Vec<f32>,
    /// u.
    pre: Buf,
    /// tanh(u); v for a gate of neurons; empty for a linear gate.
    second: Buf,
    /// raw.
    pub(crate) raw: Buf,
}

impl TopkSpec {
    /// The gate for inputs of width `hidden`.
    pub(crate) fn gate(&self, hidden: usize) -> Gate {
        Gate { spec: self.gate, hidden, num_experts: self.router.num_experts }
    }
}

impl Gate {
    /// The numbers of values of A, B, the bias and N.
    pub(crate) fn lens(&self) -> [usize; 4] {
        let (n, m, wide) = (self.num_experts, self.first_rows(), self.num_experts * self.hidden);
        let b = match self.spec.network {
            GateNetwork::Mlp => n * m,
            GateNetwork::Neuron => wide,
            GateNetwork::Linear => 0,
        };
        let bias = if self.spec.bias { n } else { 0 };
        [m * self.hidden, b, bias, if self.spec.noise { wide } else { 0 }]
    }

    /// The rows of A.
    fn first_rows(&self) -> usize {
        match self.spec.network {
            GateNetwork::Mlp => self.spec.hidden.unwrap_or(self.num_experts),
            GateNetwork::Linear | GateNetwork::Neuron => self.num_experts,
        }
    }

    /// The number of values that a model holds of the gate for one expert.
    pub(crate) fn params_of_expert(&self) -> usize {
        let row = match self.spec.network {
            GateNetwork::Linear => self.hidden,
            GateNetwork::Mlp => self.first_rows(),
            GateNetwork::Neuron => 2 * self.hidden,
        };
        row + usize::from(self.spec.bias)
    }

    /// The names of the tensors that have a row, or a value, for every expert.
    pub(crate) fn rows_of_experts(&self) -> &'static [&'static str] {
        match self.spec.network {
            GateNetwork::Linear => {
                &["gate.gate_network.weight", "gate.gate_network.bias", "gate.weight_noise.weight"]
            }
            GateNetwork::Mlp => &["gate.gate_network.2.weight", "gate.weight_noise.weight"],
            GateNetwork::Neuron => {
                &["gate.gate_network.gate.weight", "gate.gate_network.up.weight", "gate.weight_noise.weight"]
            }
        }
    }

    /// A, B, the bias and N under LLaMA-MoE's names; a neuron's are named by their projections.
    pub(crate) fn tensors(&self) -> Vec<TensorSpec> {
        let of_shape =
            |name: &str, rows, cols| TensorSpec::router(format!("gate.{name}.weight"), vec![rows, cols]);
        let (tensor, m) = (|name, cols| of_shape(name, self.num_experts, cols), self.first_rows());
        let mut tensors = match self.spec.network {
            GateNetwork::Linear => vec![tensor("gate_network", self.hidden)],
            GateNetwork::Mlp => {
                vec![of_shape("gate_network.0", m, self.hidden), tensor("gate_network.2", m)]
            }
            GateNetwork::Neuron => {
                vec![tensor("gate_network.gate", self.hidden), tensor("gate_network.up", self.hidden)]
            }
        };
        let bias = || TensorSpec::router("gate.gate_network.bias", vec![self.num_experts]);
        tensors.extend(self.spec.bias.then(bias));
        tensors.extend(self.spec.noise.then(|| tensor("weight_noise", self.hidden).training_only()));
        tensors
    }

    /// Returns views of tensors in the order of [`Gate::tensors`], N left out.
    pub(crate) fn weights<'a>(&self, tensors: &'a [Vec<f32>]) -> GateWeights<'a> {
        let (mut tensors, lens) = (tensors.iter(), self.lens());
        let mut next =
            |i: usize| if lens[i] == 0 { &[][..] } else { tensors.next().map_or(&[][..], |of| &of[..]) };
        GateWeights { a: next(0), b: next(1), bias: next(2), noise: &[] }
    }

    /// Does as [`Gate::weights`] for gradients.
    pub(crate) fn grads<'a>(&self, tensors: &'a mut [Vec<f32>]) -> GateGrads<'a> {
        let (mut tensors, lens) = (tensors.iter_mut(), self.lens());
        let mut next = |i: usize| {
            if lens[i] == 0 { &mut [][..] } else { tensors.next().map_or(&mut [][..], |of| &mut of[..]) }
        };
        GateGrads { a: next(0), b: next(1), bias: next(2), noise: &mut [] }
    }

    fn dims(&self, rows: usize, inputs: usize) -> linear::Dims {
        linear::Dims { rows, inputs, outputs: self.num_experts, precision: Precision::F32 }
    }

    /// Sets the logits `z` of `x` and the values in `acts` that the backward pass needs, `raw` only if `noisy`.
    pub(crate) fn forward(
        &self,
        z: &mut Buf,
        acts: &mut GateActs,
        x: &[f32],
        weights: GateWeights<'_>,
        noisy: bool,
    ) {
        let (rows, n, m) = (x.len() / self.hidden, self.num_experts, self.first_rows());
        let wide = self.dims(rows, self.hidden);
        z.resize(rows * n);
        let GateActs { scales, pre, second, raw } = acts;
        pre.resize(rows * m);
        let first = linear::Dims { outputs: m, ..wide };
        linear::Forward { y: pre, x, w: weights.a, bias: None, dims: first }.run();
        second.resize(if self.spec.network == GateNetwork::Linear { 0 } else { rows * m });
        if self.spec.network == GateNetwork::Neuron {
            linear::Forward { y: second, x, w: weights.b, bias: None, dims: wide }.run();
        }
        scales.clear();
        if self.spec.normalize {
            for (i, x) in x.chunks_exact(self.hidden).enumerate() {
                let norm = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let scale = if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 };
                pre[i * m..][..m].iter_mut().for_each(|u| *u *= scale);
                if self.spec.network == GateNetwork::Neuron {
                    second[i * n..][..n].iter_mut().for_each(|v| *v *= scale);
                }
                scales.push(scale);
            }
        }
        match self.spec.network {
            GateNetwork::Linear => z.copy_from_slice(pre),
            GateNetwork::Mlp => {
                second.iter_mut().zip(pre.iter()).for_each(|(t, u)| *t = u.tanh());
                linear::Forward { y: z, x: second, w: weights.b, bias: None, dims: self.dims(rows, m) }.run();
            }
            GateNetwork::Neuron => {
                let values = pre.iter().zip(second.iter());
                z.iter_mut().zip(values).for_each(|(z, (&u, &v))| *z = (u * sigmoid(u) * v).abs());
            }
        }
        if !weights.bias.is_empty() {
            for z in z.chunks_exact_mut(n) {
                z.iter_mut().zip(weights.bias).for_each(|(z, c)| *z += c);
            }
        }
        if noisy {
            raw.resize(rows * n);
            linear::Forward { y: raw, x, w: weights.noise, bias: None, dims: wide }.run();
        }
    }

    /// Adds the gradients of x and of the weights.
    pub(crate) fn backward(&self, args: NetworkBackward<'_>) {
        let NetworkBackward { dx, grads, dz, draw, acts, x, weights } = args;
        let (rows, n, m) = (x.len() / self.hidden, self.num_experts, self.first_rows());
        let wide = self.dims(rows, self.hidden);
        if !grads.bias.is_empty() {
            for dz in dz.chunks_exact(n) {
                grads.bias.iter_mut().zip(dz).for_each(|(dc, dz)| *dc += dz);
            }
        }
        let mut du = Buf::zeros(rows * m);
        let mut dv = Buf::default();
        match self.spec.network {
            GateNetwork::Linear => du.copy_from_slice(dz),
            GateNetwork::Mlp => {
                let dims = self.dims(rows, m);
                linear::BackwardWeight { dw: grads.b, dy: dz, x: &acts.second, dims }.run();
                linear::BackwardInput { dx: &mut du, dy: dz, w: weights.b, dims, add: false }.run();
                du.iter_mut().zip(acts.second.iter()).for_each(|(du, t)| *du *= 1.0 - t * t);
            }
            GateNetwork::Neuron => {
                dv.resize(rows * n);
                for (i, (&u, &v)) in acts.pre.iter().zip(acts.second.iter()).enumerate() {
                    let (s, g) = (sigmoid(u), if u * v < 0.0 { -dz[i] } else { dz[i] });
                    (du[i], dv[i]) = (g * v * s * (1.0 + u * (1.0 - s)), g * u * s);
                }
            }
        }
        if self.spec.normalize {
            for (of, values) in [(&mut du, &acts.pre), (&mut dv, &acts.second)] {
                let rows = of.chunks_exact_mut(m).zip(values.chunks_exact(m)).zip(&acts.scales);
                let inputs = dx.chunks_exact_mut(self.hidden).zip(x.chunks_exact(self.hidden));
                for (((du, u), scale), (dx, x)) in rows.zip(inputs) {
                    let along: f32 = du.iter().zip(u).map(|(du, u)| du * u).sum();
                    let along = scale * scale * along;
                    dx.iter_mut().zip(x).for_each(|(dx, x)| *dx -= along * x);
                    du.iter_mut().for_each(|du| *du *= scale);
                }
            }
        }
        if self.spec.network == GateNetwork::Neuron {
            linear::BackwardWeight { dw: grads.b, dy: &dv, x, dims: wide }.run();
            linear::BackwardInput { dx: &mut *dx, dy: &dv, w: weights.b, dims: wide, add: true }.run();
        }
        let first = linear::Dims { outputs: m, ..wide };
        linear::BackwardWeight { dw: grads.a, dy: &du, x, dims: first }.run();
        linear::BackwardInput { dx: &mut *dx, dy: &du, w: weights.a, dims: first, add: true }.run();
        if let Some(draw) = draw {
            linear::BackwardWeight { dw: grads.noise, dy: draw, x, dims: wide }.run();
            linear::BackwardInput { dx, dy: draw, w: weights.noise, dims: wide, add: true }.run();
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;

    use super::*;

    const HIDDEN: usize = 6;
    const EXPERTS: usize = 4;
    const TOKENS: usize = 5;

    /// <z, dz> + <raw, draw> in f64 loops.
    fn loss(gate: &Gate, x: &[f64], [a, b, bias, noise]: [&[f64]; 4], dz: &[f32], draw: &[f32]) -> f64 {
        let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
        let mut loss = 0.0;
        for (t, x) in x.chunks_exact(HIDDEN).enumerate() {
            let norm = if gate.spec.normalize { dot(x, x).sqrt() } else { 1.0 };
            let u: Vec<f64> = a.chunks_exact(HIDDEN).map(|row| dot(x, row) / norm).collect();
            let z: Vec<f64> = match gate.spec.network {
                GateNetwork::Linear => u,
                GateNetwork::Mlp => {
                    let h: Vec<f64> = u.iter().map(|u| u.tanh()).collect();
                    b.chunks_exact(h.len()).map(|row| dot(&h, row)).collect()
                }
                GateNetwork::Neuron => {
                    let v = b.chunks_exact(HIDDEN).map(|row| dot(x, row) / norm);
                    u.iter().zip(v).map(|(u, v)| (u / (1.0 + (-u).exp()) * v).abs()).collect()
                }
            };
            let z = z.iter().enumerate().map(|(i, z)| z + bias.get(i).unwrap_or(&0.0));
            loss += z.zip(&dz[t * EXPERTS..]).map(|(z, &dz)| z * f64::from(dz)).sum::<f64>();
            for (row, &draw) in noise.chunks_exact(HIDDEN).zip(&draw[t * EXPERTS..]) {
                loss += dot(x, row) * f64::from(draw);
            }
        }
        loss
    }

    #[test]
    fn gradients_are_differences_of_the_formulas() {
        use dsmoe_kernels::testing::{assert_close, f64s, finite_differences};
        for (network, normalize, noise, bias, hidden) in [
            (GateNetwork::Mlp, false, true, false, None),
            (GateNetwork::Mlp, true, false, false, None),
            (GateNetwork::Mlp, true, true, false, Some(EXPERTS + 3)),
            (GateNetwork::Mlp, false, false, false, Some(EXPERTS - 1)),
            (GateNetwork::Linear, false, true, false, None),
            (GateNetwork::Linear, false, false, true, None),
            (GateNetwork::Linear, true, true, true, None),
            (GateNetwork::Neuron, false, false, false, None),
            (GateNetwork::Neuron, true, true, false, None),
        ] {
            let spec = GateSpec { network, normalize, noise, bias, hidden };
            let gate = Gate { spec, hidden: HIDDEN, num_experts: EXPERTS };
            let [a, b, c, noises] = gate.lens();
            let [x, a, b, c, noises] =
                [(TOKENS * HIDDEN, 1), (a, 2), (b, 3), (c, 7), (noises, 4)].map(|(n, seed)| normals(n, seed));
            let weights = GateWeights { a: &a, b: &b, bias: &c, noise: &noises };
            let (dz, draw) = (normals(TOKENS * EXPERTS, 5), normals(TOKENS * EXPERTS, 6));
            let (mut z, mut acts) = (Buf::default(), GateActs::default());
            gate.forward(&mut z, &mut acts, &x, weights, noise);
            let [mut dx, mut da, mut db, mut dc, mut dn] =
                [&x, &a, &b, &c, &noises].map(|of| vec![0.0; of.len()]);
            let grads = GateGrads { a: &mut da, b: &mut db, bias: &mut dc, noise: &mut dn };
            let draws = noise.then_some(&draw[..]);
            let (acts, dx_of) = (&acts, &mut dx);
            gate.backward(NetworkBackward { dx: dx_of, grads, dz: &dz, draw: draws, acts, x: &x, weights });

            let [x, a, b, c, noises] = [&x, &a, &b, &c, &noises].map(|of| f64s(of));
            let value: f64 = z.iter().zip(&dz).map(|(&z, &dz)| f64::from(z) * f64::from(dz)).sum();
            assert!((value - loss(&gate, &x, [&a, &b, &c, &[]], &dz, &draw)).abs() < 1e-4, "{spec:?}");
            let h = 1e-5;
            let by_x = finite_differences(&x, h, |x| loss(&gate, x, [&a, &b, &c, &noises], &dz, &draw));
            let by_a = finite_differences(&a, h, |a| loss(&gate, &x, [a, &b, &c, &noises], &dz, &draw));
            let by_b = finite_differences(&b, h, |b| loss(&gate, &x, [&a, b, &c, &noises], &dz, &draw));
            let by_c = finite_differences(&c, h, |c| loss(&gate, &x, [&a, &b, c, &noises], &dz, &draw));
            let by_n = finite_differences(&noises, h, |n| loss(&gate, &x, [&a, &b, &c, n], &dz, &draw));
            for (name, got, want) in
                [("x", &dx, by_x), ("a", &da, by_a), ("b", &db, by_b), ("c", &dc, by_c), ("n", &dn, by_n)]
            {
                assert_close(&format!("{spec:?} d{name}"), got, &want, 1e-5);
            }
        }
    }

    #[test]
    fn an_input_of_zeros_is_no_nan() {
        let network = GateNetwork::Mlp;
        let spec = GateSpec { network, normalize: true, noise: false, bias: false, hidden: None };
        let gate = Gate { spec, hidden: HIDDEN, num_experts: EXPERTS };
        let (a, b) = (normals(EXPERTS * HIDDEN, 1), normals(EXPERTS * EXPERTS, 2));
        let mut z = Buf::default();
        let weights = GateWeights { a: &a, b: &b, bias: &[], noise: &[] };
        gate.forward(&mut z, &mut GateActs::default(), &[0.0; HIDDEN], weights, false);
        assert_eq!(z[..], [0.0; EXPERTS]);
    }
}
