//! Profiles: the TOML files, embedded or a user's own, that define a reproduction.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_baselines::{Budget, Configured, Plan, SettingValues, method};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{Config, MoeConfig};
use dsmoe_core::ffn::RouterBound;
use dsmoe_core::init::LlamaSizes;
use dsmoe_datasets::mixture::SourceTable;
use dsmoe_datasets::tasks::Task;
use dsmoe_kernels::Precision;
use dsmoe_router::RouterConfig;
use dsmoe_train::TrainConfig;
use dsmoe_train::config::NearDuplicates;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::limits::{self, MOST_RESAMPLES};
use crate::files;

/// The token of the embedded world that separates documents.
pub(crate) const WORLD_TOKEN: u32 = 0;

/// The embedded profiles by their names.
const EMBEDDED: [(&str, &str); 8] = [
    ("quick", include_str!("profiles/quick.toml")),
    ("small", include_str!("profiles/small.toml")),
    ("paper-1b", include_str!("profiles/paper-1b.toml")),
    ("paper-7b", include_str!("profiles/paper-7b.toml")),
    ("smollm2-135m", include_str!("profiles/smollm2-135m.toml")),
    ("related", include_str!("profiles/related.toml")),
    ("related-brief", include_str!("profiles/related-brief.toml")),
    ("related-smollm2", include_str!("profiles/related-smollm2.toml")),
];

/// Fields of a model's config.json that a profile gives, under its own names.
const SIZES: [(&str, &str); 7] = [
    ("vocab_size", "the vocabulary"),
    ("hidden_size", "model.hidden"),
    ("intermediate_size", "model.intermediate"),
    ("num_hidden_layers", "model.layers"),
    ("num_attention_heads", "model.heads"),
    ("num_key_value_heads", "model.kv_heads"),
    ("max_position_embeddings", "model.positions"),
];

/// Rounds in which the size of the routers and the budget are made to fit.
const ROUTER_ROUNDS: usize = 4;

/// Least distance of the thresholds of that sweep.
const LEAST_STEP: f64 = 0.001;
/// Upper end of the sweep of thresholds of [`Role::WithoutThreshold`].
const LAST_THRESHOLD: f64 = 0.999;

/// The methods that the roles of DSMoE require.
const DSMOE: [(Role, &str); 5] = [
    (Role::Dsmoe, "dsmoe"),
    (Role::Elastic, "dsmoe"),
    (Role::Paper, "dsmoe-paper"),
    (Role::WithoutSte, "dsmoe-no-ste"),
    (Role::WithoutThreshold, "dsmoe-no-threshold"),
];

