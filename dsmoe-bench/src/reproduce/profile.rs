//! What a reproduction does: a TOML file, embedded or a user's own.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_baselines::{Configured, method, read_settings};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{Config, MoeConfig, PartitionKind};
use dsmoe_core::init::LlamaSizes;
use dsmoe_router::RouterConfig;
use dsmoe_train::TrainConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::text::WORLD_TOKEN;

/// The embedded profiles by their names.
const EMBEDDED: [(&str, &str); 4] = [
    ("quick", include_str!("profiles/quick.toml")),
    ("small", include_str!("profiles/small.toml")),
    ("paper-1b", include_str!("profiles/paper-1b.toml")),
    ("paper-7b", include_str!("profiles/paper-7b.toml")),
];

/// Thresholds below 1 that the sweep of [`Role::WithoutThreshold`] ends at.
const LAST_THRESHOLD: f64 = 0.999;

/// What DSMoE's roles are made by.
const DSMOE: [(Role, &str); 4] = [
    (Role::Dsmoe, "dsmoe"),
    (Role::Paper, "dsmoe-paper"),
    (Role::WithoutSte, "dsmoe-no-ste"),
    (Role::WithoutThreshold, "dsmoe-no-threshold"),
];

/// Everything a reproduction is told apart from places. Unknown keys are errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    pub(crate) name: String,
    /// One line for people.
    pub(crate) about: String,
    /// Runs of every method, with seeds 0, 1, ...
    pub(crate) seeds: u64,
    /// Experts that an FFN is cut into.
    pub(crate) experts: usize,
    /// Share of experts whose activated parameters are everybody's budget.
    pub(crate) active: f64,
    /// The model of the paper that ours stands beside.
    pub(crate) paper: PaperModel,
    /// Text and probes of the embedded world; without it text comes from --data or --mixture.
    pub(crate) world: Option<WorldText>,
    pub(crate) model: ModelSpec,
    /// Training of the dense model from random weights; without it the model comes from --model.
    pub(crate) pretrain: Option<toml::Table>,
    /// Continued training of every method.
    pub(crate) train: toml::Table,
    pub(crate) calibration: Calibration,
    /// Shares of the continued training after which perplexity is measured, 0 first and 1 last.
    pub(crate) milestones: Vec<f64>,
    /// The same, of DSMoE (tables 5 and 6).
    #[serde(default)]
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
    /// Of all four domains together.
    pub(crate) bytes: u64,
    /// Tokens of the vocabulary.
    pub(crate) vocab: usize,
}

/// An architecture by a preset's name or by sizes; the vocabulary is the tokenizer's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelSpec {
    pub(crate) preset: Option<String>,
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
    /// Sequences of the continued training's length.
    pub(crate) samples: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Measure {
    /// Held-out windows of every source; the continued training's sequence is their length.
    pub(crate) windows: usize,
    /// Of them, those that thresholds are swept on.
    pub(crate) sweep_windows: usize,
    /// Items of every task at the most.
    pub(crate) items: usize,
    /// Thresholds of table 4.
    pub(crate) thresholds: Vec<f64>,
    /// Steps of the threshold where training had none (figure 2).
    pub(crate) late_step: f64,
    /// Tokens that are read at once for the speed of a prefill.
    pub(crate) prefill: usize,
    /// Tokens that are decoded one by one for that speed.
    pub(crate) decode: usize,
    /// Bootstrap resamples of intervals and tests with one seed.
    pub(crate) resamples: usize,
}

impl Measure {
    /// Thresholds of the sweep of [`Role::WithoutThreshold`].
    pub(crate) fn late_thresholds(&self) -> Vec<f64> {
        (0..).map(|i| f64::from(i) * self.late_step).take_while(|t| *t < LAST_THRESHOLD).collect()
    }
}

/// What a method is in the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// The dense model, trained on.
    Dense,
    /// A method that the paper compares with.
    Baseline,
    /// DSMoE with the settings that serve it best.
    Dsmoe,
    /// DSMoE as the paper has it.
    Paper,
    /// That without the straight-through rule (table 3).
    WithoutSte,
    /// That without a threshold in training (figure 2).
    WithoutThreshold,
    /// Something else to compare with.
    Control,
}

/// One row of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MethodSpec {
    /// What tables call it.
    pub(crate) name: String,
    pub(crate) role: Role,
    /// A name that `dsmoe methods` lists.
    pub(crate) make: String,
    /// The paper's name of the row.
    pub(crate) paper: Option<PaperRow>,
    /// Settings of the method; the number of experts is the profile's where none is given, and always for DSMoE.
    #[serde(default)]
    pub(crate) knobs: BTreeMap<String, String>,
    /// Keys of `[train]` that are others for this row.
    #[serde(default)]
    pub(crate) train: toml::Table,
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

