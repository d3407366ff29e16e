//! A gate that the host computes, between ops of the device: its input is copied to the host, its decision and gradients are
//! copied back. Each copy to the host waits for the device.

use std::any::Any;
use std::sync::Arc;

use dsmoe_kernels::cuda::ops::{elementwise, router};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, Matrix};
use dsmoe_router::Routing;
use rayon::prelude::*;

use crate::error::Result;
use crate::ffn::{DeviceFfn, GateBackward, GateTraining, HostGate};

/// A layer's gate, with the data that its backward pass needs from the forward pass, on the host.
#[derive(Debug)]
pub(crate) struct Hosted {
    gate: Arc<dyn HostGate>,
    /// The gate's input.
    x: Vec<f32>,
    params: Vec<f32>,
    saved: Box<dyn Any + Send>,
    pub(crate) balance_loss: f64,
}

/// Device memory for values of the host before they are added to a matrix.
#[derive(Debug)]
pub(crate) struct Staging(GpuBuf<f32>);

impl Hosted {
    /// Makes the state for `ffn`, if its gate is computed by the host.
    pub(crate) fn new(ffn: &DeviceFfn) -> Option<Hosted> {
        let DeviceFfn::Hosted { gate, .. } = ffn else { return None };
        let (gate, saved) = (gate.clone(), gate.new_saved());
        Some(Hosted { gate, x: Vec::new(), params: Vec::new(), saved, balance_loss: 0.0 })
    }

    /// Sets `routed`. The parameters are downloaded, as every update changes them.
    pub(crate) fn forward(
        &mut self,
        routed: &mut router::Routed,
        normed: router::Normed<'_>,
        params: &Matrix<f32>,
        training: GateTraining,
    ) -> Result<()> {
        let Hosted { gate, x, params: held, saved, balance_loss } = self;
        fetch_normed(x, normed)?;
        held.resize(params.len(), 0.0);
        params.download_to(held)?;
        let decision = gate.forward(saved.as_mut(), x, held, Some(training));
        *balance_loss = decision.balance_loss;
        send(decision.routing, routed)
    }

    /// Adds to `dh` and to the gradients `dgate` of the gate's parameters.
    pub(crate) fn backward(
        &self,
        dh: &mut Matrix<f32>,
        dgate: &mut Matrix<f32>,
        dcoefficients: &Matrix<f32>,
        training: GateTraining,
        staging: &mut Staging,
    ) -> Result<()> {
        let Hosted { gate, x, params, saved, .. } = self;
        let dcoefficients = dcoefficients.download()?;
        let (mut dx, mut grads) = (vec![0.0; x.len()], vec![0.0; params.len()]);
        gate.backward(GateBackward {
            dx: &mut dx,
            grads: &mut grads,
            dcoefficients: &dcoefficients,
            saved: saved.as_ref(),
            x,
            params,
            training,
        });
        let (rows, cols) = (dh.rows(), dh.cols());
        staging.add(&mut dh.shaped_mut(rows * cols, 1), &dx)?;
        staging.add(dgate, &grads)
    }
}

impl Staging {
    pub(crate) fn new(gpu: &Gpu, len: usize) -> Result<Staging> {
        Ok(Staging(gpu.zeros(len)?))
    }

    /// Adds `values` to a vector, as many at a time as there is room for.
    fn add(&mut self, to: &mut Matrix<f32>, values: &[f32]) -> Result<()> {
        let room = self.0.len().max(1);
        for (i, piece) in values.chunks(room).enumerate() {
            let mut staged = self.0.part_mut(0..piece.len());
            staged.upload_from(piece)?;
            elementwise::Add { y: &mut to.part_mut(i * room..i * room + piece.len()), x: &staged }.run()?;
        }
        Ok(())
    }
}

/// Returns the mask and the coefficients of a routing, `[T, n]` each.
fn pairs(routing: &Routing) -> (Vec<u8>, Vec<f32>) {
    let n = routing.num_experts;
    let len = routing.num_tokens * n;
    let (mut mask, mut coefficients) = (vec![0; len], vec![0.0; len]);
    for (expert, slots) in routing.offsets.windows(2).enumerate() {
        for slot in slots[0]..slots[1] {
            let at = routing.tokens[slot] as usize * n + expert;
            (mask[at], coefficients[at]) = (1, routing.coefficients[slot]);
        }
    }
    (mask, coefficients)
}

fn send(routing: &Routing, routed: &mut router::Routed) -> Result<()> {
    let (mask, coefficients) = pairs(routing);
    Ok(routed.set(routing.num_experts, &mask, &coefficients)?)
}

/// Sets `routed` by a gate with these parameters, in inference.
pub(crate) fn route(
    gate: &dyn HostGate,
    routed: &mut router::Routed,
    normed: router::Normed<'_>,
    params: &[f32],
) -> Result<()> {
    let mut x = Vec::new();
    fetch_normed(&mut x, normed)?;
    let mut saved = gate.new_saved();
    send(gate.forward(saved.as_mut(), &x, params, None).routing, routed)
}

/// Sets `h` to `normed` in f32, as the norm's kernel computes it before rounding.
fn fetch_normed(h: &mut Vec<f32>, normed: router::Normed<'_>) -> Result<()> {
    let router::Normed { x, rstd, weight, offset } = normed;
    h.resize(x.len(), 0.0);
    x.download_to(h)?;
    let (rstd, mut weight) = (rstd.download()?, weight.download()?);
    if offset != 0.0 {
        weight.iter_mut().for_each(|weight| *weight += offset);
    }
    h.par_chunks_exact_mut(weight.len().max(1)).zip(rstd).for_each(|(row, rstd)| {
        row.iter_mut().zip(&weight).for_each(|(x, w)| *x = *x * rstd * w);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn a_routing_is_sent_as_a_mask_and_coefficients() {
        let mask = array![[true, false, true], [false, false, false], [true, true, false]];
        // Expert 0 runs for token 0 with a coefficient of 0.
        let routing = Routing::from_mask(mask.view(), |t, i| (t * i) as f32);
        let (mask, coefficients) = pairs(&routing);
        assert_eq!(mask, [1, 0, 1, 0, 0, 0, 1, 1, 0]);
        assert_eq!(coefficients, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]);
    }
}