/// The definition of a reproduction, apart from places. Unknown keys are errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    pub(crate) name: String,
    /// A description in one line.
    pub(crate) about: String,
    /// Runs of every method, with seeds 0, 1, ...
    pub(crate) seeds: u64,
    /// Experts per layer of methods with a setting `experts` whose rows do not give it; without it the methods' defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) experts: Option<usize>,
    /// Share of the dense FFN that every method may activate. The budget adds the parameters outside FFNs and the
    /// routers of the row with role `dsmoe`.
    #[serde(deserialize_with = "dsmoe_train::config::share::one")]
    pub(crate) active: f64,
    /// Further such shares, `active` among them: every row that names no share of its own is made for each, under its name
    /// and the percentage.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "dsmoe_train::config::share::list"
    )]
    pub(crate) budgets: Vec<f64>,
    /// Tables and figures of the report; by default all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) outputs: Vec<String>,
    /// The model of the paper to compare with.
    pub(crate) paper: PaperModel,
    /// Text and probes of the embedded world; without it the user names text.
    pub(crate) world: Option<WorldText>,
    /// Text to calibrate and train on, as in a mixture file. Its paths are seen from the folder that the user names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) source: Vec<SourceTable>,
    /// Text to measure on. Weights are those of the mean over texts. Without it a share of every source is held out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) held_out: Vec<SourceTable>,
    pub(crate) model: ModelSpec,
    /// Training of the dense model from random weights; without it the user names a model.
    pub(crate) pretrain: Option<TrainSettings>,
    /// Continued training of every method.
    pub(crate) train: TrainSettings,
    pub(crate) calibration: Calibration,
    /// Shares of the continued training after which perplexity is measured. The last is 1.
    #[serde(deserialize_with = "dsmoe_train::config::share::list")]
    pub(crate) milestones: Vec<f64>,
    /// Further such shares for DSMoE (tables 5 and 6).
    #[serde(default, deserialize_with = "dsmoe_train::config::share::list")]
    pub(crate) curve: Vec<f64>,
    pub(crate) measure: Measure,
    pub(crate) method: Vec<MethodSpec>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PaperModel {
    #[serde(rename = "1b")]
    One,
    #[serde(rename = "7b")]
    Seven,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorldText {
    pub(crate) seed: u64,
    /// Size of the text of all four domains.
    pub(crate) bytes: u64,
    /// Tokens of the vocabulary.
    pub(crate) vocab: usize,
}

/// An architecture by a preset's name or by sizes. The vocabulary is the tokenizer's; `vocab` is for plans without one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelSpec {
    pub(crate) preset: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vocab: Option<usize>,
    pub(crate) hidden: Option<usize>,
    pub(crate) intermediate: Option<usize>,
    pub(crate) layers: Option<usize>,
    pub(crate) heads: Option<usize>,
    pub(crate) kv_heads: Option<usize>,
    pub(crate) positions: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Calibration {
    /// Sequences, as long as those of the continued training.
    pub(crate) samples: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Measure {
    /// Held-out windows of every source, as long as the sequences of the continued training.
    pub(crate) windows: usize,
    /// The first of these windows, on which thresholds are swept.
    pub(crate) sweep_windows: usize,
    /// Largest number of items of a task.
    pub(crate) items: usize,
    /// Thresholds of table 4.
    pub(crate) thresholds: Vec<f64>,
    /// Distance of the thresholds of a model that was trained without one (figure 2).
    pub(crate) late_step: f64,
    /// Tokens read at once to time a prefill.
    pub(crate) prefill: usize,
    /// Tokens decoded one by one to time decoding.
    pub(crate) decode: usize,
    /// Bootstrap resamples of intervals and tests when there is one seed.
    pub(crate) resamples: usize,
    /// Precision of the weights of measured models: f32 (default), or bf16, which a GPU has in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dtype: Option<Dtype>,
    /// Windows of every source on which a model's distributions are compared with the dense model's; 0 leaves it out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) agreement_windows: usize,
    /// Benchmarks in place of the paper's ten.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) tasks: Vec<String>,
    /// Settings of timing, in place of one process on all threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) speed: Option<SpeedGrid>,
}

/// Timing in several processes, each beside one of the dense model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SpeedGrid {
    /// Numbers of threads.
    pub(crate) threads: Vec<usize>,
    /// Texts that are decoded side by side.
    pub(crate) batches: Vec<usize>,
    /// Processes of each model, of whose results the median counts.
    pub(crate) processes: usize,
}

/// A precision of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Dtype {
    F32,
    Bf16,
}

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Precision {
        match dtype {
            Dtype::F32 => Precision::F32,
            Dtype::Bf16 => Precision::Bf16,
        }
    }
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Measure {
    /// Returns the measurement of losses alone.
    pub(crate) fn of_windows(windows: usize) -> Measure {
        Measure {
            windows,
            sweep_windows: 1,
            items: 1,
            thresholds: Vec::new(),
            late_step: 0.5,
            prefill: 1,
            decode: 1,
            resamples: 1,
            dtype: None,
            agreement_windows: 0,
            tasks: Vec::new(),
            speed: None,
        }
    }

    /// Lists the thresholds of the sweep of [`Role::WithoutThreshold`].
    pub(crate) fn late_thresholds(&self) -> Vec<f64> {
        (0..).map(|i| f64::from(i) * self.late_step).take_while(|t| *t < LAST_THRESHOLD).collect()
    }
}

