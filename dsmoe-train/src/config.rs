//! The configuration of a run: one flat TOML table whose keys are the fields of [`TrainConfig`].

mod hold;
pub mod share;

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;

use dsmoe_core::config::Config;
use dsmoe_datasets::files::read_at_most;
use dsmoe_datasets::{Bos, SplitOptions};
use dsmoe_kernels::Precision;
use dsmoe_router::{Fade, RouterGradient};
use serde::{Deserialize, Serialize};

pub use self::hold::Hold;
use crate::error::{Error, Result};
use crate::schedule::{Decay, Schedule};

/// Most tokens in one micro-batch.
const MAX_MICRO_TOKENS: usize = 1 << 24;
/// Most tokens in a run: counts stay exact in f64.
const MAX_RUN_TOKENS: u64 = 1 << 53;
/// The largest file of settings, in bytes.
const LARGEST: u64 = 1 << 20;
/// Warm-up when none is given: this many steps, or a tenth of a shorter run.
const WARMUP_STEPS: u64 = 100;
/// The paper's coefficient of the sparsity loss.
const PAPER_SPARSITY: f64 = 1.0;
/// Weight of a teacher's divergence: the text's own loss keeps a tenth, since a distribution tells more than one token.
pub(crate) const TEACHER_WEIGHT: f64 = 0.9;
/// Share of the steps in which experts of a token fade out.
const TOP_K_ANNEAL: f64 = 0.5;
/// Tokens of a row of a cached teacher, when nothing else is said.
pub const TEACHER_TOP: usize = 64;
/// Most tokens of a row.
const MOST_TOP: usize = 4096;

