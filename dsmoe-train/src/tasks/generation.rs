//! Generates answers: several prompts decode side by side, each with its own cache, until each has its answer.

use dsmoe_core::generate::argmax;
use dsmoe_core::model::{Cache, Inference, Workspace};
use dsmoe_datasets::Tokenizer;
use dsmoe_datasets::tasks::cut;
use rayon::prelude::*;

use super::Ran;
use crate::error::Result;

/// The largest number of sequences side by side.
const MOST: usize = 32;
/// The largest size of all caches, in bytes; a single sequence may have more.
const CACHE_BYTES: usize = 1 << 30;
/// The number of tokens that a stop text may have beyond its bytes.
const SLACK: usize = 2;

/// A prompt, and when its answer ends.
pub(crate) struct Prompt {
    /// Its document and its request.
    pub(crate) id: (usize, usize),
    pub(crate) tokens: Vec<u32>,
    pub(crate) until: &'static [&'static str],
    pub(crate) max_tokens: usize,
}

/// An answer under way.
struct Answer {
    prompt: Prompt,
    cache: Cache,
    new: Vec<u32>,
    done: bool,
}

/// The tokens and texts that end every answer, beside its own texts.
pub(crate) struct Ends<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) tokens: &'a [u32],
    /// The end tokens' texts.
    pub(crate) texts: Vec<String>,
}

impl<'a> Ends<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, tokens: &'a [u32]) -> Result<Ends<'a>> {
        let texts = tokens.iter().map(|&token| tokenizer.decode(&[token], false));
        let texts = texts.collect::<dsmoe_datasets::Result<_>>()?;
        Ok(Ends { tokenizer, tokens, texts })
    }

    fn all<'s>(&'s self, prompt: &Prompt) -> impl Iterator<Item = &'s str> {
        prompt.until.iter().copied().chain(self.texts.iter().map(String::as_str))
    }

    /// Takes the next token of `answer`. Returns true if that ends it.
    fn take(&self, answer: &mut Answer, token: u32) -> Result<bool> {
        if self.tokens.contains(&token) {
            return Ok(true);
        }
        answer.new.push(token);
        if answer.new.len() == answer.prompt.max_tokens {
            return Ok(true);
        }
        // A text to stop at is looked for where the new token could have ended it, and only then in the whole.
        let longest = self.all(&answer.prompt).map(str::len).max().unwrap_or(0);
        let tail = &answer.new[answer.new.len().saturating_sub(longest + SLACK)..];
        Ok(self.stops(answer, tail)? && self.stops(answer, &answer.new)?)
    }

    fn stops(&self, answer: &Answer, tokens: &[u32]) -> Result<bool> {
        let text = self.tokenizer.decode(tokens, true)?;
        Ok(self.all(&answer.prompt).any(|stop| !stop.is_empty() && text.contains(stop)))
    }

    fn text(&self, answer: &Answer) -> Result<String> {
        let text = self.tokenizer.decode(&answer.new, true)?;
        Ok(cut(&text, self.all(&answer.prompt)).to_owned())
    }
}

/// Answers all `prompts`. Returns false if `stopped` interrupted it. `finished` receives each answer when it is
/// complete, and the work since the answer before.
///
/// # Errors
/// The model or the tokenizer refuses tokens, or `finished` fails.
pub(crate) fn generate(
    model: &Inference,
    mut prompts: Vec<Prompt>,
    ends: &Ends<'_>,
    stopped: &dyn Fn() -> bool,
    finished: &mut dyn FnMut((usize, usize), String, Ran) -> Result<()>,
) -> Result<bool> {
    // The longest first: what is left at the end is quickly done.
    prompts.sort_by_key(|prompt| (prompt.tokens.len(), std::cmp::Reverse(prompt.id)));
    let side_by_side = side_by_side(model, prompts.last());
    let fresh = || Ran { tokens: 0, routing: model.new_stats() };
    let mut ran = fresh();
    let mut workspace = Workspace::default();
    let mut answers: Vec<Answer> = Vec::new();
    let mut caches: Vec<Cache> = Vec::new();
    while !(prompts.is_empty() && answers.is_empty()) {
        while answers.len() < side_by_side
            && let Some(prompt) = prompts.pop()
        {
            if stopped() {
                return Ok(false);
            }
            let room = prompt.tokens.len() + prompt.max_tokens;
            let cache = caches.pop().unwrap_or_else(|| Cache::new(model, room));
            let mut answer = Answer { prompt, cache, new: Vec::new(), done: false };
            let Answer { prompt, cache, .. } = &mut answer;
            let logits = model.decode(&prompt.tokens, cache, ran.routing.as_mut(), &mut workspace)?;
            ran.tokens += prompt.tokens.len() as u64;
            answer.done = ends.take(&mut answer, argmax(logits))?;
            answers.push(answer);
        }
        for answer in answers.extract_if(.., |answer| answer.done) {
            finished(answer.prompt.id, ends.text(&answer)?, std::mem::replace(&mut ran, fresh()))?;
            let mut cache = answer.cache;
            cache.clear();
            caches.push(cache);
        }
        if answers.is_empty() {
            continue;
        }
        if stopped() {
            return Ok(false);
        }
        for Answer { prompt, cache, new, .. } in &mut answers {
            let positions = prompt.tokens.len() + new.len();
            if cache.is_outgrown(model.config(), positions) {
                let fed = [&prompt.tokens[..], &new[..new.len() - 1]].concat();
                cache.clear();
                cache.expect(positions);
                model.decode(&fed, cache, ran.routing.as_mut(), &mut workspace)?;
                ran.tokens += fed.len() as u64;
            }
        }
        let ids: Vec<u32> = answers.iter().filter_map(|answer| answer.new.last().copied()).collect();
        let mut used: Vec<&mut Cache> = answers.iter_mut().map(|answer| &mut answer.cache).collect();
        let logits = model.decode_each(&ids, &mut used, ran.routing.as_mut(), &mut workspace)?;
        ran.tokens += ids.len() as u64;
        let rows = logits.par_chunks(model.config().vocab_size);
        answers.par_iter_mut().zip(rows).try_for_each(|(answer, logits)| {
            answer.done = ends.take(answer, argmax(logits))?;
            Ok::<(), crate::Error>(())
        })?;
    }
    Ok(true)
}

/// Returns how many sequences as long as `longest` and its answer fit into memory.
fn side_by_side(model: &Inference, longest: Option<&Prompt>) -> usize {
    let config = model.config();
    let positions = longest.map_or(1, |prompt| prompt.tokens.len() + prompt.max_tokens);
    let kv_heads: usize = config.layers().map(|shape| shape.num_kv_heads).sum();
    let bytes = 2 * size_of::<f32>() * kv_heads * config.head_dim * positions;
    (CACHE_BYTES / bytes.max(1)).clamp(1, MOST)
}