/// The part of a method in the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// The dense model with continued training.
    Dense,
    /// A method that the paper compares with.
    Baseline,
    /// DSMoE with tuned settings.
    Dsmoe,
    /// One such model for all budgets.
    Elastic,
    /// DSMoE as in the paper.
    Paper,
    /// The paper's DSMoE without the straight-through estimator (table 3).
    WithoutSte,
    /// The paper's DSMoE trained without a threshold (figure 2).
    WithoutThreshold,
    /// Another method to compare with.
    Control,
}

impl Role {
    /// Reports whether the row is DSMoE as a whole, without an ablation.
    pub(crate) fn is_dsmoe(self) -> bool {
        matches!(self, Role::Dsmoe | Role::Elastic | Role::Paper)
    }

    /// Reports whether the row is DSMoE, whole or ablated.
    pub(crate) fn is_gated(self) -> bool {
        DSMOE.iter().any(|(role, _)| *role == self)
    }
}

/// One row of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MethodSpec {
    /// The name of the row in tables.
    pub(crate) name: String,
    pub(crate) role: Role,
    /// A name that `dsmoe methods` lists.
    pub(crate) make: String,
    /// The paper's row to compare with.
    pub(crate) paper: Option<PaperRow>,
    /// Settings of the method.
    #[serde(default)]
    pub(crate) settings: SettingValues,
    /// Keys of `[train]` that differ in this row.
    #[serde(default)]
    pub(crate) train: TrainSettings,
    /// Share of the dense FFN that the row may activate, where it is not the profile's.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "dsmoe_train::config::share::option"
    )]
    pub(crate) active: Option<f64>,
    /// Share of the experts that an elastic row is measured at; set where `budgets` is applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) serves: Option<f64>,
    /// The row that this one is a budget of; set where `budgets` is applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) of: Option<String>,
    /// The model is measured as it was made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) untrained: bool,
    /// Router that stands in for the model's when it is measured: oracle or random.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) router: Option<String>,
}

impl MethodSpec {
    /// Reports whether the user's `name` means this row.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.name == name || self.of.as_deref() == Some(name)
    }

    /// Returns the router that stands in for the model's.
    pub(crate) fn bound(&self) -> Result<Option<RouterBound>> {
        Ok(self.router.as_deref().map(str::parse).transpose()?)
    }
}

/// Settings of a training that a profile gives. Unknown keys and values of wrong types are errors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "toml::Table")]
pub(crate) struct TrainSettings(toml::Table);

impl TryFrom<toml::Table> for TrainSettings {
    type Error = String;

    fn try_from(table: toml::Table) -> Result<TrainSettings, String> {
        match TrainConfig::deserialize(table.clone()) {
            Ok(_) => Ok(TrainSettings(table)),
            Err(cause) => Err(format!("settings of a training: {}", one_line(&cause))),
        }
    }
}

/// Refuses text of two kinds, and text to train on without text to measure on.
pub(crate) fn check_tables(has_world: bool, source: &[SourceTable], held_out: &[SourceTable]) -> Result<()> {
    if has_world && !source.is_empty() || source.is_empty() != held_out.is_empty() {
        bail!("give both [[source]] and [[held_out]] tables, or [world], or neither");
    }
    Ok(())
}

/// Returns the message of an error of a TOML file on one line.
pub(crate) fn one_line(cause: &toml::de::Error) -> String {
    cause.message().split_whitespace().collect::<Vec<_>>().join(" ")
}

impl TrainSettings {
    /// Returns the settings with those of `other` in their place.
    fn replaced_by(&self, other: &TrainSettings) -> TrainSettings {
        let mut table = self.0.clone();
        for group in [&["steps", "tokens"][..], &["sparsity", "active_target", "active_range"]] {
            if group.iter().any(|key| other.0.contains_key(*key)) {
                table.retain(|key, _| !group.contains(&key));
            }
        }
        table.extend(other.0.clone());
        TrainSettings(table)
    }

    /// Returns the settings with a number added to their seed.
    pub(crate) fn with_seed(&self, seed: u64) -> TrainSettings {
        let mut table = self.0.clone();
        let own = table.get("seed").and_then(toml::Value::as_integer).unwrap_or(0);
        table.insert("seed".to_owned(), own.saturating_add_unsigned(seed).into());
        TrainSettings(table)
    }

    fn config(&self) -> Result<TrainConfig> {
        Ok(TrainConfig::deserialize(self.0.clone())?)
    }
}

