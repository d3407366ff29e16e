//! Experts that run for each token: compressed rows by expert, with the token-major inverse.

use ndarray::ArrayView2;

/// The active (token, expert) pairs of one layer.
///
/// A *slot* is an index into [`tokens`](Self::tokens) and [`coefficients`](Self::coefficients); slots are grouped
/// by expert, tokens ascending inside an expert. The inverse lists each token's slots, experts ascending, so that
/// combining writes every output row once and in one order on any number of threads.
///
/// ```
/// use dsmoe_router::Routing;
/// use ndarray::array;
///
/// let mask = array![[true, false], [true, true]];
/// let routing = Routing::from_mask(mask.view(), |token, expert| (10 * token + expert) as f32);
/// assert_eq!(routing.offsets, [0, 2, 3]);
/// assert_eq!(routing.tokens, [0, 1, 1]);
/// assert_eq!(routing.coefficients, [0.0, 10.0, 11.0]);
/// assert_eq!(routing.token_offsets, [0, 1, 3]);
/// assert_eq!(routing.slots, [0, 1, 2]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Tokens routed (T).
    pub num_tokens: usize,
    /// Experts of the layer (n).
    pub num_experts: usize,
    /// `[n + 1]`: the slots of expert i are `offsets[i]..offsets[i + 1]`.
    pub offsets: Vec<usize>,
    /// `[R]`: token of each slot.
    pub tokens: Vec<u32>,
    /// `[R]`: what the expert's output is multiplied by in each slot.
    pub coefficients: Vec<f32>,
    /// `[T + 1]`: the entries of token t in [`slots`](Self::slots) are `token_offsets[t]..token_offsets[t + 1]`.
    pub token_offsets: Vec<usize>,
    /// `[R]`: slots in token-major order.
    pub slots: Vec<u32>,
}

impl Default for Routing {
    fn default() -> Routing {
        let (offsets, token_offsets) = (vec![0], vec![0]);
        let (tokens, coefficients, slots) = (Vec::new(), Vec::new(), Vec::new());
        Routing { num_tokens: 0, num_experts: 0, offsets, tokens, coefficients, token_offsets, slots }
    }
}

impl Routing {
    /// Makes the routing of the pairs set in `mask` `[T, n]`; `coefficient(token, expert)` is called for those alone.
    ///
    /// # Panics
    /// More than `u32::MAX` pairs.
    pub fn from_mask(mask: ArrayView2<'_, bool>, coefficient: impl Fn(usize, usize) -> f32) -> Routing {
        let mut routing = Routing::default();
        routing.rebuild(mask, coefficient);
        routing
    }

    /// Does as [`from_mask`](Self::from_mask), in the memory of `self`.
    ///
    /// # Panics
    /// More than `u32::MAX` pairs.
    pub fn rebuild(&mut self, mask: ArrayView2<'_, bool>, coefficient: impl Fn(usize, usize) -> f32) {
        let (num_tokens, num_experts) = mask.dim();
        assert!(u32::try_from(mask.len()).is_ok(), "routing: {num_tokens} x {num_experts} pairs");
        (self.num_tokens, self.num_experts) = (num_tokens, num_experts);

        self.token_offsets.clear();
        self.token_offsets.push(0);
        self.offsets.clear();
        self.offsets.resize(num_experts + 1, 0);
        // Loops over all pairs have no branches: which gates are open cannot be predicted.
        let mut total = 0;
        for row in mask.outer_iter() {
            for (count, &active) in self.offsets[1..].iter_mut().zip(row) {
                *count += usize::from(active);
                total += usize::from(active);
            }
            self.token_offsets.push(total);
        }
        for i in 0..num_experts {
            self.offsets[i + 1] += self.offsets[i];
        }

        self.tokens.clear();
        self.coefficients.clear();
        self.slots.clear();
        // Room for all pairs: a token with more active experts than any before it allocates nothing.
        self.tokens.reserve(mask.len());
        self.coefficients.reserve(mask.len());
        self.slots.reserve(mask.len() + 1);
        self.tokens.resize(total, 0);
        self.coefficients.resize(total, 0.0);
        // The place behind the last is written and not used.
        self.slots.resize(total + 1, 0);
        // `offsets[i]` serves as the next free slot of expert i; afterwards it is the start of expert i + 1.
        let mut end = 0;
        for (token, row) in mask.outer_iter().enumerate() {
            let start = end;
            for (expert, &active) in row.iter().enumerate() {
                self.slots[end] = expert as u32;
                end += usize::from(active);
            }
            for place in &mut self.slots[start..end] {
                let expert = *place as usize;
                let slot = self.offsets[expert];
                self.offsets[expert] += 1;
                self.tokens[slot] = token as u32;
                self.coefficients[slot] = coefficient(token, expert);
                *place = slot as u32;
            }
        }
        self.slots.truncate(total);
        self.offsets.copy_within(0..num_experts, 1);
        self.offsets[0] = 0;
        debug_assert!(self.is_consistent());
    }

