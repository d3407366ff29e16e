//! Routings for measurements.

use dsmoe_kernels::rng::Rng;
use dsmoe_router::Routing;
use ndarray::Array2;

use crate::cli::bench::Routes;

/// Makes the routing that `routes` names; `active` is the share of pairs of a random one.
pub(crate) fn routing(routes: Routes, tokens: usize, experts: usize, active: f64) -> Routing {
    let mut rng = Rng::new(0x5e1f, 0);
    let mut mask = Array2::from_elem((tokens, experts), false);
    match routes {
        Routes::Random => {
            // The pairs with the smallest random numbers: every one is as likely, and their number is exact.
            let mut drawn: Vec<(u64, usize)> =
                (0..tokens * experts).map(|pair| (rng.next_u64(), pair)).collect();
            drawn.sort_unstable();
            let wanted = (active * drawn.len() as f64).round() as usize;
            for (_, pair) in &drawn[..wanted] {
                mask[[pair / experts, pair % experts]] = true;
            }
        }
        Routes::OneExpert => mask.column_mut(0).fill(true),
        Routes::None => {}
    }
    let coefficients = Array2::from_shape_fn(mask.dim(), |_| 0.5 + 0.5 * rng.uniform());
    Routing::from_mask(mask.view(), |token, expert| coefficients[[token, expert]])
}

/// Returns the number of experts with a token.
pub(crate) fn experts_in_use(routing: &Routing) -> usize {
    routing.counts().filter(|&count| count > 0).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routings_are_what_their_names_say() {
        for (tokens, experts, active, pairs) in
            [(64, 8, 0.375, 192), (1, 8, 0.375, 3), (0, 8, 0.5, 0), (5, 3, 1.0, 15)]
        {
            let random = routing(Routes::Random, tokens, experts, active);
            assert!(random.is_consistent());
            assert_eq!(random.num_routed(), pairs, "{tokens} tokens, {experts} experts");
            assert!(random.coefficients.iter().all(|c| (0.5..1.0).contains(c)));
        }
        let random = routing(Routes::Random, 4096, 8, 0.375);
        assert!(random.counts().all(|count| (1300..1800).contains(&count)), "experts are alike");
        assert_eq!(experts_in_use(&random), 8);
        let one = routing(Routes::OneExpert, 6, 4, 0.9);
        assert_eq!(one.offsets, [0, 6, 6, 6, 6]);
        assert_eq!(experts_in_use(&one), 1);
        assert_eq!(routing(Routes::None, 6, 4, 0.9).num_routed(), 0);
    }
}
