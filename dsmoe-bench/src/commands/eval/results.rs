//! Results of benchmarks in the shape of lm-evaluation-harness's files.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use dsmoe_core::Inference;
use dsmoe_datasets::tasks::{Loaded, Scored};
use dsmoe_datasets::{Bos, Tokenizer};
use dsmoe_kernels::Isa;
use dsmoe_train::tasks::Ran;
use serde_json::{Map, Value, json};

use crate::cli::eval::Eval;
use crate::format::{self, Table};

/// The version of the part of the results that the harness does not have.
const SCHEMA_VERSION: u32 = 1;

/// The scores of a benchmark and their cost.
pub(super) struct Measured {
    pub(super) scored: Scored,
    pub(super) ran: Ran,
    pub(super) seconds: f64,
}

/// The result of a benchmark.
pub(super) struct TaskResult {
    loaded: Loaded,
    measured: Measured,
}

impl TaskResult {
    pub(super) fn new(loaded: Loaded, measured: Measured) -> TaskResult {
        TaskResult { loaded, measured }
    }
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
    /// The files that were written.
    pub(super) files: Vec<PathBuf>,
}

impl TaskResults<'_> {
    /// Writes the results and the samples of every benchmark to `folder`.
    pub(super) fn write(&mut self, folder: &Path) -> Result<()> {
        let stamp = stamp(now());
        let results = folder.join(format!("results_{stamp}.json"));
        let samples =
            |task: &TaskResult| folder.join(format!("samples_{}_{stamp}.jsonl", task.loaded.name()));
        self.files = std::iter::once(results.clone()).chain(self.tasks.iter().map(samples)).collect();
        for task in &self.tasks {
            write(&samples(task), |out| {
                for row in task.loaded.sample_rows(&task.measured.scored) {
                    serde_json::to_writer(&mut *out, &row)?;
                    out.write_all(b"\n")?;
                }
                Ok(())
            })?;
        }
        // The results come last: where they are, the samples are.
        let text = serde_json::to_string_pretty(&self.json()?)?;
        write(&results, |out| Ok(out.write_all(text.as_bytes())?))
    }

    /// Returns the whole report.
    pub(super) fn json(&self) -> Result<Value> {
        let by_task = |value: &dyn Fn(&TaskResult) -> Value| -> Value {
            let entries = self.tasks.iter().map(|task| (task.loaded.name().to_owned(), value(task)));
            Value::Object(entries.collect::<Map<_, _>>())
        };
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
        Ok(json!({
            "results": by_task(&|task| task.loaded.results(&task.measured.scored)),
            "group_subtasks": {},
            "configs": by_task(&|task| task.loaded.config()),
            "versions": by_task(&|task| task.loaded.task().version.into()),
            "n-shot": by_task(&|task| task.loaded.task().shots.into()),
            "higher_is_better": by_task(&|task| task.loaded.higher_is_better()),
            "n-samples": by_task(&|task| task.loaded.sample_counts(&task.measured.scored)),
            "config": {
                "model": "dsmoe",
                "model_args": { "pretrained": self.args.model, "dtype": dtype },
                "model_num_parameters": self.model.accounting().total,
                "model_dtype": dtype,
                "batch_size": "auto",
                "device": "cpu",
                "limit": self.args.limit,
                "max_gen_toks": self.args.max_new_tokens,
                "bootstrap_iters": 100_000,
                "random_seed": 0,
                "numpy_seed": 1234,
                "torch_seed": 1234,
                "fewshot_seed": 1234,
            },
            "git_hash": null,
            "date": now().as_secs_f64(),
            "tokenizer_bos_token": token(config.bos_token_id)?,
            "tokenizer_eos_token": token(config.eos_token_ids.first().copied())?,
            "max_length": config.max_position,
            "task_hashes": by_task(&|task| task.loaded.hash(&task.measured.scored).into()),
            "model_source": "dsmoe",
            "model_name": self.args.model,
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
            "threshold": config.moe.as_ref().map(|moe| moe.router.threshold),
            "isa": Isa::current().name(),
            "model_sha256": self.model_sha256,
            "params_total": self.model.accounting().total,
        });
        self.add_cost(&mut extras, &self.ran());
        let tasks = self.tasks.iter().map(|task| {
            let Measured { scored, ran, seconds } = &task.measured;
            let unscored =
                scored.unscored.iter().map(|(id, reason)| json!({ "doc_id": id, "reason": reason }));
            let mut fields = json!({ "unscored": unscored.collect::<Vec<_>>(), "seconds": seconds });
            self.add_cost(&mut fields, ran);
            (task.loaded.name().to_owned(), fields)
        });
        extras["tasks"] = Value::Object(tasks.collect());
        extras["files"] = json!(self.files);
        extras
    }

    fn ran(&self) -> Ran {
        let mut all = Ran::default();
        self.tasks.iter().for_each(|task| all.add(&task.measured.ran));
        all
    }

    /// Adds the mean cost of the computed tokens.
    fn add_cost(&self, fields: &mut Value, ran: &Ran) {
        let routing = ran.routing.as_ref().map(|routing| routing.summary());
        let active = routing.as_ref().map_or(0.0, |routing| routing.active_experts);
        fields["tokens"] = ran.tokens.into();
        let activated = (ran.tokens > 0).then(|| self.model.accounting().activated(active));
        fields["params_activated"] = json!(activated);
        fields["active_ratio"] = json!(routing.as_ref().map(|routing| routing.active_ratio));
        fields["active_ratio_per_layer"] =
            json!(routing.as_ref().map(|routing| &routing.active_ratio_per_layer));
        fields["zero_active_share"] = json!(routing.as_ref().map(|routing| routing.zero_active_share));
    }

    /// Formats the results as a table.
    pub(super) fn show(&self) -> String {
        let mut table = Table::new(["task", "version", "shots", "filter", "metric", "value", "stderr", "n"]);
        for TaskResult { loaded, measured } in &self.tasks {
            for score in &measured.scored.scores {
                let effective = loaded.documents().len() - measured.scored.unscored.len();
                table.row([
                    loaded.name().to_owned(),
                    loaded.task().version.to_string(),
                    loaded.task().shots.to_string(),
                    score.filter.to_owned(),
                    score.metric.to_owned(),
                    number(score.value),
                    score.stderr.map_or_else(|| "-".to_owned(), number),
                    format::count(effective as u64),
                ]);
            }
        }
        let ran = self.ran();
        let seconds: f64 = self.tasks.iter().map(|task| task.measured.seconds).sum();
        let mut fields = vec![("profile", format!("{}, --bos {}", self.args.profile, bos_word(self.bos)))];
        let mut active = 0.0;
        if let Some(routing) = ran.routing.as_ref().map(|routing| routing.summary()) {
            active = routing.active_experts;
            fields.push(("active share", format!("{} of experts", format::percent(routing.active_ratio))));
        }
        let accounting = self.model.accounting();
        fields.push((
            "parameters",
            format!(
                "{} activated of {}",
                format::amount(accounting.activated(active)),
                format::amount(accounting.total as f64)
            ),
        ));
        fields
            .push(("tokens", format!("{} run in {}", format::count(ran.tokens), format::duration(seconds))));
        if let Some(file) = self.files.first() {
            fields.push(("results", file.display().to_string()));
        }
        format!("{}\n{}", table.show(), format::fields(fields))
    }
}