    /// Returns the number of active pairs (R).
    pub fn num_routed(&self) -> usize {
        self.tokens.len()
    }

    /// Returns R / (T n); 0 without tokens.
    pub fn active_ratio(&self) -> f64 {
        match self.num_tokens * self.num_experts {
            0 => 0.0,
            pairs => self.num_routed() as f64 / pairs as f64,
        }
    }

    /// Returns the number of tokens of each expert, `[n]`.
    pub fn counts(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.offsets.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Returns the number of active experts of each token (k_t), `[T]`.
    pub fn active_counts(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.token_offsets.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Returns whether the fields satisfy the documentation of this type.
    pub fn is_consistent(&self) -> bool {
        let routed = self.num_routed();
        let covers = |offsets: &[usize], groups: usize| {
            offsets.len() == groups + 1 && offsets[0] == 0 && offsets[groups] == routed && offsets.is_sorted()
        };
        covers(&self.offsets, self.num_experts)
            && covers(&self.token_offsets, self.num_tokens)
            && self.coefficients.len() == routed
            && self.slots.len() == routed
            && self.offsets.windows(2).all(|pair| self.tokens[pair[0]..pair[1]].is_sorted_by(|a, b| a < b))
            && self.token_offsets.windows(2).enumerate().all(|(token, pair)| {
                let slots = &self.slots[pair[0]..pair[1]];
                slots.is_sorted_by(|a, b| a < b)
                    && slots
                        .iter()
                        .all(|&slot| self.tokens.get(slot as usize).is_some_and(|&t| t as usize == token))
            })
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;
    use proptest::prelude::*;

    use super::*;

    fn masks() -> impl Strategy<Value = Array2<bool>> {
        (0usize..20, 1usize..9).prop_flat_map(|(tokens, experts)| {
            prop::collection::vec(any::<bool>(), tokens * experts)
                .prop_map(move |mask| Array2::from_shape_vec((tokens, experts), mask).unwrap())
        })
    }

    proptest! {
        #[test]
        fn holds_exactly_the_active_pairs(mask in masks(), before in masks()) {
            let coefficient = |token: usize, expert: usize| (token * 100 + expert) as f32;
            let mut routing = Routing::from_mask(before.view(), |_, _| -1.0);
            routing.rebuild(mask.view(), coefficient);
            prop_assert!(routing.is_consistent());
            prop_assert_eq!(&routing, &Routing::from_mask(mask.view(), coefficient));

            let mut by_expert = Array2::from_elem(mask.dim(), false);
            for expert in 0..routing.num_experts {
                for slot in routing.offsets[expert]..routing.offsets[expert + 1] {
                    let token = routing.tokens[slot] as usize;
                    prop_assert_eq!(routing.coefficients[slot], coefficient(token, expert));
                    by_expert[[token, expert]] = true;
                }
            }
            prop_assert_eq!(&by_expert, &mask);

            let mut slots = routing.slots.clone();
            slots.sort_unstable();
            prop_assert!(slots.iter().enumerate().all(|(i, &slot)| i == slot as usize));

            let active = mask.iter().filter(|m| **m).count();
            prop_assert_eq!(routing.num_routed(), active);
            prop_assert_eq!(routing.counts().sum::<usize>(), active);
            prop_assert_eq!(routing.active_counts().sum::<usize>(), active);
            prop_assert!((0.0..=1.0).contains(&routing.active_ratio()));
        }

        #[test]
        fn inconsistent_fields_are_found(mask in masks(), at in any::<prop::sample::Index>()) {
            let good = Routing::from_mask(mask.view(), |_, _| 1.0);
            prop_assume!(good.num_routed() > 0);
            let i = at.index(good.num_routed());
            let broken = |change: &dyn Fn(&mut Routing)| {
                let mut routing = good.clone();
                change(&mut routing);
                !routing.is_consistent()
            };
            prop_assert!(broken(&|r| r.tokens[i] = r.num_tokens as u32));
            prop_assert!(broken(&|r| r.slots[i] = u32::MAX));
            prop_assert!(broken(&|r| r.offsets[r.num_experts] += 1));
            prop_assert!(broken(&|r| r.token_offsets[0] = 1));
            prop_assert!(broken(&|r| r.coefficients.clear()));
            prop_assert!(broken(&|r| r.slots.clear()));
        }
    }
}