dsmoe_core::with_defaults! {
    /// The settings of a run, apart from the model and the text. Unknown keys are errors.
    ///
    /// ```
    /// use dsmoe_train::config::{Budget, Hold, NearDuplicates, Part, TrainConfig, Trained};
    ///
    /// let mut config = TrainConfig { steps: Some(500), ..TrainConfig::default() };
    /// config.set("active_target=0.375")?;
    /// config.set("hold=\"threshold\"")?;
    /// config.set("train_parts=[\"ffn\", \"routers\"]")?;
    /// config.set("near_duplicates=\"keep\"")?;
    /// let config = config.resolve()?;
    /// assert_eq!(config.budget(), Budget::Target(0.375));
    /// assert_eq!(config.hold, Some(Hold::Threshold));
    /// assert_eq!(config.near_duplicates, Some(NearDuplicates::Keep));
    /// // The same choice for an optimiser that is used without a run.
    /// let trained = Trained { layers: None, parts: Some(vec![Part::Ffn, Part::Routers]) };
    /// assert_eq!(trained.parts, config.train_parts);
    /// # Ok::<(), dsmoe_train::Error>(())
    /// ```
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct TrainConfig {
        /// Optimiser steps of the whole run. Excludes `tokens`.
        pub steps: Option<u64> = None,
        /// Tokens of the whole run, rounded up to whole steps. Excludes `steps`.
        pub tokens: Option<u64> = None,
        /// Sequences in a micro-batch; default 32.
        pub batch: usize = 32,
        /// Tokens in a sequence; default 1024.
        pub seq: usize = 1024,
        /// The precision to which operands of matrix products are rounded: `f32` (default) or `bf16`. Weights,
        /// gradients, moments, sums, norms, softmax and routers are f32 either way.
        #[serde(with = "precision")]
        pub dtype: Precision = Precision::F32,
        /// Micro-batches of a lane, added up one after the other; default 1.
        pub accumulate: usize = 1,
        /// Lanes of an optimiser step, each of `accumulate` micro-batches. The gradients of lanes are added along a binary tree,
        /// so that any number of processes that divides the lanes into equal powers of two computes the same bits; default the
        /// number of processes.
        pub lanes: Option<usize> = None,
        /// Peak learning rate; default 2e-5.
        pub lr: f64 = 2e-5,
        /// The cosine ends at this share of `lr`; default 0.1.
        pub min_lr_ratio: f64 = 0.1,
        /// Steps of linear warm-up; default min(100, steps / 10).
        pub warmup_steps: Option<u64> = None,
        /// `cosine` (default) or `constant`.
        pub schedule: Decay = Decay::Cosine,
        /// Decay of the first moment; default 0.9.
        pub beta1: f64 = 0.9,
        /// Decay of the second moment; default 0.95.
        pub beta2: f64 = 0.95,
        /// Added to the root of the second moment; default 1e-8.
        pub eps: f64 = 1e-8,
        /// Decoupled weight decay, not on norms and routers; default 0.1.
        pub weight_decay: f64 = 0.1,
        /// Largest global gradient norm; 0 turns clipping off; default 1.
        pub clip: f64 = 1.0,
        /// Constant weight of the sparsity loss over active gates. Excludes `active_target`. Without either, a run
        /// holds the share that the model was made for; a model that names none gets weight 1, the paper's.
        pub sparsity: Option<f64> = None,
        /// Share of experts to be active, mean over tokens and layers, held by a controller. Excludes `sparsity` and
        /// `active_range`.
        #[serde(deserialize_with = "share::option")]
        pub active_target: Option<f64> = None,
        /// The least and the largest share of experts to be active: every micro-batch draws one, and every layer deviates
        /// from it, so that the model serves all of them. Excludes `sparsity` and `active_target`.
        #[serde(deserialize_with = "share::range")]
        pub active_range: Option<[f64; 2]> = None,
        /// The way a share is held: `threshold` moves the gates' thresholds with the logits, `loss` adjusts the weight of the
        /// sparsity loss, `squared` adds the squared distance of the mean gate of a micro-batch from the share to the loss, of
        /// routers with a temperature; default `loss`, for a range `threshold`, which needs the processor. Only with a share to hold.
        pub hold: Option<Hold> = None,
        /// Weight of the squared distance; default 1. Only with `hold = "squared"`.
        pub hold_weight: Option<f64> = None,
        /// Weight of the separability loss, which pushes gates away from their threshold; default 0.
        pub separability: f64 = 0.0,
        /// Weight of the entropy of gates, under which they decide: of softmax gates over all experts, of sigmoid gates each for
        /// itself. Mixtures train without their balance loss then. Default 0.
        pub gate_entropy: f64 = 0.0,
        /// Experts of a token that the run ends with, of a model whose tokens all run more; it trains without its balance loss then.
        pub top_k: Option<usize> = None,
        /// Share of the steps in which the coefficients of the experts that go fade out; default 0.5. Only with `top_k`.
        #[serde(deserialize_with = "share::option")]
        pub top_k_anneal: Option<f64> = None,
        /// Weight of the divergence from the teacher, 0 to 1; the text's loss has the rest. Only with a teacher; default
        /// 0.9.
        #[serde(deserialize_with = "share::option")]
        pub teacher_weight: Option<f64> = None,
        /// Tokens of the teacher's distribution that are told apart, the most likely ones; all others are one outcome of the
        /// divergence. Default all of them, with a cache of the teacher 64.
        pub teacher_top: Option<usize> = None,
        /// Learning rate of the routers over that of the rest; default 1.
        pub router_lr_scale: f64 = 1.0,
        /// The inactive pairs of tokens and experts whose part of the routers' gradient is computed, of a model whose gates have the
        /// straight-through rule: `full` (default, all of them), `every:K` (those of a layer in one of K micro-batches, with weight
        /// K) or `sample:P` (each with probability P and weight 1 / P).
        pub router_gradient: RouterGradient = RouterGradient::Full,
        /// The numbers that divide the routers' logits in the first and in the last step; between them it changes by the same amount
        /// from step to step. For routers with a temperature; default the model's own in all steps.
        pub router_temperature: Option<[f64; 2]> = None,
        /// Numbers of the decoder layers that are trained, all other parameters stay as they are; default everything.
        pub train_layers: Option<Vec<usize>> = None,
        /// Parts of the model that are trained, of `ffn`, `routers`, `attention`, `norms` and `embedding` (with the head); all
        /// other parameters stay as they are; default everything.
        pub train_parts: Option<Vec<Part>> = None,
        /// Seed of the order of the windows; default 0.
        pub seed: u64 = 0,
        /// Steps between checkpoints, apart from the one at the end; default none.
        pub save_every: Option<u64> = None,
        /// Checkpoints kept; default 2.
        pub keep: usize = 2,
        /// Steps between lines on a console; the metrics file has every step; default 10.
        pub log_every: u64 = 10,
        /// Steps between evaluations of the held-out text, apart from the one at the end; default none.
        pub eval_every: Option<u64> = None,
        /// Share of the text of every source held out for evaluation; default 0.02.
        #[serde(deserialize_with = "share::one")]
        pub valid_fraction: f64 = 0.02,
        /// Windows of every source held out at most; default 5000.
        pub valid_samples: u64 = 5000,
        /// The treatment of text that training and held-out sides have in common: `keep`, or `drop` (see
        /// [`dsmoe_datasets::overlap`]); default `drop` for several sources, `keep` for one.
        pub near_duplicates: Option<NearDuplicates> = None,
        /// Worker threads; default all. Results do not depend on it.
        pub threads: Option<usize> = None,
        /// Splits text files into documents.
        pub doc_separator: Option<String> = None,
        /// Column of JSONL files; default `text`.
        pub text_column: String = "text".to_owned(),
        /// When documents get a BOS token: `auto` (default), `always`, `never`.
        pub bos: Bos = Bos::Auto,
    }
}