impl MethodSpec {
    /// Whether it is DSMoE, whole or without one of its parts.
    pub(crate) fn is_dsmoe(&self) -> bool {
        DSMOE.iter().any(|(_, make)| *make == self.make)
    }
}

/// Names of the embedded profiles.
pub(crate) fn names() -> Vec<&'static str> {
    EMBEDDED.iter().map(|(name, _)| *name).collect()
}

/// The text of an embedded profile.
pub(crate) fn text(name: &str) -> Option<&'static str> {
    EMBEDDED.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

impl Profile {
    /// The embedded profile of that name, else the file.
    pub(crate) fn load(name: &str) -> Result<Profile> {
        if let Some(text) = text(name) {
            return Profile::parse(text, &format!("profile {name}"));
        }
        let path = Path::new(name);
        if !path.is_file() {
            bail!("--profile {name}: no such file; use {} or a TOML file", names().join(", "));
        }
        let text = std::fs::read_to_string(path).with_context(|| name.to_owned())?;
        Profile::parse(&text, name)
    }

    fn parse(text: &str, place: &str) -> Result<Profile> {
        let profile: Profile = toml::from_str(text).map_err(|cause| {
            let line = cause.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let message = cause.message().split_whitespace().collect::<Vec<_>>().join(" ");
            anyhow::anyhow!(
                "{place}: line {line}: {message}; `dsmoe reproduce --print-profile quick` shows one"
            )
        })?;
        profile.check().with_context(|| place.to_owned())?;
        Ok(profile)
    }

    /// Says what cannot work before anything is computed.
    fn check(&self) -> Result<()> {
        let shares = |name: &str, list: &[f64]| -> Result<()> {
            if list.windows(2).any(|pair| pair[0] >= pair[1]) || list.iter().any(|x| !(0.0..=1.0).contains(x))
            {
                bail!("{name} is {list:?}; use rising numbers from 0 to 1");
            }
            Ok(())
        };
        shares("milestones", &self.milestones)?;
        shares("curve", &self.curve)?;
        shares("measure.thresholds", &self.measure.thresholds)?;
        if self.milestones.last() != Some(&1.0) {
            bail!("milestones is {:?}; the last must be 1", self.milestones);
        }
        if self.experts == 0 || !(self.active > 0.0 && self.active <= 1.0) {
            bail!("active is {} of {} experts; use a share above 0 and up to 1", self.active, self.experts);
        }
        let measure = &self.measure;
        for (name, value) in [
            ("seeds", self.seeds as usize),
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
        if !(measure.late_step > 0.0 && measure.late_step < 1.0) {
            bail!("measure.late_step is {}; use a number above 0 and below 1", measure.late_step);
        }
        if let Some(pretrain) = self.pretrain() {
            pretrain?.resolve().context("pretrain")?;
        }
        let seq = self.train()?.resolve().context("train")?.seq;
        if self.method.is_empty() {
            bail!("no methods; write [[method]] tables");
        }
        for (i, spec) in self.method.iter().enumerate() {
            let of = || format!("method {:?}", spec.name);
            if self.method[..i].iter().any(|other| other.name == spec.name) {
                bail!("two methods are called {:?}; give each a name of its own", spec.name);
            }
            if spec.name.is_empty()
                || !spec.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            {
                bail!("a method is called {:?}; use letters, digits, '-', '_' and '.'", spec.name);
            }
            let config = self.train_of(spec, 0).with_context(of)?;
            if config.resolve().with_context(of)?.seq != seq {
                bail!("method {:?} has another seq than [train]; measure all on one", spec.name);
            }
            if let Some((role, make)) = DSMOE.iter().find(|(role, _)| *role == spec.role)
                && *make != spec.make
            {
                bail!("method {:?}: role {role:?} is of make = {make:?}, not of {:?}", spec.name, spec.make);
            }
            method(&spec.make).with_context(of)?;
            self.configured(spec).with_context(of)?;
        }
        Ok(())
    }

    /// The dense architecture with that vocabulary.
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
        Ok(sizes.config()?)
    }

    /// Everybody's budget for that dense model: activated parameters at the share of experts, routers included.
    pub(crate) fn budget(&self, dense: &Config) -> f64 {
        let mut config = dense.clone();
        config.moe = Some(MoeConfig {
            router: RouterConfig::new(self.experts),
            partition: PartitionKind::Contiguous,
            router_bias: false,
            active_target: None,
        });
        Accounting::of(&config).activated(self.active * self.experts as f64)
    }

    /// Shares of the continued training after which a method is measured.
    pub(crate) fn milestones_of(&self, spec: &MethodSpec) -> Vec<f64> {
        let mut all = match spec.role {
            // All its experts are active until a threshold is found after training.
            Role::WithoutThreshold => return Vec::new(),
            Role::Dsmoe | Role::Paper => [&self.milestones[..], &self.curve].concat(),
            _ => self.milestones.clone(),
        };
        all.sort_by(f64::total_cmp);
        all.dedup();
        all
    }

