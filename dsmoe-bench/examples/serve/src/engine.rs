//! The thread that owns the model: it takes jobs from a bounded queue and decodes them side by side.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use dsmoe_core::Inference;
use dsmoe_core::generate::{GenerateOptions, Sampler};
use dsmoe_core::model::{Cache, Workspace};
use dsmoe_datasets::{Bos, DecodeStream, Tokenizer};
use tokio::sync::mpsc::{Sender, channel};

use crate::stops::Stops;

/// Most events of a job that wait for a slow client, who is then taken to be gone.
const EVENTS: usize = 8192;

/// The largest [`Limits::batch`] and [`Limits::queue`]: room for them is made at the start.
const MOST: usize = 1 << 16;

/// Limits of the work that the server accepts.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Texts that are decoded side by side.
    pub batch: usize,
    /// Jobs that wait for a place among them.
    pub queue: usize,
    /// Most tokens of a prompt and its completion.
    pub positions: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { batch: 8, queue: 64, positions: 4096 }
    }
}

/// A prompt to continue.
#[derive(Clone, Debug)]
pub struct Job {
    pub prompt: String,
    pub options: GenerateOptions,
    pub stop: Vec<String>,
    /// Share of the experts that tokens of this job run, for a model that stores thresholds by budget.
    pub active: Option<f64>,
}

/// A message about a job. A job sends any number of texts, then an end or a failure.
#[derive(Clone, Debug)]
pub enum Event {
    Text(String),
    End { reason: &'static str, prompt_tokens: usize, tokens: Vec<u32> },
    Failed(String),
}

/// The reason why a job was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is full.
    Busy,
    /// The engine has ended.
    Ended,
}

/// The queue of a running engine; clones share it.
#[derive(Clone, Debug)]
pub struct Engine {
    queue: SyncSender<(Job, Sender<Event>)>,
    eos: Vec<u32>,
}

impl Engine {
    /// The tokens that end a text of the model.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Puts a job into the queue, and returns its events.
    pub fn submit(&self, job: Job) -> Result<tokio::sync::mpsc::Receiver<Event>, Refusal> {
        let (events, receiver) = channel(EVENTS);
        match self.queue.try_send((job, events)) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(_)) => Err(Refusal::Busy),
            Err(TrySendError::Disconnected(_)) => Err(Refusal::Ended),
        }
    }
}

/// Starts the thread that owns the model. It ends when the last [`Engine`] is gone.
///
/// # Errors
/// A batch or queue of none or of more than 65,536; the system refuses a thread.
pub fn start(model: Inference, tokenizer: Tokenizer, limits: Limits) -> Result<Engine> {
    for (name, value) in [("--batch", limits.batch), ("--queue", limits.queue)] {
        ensure!((1..=MOST).contains(&value), "{name} is {value}; use 1 to {MOST}");
    }
    let (queue, jobs) = sync_channel(limits.queue);
    let eos = model.config().eos_token_ids.clone();
    std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
        let budget = model.config().moe.as_ref().and_then(|moe| moe.budget());
        let (texts, workspace) = (Vec::new(), Workspace::default());
        Batch { model, tokenizer: &tokenizer, limits, budget, texts, workspace }.run(&jobs);
    })?;
    Ok(Engine { queue, eos })
}

/// A text that is being decoded.
struct Text<'t> {
    events: Sender<Event>,
    cache: Cache,
    sampler: Sampler,
    decoder: DecodeStream<'t>,
    stops: Stops,
    options: GenerateOptions,
    active: Option<f64>,
    /// The prompt and what follows; the cache has all but the last.
    ids: Vec<u32>,
    prompt_tokens: usize,
    /// The reason for the end, when there is one.
    end: Option<&'static str>,
}

impl Text<'_> {
    /// Takes the token that these logits give, and sends the text that it completes.
    fn take(&mut self, logits: &[f32]) -> Result<()> {
        ensure!(logits.iter().all(|z| z.is_finite()), "the model's logits are not finite");
        let next = self.sampler.choose(logits);
        if self.options.stop.contains(&next) {
            self.end = Some("stop");
            return Ok(());
        }
        self.ids.push(next);
        let piece = self.decoder.push(next)?.unwrap_or_default();
        let text = self.stops.push(&piece);
        if !text.is_empty() && self.events.try_send(Event::Text(text)).is_err() {
            self.end = Some("gone");
        } else if self.stops.stopped {
            self.end = Some("stop");
        } else if self.ids.len() - self.prompt_tokens == self.options.max_tokens {
            self.end = Some("length");
        }
        Ok(())
    }

    fn finish(mut self, reason: &'static str) {
        if !self.stops.stopped {
            let held = self.decoder.finish().ok().flatten().unwrap_or_default();
            let rest = self.stops.push(&held) + &self.stops.finish();
            if !rest.is_empty() {
                let _ = self.events.try_send(Event::Text(rest));
            }
        }
        let tokens = self.ids.split_off(self.prompt_tokens);
        let _ = self.events.try_send(Event::End { reason, prompt_tokens: self.prompt_tokens, tokens });
    }
}

