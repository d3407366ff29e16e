//! Generation of tokens: greedy or sampled, with or without the KV cache.

use std::cmp::Ordering;

use dsmoe_kernels::rng::Rng;
use dsmoe_router::RoutingStats;

use crate::error::{Error, Result};
use crate::model::tensors::in_pool;
use crate::model::{Cache, Inference, Workspace};

/// Options for choosing the next token and for stopping.
///
/// ```
/// use dsmoe_core::generate::{GenerateOptions, generate};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// let options = GenerateOptions { max_tokens: 8, temperature: 0.8, top_p: 0.9, ..GenerateOptions::default() };
/// let tokens = |seed: u64| -> dsmoe_core::Result<Vec<u32>> {
///     Ok(generate(&model, &[1, 5, 9], &GenerateOptions { seed, ..options.clone() }, |_| true)?.tokens)
/// };
/// // A text is a function of the seed.
/// assert_eq!(tokens(7)?, tokens(7)?);
/// assert_ne!(tokens(7)?, tokens(8)?);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Tokens to generate at the most.
    pub max_tokens: usize,
    /// 0 takes the most likely token; otherwise the logits are divided by it before sampling.
    pub temperature: f32,
    /// Sample among this many most likely tokens; 0 for all.
    pub top_k: usize,
    /// Sample among the fewest most likely tokens whose probabilities reach this; 1 for all.
    pub top_p: f32,
    /// Seed of the sampling.
    pub seed: u64,
    /// Tokens that end the text; they are not part of it.
    pub stop: Vec<u32>,
    /// Keep keys and values of earlier positions; without, every step runs the whole text.
    pub kv_cache: bool,
    /// Feed the prompt in pieces of this many tokens; 0 for all at once.
    pub prefill_chunk: usize,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions {
            max_tokens: 128,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            stop: Vec::new(),
            kv_cache: true,
            prefill_chunk: 0,
        }
    }
}

impl GenerateOptions {
    fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::argument(
                format!("temperature {} is negative", self.temperature),
                "set {temperature} to 0",
            ));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::argument(
                format!("top-p {} is outside 0..1", self.top_p),
                "set {top_p} to 0.9 or 90%",
            ));
        }
        Ok(())
    }
}

/// Reason for the end of a generation.
///
/// ```
/// use dsmoe_core::generate::{Finish, GenerateOptions, generate};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// // The caller stops after the third token.
/// let mut left = 3;
/// let options = GenerateOptions { max_tokens: 8, ..GenerateOptions::default() };
/// let generation = generate(&model, &[1, 5, 9], &options, |_token| {
///     left -= 1;
///     left > 0
/// })?;
/// match generation.finish {
///     Finish::Caller => assert_eq!(generation.tokens.len(), 3),
///     Finish::MaxTokens | Finish::Stop | Finish::Positions => panic!("{:?}", generation.finish),
/// }
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// `max_tokens` were generated.
    MaxTokens,
    /// A stop token came.
    Stop,
    /// The model has no more positions.
    Positions,
    /// The caller's callback said so.
    Caller,
}

/// Result of a generation.
///
/// ```
/// use dsmoe_core::generate::{Finish, GenerateOptions, Generation, generate};
/// use dsmoe_core::init::preset;
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
///
/// let model = Inference::new(&Model::new(preset("tiny")?), Precision::F32);
/// let options = GenerateOptions { max_tokens: 4, ..GenerateOptions::default() };
/// let Generation { tokens, finish, .. } = generate(&model, &[1, 5, 9], &options, |_| true)?;
/// assert_eq!((tokens.len(), finish), (4, Finish::MaxTokens));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Generation {
    /// The new tokens, without the prompt and without a stop token.
    pub tokens: Vec<u32>,
    /// Reason for its end.
    pub finish: Finish,
    /// Routing over all positions that were run; none without routers.
    pub stats: Option<RoutingStats>,
    /// Seconds until the first logits.
    pub prefill_seconds: f64,
    /// Seconds after that.
    pub decode_seconds: f64,
}

/// Positions that the cache has room for from the start, beside the prompt.
const ROOM: usize = 4096;

/// Continues `prompt`; `on_token` receives every token and returns whether to continue. It is called on a
/// thread of the pool, where all of the generation runs.
///
/// # Errors
/// Options out of range, an empty prompt, a token outside the vocabulary, a prompt longer than the model's positions, or
/// logits that are not finite.
pub fn generate(
    model: &Inference,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: impl FnMut(u32) -> bool + Send,
) -> Result<Generation> {
    options.check()?;
    in_pool(|| run(model, prompt, options, on_token))
}