    /// The method of a row with its settings.
    pub(crate) fn configured(&self, spec: &MethodSpec) -> Result<Box<dyn Configured>> {
        let mut words: Vec<String> =
            spec.knobs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let method = method(&spec.make)?;
        let takes_experts = method.settings().iter().any(|setting| setting.name == "experts");
        if spec.is_dsmoe() || takes_experts && !spec.knobs.contains_key("experts") {
            words.push(format!("experts={}", self.experts));
        }
        Ok(method.configure(&read_settings(words.iter().map(String::as_str))?)?)
    }

    /// The training of the dense model from random weights.
    pub(crate) fn pretrain(&self) -> Option<Result<TrainConfig>> {
        self.pretrain.as_ref().map(|table| self.config(table, "pretrain"))
    }

    /// The continued training, without what is a method's own.
    pub(crate) fn train(&self) -> Result<TrainConfig> {
        self.config(&self.train, "train")
    }

    /// The continued training of a method.
    pub(crate) fn train_of(&self, spec: &MethodSpec, seed: u64) -> Result<TrainConfig> {
        let mut table = self.train.clone();
        for (one, other) in [("steps", "tokens"), ("sparsity", "active_target")] {
            for (set, gone) in [(one, other), (other, one)] {
                if spec.train.contains_key(set) {
                    table.remove(gone);
                }
            }
        }
        table.extend(spec.train.clone());
        let mut config = self.config(&table, "train")?;
        if spec.is_dsmoe() && config.sparsity.is_none() && config.active_target.is_none() {
            // Without a threshold in training nothing is shut: the budget is reached after it.
            if spec.role == Role::WithoutThreshold {
                config.sparsity = Some(1.0);
            } else {
                config.active_target = Some(self.active);
            }
        }
        config.seed += seed;
        Ok(config)
    }

    fn config(&self, table: &toml::Table, name: &str) -> Result<TrainConfig> {
        let mut config: TrainConfig = table.clone().try_into().map_err(|cause: toml::de::Error| {
            anyhow::anyhow!("{name}: {}", cause.message().split_whitespace().collect::<Vec<_>>().join(" "))
        })?;
        if self.world.is_some() {
            // Held-out documents are documents of their own.
            config.valid_fraction = 0.0;
            config.near_duplicates = Some(dsmoe_train::config::NearDuplicates::Keep);
        }
        config.keep = 1;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_profiles_are_sound() {
        for name in names() {
            let profile = Profile::load(name).unwrap();
            assert_eq!(profile.name, name);
            for spec in &profile.method {
                profile.train_of(spec, 2).unwrap().resolve().unwrap();
            }
        }
    }

    #[test]
    fn all_methods_of_experts_have_the_profiles_number_of_them() {
        let text = text("quick").unwrap().replacen("experts = 8", "experts = 4", 1);
        let profile = Profile::parse(&text, "p.toml").unwrap();
        let with_experts = profile.method.iter().filter(|spec| {
            let settings = profile.configured(spec).unwrap().resolved();
            settings.get("experts").inspect(|value| assert_eq!(**value, 4, "{}", spec.name)).is_some()
        });
        let names: Vec<&str> = with_experts.map(|spec| spec.name.as_str()).collect();
        for name in ["llama-moe", "moefication", "random-k", "dsmoe", "dsmoe-no-ste"] {
            assert!(names.contains(&name), "{names:?}");
        }
    }

    #[test]
    fn what_a_profile_cannot_say() {
        let quick = text("quick").unwrap();
        let refused = |text: &str, parts: &[&str]| {
            let error = format!("{:#}", Profile::parse(text, "p.toml").unwrap_err());
            assert!(parts.iter().all(|part| error.contains(part)), "{error}: {parts:?}");
        };
        refused(&format!("bogus = 1\n{quick}"), &["p.toml: line 1", "unknown field `bogus`"]);
        refused(&quick.replacen("windows =", "windos =", 1), &["p.toml: line", "windos"]);
        refused(&quick.replacen("[train]", "[train]\nbogus = 1", 1), &["train", "bogus"]);
        refused(
            &format!("{quick}\n[[method]]\nname = \"x\"\nrole = \"control\"\nmake = \"nothing\"\n"),
            &["nothing"],
        );
        refused(
            &format!(
                "{quick}\n[[method]]\nname = \"x\"\nrole = \"control\"\nmake = \"wanda\"\nknobs = {{ order = \"taylor\" }}\n"
            ),
            &["order", "not a setting"],
        );
        refused(
            &quick.replacen("\"dsmoe-no-ste\"\nrole", "\"x\"\nrole", 1).replacen(
                "make = \"dsmoe-no-ste\"",
                "make = \"dsmoe\"",
                1,
            ),
            &["WithoutSte", "dsmoe-no-ste"],
        );
        refused(&quick.replacen("seeds = 1", "seeds = 0", 1), &["seeds is 0"]);
    }
}
