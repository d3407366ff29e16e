//! A model's responses to the benchmarks' requests.
//!
//! [`Responder`] runs the requests of documents: log-likelihoods in batches sorted by length, with the beginning that
//! the choices of a document share run once; generation with a cache per prompt, several side by side. A response
//! depends on its request alone: not on the batch, the number of threads or a limit, to the bit.

mod encode;
mod generation;
mod journal;
mod likelihood;

use std::cmp::Reverse;

use dsmoe_core::Inference;
use dsmoe_core::model::Workspace;
use dsmoe_datasets::tasks::{Profile, Request, Response};
use dsmoe_datasets::{Bos, Tokenizer};
use dsmoe_router::RoutingStats;
use rayon::prelude::*;

pub use journal::Journal;

use crate::error::Result;
use encode::{Encoder, Refusal, Scored};
use generation::{Ends, Prompt};
use likelihood::{Batch, Unit, total};

/// Tokens of a forward pass, about.
pub const BATCH_TOKENS: usize = 2048;

/// A response, or why the document has none.
pub type Answer = std::result::Result<Response, String>;

/// Answers requests with a model.
#[derive(Debug)]
pub struct Responder<'a> {
    model: &'a Inference,
    tokenizer: &'a Tokenizer,
    bos: Bos,
    profile: Profile,
    batch_tokens: usize,
    stats: Option<RoutingStats>,
    tokens: usize,
}

/// What a request is turned into.
enum Work {
    Likelihood(Scored),
    Rolling(Vec<Scored>),
    Generate(Prompt),
}

impl<'a> Responder<'a> {
    /// For `model` with its `tokenizer`; `bos` says when a text gets the BOS token in front.
    pub fn new(model: &'a Inference, tokenizer: &'a Tokenizer, bos: Bos, profile: Profile) -> Responder<'a> {
        let stats = model.new_stats();
        Responder { model, tokenizer, bos, profile, batch_tokens: BATCH_TOKENS, stats, tokens: 0 }
    }

    /// Runs about so many tokens in a forward pass, in place of [`BATCH_TOKENS`]; responses do not depend on it.
    #[must_use]
    pub fn batch_tokens(mut self, tokens: usize) -> Responder<'a> {
        self.batch_tokens = tokens;
        self
    }

    /// Routing of all tokens that were run so far; none without routers.
    pub fn stats(&self) -> Option<&RoutingStats> {
        self.stats.as_ref()
    }

    /// Tokens that were run so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Answers the requests of `documents`, in their order. What `journal` knows is not run again, and what is run is
    /// kept there. `progress` hears how many documents of how many are done.
    ///
    /// # Errors
    /// The tokenizer or the model fails, or the journal cannot be written. A request that cannot be answered is no
    /// error but an answer.
    pub fn answer(
        &mut self,
        documents: &[&[Request]],
        mut journal: Option<&mut Journal>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Vec<Answer>>> {
        let known = |request: &Request| journal.as_ref().and_then(|journal| journal.get(request).cloned());
        let mut answers: Vec<Vec<Option<Answer>>> =
            documents.iter().map(|requests| requests.iter().map(|r| known(r).map(Ok)).collect()).collect();
        // A document is run whole: its requests share a beginning.
        let open: Vec<usize> =
            (0..documents.len()).filter(|&i| answers[i].iter().any(Option::is_none)).collect();
        let mut left: Vec<usize> = vec![0; documents.len()];
        let (mut units, mut prompts) = (Vec::new(), Vec::new());
        let encoder = self.encoder();
        let encoded: Vec<Vec<std::result::Result<Work, Refusal>>> =
            open.par_iter().map(|&i| encode(&encoder, documents[i])).collect::<Result<_>>()?;
        for (&i, works) in open.iter().zip(encoded) {
            let mut scored = Vec::new();
            for (j, work) in works.into_iter().enumerate() {
                match work {
                    Err(refusal) => answers[i][j] = Some(Err(refusal)),
                    Ok(Work::Likelihood(work)) => scored.push((j, work)),
                    Ok(Work::Rolling(windows)) => {
                        units.extend(windows.into_iter().map(|window| Unit::new(i, vec![(j, window)])));
                    }
                    Ok(Work::Generate(prompt)) => prompts.push(Prompt { id: i, ..prompt }),
                }
            }
            if !scored.is_empty() {
                units.push(Unit::new(i, scored));
            }
        }
        for document in units.iter().map(|unit| unit.document).chain(prompts.iter().map(|p| p.id)) {
            left[document] += 1;
        }
        let total_documents = documents.len();
        let mut done = left.iter().filter(|&&left| left == 0).count();
        progress(done, total_documents);
        let mut finish = |document: usize, answers: &mut [Vec<Option<Answer>>]| -> Result<()> {
            left[document] -= 1;
            if left[document] > 0 {
                return Ok(());
            }
            done += 1;
            if let Some(journal) = journal.as_deref_mut() {
                let pairs = documents[document].iter().zip(&answers[document]);
                journal.put(
                    pairs.filter_map(|(request, answer)| Some((request, answer.as_ref()?.as_ref().ok()?))),
                )?;
            }
            progress(done, total_documents);
            Ok(())
        };

        units.sort_by_key(|unit| (Reverse(unit.tokens()), unit.document));
        let mut workspace = Workspace::default();
        let mut rest = &units[..];
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |unit: &&Unit| {
                tokens += unit.tokens();
                tokens <= self.batch_tokens
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            rest = later;
            let mut batch = Batch::default();
            now.iter().for_each(|unit| batch.push(unit));
            self.tokens += batch.ids.len();
            let Batch { ids, segments, targets } = &batch;
            let found =
                self.model.likelihoods(ids, segments, targets, self.stats.as_mut(), &mut workspace)?;
            let mut found = found.into_iter();
            for unit in now {
                for (j, scored) in &unit.scored {
                    let (sum, greedy) = total(&mut found, scored.targets.len());
                    let answer = &mut answers[unit.document][*j];
                    let request = &documents[unit.document][*j];
                    *answer = Some(joined(answer.take(), request, sum, greedy));
                }
                finish(unit.document, &mut answers)?;
            }
        }

        let ends = Ends::new(self.tokenizer, &self.model.config().eos_token_ids)?;
        generation::generate(self.model, prompts, &ends, self.stats.as_mut(), &mut |document, text| {
            answers[document][0] = Some(Ok(Response::Generated { text }));
            finish(document, &mut answers)
        })?;
        let unanswered = || Err("no window of text".to_owned());
        Ok(answers
            .into_iter()
            .map(|answers| answers.into_iter().map(|answer| answer.unwrap_or_else(unanswered)).collect())
            .collect())
    }

    fn encoder(&self) -> Encoder<'a> {
        let config = self.model.config();
        let end = config.eos_token_ids.first().copied();
        let start = if self.profile.starts_from_end_token() { end } else { config.bos_token_id.or(end) };
        Encoder {
            tokenizer: self.tokenizer,
            bos: self.bos,
            profile: self.profile,
            start,
            positions: config.max_position,
        }
    }
}

