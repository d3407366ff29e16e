//! The random numbers of CPython's `random.Random`, which decide what few-shot prompts and bootstraps look like.

use std::collections::HashSet;

/// Words of the Mersenne Twister's state.
const WORDS: usize = 624;
const MIDDLE: usize = 397;

/// MT19937 with CPython's seeding and drawing.
#[derive(Clone, Debug)]
pub struct Random {
    state: [u32; WORDS],
    next: usize,
}

impl Random {
    /// Seeds a generator as `random.Random(seed)` does.
    pub fn new(seed: u32) -> Random {
        let mut state = [0u32; WORDS];
        state[0] = 19_650_218;
        for i in 1..WORDS {
            state[i] = 1_812_433_253u32.wrapping_mul(mixed(&state, i)).wrapping_add(i as u32);
        }
        // A key of one word: CPython's seeds below 2^32 are such.
        let mut i = 1;
        for _ in 0..WORDS {
            state[i] = (state[i] ^ mixed(&state, i).wrapping_mul(1_664_525)).wrapping_add(seed);
            i = wrapped(i, &mut state);
        }
        for _ in 1..WORDS {
            state[i] = (state[i] ^ mixed(&state, i).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i = wrapped(i, &mut state);
        }
        state[0] = 1 << 31;
        Random { state, next: WORDS }
    }

    fn word(&mut self) -> u32 {
        if self.next == WORDS {
            for i in 0..WORDS {
                let y = (self.state[i] & (1 << 31)) | (self.state[(i + 1) % WORDS] & !(1 << 31));
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + MIDDLE) % WORDS] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Draws as `random()` does: uniform in 0..1.
    pub fn uniform(&mut self) -> f64 {
        let (high, low) = (self.word() >> 5, self.word() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// Draws as `randrange(n)` does.
    ///
    /// # Panics
    /// `n` is 0 or above 2^32 - 1.
    pub fn below(&mut self, n: usize) -> usize {
        let n = u32::try_from(n).expect("a population below 2^32");
        assert!(n > 0, "a draw from nothing");
        let bits = u32::BITS - n.leading_zeros();
        loop {
            let drawn = self.word() >> (u32::BITS - bits);
            if drawn < n {
                return drawn as usize;
            }
        }
    }

    /// Draws as `sample(range(n), k)` does: `k` different numbers below `n`.
    ///
    /// # Panics
    /// `k` is larger than `n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n, "{k} drawn of {n}");
        let mut set_size = 21;
        if k > 5 {
            set_size += 4usize.pow((3.0 * k as f64).log(4.0).ceil() as u32);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            let draw = |i: usize| {
                let j = self.below(n - i);
                let drawn = pool[j];
                pool[j] = pool[n - i - 1];
                drawn
            };
            return (0..k).map(draw).collect();
        }
        let mut seen = HashSet::new();
        let draw = |_| loop {
            let j = self.below(n);
            if seen.insert(j) {
                return j;
            }
        };
        (0..k).map(draw).collect()
    }

    /// Shuffles as `shuffle(list)` does.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

/// Computes word `i` of the seeded state from the word before it.
fn mixed(state: &[u32; WORDS], i: usize) -> u32 {
    state[i - 1] ^ (state[i - 1] >> 30)
}

/// Returns the word after word `i` in seeding, which wraps around to word 1.
fn wrapped(i: usize, state: &mut [u32; WORDS]) -> usize {
    if i + 1 < WORDS {
        return i + 1;
    }
    state[0] = state[WORDS - 1];
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `python3 -c "import random; r = random.Random(1234); print(r.sample(range(n), k))"` and its like.
    #[test]
    fn draws_are_those_of_cpython() {
        for (n, k, first, second) in [
            (7473, 5, vec![6374, 3610, 957, 61, 742], vec![7462, 6610, 4769, 286, 5501]),
            (
                87_925,
                5,
                vec![57_767, 15_315, 981, 11_880, 76_313],
                vec![4577, 11_001, 12_900, 46_482, 31_039],
            ),
            (3778, 5, vec![3187, 1805, 478, 30, 371], vec![3731, 3305, 2384, 143, 2750]),
        ] {
            let mut random = Random::new(1234);
            assert_eq!((random.sample(n, k), random.sample(n, k)), (first, second), "{n}");
        }
    }

    #[test]
    fn small_populations_are_drawn_as_cpython_does() {
        let mut random = Random::new(1234);
        assert_eq!(random.sample(20, 5), [14, 3, 0, 2, 1]);
        assert_eq!(random.sample(6, 6), [5, 0, 4, 1, 3, 2]);
        assert_eq!(random.sample(84, 6), [3, 2, 44, 79, 61, 78]);
        assert_eq!(random.sample(85, 6), [59, 19, 11, 23, 14, 1]);
        let mut random = Random::new(42);
        let mut list: Vec<usize> = (0..12).collect();
        random.shuffle(&mut list);
        assert_eq!(list, [7, 5, 2, 8, 9, 6, 11, 3, 4, 0, 1, 10]);
        assert_eq!(random.sample(100, 5), [4, 3, 11, 27, 29]);
    }

    #[test]
    fn uniform_numbers_are_those_of_cpython() {
        let mut random = Random::new(0);
        assert_eq!([random.uniform(), random.uniform()], [0.8444218515250481, 0.7579544029403025]);
        assert_eq!([(); 4].map(|()| random.below(10)), [6, 0, 4, 8]);
        let mut random = Random::new(99);
        assert_eq!(random.uniform(), 0.40397807494366633);
        assert_eq!((0..700).map(|_| random.uniform()).last(), Some(0.4636590366411817));
    }
}
