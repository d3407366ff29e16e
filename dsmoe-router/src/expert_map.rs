//! Gates that share experts, as after a merge: every gate decides as before, and runs the expert that took its own in.
//!
//! ```text
//! gates    mask m [T, n], coefficients c [T, n]            expert of gate e: j = map(e)
//! experts  M[t, j] = any of m[t, e] with map(e) = j        C[t, j] = sum of c[t, e] m[t, e] with map(e) = j
//! backward dc[t, e] = dC[t, map(e)]
//! ```

use ndarray::{Array2, ArrayView2};

use crate::{Error, Result, Routing};

/// The expert that every gate of a layer runs.
///
/// ```
/// use dsmoe_router::Routing;
/// use dsmoe_router::expert_map::ExpertMap;
/// use ndarray::array;
///
/// // Gates 0 and 2 run expert 0.
/// let map = ExpertMap::new(vec![0, 1, 0], 2)?;
/// let gates = Routing::from_mask(array![[true, false, true]].view(), |_, _| 0.5);
/// let mut experts = Routing::default();
/// map.route(&gates, &mut experts);
/// assert_eq!((experts.num_experts, &experts.coefficients[..]), (2, &[1.0][..]));
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertMap {
    of_gates: Vec<u32>,
    num_experts: usize,
}

impl ExpertMap {
    /// Makes the map of gates to `num_experts` experts, of which each has a gate.
    ///
    /// # Errors
    /// A gate has an expert that there is not, or an expert has no gate.
    pub fn new(of_gates: Vec<u32>, num_experts: usize) -> Result<ExpertMap> {
        let mut has_gate = vec![false; num_experts.min(of_gates.len())];
        for &expert in &of_gates {
            match has_gate.get_mut(expert as usize) {
                Some(has_gate) => *has_gate = true,
                None => {
                    return Err(Error::range(
                        "expert_map",
                        expert,
                        format!("an expert below {num_experts}, each with a gate"),
                    ));
                }
            }
        }
        match has_gate.len() == num_experts && has_gate.iter().all(|&has| has) {
            true => Ok(ExpertMap { of_gates, num_experts }),
            false => {
                let without = has_gate.iter().position(|&has| !has).unwrap_or(has_gate.len());
                Err(Error::range("expert_map", "without a gate", format!("a gate for expert {without}")))
            }
        }
    }

    /// Returns the number of gates (n).
    pub fn num_gates(&self) -> usize {
        self.of_gates.len()
    }

    /// Returns the number of experts.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Returns the expert of every gate.
    pub fn of_gates(&self) -> &[u32] {
        &self.of_gates
    }

    /// Sets `experts` to what the experts run where `gates` is the routing of their gates. Coefficients of one expert are
    /// added in the order of the gates.
    ///
    /// # Panics
    /// `gates` is of another number of gates.
    pub fn route(&self, gates: &Routing, experts: &mut Routing) {
        assert_eq!(gates.num_experts, self.num_gates(), "expert map: gates");
        let shape = (gates.num_tokens, self.num_experts);
        let (mut mask, mut sums) = (Array2::from_elem(shape, false), Array2::<f64>::zeros(shape));
        for (&expert, slots) in self.of_gates.iter().zip(gates.offsets.windows(2)) {
            let slots = slots[0]..slots[1];
            for (&token, &coefficient) in gates.tokens[slots.clone()].iter().zip(&gates.coefficients[slots]) {
                let pair = [token as usize, expert as usize];
                mask[pair] = true;
                sums[pair] += f64::from(coefficient);
            }
        }
        experts.rebuild(mask.view(), |token, expert| sums[[token, expert]] as f32);
    }

    /// Returns the gradient by the coefficients of the gates `[T, n]` of that by the coefficients of the experts.
    ///
    /// # Panics
    /// `by_expert` is of another number of experts.
    pub fn backward(&self, by_expert: ArrayView2<'_, f32>) -> Array2<f32> {
        assert_eq!(by_expert.ncols(), self.num_experts, "expert map: experts");
        let shape = (by_expert.nrows(), self.num_gates());
        Array2::from_shape_fn(shape, |(t, gate)| by_expert[[t, self.of_gates[gate] as usize]])
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::mixture::{MixtureConfig, route};

    #[test]
    fn coefficients_of_gates_with_one_expert_add_up() {
        // The published example: three of four gates, renormalised, and gates 0 and 2 run one expert.
        let config = MixtureConfig::new(4, 3, true).unwrap();
        let routed = route(&config, array![[2.0f32, 1.0, 0.5, -1.0]].view(), crate::Fade::NONE);
        let want = [0.628_532, 0.231_224, 0.140_244];
        dsmoe_kernels::testing::assert_close("gates", &routed.routing.coefficients, &want, 1e-6);
        let map = ExpertMap::new(vec![0, 1, 0, 2], 3).unwrap();
        let mut experts = Routing::default();
        map.route(&routed.routing, &mut experts);
        assert_eq!((experts.num_experts, &experts.offsets[..]), (3, &[0, 1, 2, 2][..]));
        let want = [0.768_776, 0.231_224];
        dsmoe_kernels::testing::assert_close("experts", &experts.coefficients, &want, 1e-6);
        let back = map.backward(array![[10.0f32, 20.0, 30.0]].view());
        assert_eq!(back, array![[10.0, 20.0, 10.0, 30.0]]);
    }

    #[test]
    fn a_map_of_every_gate_to_its_own_expert_changes_nothing() {
        let mask = array![[true, false, true], [false, false, false], [false, true, true]];
        let gates = Routing::from_mask(mask.view(), |t, e| 0.1 + (3 * t + e) as f32);
        let mut experts = Routing::default();
        ExpertMap::new(vec![0, 1, 2], 3).unwrap().route(&gates, &mut experts);
        assert_eq!(experts, gates);
    }

    #[test]
    fn wrong_maps_are_refused() {
        for (of_gates, experts, part) in
            [(vec![0, 2], 2, "below 2"), (vec![0, 0], 2, "expert 1"), (vec![0], 1 << 40, "expert 1")]
        {
            let error = ExpertMap::new(of_gates, experts).unwrap_err().to_string();
            assert!(error.contains("expert_map") && error.contains(part), "{error}");
        }
    }
}
