//! A model's responses to the benchmarks' requests.
//!
//! [`Responder`] runs the requests of documents: log-likelihoods in batches sorted by length, with the beginning that
//! the choices of a document share run once; generation with a cache per prompt, several side by side. A response
//! depends on its request alone: not on the batch, the number of threads or a limit, to the bit.

mod encode;
mod generation;
mod journal;
mod likelihood;
mod rolling;
mod shared;

use std::cmp::Reverse;
use std::sync::atomic::{AtomicBool, Ordering};

use dsmoe_core::Inference;
use dsmoe_core::model::{Likelihood, Workspace};
use dsmoe_datasets::tasks::{Profile, Request, Response};
use dsmoe_datasets::{Bos, Tokenizer};
use dsmoe_kernels::comm::{Alone, Communicator};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use journal::{Journal, Ran, model_sha256};
pub use rolling::{RollingReport, rolling};

use crate::error::Result;
use encode::{Encoded, Encoder, Scored};
use generation::{Ends, Prompt};
use likelihood::{Batch, Unit, total};

/// The approximate number of tokens of a forward pass of a small model.
const BATCH_TOKENS: usize = 2048;
/// The same for a large model: enough to make good use of its weights, and an interrupt does not wait long.
const LARGE_BATCH_TOKENS: usize = 512;
/// Bytes of weights from which a model is large.
const LARGE: usize = 256 << 20;

/// The largest number of forward passes of a small model side by side: while one waits for its last piece, others
/// continue.
const SIDE_BY_SIDE: usize = 4;

/// A response, or the reason why the document has none.
///
/// ```
/// use dsmoe_datasets::tasks::Response;
/// use dsmoe_train::tasks::Answer;
///
/// let answers: [Answer; 2] = [
///     Ok(Response::LogLikelihood { sum: -3.5, greedy: false }),
///     Err("the prompt has more tokens than the model has positions".to_owned()),
/// ];
/// let sums = answers.iter().map(|answer| match answer {
///     Ok(Response::LogLikelihood { sum, .. }) => Some(*sum),
///     Ok(_) => None,
///     Err(reason) => {
///         eprintln!("no answer: {reason}");
///         None
///     }
/// });
/// assert_eq!(sums.collect::<Vec<_>>(), [Some(-3.5), None]);
/// ```
pub type Answer = std::result::Result<Response, String>;

/// Answers requests with a model.
///
/// ```no_run
/// use dsmoe_core::Inference;
/// use dsmoe_datasets::tasks::{Loaded, Profile, Request};
/// use dsmoe_datasets::{Bos, Tokenizer};
/// use dsmoe_train::tasks::{Answer, Answers, Journal, Ran, Responder, RollingReport, model_sha256, rolling};
///
/// fn score(model: &Inference, tokenizer: &Tokenizer, task: &Loaded) -> dsmoe_train::Result<()> {
///     let responder = Responder::new(model, tokenizer, Bos::Auto, Profile::default());
///     let documents: Vec<&[Request]> = task.documents().iter().map(|d| &d.requests[..]).collect();
///     // Answers of an interrupted run are found again.
///     let made_by = model_sha256("model".as_ref())?;
///     let mut journal = Journal::open("answers.jsonl".as_ref(), &made_by, model.new_stats().as_ref())?;
///     let answers = responder.answer(&documents, Some(&mut journal), &mut |_, _| {})?;
///     if let Some(Answers { documents, ran: Ran { tokens, .. } }) = answers {
///         let first: &Answer = &documents[0][0];
///         println!("{tokens} tokens; {first:?}; {:?}", task.score(&documents).scores);
///     }
///     let text = ["A whole text.".to_owned()].map(Ok);
///     if let Some((RollingReport { byte_perplexity, .. }, _)) = rolling(&responder, text, &mut |_| {})? {
///         println!("perplexity per byte {byte_perplexity}");
///     }
///     Ok(())
/// }
/// ```
pub struct Responder<'a> {
    model: &'a Inference,
    tokenizer: &'a Tokenizer,
    bos: Bos,
    profile: Profile,
    batch_tokens: usize,
    stop: Option<&'a AtomicBool>,
    comm: &'a dyn Communicator,
}