impl fmt::Display for TrainSettings {
    /// Writes the settings as in TOML, separated by commas.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_string().trim().replace('\n', ", "))
    }
}

/// A row of the paper's tables 1 and 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PaperRow {
    Dense,
    LlmPrunerChannel,
    LlmPrunerBlock,
    Sparsegpt,
    LlamaMoe,
    Dsmoe,
}

impl PaperRow {
    /// Returns the paper's name.
    pub(crate) fn label(self) -> &'static str {
        const LABELS: [&str; 6] =
            ["dense", "LLM-Pruner, channels", "LLM-Pruner, blocks", "SparseGPT", "LLaMA-MoE", "DSMoE"];
        LABELS[self as usize]
    }
}

/// Lists the names of the embedded profiles.
pub(crate) fn names() -> Vec<&'static str> {
    EMBEDDED.iter().map(|(name, _)| *name).collect()
}

/// Returns the text of an embedded profile.
pub(crate) fn text(name: &str) -> Option<&'static str> {
    EMBEDDED.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// Returns the profile `name` of a command line as messages name it: the file, or the name of an embedded one.
pub(crate) fn place(name: &str) -> String {
    text(name).map_or_else(|| name.to_owned(), |_| format!("profile {name}"))
}

impl Profile {
    /// Loads the embedded profile of that name, or else the file.
    pub(crate) fn load(name: &str) -> Result<Profile> {
        if let Some(text) = text(name) {
            return Profile::parse(text, &place(name));
        }
        if !Path::new(name).is_file() {
            bail!("--profile {name}: no such file; use {} or a TOML file", names().join(", "));
        }
        Profile::parse(&files::read_toml(Path::new(name))?, name)
    }

    fn parse(text: &str, place: &str) -> Result<Profile> {
        let mut profile: Profile = toml::from_str(text).map_err(|cause| {
            let line = cause.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let mut message = one_line(&cause);
            if message.contains("unknown field `knobs`") {
                message = "`knobs` is now `settings`, whose numbers and booleans have no quotes".to_owned();
            }
            anyhow::anyhow!(
                "{place}: line {line}: {message}; `dsmoe reproduce --print-profile quick` prints an example"
            )
        })?;
        limits::check_lists(&profile).with_context(|| place.to_owned())?;
        limits::check_rows(&profile).with_context(|| place.to_owned())?;
        profile.apply_budgets().with_context(|| place.to_owned())?;
        profile.check().with_context(|| place.to_owned())?;
        Ok(profile)
    }

    /// Puts rows for each budget in place of those without a budget of their own, the profile's `active` first.
    fn apply_budgets(&mut self) -> Result<()> {
        if self.budgets.is_empty() {
            return Ok(());
        }
        if !self.budgets.contains(&self.active) {
            bail!("budgets is {:?}; active {} must be one of them", self.budgets, self.active);
        }
        if !self.budgets.is_sorted_by(|a, b| a < b) || self.budgets.iter().any(|x| !(*x > 0.0 && *x <= 1.0)) {
            bail!("budgets is {:?}; use increasing shares above 0 and up to 1", self.budgets);
        }
        let others = self.budgets.iter().filter(|share| **share != self.active);
        let order: Vec<f64> = [self.active].iter().chain(others).copied().collect();
        let rows = std::mem::take(&mut self.method);
        let alone = |spec: &&MethodSpec| spec.role == Role::Dense;
        self.method.extend(rows.iter().filter(alone).cloned());
        for share in order {
            for spec in rows.iter().filter(|spec| !alone(spec)) {
                let mut row = spec.clone();
                if row.active.is_none() {
                    row.name = format!("{}-{}", spec.name, 100.0 * share);
                    row.of = Some(spec.name.clone());
                    match spec.role {
                        Role::Elastic => row.serves = Some(share),
                        _ => row.active = Some(share),
                    }
                } else if row.active != Some(share) {
                    continue;
                }
                self.method.push(row);
            }
        }
        Ok(())
    }