fn bos_word(bos: Bos) -> &'static str {
    match bos {
        Bos::Auto => "auto",
        Bos::Always => "always",
        Bos::Never => "never",
    }
}

/// Formats a number with four decimals, or with four digits if it is large.
fn number(value: f64) -> String {
    if value.abs() < 1e5 { format!("{value:.4}") } else { format!("{value:.3e}") }
}

/// Writes a file atomically.
fn write(path: &Path, fill: impl FnOnce(&mut BufWriter<&std::fs::File>) -> Result<()>) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let result = tempfile::NamedTempFile::new_in(folder).map_err(anyhow::Error::from).and_then(|file| {
        let mut out = BufWriter::new(file.as_file());
        fill(&mut out)?;
        out.flush()?;
        drop(out);
        file.as_file().sync_all()?;
        Ok(file.persist(path)?)
    });
    result.map(drop).with_context(|| path.display().to_string())
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Formats a time in UTC as `2026-01-31T23-59-59.123456`.
fn stamp(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (mut days, time) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    format!(
        "{year:04}-{:02}-{:02}T{:02}-{:02}-{:02}.{:06}",
        month + 1,
        days + 1,
        time / 3600,
        time / 60 % 60,
        time % 60,
        since_epoch.subsec_micros()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values from `date -u -d @SECONDS`.
    #[test]
    fn stamps_are_dates() {
        for (seconds, date) in [
            (0, "1970-01-01T00-00-00"),
            (951_782_399, "2000-02-28T23-59-59"),
            (951_782_400, "2000-02-29T00-00-00"),
            (951_868_800, "2000-03-01T00-00-00"),
            (1_732_400_000, "2024-11-23T22-13-20"),
            (4_107_542_399, "2100-02-28T23-59-59"),
            (4_107_542_400, "2100-03-01T00-00-00"),
        ] {
            assert_eq!(stamp(Duration::new(seconds, 1_234_000)), format!("{date}.001234"));
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.5, 12.34567, 1.39973e10].map(number), ["0.5000", "12.3457", "1.400e10"]);
    }
}