/// The parts that are trained; all else stays as it is.
///
/// ```
/// use dsmoe_core::params::{Layout, TensorSpec};
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::config::{Part, Trained};
/// use dsmoe_train::optim::{AdamW, Update};
///
/// let layout = Layout::of(vec![TensorSpec::matrix("up", 1, 16), TensorSpec::router("router", vec![1, 16])]);
/// let mut optimizer = AdamW::new(&layout);
/// optimizer.train_only(Trained { parts: Some(vec![Part::Routers]), ..Trained::default() });
/// let (config, mut params) = (TrainConfig::default(), vec![0.5; 32]);
/// let update = Update { config: &config, lr: 1e-3, scale: 1.0, step: 1 };
/// optimizer.step(Some(&mut params), &[1.0; 32], &layout, &update);
/// assert!(params[..16].iter().all(|x| *x == 0.5) && params[16..].iter().all(|x| *x < 0.5));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trained {
    /// Decoder layers; none for everything.
    pub layers: Option<Vec<usize>>,
    /// Parts; none for all of them.
    pub parts: Option<Vec<Part>>,
}

/// A part of a model.
///
/// ```
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::config::Part;
///
/// let mut config = TrainConfig::default();
/// config.set(r#"train_parts=["ffn", "routers"]"#)?;
/// assert_eq!(config.train_parts, Some(vec![Part::Ffn, Part::Routers]));
/// // The message names the parts.
/// let error = config.set(r#"train_parts=["experts"]"#).unwrap_err().to_string();
/// assert!(error.contains("`embedding`"), "{error}");
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// The projections of FFNs and of their experts, with their biases.
    Ffn,
    /// Routers and gates.
    Routers,
    /// The projections of attention, with their biases.
    Attention,
    /// All norms.
    Norms,
    /// The embedding and the head.
    Embedding,
}

/// The treatment of text that is on both sides.
///
/// ```
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::config::NearDuplicates;
///
/// let drop: NearDuplicates = "drop".parse()?;
/// let config = TrainConfig { steps: Some(10), near_duplicates: Some(drop), ..TrainConfig::default() };
/// assert_eq!(config.resolve()?.near_duplicates, Some(NearDuplicates::Drop));
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NearDuplicates {
    /// It stays; only equal pieces are kept on one side.
    Keep,
    /// It is removed from one side.
    Drop,
}

impl std::str::FromStr for NearDuplicates {
    type Err = Error;

    fn from_str(text: &str) -> Result<NearDuplicates> {
        match text {
            "keep" => Ok(NearDuplicates::Keep),
            "drop" => Ok(NearDuplicates::Drop),
            _ => Err(Error::field("near_duplicates", format!("{text:?}"), "keep or drop")),
        }
    }
}

/// A precision by its name.
mod precision {
    use super::{Deserialize, Precision};

