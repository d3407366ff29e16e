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

    /// Returns the gates of an expert, ascending.
    pub fn gates_of(&self, expert: usize) -> impl Iterator<Item = usize> + '_ {
        let of_gates = self.of_gates.iter().enumerate();
        of_gates.filter(move |&(_, &of)| of as usize == expert).map(|(gate, _)| gate)
    }

    /// Returns whether each gate runs the expert of its own number, as without a map.
    pub fn is_plain(&self) -> bool {
        self.of_gates.iter().enumerate().all(|(gate, &expert)| gate == expert as usize)
    }

    /// Returns the map of the same gates after the experts themselves were merged, `merge` being the map of experts to new ones.
    ///
    /// # Panics
    /// `merge` is of another number of experts.
    ///
    /// ```
    /// use dsmoe_router::expert_map::ExpertMap;
    ///
    /// let once = ExpertMap::new(vec![0, 1, 0, 2], 3)?;
    /// let twice = once.then(&ExpertMap::new(vec![0, 1, 1], 2)?);
    /// assert_eq!((twice.of_gates(), twice.num_experts()), (&[0, 1, 0, 1][..], 2));
    /// # Ok::<(), dsmoe_router::Error>(())
    /// ```
    #[must_use]
    pub fn then(&self, merge: &ExpertMap) -> ExpertMap {
        assert_eq!(merge.num_gates(), self.num_experts, "expert map: experts");
        let of_gates = self.of_gates.iter().map(|&expert| merge.of_gates[expert as usize]).collect();
        ExpertMap { of_gates, num_experts: merge.num_experts }
    }

    /// Returns the gates of some of the experts, expert after expert, and the map of these gates to them.
    ///
    /// # Panics
    /// There is no such expert.
    ///
    /// ```
    /// use dsmoe_router::expert_map::ExpertMap;
    ///
    /// let (gates, map) = ExpertMap::new(vec![0, 1, 0, 2], 3)?.keep(&[2, 0]);
    /// assert_eq!((&gates[..], map.of_gates()), (&[3, 0, 2][..], &[0, 1, 1][..]));
    /// # Ok::<(), dsmoe_router::Error>(())
    /// ```
    pub fn keep(&self, kept: &[usize]) -> (Vec<usize>, ExpertMap) {
        assert!(kept.iter().all(|&expert| expert < self.num_experts), "expert map: experts {kept:?}");
        let gates = kept.iter().map(|&expert| self.gates_of(expert).collect::<Vec<_>>());
        let gates: Vec<Vec<usize>> = gates.collect();
        let of = |(new, gates): (usize, &Vec<usize>)| vec![new as u32; gates.len()];
        let of_gates = gates.iter().enumerate().flat_map(of).collect();
        (gates.concat(), ExpertMap { of_gates, num_experts: kept.len() })
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

    /// Returns the map of these gates and experts, and of as many others behind them as `others`, each of its own gate: experts that all
    /// tokens run.
    #[must_use]
    pub fn before(&self, others: usize) -> ExpertMap {
        let behind = (self.num_experts..self.num_experts + others).map(|expert| expert as u32);
        let of_gates = self.of_gates.iter().copied().chain(behind).collect();
        ExpertMap { of_gates, num_experts: self.num_experts + others }
    }

    /// Returns for every token and expert the logit whose exponential is the sum of those of its gates' `logits` `[T, n]`.
    ///
    /// # Panics
    /// `logits` are of another number of gates.
    pub fn log_sums(&self, logits: ArrayView2<'_, f32>) -> Array2<f32> {
        self.of_experts(logits, |values| match values {
            [only] => *only,
            values => {
                let most = values.iter().fold(f64::NEG_INFINITY, |most, &z| most.max(f64::from(z)));
                (most + values.iter().map(|&z| (f64::from(z) - most).exp()).sum::<f64>().ln()) as f32
            }
        })
    }

    /// Returns for every token and expert the largest of its gates' `logits` `[T, n]`: it is above a threshold if any of them is.
    ///
    /// # Panics
    /// Those of [`ExpertMap::log_sums`].
    ///
    /// ```
    /// use dsmoe_router::expert_map::ExpertMap;
    /// use ndarray::array;
    ///
    /// let map = ExpertMap::new(vec![0, 1, 0], 2)?;
    /// assert_eq!(map.largest(array![[0.5, -1.0, 2.0]].view()), array![[2.0, -1.0]]);
    /// # Ok::<(), dsmoe_router::Error>(())
    /// ```
    pub fn largest(&self, logits: ArrayView2<'_, f32>) -> Array2<f32> {
        self.of_experts(logits, |values| values.iter().copied().fold(f32::NEG_INFINITY, f32::max))
    }

    /// Returns for every token and expert the sum of its gates' `values` `[T, n]`.
    ///
    /// # Panics
    /// `values` are of another number of gates.
    pub fn sums(&self, values: ArrayView2<'_, f64>) -> Array2<f64> {
        self.of_experts(values, |values| values.iter().sum())
    }

    /// Returns what `of` makes of the values of the gates of every expert, token by token.
    fn of_experts<T: Copy>(&self, values: ArrayView2<'_, T>, of: impl Fn(&[T]) -> T) -> Array2<T> {
        assert_eq!(values.ncols(), self.num_gates(), "expert map: gates");
        let gates: Vec<Vec<usize>> =
            (0..self.num_experts).map(|expert| self.gates_of(expert).collect()).collect();
        let mut of_expert = Vec::new();
        Array2::from_shape_fn((values.nrows(), self.num_experts), |(token, expert)| {
            of_expert.clear();
            of_expert.extend(gates[expert].iter().map(|&gate| values[[token, gate]]));
            of(&of_expert)
        })
    }

    /// Returns the pairs of tokens and experts of a routing of the experts `[T, experts]`.
    ///
    /// # Panics
    /// `experts` is of another number of experts.
    pub fn mask(&self, experts: &Routing) -> Array2<bool> {
        assert_eq!(experts.num_experts, self.num_experts, "expert map: experts");
        let mut mask = Array2::from_elem((experts.num_tokens, self.num_experts), false);
        for (expert, slots) in experts.offsets.windows(2).enumerate() {
            for &token in &experts.tokens[slots[0]..slots[1]] {
                mask[[token as usize, expert]] = true;
            }
        }
        mask
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
    fn maps_of_maps_run_what_both_say() {
        let map = ExpertMap::new(vec![0, 1, 0, 2, 2], 3).unwrap();
        assert!(map.gates_of(2).eq([3, 4]) && map.gates_of(1).eq([1]));
        let merge = ExpertMap::new(vec![1, 0, 1], 2).unwrap();
        let mask = array![[true, false, true, false, true], [false, true, false, true, true]];
        let gates = Routing::from_mask(mask.view(), |t, e| 0.25 + (5 * t + e) as f32);
        let [mut once, mut twice, mut both] = [0; 3].map(|_| Routing::default());
        map.route(&gates, &mut once);
        merge.route(&once, &mut twice);
        map.then(&merge).route(&gates, &mut both);
        assert_eq!(both, twice);
        // Experts that each keep one gate have no need of a map.
        let (gates, kept) = map.keep(&[1]);
        assert!(gates == [1] && kept.is_plain() && !map.is_plain());
        assert_eq!(map.keep(&[0, 1, 2]).1.of_gates(), [0, 0, 1, 2, 2]);
    }

    #[test]
    fn values_of_experts_are_those_of_their_gates() {
        let map = ExpertMap::new(vec![1, 0, 1], 2).unwrap();
        let logits = array![[0.0f32, 3.0, 2.0], [-80.0, 1.0, -80.0]];
        let joint = map.log_sums(logits.view());
        assert_eq!([joint[[0, 0]], joint[[1, 0]]], [3.0, 1.0]);
        assert!((joint[[0, 1]] - (1.0 + 2f32.exp()).ln()).abs() < 1e-6);
        assert!((joint[[1, 1]] - (2f32.ln() - 80.0)).abs() < 1e-5);
        assert_eq!(map.largest(logits.view()), array![[3.0, 2.0], [1.0, -80.0]]);
        assert_eq!(map.sums(array![[0.5, 0.25, 1.0]].view()), array![[0.25, 1.5]]);
        let mask = array![[true, false, true], [false, false, false]];
        let mut experts = Routing::default();
        map.route(&Routing::from_mask(mask.view(), |_, _| 1.0), &mut experts);
        assert_eq!(map.mask(&experts), array![[false, true], [false, false]]);
        // Experts that all tokens run come behind, each of its own.
        let all = map.before(2);
        assert_eq!((all.of_gates(), all.num_experts()), (&[1, 0, 1, 2, 3][..], 4));
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
