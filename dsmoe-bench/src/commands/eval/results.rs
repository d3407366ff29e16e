//! Results of benchmarks in the shape of lm-evaluation-harness's files.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use chrono::{DateTime, Utc};
use dsmoe_core::Inference;
use dsmoe_core::config::MoeConfig;
use dsmoe_datasets::tasks::{Loaded, Scored};
use dsmoe_datasets::{Bos, Tokenizer};
use dsmoe_kernels::Isa;
use dsmoe_train::tasks::Ran;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::cli::eval::Eval;
use crate::files::{write, write_with};
use crate::format::{self, Table};

/// The version of the part of the results that the harness does not have.
const SCHEMA_VERSION: u32 = 1;

/// The scores of a benchmark and their cost.
pub(super) struct TaskResult {
    pub(super) loaded: Loaded,
    pub(super) scored: Scored,
    pub(super) ran: Ran,
    pub(super) seconds: f64,
}

/// A benchmark that was asked for and not scored.
#[derive(Debug, Serialize)]
pub(super) struct LeftOut {
    pub(super) task: &'static str,
    pub(super) reason: String,
    /// Another benchmark of the same files is scored in its place.
    pub(super) is_same: bool,
}

/// The results of all benchmarks.
pub(super) struct TaskResults<'a> {
    pub(super) args: &'a Eval,
    /// The name of the model, fit for a file name.
    pub(super) name: String,
    pub(super) bos: Bos,
    pub(super) model: &'a Inference,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) model_sha256: String,
    pub(super) seconds: f64,
    pub(super) tasks: Vec<TaskResult>,
    pub(super) left_out: Vec<LeftOut>,
    /// The files that were written.
    pub(super) files: Vec<PathBuf>,
}