    use serde::{Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(value: &Precision, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(value.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Precision, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

/// The pressure on gates to close.
///
/// ```
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::config::Budget;
///
/// let mut config = TrainConfig { steps: Some(100), ..TrainConfig::default() };
/// // Without a share to hold, a run has the paper's weight.
/// assert_eq!(config.clone().resolve()?.budget(), Budget::Weight(1.0));
/// config.set("active_target=40%")?;
/// assert_eq!(config.clone().resolve()?.budget(), Budget::Target(0.4));
/// config.set("active_range=[0.25, 0.5]")?;
/// assert_eq!(config.resolve()?.budget(), Budget::Range(0.25, 0.5));
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// A constant weight of the sparsity loss over active gates.
    Weight(f64),
    /// A share of active experts for a controller to hold.
    Target(f64),
    /// The least and the largest share of active experts, between which every micro-batch draws one.
    Range(f64, f64),
}

impl TrainConfig {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or has an unknown key or a value of the wrong type.
    pub fn from_toml(path: &Path) -> Result<TrainConfig> {
        let bytes = read_at_most(path, LARGEST).map_err(Error::io(path))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::ConfigFile { path: path.to_path_buf(), message: "not UTF-8".to_owned() })?;
        toml::from_str(&text).map_err(|cause| {
            let line = cause.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let message = format!("line {line}: {}", one_line(cause.message()));
            Error::ConfigFile { path: path.to_path_buf(), message }
        })
    }

    /// Returns the table as TOML.
    pub(crate) fn to_toml(&self) -> String {
        toml::to_string(self).expect("a flat table of numbers and strings is TOML")
    }

    /// Applies one `key=value` word. The value is TOML; a bare word is a string. See [`TrainConfig::apply`].
    ///
    /// # Errors
    /// No `=`, an unknown key, or a value of the wrong type.
    pub fn set(&mut self, setting: &str) -> Result<()> {
        let wrong =
            |message: &str| Err(Error::Setting { setting: setting.to_owned(), message: message.to_owned() });
        let Some((key, value)) = setting.split_once('=') else {
            return wrong("no `=`; write key=value, such as lr=3e-4");
        };
        if value.trim().is_empty() {
            return wrong("no value; write key=value, such as lr=3e-4");
        }
        let parsed = format!("value = {value}").parse::<toml::Table>().ok();
        let parsed = parsed.and_then(|mut table| table.remove("value"));
        if parsed.is_none() && is_long_number(value.trim()) {
            return wrong("a number that 64 bits do not hold; use at most 9223372036854775807");
        }
        self.insert(key.trim(), parsed.unwrap_or_else(|| value.trim().into()), setting)
    }

    /// Overrides the settings that `table` names. Of two keys that exclude each other the one set last holds.
    ///
    /// # Errors
    /// An unknown key or a value of the wrong type; the message names the key.
    pub fn apply(&mut self, table: &toml::Table) -> Result<()> {
        table.iter().try_for_each(|(key, value)| self.insert(key, value.clone(), &format!("{key} = {value}")))
    }

    fn insert(&mut self, key: &str, value: toml::Value, shown: &str) -> Result<()> {
        let mut table = toml::Table::try_from(&*self).expect("a flat table of numbers and strings is TOML");
        let groups = [&["steps", "tokens"][..], &["sparsity", "active_target", "active_range"]];
        for excluded in groups.into_iter().filter(|group| group.contains(&key)).flatten() {
            table.remove(*excluded);
        }
        table.insert(key.to_owned(), value);
        let wrong = |message: String| Error::Setting { setting: shown.to_owned(), message };
        *self = table.try_into().map_err(|cause: toml::de::Error| wrong(one_line(cause.message())))?;
        Ok(())
    }

    /// Resolves the settings of a run of a model. Without an explicit share or `sparsity` the run holds the
    /// share of experts that the model was made for, if its directory names one. See [`TrainConfig::resolve`].
    ///
    /// # Errors
    /// Those of [`TrainConfig::resolve`]; an estimator of a gradient, or a temperature, that the model's gates do not have.
    pub fn resolve_for(mut self, model: &Config) -> Result<TrainConfig> {
        self.active_target = self.active_target.or_else(|| self.made_for(model));
        let resolved = self.resolve()?;
        let rule = resolved.router_gradient;
        if !rule.is_full() && !model.moe.as_ref().is_some_and(|moe| moe.router.ste) {
            let allowed = "full for a model without gates of the straight-through rule";
            return Err(Error::field("router_gradient", rule, allowed));
        }
        resolved.check_routers(model)?;
        Ok(resolved)
    }

    /// Returns how experts of a token have faded out before step `step`, which counts from 0.
    pub(crate) fn fade_at(&self, step: u64) -> Fade {
        let Some(kept) = self.top_k else { return Fade::NONE };
        let span = self.top_k_anneal.unwrap_or(TOP_K_ANNEAL) * self.steps.unwrap_or(0) as f64;
        let done = if span > 0.0 { (step as f64 / span).min(1.0) } else { 1.0 };
        Fade { kept, factor: 1.0 - done }
    }

    /// Reports whether mixtures train with their balance loss, which pulls against gates that decide.
    pub(crate) fn balances(&self) -> bool {
        self.gate_entropy == 0.0 && self.top_k.is_none()
    }

    /// Returns the share of active experts that `model` was made for, if these settings leave it to the model.
    pub fn made_for(&self, model: &Config) -> Option<f64> {
        let explicit = self.sparsity.is_some() || self.active_target.is_some() || self.active_range.is_some();
        let of_experts = model.moe.as_ref().and_then(|moe| moe.active_target);
        let of_spec = || model.ffn.as_ref().and_then(|spec| spec.active_target());
        of_experts.or_else(of_spec).filter(|_| !explicit)
    }

    /// Checks every field and fills in what follows from others: `steps` from `tokens`, `warmup_steps`, and the
    /// paper's `sparsity` when there is no target.
    ///
    /// # Errors
    /// A field outside its range, fields that exclude each other, or neither `steps` nor `tokens`.
    pub fn resolve(mut self) -> Result<TrainConfig> {
        in_range("batch", self.batch, 1..=MAX_MICRO_TOKENS)?;
        in_range("seq", self.seq, 1..=MAX_MICRO_TOKENS)?;
        in_range("accumulate", self.accumulate, 1..=1 << 20)?;
        in_range("lanes", *self.lanes.get_or_insert(1), 1..=1 << 16)?;
        let micro = self.batch.saturating_mul(self.seq);
        if micro > MAX_MICRO_TOKENS {
            let found = format!("{} x seq {}", self.batch, self.seq);
            let allowed = format!("at most {MAX_MICRO_TOKENS} tokens in a micro-batch; raise accumulate");
            return Err(Error::field("batch", found, allowed));
        }
        for (field, value, range, allowed) in [
            ("lr", self.lr, 0.0..=1e3, "0 to 1000"),
            ("min_lr_ratio", self.min_lr_ratio, 0.0..=1.0, "0 to 1"),
            ("beta1", self.beta1, 0.0..=0.999_999, "0 or more and below 1"),
            ("beta2", self.beta2, 0.0..=0.999_999, "0 or more and below 1"),
            ("eps", self.eps, 1e-30..=1.0, "a small positive number such as 1e-8"),
            ("weight_decay", self.weight_decay, 0.0..=1e3, "0 to 1000"),
            ("clip", self.clip, 0.0..=f64::MAX, "a positive number, or 0 for no clipping"),
            ("sparsity", self.sparsity.unwrap_or(0.0), 0.0..=1e6, "0 to 1000000"),
            (
                "active_target",
                self.active_target.unwrap_or(1.0),
                1e-6..=1.0,
                "a share above 0 and up to 1, such as 0.4 or 40%",
            ),
            ("hold_weight", self.hold_weight.unwrap_or(0.0), 0.0..=1e6, "0 to 1000000"),
            ("separability", self.separability, 0.0..=1e6, "0 to 1000000"),
            ("gate_entropy", self.gate_entropy, 0.0..=1e6, "0 to 1000000"),
            ("top_k_anneal", self.top_k_anneal.unwrap_or(0.0), 0.0..=1.0, "0 to 1"),
            ("teacher_weight", self.teacher_weight.unwrap_or(0.0), 0.0..=1.0, "a share from 0 to 1"),
            ("router_lr_scale", self.router_lr_scale, 0.0..=1e6, "0 to 1000000"),
            (
                "valid_fraction",
                self.valid_fraction,
                0.0..=0.999,
                "a share of 0 or more and below 1, such as 0.02 or 2%",
            ),
        ] {
            if !range.contains(&value) {
                return Err(Error::field(field, value, allowed));
            }
        }
        self.router_gradient.validate()?;
        in_range("seed", self.seed, 0..=i64::MAX as u64)?;
        in_range("keep", self.keep, 1..=usize::MAX)?;
        in_range("teacher_top", self.teacher_top.unwrap_or(1), 1..=MOST_TOP)?;
        in_range("log_every", self.log_every, 1..=u64::MAX)?;
        in_range("save_every", self.save_every.unwrap_or(1), 1..=u64::MAX)?;
        in_range("eval_every", self.eval_every.unwrap_or(1), 1..=u64::MAX)?;
        in_range("threads", self.threads.unwrap_or(1), 1..=1024)?;
        in_range("valid_samples", self.valid_samples, 0..=1 << 40)?;
        if self.top_k_anneal.is_some() && self.top_k.is_none() {
            let allowed = "{top_k} K too, or leave top_k_anneal out";
            return Err(Error::field("top_k_anneal", "set alone", allowed));
        }
        if self.top_k.is_some() {
            self.top_k_anneal.get_or_insert(TOP_K_ANNEAL);
        }
        if self.eval_every.is_some() && (self.valid_fraction == 0.0 || self.valid_samples == 0) {
            let allowed = "valid_fraction above 0, valid_samples above 0, or leave eval_every out";
            return Err(Error::field("eval_every", "set with nothing held out", allowed));
        }

        let steps = match (self.steps, self.tokens.take()) {
            (Some(_), Some(_)) => return Err(exclusive("steps", "tokens")),
            (None, None) => return Err(Error::field("steps", "not set", "{steps} N or {tokens} N")),
            (Some(steps), None) => steps,
            (None, Some(tokens)) => tokens.div_ceil(self.tokens_per_step()),
        };
        in_range("steps", steps, 1..=MAX_RUN_TOKENS / self.tokens_per_step())?;
        self.steps = Some(steps);
        self.warmup_steps.get_or_insert(WARMUP_STEPS.min(steps / 10));
        if let Some([low, high]) = self.active_range
            && !(low > 0.0 && low < high && high <= 1.0)
        {
            let allowed =
                "two ascending shares above 0 and up to 1, such as 0.25 and 1, or one {active_target}";
            return Err(Error::field("active_range", format!("{low} to {high}"), allowed));
        }
        if self.train_parts.as_ref().is_some_and(Vec::is_empty) {
            let allowed = "a list of ffn, routers, attention, norms and embedding";
            return Err(Error::field("train_parts", "empty", allowed));
        }
        match (self.sparsity, self.active_target, self.active_range) {
            (Some(_), Some(_), _) => return Err(exclusive("sparsity", "active_target")),
            (Some(_), _, Some(_)) => return Err(exclusive("sparsity", "active_range")),
            (_, Some(_), Some(_)) => return Err(exclusive("active_target", "active_range")),
            (None, None, None) => self.sparsity = Some(PAPER_SPARSITY),
            _ => {}
        }
        self.resolve_hold()?;
        Ok(self)
    }

    /// Returns what is trained.
    pub(crate) fn trained(&self) -> Trained {
        Trained { layers: self.train_layers.clone(), parts: self.train_parts.clone() }
    }

    /// Returns the setting that leaves parts of the model as they are, if there is one.
    pub(crate) fn freezes(&self) -> Option<&'static str> {
        let parts = self.train_parts.as_ref().map(|_| "train_parts");
        self.train_layers.as_ref().map(|_| "train_layers").or(parts)
    }

    /// Returns the number of tokens predicted in one optimiser step.
    pub fn tokens_per_step(&self) -> u64 {
        self.micro_batches() * (self.batch as u64 * self.seq as u64)
    }

    /// Returns the number of lanes; 1 unless there is another.
    pub fn lanes(&self) -> usize {
        self.lanes.unwrap_or(1)
    }

    /// Returns the number of micro-batches in one optimiser step.
    pub fn micro_batches(&self) -> u64 {
        self.lanes() as u64 * self.accumulate as u64
    }

    /// Returns the learning rate of every step, of a resolved configuration.
    pub fn schedule(&self) -> Schedule {
        let TrainConfig { lr, min_lr_ratio, schedule: decay, .. } = *self;
        let [warmup_steps, steps] = [self.warmup_steps, self.steps].map(Option::unwrap_or_default);
        Schedule { lr, min_lr_ratio, warmup_steps, steps, decay }
    }

    /// Returns how a text is split into training and held-out text.
    pub fn split_options(&self) -> SplitOptions {
        let (seq, valid_fraction) = (self.seq, self.valid_fraction);
        SplitOptions { seq, valid_fraction, valid_samples: self.valid_samples }
    }

    /// Returns the loss of the text and the divergence from the teacher, weighted.
    pub(crate) fn mixed(&self, lm_loss: f64, divergence: f64) -> f64 {
        match self.teacher_weight {
            None => lm_loss,
            Some(weight) => (1.0 - weight) * lm_loss + weight * divergence,
        }
    }

    /// Returns the pressure on gates to close.
    pub fn budget(&self) -> Budget {
        match (self.active_target, self.active_range) {
            (Some(target), _) => Budget::Target(target),
            (None, Some([low, high])) => Budget::Range(low, high),
            (None, None) => Budget::Weight(self.sparsity.unwrap_or(PAPER_SPARSITY)),
        }
    }
}

fn exclusive(field: &'static str, other: &str) -> Error {
    Error::field(field, format!("set together with {other}"), "one of the two")
}

fn in_range<T: PartialOrd + Display>(field: &'static str, x: T, range: RangeInclusive<T>) -> Result<()> {
    if range.contains(&x) {
        return Ok(());
    }
    Err(Error::field(field, x, format!("{} to {}", range.start(), range.end())))
}

/// Reports whether `word` is a whole number of so many digits that TOML has none for it.
fn is_long_number(word: &str) -> bool {
    const DIGITS: usize = 19;
    let digits = word.strip_prefix(['+', '-']).unwrap_or(word);
    digits.len() >= DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_')
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(settings: &[&str]) -> Result<TrainConfig> {
        let mut config = TrainConfig { steps: Some(50), ..TrainConfig::default() };
        for setting in settings {
            config.set(setting)?;
        }
        config.resolve()
    }

    #[test]
    fn defaults_resolve_to_the_recipe() {
        let config = with(&[]).unwrap();
        assert_eq!((config.steps, config.warmup_steps, config.sparsity), (Some(50), Some(5), Some(1.0)));
        assert_eq!(config.budget(), Budget::Weight(1.0));
        assert_eq!((config.lanes, config.tokens_per_step()), (Some(1), 32 * 1024));
        let lanes = with(&["lanes=6", "accumulate=2"]).unwrap();
        assert_eq!((lanes.micro_batches(), lanes.tokens_per_step()), (12, 12 * 32 * 1024));
        let long = with(&["tokens=1_000_000_000", "batch=4"]).unwrap();
        assert_eq!((long.steps, long.warmup_steps, long.tokens), (Some(244_141), Some(100), None));
        assert_eq!(with(&["warmup_steps=7"]).unwrap().warmup_steps, Some(7));
        let text = long.to_toml();
        assert_eq!(toml::from_str::<TrainConfig>(&text).unwrap(), long);
    }

    #[test]
    fn settings_take_toml_and_bare_words() {
        let config =
            with(&["lr=1", "schedule=constant", "bos = \"never\"", "doc_separator=<|endoftext|>"]).unwrap();
        assert_eq!((config.lr, config.schedule, config.bos), (1.0, Decay::Constant, Bos::Never));
        assert_eq!(config.doc_separator.as_deref(), Some("<|endoftext|>"));
        assert_eq!(with(&["sparsity=2", "active_target=0.5"]).unwrap().budget(), Budget::Target(0.5));
        assert_eq!(with(&["active_target=0.5", "sparsity=2"]).unwrap().budget(), Budget::Weight(2.0));
        for (setting, wanted) in
            [("active_target=40%", 0.4), ("active_target = '37.5 %'", 0.375), ("active_target=1", 1.0)]
        {
            assert_eq!(with(&[setting]).unwrap().active_target, Some(wanted), "{setting}");
        }
        let shares = with(&["valid_fraction=2%", "teacher_weight=90%", "active_range=['25%', 1]"]).unwrap();
        assert_eq!((shares.valid_fraction, shares.teacher_weight), (0.02, Some(0.9)));
        assert_eq!(shares.active_range, Some([0.25, 1.0]));
        for (setting, rule) in [
            ("router_gradient=full", RouterGradient::Full),
            ("router_gradient=every:4", RouterGradient::Every(4)),
            ("router_gradient='sample:12.5%'", RouterGradient::Sample(0.125)),
        ] {
            let config = with(&[setting]).unwrap();
            assert_eq!(config.router_gradient, rule);
            assert_eq!(toml::from_str::<TrainConfig>(&config.to_toml()).unwrap(), config);
        }
        let squared = with(&["active_target=0.5", "hold=squared", "router_temperature=[1, 0.1]"]).unwrap();
        assert_eq!((squared.hold, squared.hold_weight), (Some(Hold::Squared), Some(1.0)));
        assert_eq!(squared.router_temperature, Some([1.0, 0.1]));
        assert_eq!(toml::from_str::<TrainConfig>(&squared.to_toml()).unwrap(), squared);
        let range = with(&["active_target=0.5", "active_range=[0.25, 1.0]", "hold=threshold"]).unwrap();
        assert_eq!((range.budget(), range.hold), (Budget::Range(0.25, 1.0), Some(Hold::Threshold)));
        assert_eq!(toml::from_str::<TrainConfig>(&range.to_toml()).unwrap(), range);
    }

    #[test]
    fn errors_are_one_line_with_field_and_remedy() {
        for (settings, wanted) in [
            (vec!["lr"], ["setting `lr`", "key=value"]),
            (vec!["lr="], ["setting `lr=`: no value", "write key=value"]),
            (vec!["steps=18446744073709551615"], ["64 bits do not hold", "at most 9223372036854775807"]),
            (vec!["lrr=1"], ["setting `lrr=1`: unknown field", "`min_lr_ratio`"]),
            (vec!["lr=fast"], ["setting `lr=fast`", "expected f64"]),
            (vec!["seq=-1"], ["setting `seq=-1`", "expected usize"]),
            (vec!["dtype=fp8"], ["setting `dtype=fp8`", "use f32 or bf16"]),
            (vec!["lr=nan"], ["lr is NaN", "use 0 to 1000"]),
            (vec!["seq=0"], ["seq is 0", "use 1 to"]),
            (vec!["batch=100000", "seq=100000"], ["batch is 100000 x seq 100000", "raise accumulate"]),
            (vec!["beta2=1"], ["beta2 is 1", "below 1"]),
            (vec!["active_target=0"], ["active_target is 0", "above 0"]),
            (vec!["active_target=40"], ["active_target is 40", "such as 0.4 or 40%"]),
            (vec!["active_target=many"], ["setting `active_target=many`", "0.4 or \"40%\""]),
            (vec!["teacher_weight=1.5"], ["teacher_weight is 1.5", "0 to 1"]),
            (vec!["teacher_top=0"], ["teacher_top is 0", "use 1 to"]),
            (vec!["separability=-1"], ["separability is -1", "0 to"]),
            (vec!["active_range=[0.5, 0.25]"], ["active_range is 0.5 to 0.25", "ascending"]),
            (vec!["active_range=[0.5]"], ["setting `active_range=[0.5]`", "length"]),
            (vec!["active_range=[0.5, 1.0]", "hold=loss"], ["hold is loss", "threshold"]),
            (vec!["active_range=[0.5, 1.0]", "hold=squared"], ["hold is squared for a range", "threshold"]),
            (vec!["hold=loss"], ["hold is set", "active_target"]),
            (vec!["hold=slow", "active_target=0.5"], ["unknown variant `slow`", "`squared`"]),
            (vec!["hold_weight=2"], ["hold_weight is 2", "hold squared only"]),
            (
                vec!["active_target=0.5", "hold=squared", "hold_weight=-1"],
                ["hold_weight is -1", "0 to 1000000"],
            ),
            (vec!["router_temperature=[1, 0]"], ["router_temperature is 1 to 0", "0.001 to 1000"]),
            (vec!["router_temperature=0.5"], ["setting `router_temperature=0.5`", "array"]),
            (vec!["train_parts=[]"], ["train_parts is empty", "a list of ffn, routers"]),
            (vec!["train_parts=['heads']"], ["unknown variant `heads`", "`embedding`"]),
            (vec!["router_gradient=every:0"], ["router_gradient is every:0", "K from 1 to 65536"]),
            (vec!["router_gradient=sample:0"], ["router_gradient is sample:0", "P above 0 and up to 1"]),
            (vec!["router_gradient=sample:1.5"], ["router_gradient is sample:1.5", "full, every:K"]),
            (vec!["router_gradient=sample:nan"], ["router_gradient is sample:nan", "or sample:P"]),
            (vec!["router_gradient=some"], ["setting `router_gradient=some`", "use full, every:K"]),
            (vec!["router_gradient=0.5"], ["setting `router_gradient=0.5`", "expected a string"]),
            (vec!["keep=0"], ["keep is 0", "use 1 to"]),
            (vec!["lanes=0"], ["lanes is 0", "use 1 to"]),
            (vec!["steps=0"], ["steps is 0", "use 1 to"]),
            (vec!["valid_fraction=0", "eval_every=5"], ["eval_every", "valid_fraction above 0"]),
        ] {
            let message = with(&settings).unwrap_err().to_string();
            assert!(wanted.iter().all(|part| message.contains(part)), "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
        let rule = RouterGradient::Sample(f64::NAN);
        let wrong = TrainConfig { steps: Some(1), router_gradient: rule, ..TrainConfig::default() };
        assert!(
            wrong.resolve().unwrap_err().to_string().starts_with("router_gradient is sample:NaN; use full")
        );
        let none = TrainConfig::default().resolve().unwrap_err().to_string();
        assert_eq!(none, "steps is not set; use steps N or tokens N");
        let both = TrainConfig { steps: Some(1), tokens: Some(1), ..TrainConfig::default() };
        assert!(both.resolve().unwrap_err().to_string().starts_with("steps is set together with tokens"));
    }

    #[test]
    fn tables_override_settings_and_name_unknown_keys() {
        let mut config = TrainConfig { sparsity: Some(2.0), tokens: Some(9), ..TrainConfig::default() };
        let table = |text: &str| text.parse::<toml::Table>().unwrap();
        config.apply(&table("active_target = 0.25\nsteps = 7\nlr = 1e-3")).unwrap();
        assert_eq!((config.active_target, config.sparsity), (Some(0.25), None));
        assert_eq!((config.steps, config.tokens, config.lr), (Some(7), None, 1e-3));
        for (text, wanted) in [
            ("learning_rate = 1", ["setting `learning_rate = 1`", "unknown field `learning_rate`"]),
            ("lr = 'fast'", ["setting `lr = \"fast\"`", "expected f64"]),
            ("lr = \"\"\"\nfast\n\"\"\"", ["setting `lr = \"\"\" fast \"\"\"`", "expected f64"]),
        ] {
            let message = config.apply(&table(text)).unwrap_err().to_string();
            assert!(wanted.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn files_are_checked_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "steps = 3\nlr = 1e-3\n").unwrap();
        assert_eq!(TrainConfig::from_toml(&path).unwrap().lr, 1e-3);
        for (text, wanted) in [
            ("steps = 3\nspeed = 2\n", "line 2: unknown field `speed`"),
            ("steps = 3\n\nlr = \"x\"\n", "line 3: invalid type"),
            ("steps = \n", "line 1: "),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = TrainConfig::from_toml(&path).unwrap_err().to_string();
            assert!(message.contains("run.toml") && message.contains(wanted), "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
        let missing = TrainConfig::from_toml(&dir.path().join("no.toml")).unwrap_err().to_string();
        assert!(missing.contains("no.toml"), "{missing}");
    }
}