struct Batch<'t> {
    model: Inference,
    tokenizer: &'t Tokenizer,
    limits: Limits,
    /// The budget that the model was loaded with, if it stores any.
    budget: Option<f64>,
    texts: Vec<Text<'t>>,
    workspace: Workspace,
}

impl<'t> Batch<'t> {
    fn run(&mut self, jobs: &Receiver<(Job, Sender<Event>)>) {
        loop {
            while self.texts.len() < self.limits.batch {
                let next = if self.texts.is_empty() {
                    jobs.recv_timeout(Duration::from_secs(3600))
                } else {
                    jobs.try_recv().map_err(|error| match error {
                        TryRecvError::Empty => RecvTimeoutError::Timeout,
                        TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                    })
                };
                match next {
                    Ok((job, events)) => self.begin(job, events),
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) if self.texts.is_empty() => return,
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            self.step();
        }
    }

    /// Runs a prompt, which gives the first token of its text.
    fn begin(&mut self, job: Job, events: Sender<Event>) {
        if events.is_closed() {
            return;
        }
        match self.prefill(job, events.clone()) {
            Ok(text) => self.keep(text),
            Err(error) => drop(events.try_send(Event::Failed(format!("{error:#}")))),
        }
    }

    fn prefill(&mut self, job: Job, events: Sender<Event>) -> Result<Text<'t>> {
        let config = self.model.config();
        let ids = self.tokenizer.encode(&job.prompt, Bos::Auto)?;
        let most = self.limits.positions.min(config.max_position);
        let positions = ids.len().saturating_add(job.options.max_tokens);
        ensure!(!ids.is_empty(), "the prompt is empty, and the tokenizer adds no token to start from");
        ensure!(job.options.max_tokens > 0, "max_tokens is 0");
        ensure!(
            positions <= most,
            "{} tokens of the prompt and max_tokens are more than {most} positions",
            ids.len()
        );
        let sampler = Sampler::new(&job.options, config.vocab_size)?;
        let mut text = Text {
            events,
            cache: Cache::new(&self.model, positions),
            sampler,
            decoder: self.tokenizer.stream(&ids)?,
            stops: Stops::new(job.stop),
            options: job.options,
            active: job.active,
            prompt_tokens: ids.len(),
            ids,
            end: None,
        };
        self.select(text.active)?;
        let Batch { model, workspace, .. } = self;
        text.cache.expect(text.ids.len());
        let logits = rayon::scope(|_| model.decode(&text.ids, &mut text.cache, None, workspace))?;
        text.take(logits)?;
        Ok(text)
    }

    /// Sets the budget of the next pass: that of the job, or the one that the model names.
    fn select(&mut self, active: Option<f64>) -> Result<()> {
        match (active, self.budget) {
            (Some(_), None) => bail!("`active` needs a model that stores thresholds by budget"),
            (None, None) => Ok(()),
            (active, Some(own)) => Ok(self.model.set_active(active.unwrap_or(own))?),
        }
    }

    /// Decodes one token of every text: those of one budget in one pass.
    fn step(&mut self) {
        let mut texts = std::mem::take(&mut self.texts);
        texts.sort_by(|a, b| a.active.partial_cmp(&b.active).unwrap_or(std::cmp::Ordering::Equal));
        let mut rest = texts.into_iter().peekable();
        while let Some(first) = rest.next() {
            let active = first.active;
            let mut group = vec![first];
            while let Some(text) = rest.next_if(|text| text.active == active) {
                group.push(text);
            }
            match self.decode(active, &mut group) {
                Ok(()) => group.into_iter().for_each(|text| self.keep(text)),
                Err(error) => {
                    let message = format!("{error:#}");
                    for text in group {
                        let _ = text.events.try_send(Event::Failed(message.clone()));
                    }
                }
            }
        }
    }

    fn decode(&mut self, active: Option<f64>, group: &mut [Text<'t>]) -> Result<()> {
        self.select(active)?;
        let Batch { model, workspace, .. } = self;
        let vocab = model.config().vocab_size;
        // A rotation that depends on the length makes a text begin again when it outgrows it.
        for text in group.iter_mut().filter(|text| text.cache.is_outgrown(model.config(), text.ids.len())) {
            text.cache.clear();
            text.cache.expect(text.ids.len());
            model.decode(&text.ids[..text.ids.len() - 1], &mut text.cache, None, workspace)?;
        }
        let ids: Vec<u32> = group.iter().map(|text| *text.ids.last().expect("a prompt")).collect();
        let mut caches: Vec<&mut Cache> = Vec::with_capacity(group.len());
        for text in group.iter_mut() {
            text.cache.expect(text.ids.len());
            caches.push(&mut text.cache);
        }
        let logits = rayon::scope(|_| model.decode_each(&ids, &mut caches, None, workspace))?;
        for (text, logits) in group.iter_mut().zip(logits.chunks_exact(vocab)) {
            text.take(logits)?;
        }
        Ok(())
    }

    /// Keeps a text for the next step, or ends it.
    fn keep(&mut self, text: Text<'t>) {
        match text.end {
            Some(reason) => text.finish(reason),
            None if text.events.is_closed() => {}
            None => self.texts.push(text),
        }
    }
}
