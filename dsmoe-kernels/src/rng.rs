//! Reproducible random numbers: the raw output of PCG-64 with distributions defined here, whose values do not depend
//! on the version of a dependency.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng as _;

/// A stream of random numbers. Equal seeds and streams give equal numbers on every machine.
#[derive(Clone, Debug)]
pub struct Rng {
    pcg: Pcg64,
    spare: Option<f32>,
}

impl Rng {
    /// Starts stream `stream` of `seed`. Different streams of one seed are independent.
    pub fn new(seed: u64, stream: u64) -> Rng {
        let mix = |x: u64| {
            // splitmix64, so that neighbouring seeds start far apart.
            let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        let state = (u128::from(mix(seed)) << 64) | u128::from(mix(seed ^ 0x5851_f42d_4c95_7f2d));
        let increment = (u128::from(mix(stream)) << 64) | u128::from(mix(!stream));
        Rng { pcg: Pcg64::new(state, increment), spare: None }
    }

    /// Returns 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.pcg.next_u64()
    }

    /// Returns a uniform value in [0, 1) with 24 random bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 * (1.0 / (1u64 << 24) as f32)
    }

    /// Returns a uniform value in 0..n.
    ///
    /// # Panics
    /// `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "rng: below(0)");
        // Rejection keeps it exactly uniform.
        let limit = u64::MAX - u64::MAX % n;
        loop {
            let x = self.next_u64();
            if x < limit {
                return x % n;
            }
        }
    }

    /// Returns a standard normal value, by the method of Box and Muller.
    pub fn normal(&mut self) -> f32 {
        if let Some(x) = self.spare.take() {
            return x;
        }
        let u = 1.0 - f64::from(self.uniform());
        let angle = std::f64::consts::TAU * f64::from(self.uniform());
        let radius = (-2.0 * u.ln()).sqrt();
        self.spare = Some((radius * angle.sin()) as f32);
        (radius * angle.cos()) as f32
    }

    /// Fills `out` with normal values of standard deviation `std`.
    pub fn fill_normal(&mut self, out: &mut [f32], std: f32) {
        for x in out {
            *x = std * self.normal();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Rng;
    use crate::testing::sized;

    #[test]
    fn equal_seeds_give_equal_streams_and_others_differ() {
        let take = |seed, stream| {
            let mut rng = Rng::new(seed, stream);
            (0..8).map(|_| rng.next_u64()).collect::<Vec<_>>()
        };
        assert_eq!(take(1, 2), take(1, 2));
        assert_ne!(take(1, 2), take(2, 2));
        assert_ne!(take(1, 2), take(1, 3));
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut rng = Rng::new(7, 0);
        let n = sized(200_000, 20_000);
        let (mut sum, mut squares, mut uniform) = (0.0f64, 0.0f64, 0.0f64);
        for _ in 0..n {
            let x = f64::from(rng.normal());
            sum += x;
            squares += x * x;
            uniform += f64::from(rng.uniform());
        }
        let n = f64::from(n);
        assert!((sum / n).abs() < 0.01, "mean {}", sum / n);
        assert!((squares / n - 1.0).abs() < 0.01, "variance {}", squares / n);
        assert!((uniform / n - 0.5).abs() < 0.005, "uniform mean {}", uniform / n);
        assert!((0..1000).all(|_| rng.below(7) < 7));
    }
}
