//! A layer whose router has learned, and the parts that an interrupted job leaves of such layers.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::partial::Partial;
use crate::topk::LayerExperts;

/// The names of the measurements of a layer.
pub(super) const MEASURED: [&str; 4] =
    ["share of labels found", "error of the router", "error of the labels", "error of random experts"];

/// The experts and the router of a layer, with the values of [`MEASURED`].
pub(super) struct Taught {
    pub(super) experts: LayerExperts,
    pub(super) measured: [f64; MEASURED.len()],
}

/// A layer in its part: numbers as bits.
#[derive(Serialize, Deserialize)]
struct Kept {
    order: Vec<u32>,
    gate: Vec<Vec<u32>>,
    measured: [u64; MEASURED.len()],
}

fn part_of(layer: usize) -> String {
    format!("router-{layer}")
}

impl Taught {
    /// Returns the first layers, as many as an interrupted job has finished of `layers`.
    pub(super) fn finished(partial: &Partial, layers: usize) -> Result<Vec<Taught>> {
        let parts = partial.first::<Kept>(layers, part_of)?;
        let floats = |bits: Vec<u32>| bits.into_iter().map(f32::from_bits).collect();
        let taught = |Kept { order, gate, measured }| Taught {
            experts: LayerExperts { order, gate: gate.into_iter().map(floats).collect() },
            measured: measured.map(f64::from_bits),
        };
        Ok(parts.into_iter().map(|part| taught(part.value)).collect())
    }

    pub(super) fn keep(&self, partial: &Partial, layer: usize) -> Result<()> {
        let LayerExperts { order, gate } = &self.experts;
        let bits = |values: &Vec<f32>| values.iter().map(|value| value.to_bits()).collect();
        let kept = Kept {
            order: order.clone(),
            gate: gate.iter().map(bits).collect(),
            measured: self.measured.map(f64::to_bits),
        };
        partial.keep(&part_of(layer), &kept, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_come_back_bit_for_bit() {
        let gate = vec![vec![0.1, -0.0, 1e-40], vec![f32::MIN_POSITIVE]];
        let taught = Taught {
            experts: LayerExperts { order: vec![2, 0, 1], gate: gate.clone() },
            measured: [0.1, 1e-310, -0.0, 1e300],
        };
        let work = tempfile::tempdir().unwrap();
        let partial = Partial::open(&work.path().join("out"), "work".to_owned(), true).unwrap();
        taught.keep(&partial, 0).unwrap();
        // Layers behind a gap are not finished.
        taught.keep(&partial, 2).unwrap();
        let found = Taught::finished(&partial, 3).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].experts.order, taught.experts.order);
        let bits = |gate: &[Vec<f32>]| gate.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&found[0].experts.gate), bits(&gate));
        assert_eq!(found[0].measured.map(f64::to_bits), taught.measured.map(f64::to_bits));
    }
}