/// A request's answer with one more window of it.
fn joined(before: Option<Answer>, request: &Request, sum: f64, greedy: bool) -> Answer {
    if !sum.is_finite() {
        return Err("its likelihood is not finite: the model overflows on it".into());
    }
    match (before, request) {
        (Some(Err(refusal)), _) => Err(refusal),
        (Some(Ok(Response::Rolling { sum: before })), _) => Ok(Response::Rolling { sum: before + sum }),
        (_, Request::Rolling { .. }) => Ok(Response::Rolling { sum }),
        _ => Ok(Response::LogLikelihood { sum, greedy }),
    }
}

/// Encodes the requests of one document.
fn encode(encoder: &Encoder<'_>, requests: &[Request]) -> Result<Vec<std::result::Result<Work, Refusal>>> {
    let mut last = None;
    let mut works = Vec::with_capacity(requests.len());
    for request in requests {
        works.push(match request {
            Request::LogLikelihood { context, continuation } => {
                // Choices of one question have one context.
                let same = last.as_ref().is_some_and(|(text, _)| text == context);
                if !same {
                    last = Some((context.clone(), encoder.context(context)?));
                }
                let (_, encoded) = last.as_ref().expect("set above");
                encoder.pair(encoded, continuation)?.map(Work::Likelihood)
            }
            Request::Rolling { text } => encoder.rolling(text)?.map(Work::Rolling),
            Request::Generate { context, until, max_tokens } => {
                let (until, max_tokens) = (*until, *max_tokens);
                encoder
                    .prompt(context, max_tokens)?
                    .map(|tokens| Work::Generate(Prompt { id: 0, tokens, until, max_tokens }))
            }
        });
    }
    Ok(works)
}