    /// Refuses settings that cannot work before anything is computed.
    fn check(&self) -> Result<()> {
        let shares = |name: &str, list: &[f64]| -> Result<()> {
            if !list.is_sorted_by(|a, b| a < b) || list.iter().any(|x| !(0.0..=1.0).contains(x)) {
                bail!("{name} is {list:?}; use increasing numbers from 0 to 1");
            }
            Ok(())
        };
        shares("milestones", &self.milestones)?;
        shares("curve", &self.curve)?;
        shares("measure.thresholds", &self.measure.thresholds)?;
        if self.milestones.last() != Some(&1.0) {
            bail!("milestones is {:?}; the last must be 1", self.milestones);
        }
        if !(self.active > 0.0 && self.active <= 1.0) {
            bail!("active is {}; use a share above 0 and up to 1", self.active);
        }
        let measure = &self.measure;
        for task in &measure.tasks {
            Task::named(task).context("measure.tasks")?;
        }
        if let Some(grid) = &measure.speed
            && (grid.processes == 0
                || [&grid.threads, &grid.batches].iter().any(|list| list.is_empty() || list.contains(&0)))
        {
            bail!("measure.speed needs threads, batches and processes of 1 or more");
        }
        check_tables(self.world.is_some(), &self.source, &self.held_out)?;
        for (name, value) in [
            ("seeds", self.seeds as usize),
            ("experts", self.experts.unwrap_or(1)),
            ("calibration.samples", self.calibration.samples),
            ("measure.windows", measure.windows),
            ("measure.sweep_windows", measure.sweep_windows),
            ("measure.items", measure.items),
            ("measure.prefill", measure.prefill),
            ("measure.decode", measure.decode),
            ("measure.resamples", measure.resamples),
        ] {
            if value == 0 {
                bail!("{name} is 0; use 1 or more");
            }
        }
        if measure.resamples > MOST_RESAMPLES {
            bail!("measure.resamples is {}; use at most {MOST_RESAMPLES}", measure.resamples);
        }
        if !(LEAST_STEP..1.0).contains(&measure.late_step) {
            bail!("measure.late_step is {}; use a number from {LEAST_STEP} and below 1", measure.late_step);
        }
        if let Some(pretrain) = self.pretrain() {
            pretrain?.resolve().context("pretrain")?;
        }
        let seq = self.train()?.resolve().context("train")?.seq;
        if self.method.is_empty() {
            bail!("there are no methods; write [[method]] tables");
        }
        let mut names = HashSet::new();
        for spec in &self.method {
            let of = || format!("method {:?}", spec.name);
            if !names.insert(&spec.name) {
                bail!("two methods have the name {:?}; give each its own", spec.name);
            }
            if spec.name.is_empty()
                || !spec.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            {
                bail!("a method has the name {:?}; use letters, digits, '-', '_' and '.'", spec.name);
            }
            let config = self.train_of(spec, 0, None).with_context(of)?;
            if config.resolve().with_context(of)?.seq != seq {
                bail!("method {:?}: seq differs from that of [train]; use one for all methods", spec.name);
            }
            if spec.active.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
                bail!("method {:?}: active is not above 0 and up to 1", spec.name);
            }
            if spec.role == Role::Elastic && spec.serves.is_none() {
                bail!("method {:?}: role elastic is for a profile with budgets", spec.name);
            }
            spec.bound().with_context(of)?;
            if let Some((role, make)) = DSMOE.iter().find(|(role, _)| *role == spec.role)
                && *make != spec.make
            {
                bail!("method {:?}: role {role:?} requires make = {make:?}, not {:?}", spec.name, spec.make);
            }
            self.configured(spec).with_context(of)?;
        }
        Ok(())
    }

    /// Returns the dense architecture with that vocabulary.
    pub(crate) fn architecture(&self, vocab: usize) -> Result<Config> {
        let spec = &self.model;
        if let Some(name) = &spec.preset {
            let mut config: Value = serde_json::from_str(&dsmoe_core::init::preset(name)?.to_json())?;
            config["vocab_size"] = json!(vocab);
            return Ok(Config::from_json(Path::new("config.json"), &config.to_string())?);
        }
        let need = |value: Option<usize>, key: &str| {
            value.with_context(|| format!("model.{key} is missing; give it, or model.preset"))
        };
        let heads = need(spec.heads, "heads")?;
        let sizes = LlamaSizes {
            vocab,
            hidden: need(spec.hidden, "hidden")?,
            intermediate: need(spec.intermediate, "intermediate")?,
            layers: need(spec.layers, "layers")?,
            heads,
            kv_heads: spec.kv_heads.unwrap_or(heads),
            positions: need(spec.positions, "positions")?,
            bos_eos: [WORLD_TOKEN; 2],
        };
        match sizes.config() {
            Ok(config) => Ok(config),
            Err(dsmoe_core::Error::Field { field, problem, help, .. }) => {
                let own = SIZES.iter().find(|(name, _)| *name == field).map_or(&field[..], |(_, own)| *own);
                bail!("{own} {problem}; {help}")
            }
            Err(error) => Err(error).context("model"),
        }
    }

    /// Returns the activated parameters that every method gets: those outside FFNs, the active share of the dense FFN,
    /// and the router weights of the row with role `dsmoe`.
    pub(crate) fn budget(&self, dense: &Config) -> Result<f64> {
        self.budget_at(dense, self.active)
    }

    /// Returns the activated parameters that a row gets.
    pub(crate) fn budget_of(&self, spec: &MethodSpec, dense: &Config) -> Result<f64> {
        self.budget_at(dense, self.share_of(spec))
    }

    /// Returns the share of the dense FFN that a row is made for.
    pub(crate) fn share_of(&self, spec: &MethodSpec) -> f64 {
        spec.active.unwrap_or(self.active)
    }

    /// Returns the share of the dense FFN that a row is measured at.
    pub(crate) fn served_by(&self, spec: &MethodSpec) -> f64 {
        spec.serves.unwrap_or_else(|| self.share_of(spec))
    }

    /// Returns the activated parameters of a share of the dense FFN.
    pub(crate) fn budget_at(&self, dense: &Config, active: f64) -> Result<f64> {
        if self.experts.is_some() {
            let experts = self.budget_experts()?;
            return Ok(Accounting::of(&gated(dense, experts)).activated(active * experts as f64));
        }
        let counts = Accounting::of(dense);
        let without = counts.non_ffn as f64 + active * counts.ffn as f64;
        let mut routers = 0.0;
        if let Some(spec) = self.method.iter().find(|spec| spec.role == Role::Dsmoe) {
            let method = self.configured(spec)?;
            // The size of the routers follows from the budget, of which they are a small part.
            for _ in 0..ROUTER_ROUNDS {
                let plan = method.plan(dense, Budget::Params((without + routers).round()))?;
                routers = plan.total - counts.total as f64;
            }
        }
        Ok(without + routers)
    }

    /// Plans the model of a row.
    pub(crate) fn plan_of(&self, spec: &MethodSpec, dense: &Config) -> Result<Plan> {
        let budget = Budget::Params(self.budget_of(spec, dense)?.round());
        self.configured(spec)?.plan(dense, budget).with_context(|| format!("method {:?}", spec.name))
    }

    /// Returns the share of active experts at which a gated row has the budget. It differs from `active` by the cost of
    /// the row's own routers.
    pub(crate) fn active_of(&self, spec: &MethodSpec, dense: &Config) -> Result<f64> {
        let Some(own) = self.experts_of(spec)?.filter(|_| self.experts.is_some()) else {
            return Ok(self.plan_of(spec, dense)?.active_target.unwrap_or(self.share_of(spec)));
        };
        let counts = |experts| Accounting::of(&gated(dense, experts));
        let budget = counts(self.budget_experts()?);
        let own = counts(own);
        Ok(self.share_of(spec) + (budget.router as f64 - own.router as f64) / own.ffn as f64)
    }

    /// Returns the share of active experts that the training of a row has to reach, if it has to.
    pub(crate) fn target_of(&self, spec: &MethodSpec, dense: &Config) -> Result<Option<f64>> {
        let is_trained = self.plan_of(spec, dense)?.active_target.is_some();
        is_trained.then(|| self.active_of(spec, dense)).transpose()
    }

    /// Returns the number of experts whose routers the budget includes.
    fn budget_experts(&self) -> Result<usize> {
        let row = |role| self.method.iter().find(|spec| spec.role == role);
        match row(Role::Dsmoe).or_else(|| row(Role::Paper)) {
            Some(spec) => Ok(self.experts_of(spec)?.unwrap_or_else(|| self.default_experts())),
            None => Ok(self.default_experts()),
        }
    }

    /// Returns the number of experts of rows whose own is not known; 1 makes shares of numbers of experts.
    pub(crate) fn default_experts(&self) -> usize {
        self.experts.unwrap_or(1)
    }

    /// Returns the number of experts of a row, if its method has that setting.
    pub(crate) fn experts_of(&self, spec: &MethodSpec) -> Result<Option<usize>> {
        let settings = self.configured(spec)?.resolved();
        Ok(settings.get("experts").and_then(Value::as_u64).map(|experts| experts as usize))
    }

    /// Lists the shares of the continued training after which a row is measured.
    pub(crate) fn milestones_of(&self, spec: &MethodSpec) -> Vec<f64> {
        let mut all = match spec.role {
            // All experts are active until the threshold is found after training.
            Role::WithoutThreshold => return Vec::new(),
            role if role.is_dsmoe() => [&self.milestones[..], &self.curve].concat(),
            _ => self.milestones.clone(),
        };
        all.sort_by(f64::total_cmp);
        all.dedup();
        all
    }

    /// Returns the method of a row with its settings.
    pub(crate) fn configured(&self, spec: &MethodSpec) -> Result<Box<dyn Configured>> {
        let method = method(&spec.make)?;
        let mut settings = spec.settings.clone();
        if let Some(experts) = self.experts
            && method.settings().iter().any(|setting| setting.name == "experts")
        {
            settings.entry("experts").or_insert(experts.into());
        }
        Ok(method.configure(&settings)?)
    }

    /// Returns the training of the dense model from random weights.
    pub(crate) fn pretrain(&self) -> Option<Result<TrainConfig>> {
        self.pretrain.as_ref().map(|settings| self.config(settings))
    }

    /// Returns the continued training without the settings of a row.
    pub(crate) fn train(&self) -> Result<TrainConfig> {
        self.config(&self.train)
    }

    /// Returns the continued training of a row. `target` is the share of active experts that it has to reach.
    pub(crate) fn train_of(&self, spec: &MethodSpec, seed: u64, target: Option<f64>) -> Result<TrainConfig> {
        let mut config = self.config(&self.train.replaced_by(&spec.train))?;
        if config.sparsity.is_none() && config.active_target.is_none() && config.active_range.is_none() {
            match spec.role {
                // All experts are active in training; a threshold reaches the budget after it.
                Role::WithoutThreshold => config.sparsity = Some(1.0),
                _ => config.active_target = target,
            }
        }
        // Without weight there is no teacher.
        config.teacher_weight = config.teacher_weight.filter(|weight| *weight > 0.0);
        config.teacher_top = config.teacher_top.filter(|_| config.teacher_weight.is_some());
        config.seed += seed;
        Ok(config)
    }

    /// Sets the tokens of the continued training of all rows that do not set their own.
    pub(crate) fn train_on(&mut self, tokens: u64) {
        let tokens = i64::try_from(tokens).unwrap_or(i64::MAX);
        let length = TrainSettings([("tokens".to_owned(), tokens.into())].into_iter().collect());
        self.train = self.train.replaced_by(&length);
    }

    fn config(&self, settings: &TrainSettings) -> Result<TrainConfig> {
        let mut config = settings.config()?;
        if self.world.is_some() || !self.held_out.is_empty() {
            // The world and a profile with text have held-out documents of their own.
            config.valid_fraction = 0.0;
            config.near_duplicates = Some(NearDuplicates::Keep);
        }
        config.keep = 1;
        Ok(config)
    }
}

/// Returns `dense` with a router of that many experts before every FFN.
pub(crate) fn gated(dense: &Config, experts: usize) -> Config {
    let mut config = dense.clone();
    config.moe = Some(MoeConfig::new(RouterConfig::new(experts)));
    config
}

#[cfg(test)]
mod tests;