/// The answers to documents' requests.
///
/// ```
/// use dsmoe_datasets::tasks::{Request, Response};
/// use dsmoe_train::tasks::{Answers, Responder};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # use dsmoe_datasets::tasks::Profile;
/// # use dsmoe_datasets::{Bos, Tokenizer, train_bpe};
/// # let work = tempfile::tempdir()?;
/// # train_bpe(std::iter::once("a text".to_owned()), 258, work.path())?;
/// # let tokenizer = Tokenizer::load(work.path(), Some(0), 2048)?;
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
/// # let responder = Responder::new(&model, &tokenizer, Bos::Auto, Profile::default());
///
/// let likelihood = |continuation: &str| Request::LogLikelihood {
///     context: "The sky is".into(),
///     continuation: continuation.to_owned(),
/// };
/// // One document of two choices. The result is none if the responder was stopped.
/// let requests = [likelihood(" blue"), likelihood(" late")];
/// let Answers { documents, ran } = responder.answer(&[&requests], None, &mut |_, _| {})?.unwrap();
/// assert_eq!(documents[0].len(), 2);
/// assert!(matches!(documents[0][0], Ok(Response::LogLikelihood { sum, .. }) if sum < 0.0));
/// assert!(ran.tokens > 0 && ran.routing.is_none()); // a dense model
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// One list a document, one answer a request.
    pub documents: Vec<Vec<Answer>>,
    /// The work for them, by this and earlier runs with the same journal. An answer that an interrupt cut short counts
    /// with what was run of it.
    pub ran: Ran,
}

/// The work for a request.
enum Work {
    Likelihood(Scored),
    Rolling(Vec<Scored>),
    Generate(Prompt),
}

