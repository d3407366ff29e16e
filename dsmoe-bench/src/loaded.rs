//! A model that stays in memory, with its tokenizer: what `generate` and `eval` do with one, call by call.

use std::path::Path;
use std::sync::Arc;

use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::config::Config;
use dsmoe_core::generate::GenerateOptions;
use dsmoe_core::model::{Observe, Observed};
use dsmoe_core::{Device, Inference};
use dsmoe_datasets::{Bos, Tokenizer};
use dsmoe_kernels::Precision;
use dsmoe_train::eval::EvalOptions;
use serde::Serialize;

use crate::caller::{Call, Caller, unless_stopped};
use crate::cli::gates::GateArgs;
use crate::continuation::{Asked, continue_text};
use crate::evaluation;
use crate::failure::Failure;
use crate::memory;
use crate::models::{default_precision, load_inference, show_config_notices, tokenizer};
use crate::ui::Ui;

/// How a model is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoadOptions {
    /// Precision of the weights; that of the stored ones if there is none.
    pub precision: Option<Precision>,
    /// Device that computes.
    pub device: Device,
    /// Gates to open.
    pub gates: Gates,
}

/// Gates to open in place of those that the model's directory names.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gates {
    /// Threshold of the gates.
    pub threshold: Option<f32>,
    /// Share of the experts.
    pub active: Option<f64>,
}

/// A text to continue.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// Whether a BOS token stands before it.
    pub bos: Bos,
    /// How it is continued. Tokens that end the text are added to those here unless `ignore_eos`.
    pub options: GenerateOptions,
    /// Continue after a token that ends the text.
    pub ignore_eos: bool,
    /// Texts before which the continuation ends.
    pub stop: Vec<String>,
}

/// A model in memory.
pub struct Loaded {
    model: Inference,
    /// A model may have no tokenizer, which matters where text is asked for.
    tokenizer: Result<Tokenizer, Failure>,
}

/// Turns the error of a command into a failure.
fn failed<T>(outcome: anyhow::Result<T>) -> Result<T, Failure> {
    outcome.map_err(|error| Failure::of(&error))
}

impl Loaded {
    /// Loads the model of a directory or of a GGUF file.
    ///
    /// # Errors
    /// The model is malformed or too large, or has no such gates.
    pub fn load(dir: &Path, options: LoadOptions, caller: Arc<dyn Caller>) -> Result<Loaded, Failure> {
        dsmoe_baselines::register();
        let ui = Ui::of_call(Call::new(caller));
        failed(load(dir, options, &ui))
    }

    /// Returns the model.
    pub fn model(&self) -> &Inference {
        &self.model
    }

    /// Returns the tokenizer.
    ///
    /// # Errors
    /// The model has none, or one that cannot be read.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Failure> {
        self.tokenizer.as_ref().map_err(Failure::clone)
    }

    /// Opens other gates.
    ///
    /// # Errors
    /// The model has no such gates.
    pub fn set_gates(&mut self, gates: Gates) -> Result<(), Failure> {
        let threshold = gates.threshold.map_or(Ok(()), |threshold| self.model.set_threshold(threshold));
        let set =
            threshold.and_then(|()| gates.active.map_or(Ok(()), |active| self.model.set_active(active)));
        failed(set.map_err(Into::into))
    }

    /// Tokenizes a text.
    ///
    /// # Errors
    /// Those of [`Loaded::tokenizer`]; the text cannot be encoded, or the tokenizer has no BOS token.
    pub fn encode(&self, text: &str, bos: Bos) -> Result<Vec<u32>, Failure> {
        failed(self.tokenizer()?.encode(text, bos).map_err(Into::into))
    }

    /// Returns the text of tokens.
    ///
    /// # Errors
    /// Those of [`Loaded::tokenizer`]; a token is not of the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Failure> {
        failed(self.tokenizer()?.decode(ids, skip_special).map_err(Into::into))
    }

    /// Runs the model over a text and keeps what is asked for.
    ///
    /// # Errors
    /// Those of [`Inference::observe`]; the result does not fit into memory.
    pub fn observe(&self, ids: &[u32], what: Observe) -> Result<Observed, Failure> {
        let config = self.model.config();
        let states = if what.states { (config.num_layers + 1) * config.hidden } else { 0 };
        let values =
            ids.len().saturating_mul(states).saturating_add(what.logits.saturating_mul(config.vocab_size));
        let needed = (values as u64).saturating_mul(4);
        failed(memory::check("the result", needed, memory::available(), "use fewer tokens or fewer logits"))?;
        failed(self.model.observe(ids, what).map_err(Into::into))
    }

    /// Continues a prompt, as `generate` does, and returns its report as JSON. `show` receives new text, and returns whether to
    /// continue.
    ///
    /// # Errors
    /// Options out of range, an empty prompt, a prompt longer than the model's positions, or logits that are not finite; the
    /// caller stopped it.
    pub fn generate(
        &self,
        prompt: Prompt,
        caller: Arc<dyn Caller>,
        show: &mut (dyn FnMut(&str) -> bool + Send),
    ) -> Result<String, Failure> {
        let tokenizer = self.tokenizer()?;
        let ids = self.encode(&prompt.text, prompt.bos)?;
        let Prompt { text, mut options, ignore_eos, stop, .. } = prompt;
        if !ignore_eos {
            options.stop.extend(&self.model.config().eos_token_ids);
        }
        let call = Call::new(caller);
        let asked = Asked { prompt: text, ids, options, stop: &stop };
        let mut next = |text: &str| Ok(!call.is_to_stop() && (text.is_empty() || show(text)));
        let continued = failed(continue_text(&self.model, tokenizer, asked, &mut next));
        if call.is_to_stop() { Err(Failure::stopped()) } else { continued.and_then(|report| json(&report)) }
    }

    /// Measures the perplexity of tokens, as `eval` does, and returns its report as JSON.
    ///
    /// # Errors
    /// Options out of range, fewer than two tokens, a token id outside the vocabulary, or windows longer than the model has
    /// positions; the caller stopped it.
    pub fn evaluate(
        &self,
        ids: &[u32],
        options: EvalOptions,
        caller: Arc<dyn Caller>,
    ) -> Result<String, Failure> {
        let ui = Ui::of_call(Call::new(caller));
        let work = || rayon::scope(|_| evaluation::measure(&self.model, ids, options, &ui));
        let report = unless_stopped(work).ok_or_else(Failure::stopped)?;
        failed(report).and_then(|report| json(&report))
    }
}

fn load(dir: &Path, options: LoadOptions, ui: &Ui) -> anyhow::Result<Loaded> {
    let LoadOptions { precision, device, gates: Gates { threshold, active } } = options;
    let config = Config::load(dir)?;
    show_config_notices(&config, ui);
    let precision = match precision {
        Some(precision) => precision,
        None => default_precision(device, Checkpoint::open(dir)?.precision()),
    };
    let model = load_inference(dir, precision, device, GateArgs { threshold, active })?;
    let tokenizer = failed(tokenizer(dir, &config, ui));
    Ok(Loaded { model, tokenizer })
}

fn json(report: &impl Serialize) -> Result<String, Failure> {
    failed(serde_json::to_string(report).map_err(Into::into))
}