impl TaskResults<'_> {
    /// Writes the results and the samples of every benchmark to `folder`.
    pub(super) fn write(&mut self, folder: &Path) -> Result<()> {
        let stamp = stamp(SystemTime::now().into());
        let results = folder.join(format!("results_{stamp}.json"));
        let samples =
            |task: &TaskResult| folder.join(format!("samples_{}_{stamp}.jsonl", task.loaded.name()));
        self.files = std::iter::once(results.clone()).chain(self.tasks.iter().map(samples)).collect();
        for task in &self.tasks {
            write_with(&samples(task), |out| {
                for row in task.loaded.sample_rows(&task.scored) {
                    serde_json::to_writer(&mut *out, &row)?;
                    out.write_all(b"\n")?;
                }
                Ok(())
            })?;
        }
        // The results come last: where they are, the samples are.
        write(&results, serde_json::to_string_pretty(&self.json()?)?)
    }

    /// Reports whether all that was asked for was scored.
    pub(super) fn is_complete(&self) -> bool {
        self.left_out.iter().all(|task| task.is_same)
            && self.tasks.iter().all(|task| task.scored.unscored.is_empty())
    }

    /// Returns the whole report.
    pub(super) fn json(&self) -> Result<Value> {
        let by_task = |value: &dyn Fn(&TaskResult) -> Value| -> Value {
            let entries = self.tasks.iter().map(|task| (task.loaded.name().to_owned(), value(task)));
            Value::Object(entries.collect::<Map<_, _>>())
        };
        let mut results = Map::new();
        let mut groups = Map::new();
        for TaskResult { loaded, scored, .. } in &self.tasks {
            results.insert(loaded.name().to_owned(), loaded.results(scored));
            results.extend(loaded.group_results(scored).map(|(name, value)| (name.to_owned(), value)));
            if !scored.groups.is_empty() {
                let names: Vec<&str> = scored.groups.iter().map(|group| &group.name[..]).collect();
                groups.insert(loaded.name().to_owned(), names.into());
            }
        }
        let config = self.model.config();
        let token = |id: Option<u32>| -> Result<Value> {
            Ok(match id {
                Some(id) => json!([self.tokenizer.decode(&[id], false)?, id.to_string()]),
                None => Value::Null,
            })
        };
        let dtype = match self.args.precision().name() {
            "f32" => "float32",
            "bf16" => "bfloat16",
            other => other,
        };
        let date = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Ok(json!({
            "results": results,
            "group_subtasks": groups,
            "configs": by_task(&|task| task.loaded.config()),
            "versions": by_task(&|task| task.loaded.task().version.into()),
            "n-shot": by_task(&|task| task.loaded.shots().into()),
            "higher_is_better": by_task(&|task| task.loaded.higher_is_better()),
            "n-samples": by_task(&|task| task.loaded.sample_counts(&task.scored)),
            "config": {
                "model": "dsmoe",
                "model_args": { "pretrained": self.args.model.display().to_string(), "dtype": dtype },
                "model_num_parameters": self.model.accounting().total,
                "model_dtype": dtype,
                "batch_size": "auto",
                "device": self.args.device.to_string(),
                "limit": self.args.limit,
                "max_gen_toks": self.args.max_new_tokens,
                "bootstrap_iters": 100_000,
                "random_seed": 0,
                "numpy_seed": 1234,
                "torch_seed": 1234,
                "fewshot_seed": 1234,
            },
            "git_hash": null,
            "date": date,
            "tokenizer_bos_token": token(config.bos_token_id)?,
            "tokenizer_eos_token": token(config.eos_token_ids.first().copied())?,
            "max_length": config.max_position,
            "task_hashes": by_task(&|task| task.loaded.hash(&task.scored).into()),
            "model_source": "dsmoe",
            "model_name": self.args.model.display().to_string(),
            "model_name_sanitized": self.name,
            "total_evaluation_time_seconds": self.seconds.to_string(),
            "dsmoe": self.extras(),
        }))
    }

    /// Returns the part that the harness does not have.
    fn extras(&self) -> Value {
        let config = self.model.config();
        let mut extras = json!({
            "schema_version": SCHEMA_VERSION,
            "version": env!("CARGO_PKG_VERSION"),
            "profile": self.args.profile,
            "bos": self.bos,
            "dtype": self.args.precision().name(),
            "threshold": config.moe.as_ref().and_then(MoeConfig::threshold),
            "budget": config.moe.as_ref().and_then(MoeConfig::budget),
            "isa": Isa::current().name(),
            "model_sha256": self.model_sha256,
            "params_total": self.model.accounting().total,
            "weight_bytes": self.model.bytes(),
        });
        self.add_cost(&mut extras, &self.ran());
        let tasks = self.tasks.iter().map(|task| {
            let TaskResult { scored, ran, seconds, .. } = task;
            let unscored =
                scored.unscored.iter().map(|(id, reason)| json!({ "doc_id": id, "reason": reason }));
            let mut fields = json!({ "unscored": unscored.collect::<Vec<_>>(), "seconds": seconds });
            self.add_cost(&mut fields, ran);
            if let Some(nll) = task.loaded.gold_nll(scored) {
                fields["gold_nll"] = nll.into();
            }
            (task.loaded.name().to_owned(), fields)
        });
        extras["tasks"] = Value::Object(tasks.collect());
        extras["files"] = json!(self.files);
        extras["left_out"] = json!(self.left_out);
        extras
    }

    fn ran(&self) -> Ran {
        let mut all = Ran::default();
        self.tasks.iter().for_each(|task| all.add(&task.ran));
        all
    }

    /// Adds the mean cost of the computed tokens.
    fn add_cost(&self, fields: &mut Value, ran: &Ran) {
        let routing = ran.routing.as_ref().map(|routing| routing.summary());
        let routing = routing.as_ref();
        let active = routing.map_or(0.0, |routing| routing.active_experts);
        fields["tokens"] = ran.tokens.into();
        let activated = (ran.tokens > 0).then(|| self.model.accounting().activated(active));
        fields["params_activated"] = json!(activated);
        fields["active_ratio"] = json!(routing.map(|routing| routing.active_ratio));
        fields["active_ratio_per_layer"] = json!(routing.map(|routing| &routing.active_ratio_per_layer));
        fields["zero_active_share"] = json!(routing.map(|routing| routing.zero_active_share));
    }

    /// Formats the results as a table.
    pub(super) fn show(&self) -> String {
        let mut table = Table::new(["task", "version", "shots", "filter", "metric", "value", "stderr", "n"]);
        for TaskResult { loaded, scored, .. } in &self.tasks {
            let effective = loaded.documents().len() - scored.unscored.len();
            let whole = (loaded.name(), effective, &scored.scores);
            let groups = scored.groups.iter().map(|group| (&group.name[..], group.documents, &group.scores));
            for (name, documents, scores) in std::iter::once(whole).chain(groups) {
                for score in scores {
                    table.row([
                        name.to_owned(),
                        loaded.task().version.to_string(),
                        loaded.shots().to_string(),
                        score.filter.to_owned(),
                        score.metric.to_owned(),
                        number(score.value),
                        format::or_dash(score.stderr, number),
                        format::count(documents as u64),
                    ]);
                }
            }
        }
        for LeftOut { task, reason, .. } in &self.left_out {
            let dash = || "-".to_owned();
            table.row([
                (*task).to_owned(),
                dash(),
                dash(),
                dash(),
                format!("not scored: {reason}"),
                dash(),
                dash(),
                "0".to_owned(),
            ]);
        }
        let ran = self.ran();
        let seconds: f64 = self.tasks.iter().map(|task| task.seconds).sum();
        let bos = json!(self.bos);
        let bos = bos.as_str().unwrap_or_default();
        let mut fields = vec![("profile", format!("{}, --bos {bos}", self.args.profile))];
        let mut active = 0.0;
        if let Some(routing) = ran.routing.as_ref().map(|routing| routing.summary()) {
            active = routing.active_experts;
            fields.push(("active share", format!("{} of experts", format::percent(routing.active_ratio))));
        }
        let accounting = self.model.accounting();
        fields.push(("parameters", format::activated(accounting.activated(active), accounting.total)));
        fields.push(("weights", format::in_memory(self.model.bytes() as u64)));
        let gold = |task: &TaskResult| {
            Some(format!("{} {:.4}", task.loaded.name(), task.loaded.gold_nll(&task.scored)?))
        };
        let gold: Vec<String> = self.tasks.iter().filter_map(gold).collect();
        if !gold.is_empty() {
            fields.push(("loss of right answers", format!("{}, nats by item", gold.join(", "))));
        }
        let (tokens, time) = (format::count(ran.tokens), format::duration(seconds));
        fields.push(("tokens", format!("{tokens} run in {time}")));
        if let Some(file) = self.files.first() {
            fields.push(("results", file.display().to_string()));
        }
        format!("{}\n{}", table.show(), format::fields(fields))
    }
}

/// Formats a number with four decimals, or with four digits if it is large.
fn number(value: f64) -> String {
    if value.abs() < 1e5 { format!("{value:.4}") } else { format!("{value:.3e}") }
}

/// Formats a time as `2026-01-31T23-59-59.123456`.
fn stamp(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%dT%H-%M-%S%.6f").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values from `date -u -d @SECONDS`.
    #[test]
    fn stamps_are_dates() {
        for (seconds, date) in [
            (951_782_399, "2000-02-28T23-59-59.001234"),
            (951_782_400, "2000-02-29T00-00-00.001234"),
            (4_107_542_400, "2100-03-01T00-00-00.001234"),
        ] {
            assert_eq!(stamp(DateTime::from_timestamp(seconds, 1_234_000).unwrap()), date);
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.5, 12.34567, 1.39973e10].map(number), ["0.5000", "12.3457", "1.400e10"]);
    }
}