impl<'a> Responder<'a> {
    /// Answers with `model` and its `tokenizer`; `bos` says when a text gets the BOS token in front.
    pub fn new(model: &'a Inference, tokenizer: &'a Tokenizer, bos: Bos, profile: Profile) -> Responder<'a> {
        let batch_tokens = if model.bytes() < LARGE { BATCH_TOKENS } else { LARGE_BATCH_TOKENS };
        Responder { model, tokenizer, bos, profile, batch_tokens, stop: None, comm: &Alone }
    }

    /// Sets the approximate number of tokens in a forward pass. Responses do not depend on it.
    #[must_use]
    pub fn batch_tokens(mut self, tokens: usize) -> Responder<'a> {
        self.batch_tokens = tokens;
        self
    }

    /// Stops before the next document is encoded, or the next forward pass is made, once `flag` is raised.
    #[must_use]
    pub fn stop_at(mut self, flag: &'a AtomicBool) -> Responder<'a> {
        self.stop = Some(flag);
        self
    }

    /// Divides the documents among the processes of `comm`. All get the answers of a single process.
    #[must_use]
    pub fn on(mut self, comm: &'a dyn Communicator) -> Responder<'a> {
        self.comm = comm;
        self
    }

    /// Answers the requests of `documents`, in their order; none if it was stopped. Of several processes the first one alone
    /// may have a journal, and all are stopped if one is. Responses in `journal` are used,
    /// and new ones are kept there. `progress` receives the number of documents done and of all.
    ///
    /// # Errors
    /// The tokenizer or the model fails, or the journal cannot be written. A request that cannot be answered is no
    /// error but an answer.
    pub fn answer(
        &self,
        documents: &[&[Request]],
        journal: Option<&mut Journal>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<Answers>> {
        match self.comm.size() {
            1 => self.answer_alone(documents, journal, progress),
            _ => shared::answer(self, documents, journal, progress),
        }
    }

    fn answer_alone(
        &self,
        documents: &[&[Request]],
        journal: Option<&mut Journal>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<Answers>> {
        let mut sheet = Sheet::new(documents, journal, progress);
        let (mut units, mut prompts) = (Vec::new(), Vec::new());
        let encoder = self.encoder();
        let open = sheet.open();
        let stop = self.stop;
        let encode = |&i: &usize| match is_raised(stop) {
            true => Ok(Vec::new()),
            false => encode(&encoder, documents[i]),
        };
        let encoded: Vec<Vec<Encoded<Work>>> = open.par_iter().map(encode).collect::<Result<_>>()?;
        if self.stopped() {
            return Ok(None);
        }
        for (&i, works) in open.iter().zip(encoded) {
            let mut scored = Vec::new();
            for (j, work) in works.into_iter().enumerate() {
                match work {
                    Err(refusal) => sheet.answers[i][j] = Some(Err(refusal)),
                    Ok(Work::Likelihood(work)) => scored.push((j, work)),
                    Ok(Work::Rolling(windows)) => {
                        units.extend(windows.into_iter().map(|window| Unit::new(i, vec![(j, window)])));
                    }
                    Ok(Work::Generate(prompt)) => prompts.push(Prompt { id: (i, j), ..prompt }),
                }
            }
            if !scored.is_empty() {
                units.push(Unit::new(i, scored));
            }
        }
        for document in units.iter().map(|unit| unit.document).chain(prompts.iter().map(|p| p.id.0)) {
            sheet.left[document] += 1;
        }
        sheet.begin();
        if !self.likelihoods(units, &mut sheet)? || !self.generate(prompts, &mut sheet)? {
            return Ok(None);
        }
        Ok(Some(sheet.finish()))
    }

    fn stopped(&self) -> bool {
        is_raised(self.stop)
    }

    /// Runs the likelihoods. Returns false if it was stopped.
    fn likelihoods(&self, mut units: Vec<Unit>, sheet: &mut Sheet<'_>) -> Result<bool> {
        units.sort_by_key(|unit| (Reverse(unit.tokens()), unit.document));
        let mut passes: Vec<Pass<'_>> = Vec::new();
        let most = if self.model.bytes() < LARGE { SIDE_BY_SIDE } else { 1 };
        passes.resize_with(rayon::current_num_threads().min(most), Pass::default);
        let mut rest = &units[..];
        while !rest.is_empty() {
            if self.stopped() {
                return Ok(false);
            }
            for pass in &mut passes {
                let mut tokens = 0;
                let fits = |unit: &&Unit| {
                    tokens += unit.tokens();
                    tokens <= self.batch_tokens
                };
                let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
                (pass.units, rest) = rest.split_at(count);
            }
            passes.retain(|pass| !pass.units.is_empty());
            passes.par_iter_mut().try_for_each(|pass| pass.run(self.model))?;
            for Pass { units, found, ran, .. } in &mut passes {
                let mut found = found.drain(..);
                for unit in *units {
                    for (j, scored) in &unit.scored {
                        let (sum, greedy) = total(&mut found, scored.targets.len());
                        sheet.add_likelihood((unit.document, *j), sum, greedy);
                    }
                }
                sheet.done(units.iter().map(|unit| unit.document), std::mem::take(ran))?;
            }
        }
        Ok(true)
    }

    /// Generates the answers. Returns false if it was stopped.
    fn generate(&self, prompts: Vec<Prompt>, sheet: &mut Sheet<'_>) -> Result<bool> {
        if prompts.is_empty() {
            return Ok(true);
        }
        let ends = Ends::new(self.tokenizer, &self.model.config().eos_token_ids)?;
        let stopped = || self.stopped();
        generation::generate(self.model, prompts, &ends, &stopped, &mut |(document, request), text, ran| {
            sheet.answers[document][request] = Some(Ok(Response::Generated { text }));
            sheet.done([document], ran)
        })
    }

    fn encoder(&self) -> Encoder<'a> {
        let config = self.model.config();
        let end = config.eos_token_ids.first().copied();
        let own = || self.tokenizer.prefix_id().or(config.bos_token_id).or(end);
        let start = if self.profile.starts_from_end_token() { end } else { own() };
        let &Responder { tokenizer, bos, profile, .. } = self;
        Encoder { tokenizer, bos, profile, start, positions: config.max_position }
    }
}

fn is_raised(flag: Option<&AtomicBool>) -> bool {
    flag.is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// A forward pass over some units.
#[derive(Default)]
struct Pass<'a> {
    units: &'a [Unit],
    found: Vec<Likelihood>,
    ran: Ran,
    workspace: Workspace,
}

impl Pass<'_> {
    fn run(&mut self, model: &Inference) -> Result<()> {
        let mut batch = Batch::default();
        self.units.iter().for_each(|unit| batch.push(unit));
        let Batch { ids, segments, targets } = &batch;
        self.ran = Ran { tokens: ids.len() as u64, routing: model.new_stats() };
        let routing = self.ran.routing.as_mut();
        self.found = model.likelihoods(ids, segments, targets, routing, &mut self.workspace)?;
        Ok(())
    }
}

/// The answers so far.
struct Sheet<'a> {
    documents: &'a [&'a [Request]],
    answers: Vec<Vec<Option<Answer>>>,
    /// The pieces of work that each document waits for.
    left: Vec<usize>,
    finished: usize,
    ran: Ran,
    journal: Option<&'a mut Journal>,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl<'a> Sheet<'a> {
    /// Starts with the responses in `journal`. A document is run as a whole, since its requests share a beginning; a
    /// document with some responses is run again.
    fn new(
        documents: &'a [&'a [Request]],
        journal: Option<&'a mut Journal>,
        progress: &'a mut dyn FnMut(usize, usize),
    ) -> Sheet<'a> {
        let known = |requests: &&[Request]| -> Option<Vec<Option<Answer>>> {
            let journal = journal.as_ref()?;
            requests.iter().map(|request| Some(Some(Ok(journal.get(request)?.clone())))).collect()
        };
        let answers = documents.iter().map(|d| known(d).unwrap_or_else(|| vec![None; d.len()])).collect();
        let ran = journal.as_ref().map(|journal| journal.ran().clone()).unwrap_or_default();
        let left = vec![0; documents.len()];
        Sheet { documents, answers, left, finished: 0, ran, journal, progress }
    }

    /// Returns the documents that are not answered.
    fn open(&self) -> Vec<usize> {
        (0..self.answers.len()).filter(|&i| self.answers[i].iter().any(Option::is_none)).collect()
    }

    fn begin(&mut self) {
        self.finished = self.left.iter().filter(|&&left| left == 0).count();
        (self.progress)(self.finished, self.documents.len());
    }

    /// Adds one more window to the answer of a request.
    fn add_likelihood(&mut self, (document, request): (usize, usize), sum: f64, greedy: bool) {
        let answer = &mut self.answers[document][request];
        *answer = Some(if sum.is_finite() {
            match (answer.take(), &self.documents[document][request]) {
                (Some(Err(refusal)), _) => Err(refusal),
                (Some(Ok(Response::Rolling { sum: before })), _) => {
                    Ok(Response::Rolling { sum: before + sum })
                }
                (_, Request::Rolling { .. }) => Ok(Response::Rolling { sum }),
                _ => Ok(Response::LogLikelihood { sum, greedy }),
            }
        } else {
            Err("its likelihood is not finite: the model overflows on it".into())
        });
    }

    /// Records that a piece of work of each of `documents` is done.
    fn done(&mut self, documents: impl IntoIterator<Item = usize>, ran: Ran) -> Result<()> {
        let mut whole = Vec::new();
        for document in documents {
            self.left[document] -= 1;
            if self.left[document] == 0 {
                whole.push(document);
            }
        }
        self.finished += whole.len();
        self.ran.add(&ran);
        if let Some(journal) = self.journal.as_deref_mut() {
            let pairs = whole.iter().flat_map(|&i| self.documents[i].iter().zip(&self.answers[i]));
            let answered =
                pairs.filter_map(|(request, answer)| Some((request, answer.as_ref()?.as_ref().ok()?)));
            journal.put(answered, ran)?;
        }
        (self.progress)(self.finished, self.documents.len());
        Ok(())
    }

    fn finish(self) -> Answers {
        let unanswered = || Err("it has no text".to_owned());
        let all = |answers: Vec<Option<Answer>>| {
            answers.into_iter().map(|answer| answer.unwrap_or_else(unanswered)).collect()
        };
        Answers { documents: self.answers.into_iter().map(all).collect(), ran: self.ran }
    }
}

/// Encodes the requests of one document.
fn encode(encoder: &Encoder<'_>, requests: &[Request]) -> Result<Vec<Encoded<Work>>> {
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
                let (id, until, max_tokens) = ((0, 0), *until, *max_tokens);
                let prompt = |tokens| Work::Generate(Prompt { id, tokens, until, max_tokens });
                encoder.prompt(context, max_tokens)?.map(prompt)
            }
        });
    }
    Ok(works)
}