fn run(
    model: &Inference,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> bool,
) -> Result<Generation> {
    let room = prompt.len() + options.max_tokens.min(ROOM);
    let mut workspace = Workspace::default();
    let mut cache = Cache::new(model, room);
    let mut stats = model.new_stats();
    let mut sampler = Sampler::new(options, model.config().vocab_size)?;
    let mut text = Vec::with_capacity(room);
    text.extend_from_slice(prompt);
    let mut finish = Finish::MaxTokens;
    let started = std::time::Instant::now();
    let mut prefill_seconds = 0.0;

    while text.len() - prompt.len() < options.max_tokens {
        if text.len() > prompt.len() && text.len() > model.config().max_position {
            finish = Finish::Positions;
            break;
        }
        if !options.kv_cache || cache.is_outgrown(model.config(), text.len()) {
            cache.clear();
        }
        cache.expect(text.len());
        let mut rest = &text[cache.len()..];
        while options.prefill_chunk > 0 && rest.len() > options.prefill_chunk {
            let (chunk, tail) = rest.split_at(options.prefill_chunk);
            model.decode(chunk, &mut cache, stats.as_mut(), &mut workspace)?;
            rest = tail;
        }
        let logits = model.decode(rest, &mut cache, stats.as_mut(), &mut workspace)?;
        if !logits.iter().all(|z| z.is_finite()) {
            let problem =
                format!("the model overflows: its logits after token {} are not finite", text.len());
            return Err(Error::argument(problem, "take an earlier checkpoint of it, or set {dtype} to f32"));
        }
        let next = sampler.choose(logits);
        if text.len() == prompt.len() {
            prefill_seconds = started.elapsed().as_secs_f64();
        }
        if options.stop.contains(&next) {
            finish = Finish::Stop;
            break;
        }
        text.push(next);
        if !on_token(next) {
            finish = Finish::Caller;
            break;
        }
    }
    Ok(Generation {
        tokens: text.split_off(prompt.len()),
        finish,
        stats,
        prefill_seconds,
        decode_seconds: started.elapsed().as_secs_f64() - prefill_seconds,
    })
}

/// Chooses the tokens of one text by their logits, in the way [`generate`] does: for programs that decode several texts side by
/// side with [`Inference::decode_each`].
///
/// ```
/// use dsmoe_core::generate::{GenerateOptions, Sampler};
///
/// let options = GenerateOptions { temperature: 0.0, ..GenerateOptions::default() };
/// let mut sampler = Sampler::new(&options, 3)?;
/// assert_eq!(sampler.choose(&[0.5, 2.0, 1.0]), 1);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Sampler {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    rng: Rng,
    candidates: Vec<(u32, f32)>,
}

/// Orders by falling logit, then by id.
fn likely_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

impl Sampler {
    /// Makes the sampler of a text over `vocab` tokens.
    ///
    /// # Errors
    /// Options out of range.
    ///
    /// ```
    /// use dsmoe_core::generate::{GenerateOptions, Sampler};
    ///
    /// let mut greedy = Sampler::new(&GenerateOptions::default(), 3)?;
    /// assert_eq!(greedy.choose(&[0.1, 2.0, 0.3]), 1);
    /// assert!(Sampler::new(&GenerateOptions { top_p: 2.0, ..Default::default() }, 3).is_err());
    /// # Ok::<(), dsmoe_core::Error>(())
    /// ```
    pub fn new(options: &GenerateOptions, vocab: usize) -> Result<Sampler> {
        options.check()?;
        let &GenerateOptions { temperature, top_k, top_p, seed, .. } = options;
        let candidates = Vec::with_capacity(if temperature == 0.0 { 0 } else { vocab });
        Ok(Sampler { temperature, top_k, top_p, rng: Rng::new(seed, 0x9e), candidates })
    }

    /// Returns the next token. Of tokens with equal logits, top-k and top-p prefer the lower id.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let Sampler { temperature, top_k, top_p, .. } = *self;
        let best = argmax(logits);
        if temperature == 0.0 || top_k == 1 {
            return best;
        }
        let candidates = &mut self.candidates;
        let largest = logits[best as usize];
        let weight = |z: f32| ((z - largest) / temperature).exp();
        candidates.clear();
        candidates.extend((0u32..).zip(logits.iter().copied()));
        if (1..candidates.len()).contains(&top_k) {
            candidates.select_nth_unstable_by(top_k - 1, likely_first);
            candidates.truncate(top_k);
        }
        candidates.iter_mut().for_each(|(_, z)| *z = weight(*z));
        let mut total: f32 = candidates.iter().map(|(_, p)| p).sum();
        if top_p < 1.0 {
            nucleus(candidates, top_p * total);
            total = candidates.iter().map(|(_, p)| p).sum();
        }
        let mut left = self.rng.uniform() * total;
        for &(id, p) in candidates.iter() {
            left -= p;
            if left < 0.0 {
                return id;
            }
        }
        best
    }
}

/// Keeps the fewest most likely candidates whose weights reach `mass`.
fn nucleus(candidates: &mut Vec<(u32, f32)>, mass: f32) {
    let (mut sorted, mut reached) = (0, 0.0);
    while sorted < candidates.len() {
        // A few at a time: most often the first ones suffice.
        let rest = &mut candidates[sorted..];
        let count = (2 * sorted).clamp(64, rest.len().max(64)).min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count - 1, likely_first);
        }
        rest[..count].sort_unstable_by(likely_first);
        for (i, (_, p)) in rest[..count].iter().enumerate() {
            reached += p;
            if reached >= mass {
                candidates.truncate(sorted + i + 1);
                return;
            }
        }
        sorted += count;
    }
}

/// Returns the index of the largest logit; the lowest on ties.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: &GenerateOptions, logits: &[f32]) -> Vec<usize> {
        let options = GenerateOptions { seed: 3, ..options.clone() };
        let mut sampler = Sampler::new(&options, 0).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.choose(logits) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let options = GenerateOptions::default();
        assert_eq!(Sampler::new(&options, 4).unwrap().choose(&[1.0, 3.0, 3.0, -1.0]), 1);
    }

    #[test]
    fn the_nucleus_is_the_shortest_prefix_of_the_sorted_weights() {
        let mut rng = Rng::new(5, 0);
        for n in [1, 3, 64, 65, 1000] {
            let all: Vec<(u32, f32)> = (0..n).map(|id| (id, (3.0 * rng.normal()).exp())).collect();
            let mut sorted = all.clone();
            sorted.sort_by(likely_first);
            let total: f32 = sorted.iter().map(|(_, p)| p).sum();
            for share in [1e-6, 0.5, 0.9, 0.999, 2.0] {
                let mut sum = 0.0;
                let mut want = sorted.clone();
                want.retain(|(_, p)| {
                    let before = sum;
                    sum += p;
                    before < share * total
                });
                let mut got = all.clone();
                nucleus(&mut got, share * total);
                assert_eq!(got, want, "{n} candidates, share {share}");
            }
        }
    }

    #[test]
    fn sampling_follows_the_softmax_and_its_cuts() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        let total: f32 = logits.iter().map(|x| x.exp()).sum();
        let all = GenerateOptions { temperature: 1.0, ..GenerateOptions::default() };
        for (i, count) in counts(&all, &logits).into_iter().enumerate() {
            let want = logits[i].exp() / total;
            assert!((count as f32 / 20_000.0 - want).abs() < 0.012, "token {i}: {count}");
        }
        let two = GenerateOptions { top_k: 2, ..all.clone() };
        let got = counts(&two, &logits);
        assert!(got[0] == 0 && got[3] == 0 && got[1] > 4000 && got[2] > 12_000, "{got:?}");
        // The most likely token alone holds 0.61 of the mass, the two most likely 0.83.
        let nucleus = GenerateOptions { top_p: 0.7, ..all.clone() };
        let got = counts(&nucleus, &logits);
        assert!(got[0] == 0 && got[3] == 0 && got[1] > 0, "{got:?}");
        let cold = GenerateOptions { temperature: 0.01, ..all };
        assert_eq!(counts(&cold, &logits)[2], 20_000);
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for options in [
            GenerateOptions { temperature: -1.0, ..GenerateOptions::default() },
            GenerateOptions { temperature: f32::NAN, ..GenerateOptions::default() },
            GenerateOptions { top_p: 0.0, ..GenerateOptions::default() },
        ] {
            assert!(options.check().is_err(), "{options:?}");
        }
    }
}
