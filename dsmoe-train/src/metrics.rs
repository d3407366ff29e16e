//! `metrics.jsonl`: one JSON object per line, a header first, then one line per step and per evaluation.
//!
//! A number that is not finite is written as `null`, and its line carries `"nan": true`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use dsmoe_datasets::files::{json_values, open_regular};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The losses and rates of one optimiser step. Shares are in 0..=1; fields about routing are empty for a dense model.
///
/// ```
/// use dsmoe_train::{Observer, StepRecord};
///
/// /// Prints a line per step.
/// struct Console;
///
/// impl Observer for Console {
///     fn step(&mut self, record: &StepRecord) {
///         let active = record.activation_ratio.map_or(String::new(), |share| format!(", {share:.3} active"));
///         println!("step {}: loss {:.4}{active}", record.step, record.lm_loss);
///     }
/// }
///
/// let record = StepRecord::default();
/// Console.step(&record);
/// // The JSON of a dense model's step has no fields about routing.
/// assert!(serde_json::to_value(&record)?.get("activation_ratio").is_none());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens predicted so far, this step's included.
    pub tokens: u64,
    /// `lm_loss` (with a teacher of weight w, (1 - w) `lm_loss` + w `kl`) + `balance_loss` + `sparsity_weight` times the sparsity loss or, under a target, the mean gate + the weighted separability loss, entropy of gates and squared distance from the share.
    pub loss: f64,
    /// Mean negative log-likelihood of the step's tokens, nats.
    pub lm_loss: f64,
    /// Mean divergence KL(teacher || model) of the step's tokens, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Mean gate of active experts over layers, tokens and experts (eqs. 17-19).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sparsity_loss: Option<f64>,
    /// The squared distance of the mean gate of a micro-batch from the share, mean over micro-batches, where such a loss holds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_loss: Option<f64>,
    /// The balance losses of all layers, where the FFN has such a loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance_loss: Option<f64>,
    /// Mean of the separability loss over layers, tokens and gates, where it has a weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separability_loss: Option<f64>,
    /// Mean of the entropy of gates over layers and tokens, of sigmoid gates over gates too, where it has a weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate_entropy: Option<f64>,
    /// The number that divides the routers' logits in this step, where the run sets it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router_temperature: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Gradient norm of the routers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router_grad_norm: Option<f64>,
    /// Tokens per second of this step.
    pub tokens_per_s: f64,
    /// Active share of all (token, layer, expert) triples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation_ratio: Option<f64>,
    /// The same by layer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layer_activation: Vec<f64>,
    /// Mean of the budgets of the step's micro-batches, where they are drawn from a range.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<f64>,
    /// Mean over layers of the thresholds in this step (logits; of a range, those of its least share), where they hold the
    /// share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold_logit: Option<f64>,
    /// Share of (token, layer) pairs without an active expert.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_active_share: Option<f64>,
    /// Mean over layers of the entropy of the expert load, over that of an even load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_entropy: Option<f64>,
    /// Weight of the sparsity loss in this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sparsity_weight: Option<f64>,
    /// Resident memory of the process, where the system reports it: `VmRSS` of `/proc/self/status`, which has pages of mapped files
    /// too, those of the program and of its libraries among them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_bytes: Option<u64>,
    /// Seconds since this invocation began to train.
    pub wall_s: f64,
}

/// Name of the file in a run directory.
pub(crate) const METRICS_FILE: &str = "metrics.jsonl";
/// The last bytes of the file that are searched for an evaluation.
const TAIL: u64 = 4 << 20;
/// Most keys and values of a line; one with more is none that a run wrote.
const MOST_VALUES: usize = 1 << 20;

/// The last evaluation of a run.
///
/// ```
/// use dsmoe_train::metrics::{LastEvaluation, last_evaluation};
///
/// let work = tempfile::tempdir()?;
/// // A directory that is not of a run has none.
/// let last: Option<LastEvaluation> = last_evaluation(work.path());
/// assert_eq!(last, None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LastEvaluation {
    /// Steps done.
    pub step: u64,
    /// Perplexity on the held-out text.
    pub ppl: f64,
    /// Active share of all (token, layer, expert) triples.
    pub active_ratio: Option<f64>,
}

/// Returns the last evaluation that a run recorded; none if `dir` is not of a run, or the run did not evaluate.
pub fn last_evaluation(dir: &Path) -> Option<LastEvaluation> {
    let mut file = open_regular(&dir.join(METRICS_FILE)).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    bytes.rsplit(|&byte| byte == b'\n').find_map(|line| {
        let value = parsed(line)?;
        Some(LastEvaluation {
            step: value.get("step")?.as_u64()?,
            ppl: value.get("eval_ppl")?.as_f64()?,
            active_ratio: value.get("eval_active_ratio").and_then(Value::as_f64),
        })
    })
}

/// Parses a line; none if it is no JSON, or has more values than a run writes.
fn parsed(line: &[u8]) -> Option<Value> {
    if json_values(line) > MOST_VALUES {
        return None;
    }
    serde_json::from_slice(line).ok()
}

/// The open metrics file.
#[derive(Debug)]
pub(crate) struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Starts the file anew with `header` as its first line.
    pub(crate) fn create(path: &Path, header: &Value) -> Result<Metrics> {
        let file = File::create(path).map_err(Error::io(path))?;
        let mut metrics = Metrics { file, path: path.to_path_buf() };
        metrics.line(header)?;
        Ok(metrics)
    }

    /// Continues a file after `step`: lines of later steps, and everything after a torn line, are cut off, and with `evaluates` the
    /// evaluation after `step`, which comes again. A file that is missing or has no complete header is started anew.
    pub(crate) fn resume(path: &Path, step: u64, evaluates: bool, header: &Value) -> Result<Metrics> {
        // A pipe would block, and a device need not end.
        if path.exists() {
            open_regular(path).map_err(Error::io(path))?;
        }
        // Not to append: Windows does not let such a file be cut.
        let Ok(mut file) = OpenOptions::new().read(true).write(true).open(path) else {
            return Metrics::create(path, header);
        };
        let mut reader = BufReader::new(&file);
        let (mut kept, mut line) = (0u64, Vec::new());
        loop {
            line.clear();
            let len = reader.read_until(b'\n', &mut line).map_err(Error::io(path))?;
            let whole = line.ends_with(b"\n").then(|| parsed(&line)).flatten();
            let Some(value) = whole else { break };
            let is_header = value.get("step").is_none();
            let is_again = |at: u64| evaluates && at == step && value.get("eval_nll").is_some();
            let in_run = value.get("step").and_then(Value::as_u64);
            let in_run = in_run.is_some_and(|at| at <= step && !is_again(at));
            if (kept == 0) != is_header || !(is_header || in_run) {
                break;
            }
            kept += len as u64;
        }
        if kept == 0 {
            return Metrics::create(path, header);
        }
        file.set_len(kept).map_err(Error::io(path))?;
        file.seek(SeekFrom::Start(kept)).map_err(Error::io(path))?;
        Ok(Metrics { file, path: path.to_path_buf() })
    }

    /// Appends one object.
    pub(crate) fn line(&mut self, value: &Value) -> Result<()> {
        let mut text = value.to_string();
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(Error::io(&self.path))
    }

    /// Waits until all lines are on the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io(&self.path))
    }
}

/// Returns a step as a line of the file.
pub(crate) fn step_line(record: &StepRecord) -> Value {
    // serde_json writes a number that is not finite as null.
    let mut value = serde_json::to_value(record).expect("a record of numbers is JSON");
    let null = |v: &Value| v.is_null() || v.as_array().is_some_and(|all| all.contains(&Value::Null));
    if let Value::Object(map) = &mut value
        && map.values().any(null)
    {
        map.insert("nan".to_owned(), Value::Bool(true));
    }
    value
}

/// Returns an evaluation as a line of the file: its fields prefixed with `eval_`.
pub(crate) fn eval_line(step: u64, report: &crate::eval::EvalReport) -> Value {
    let mut map = Map::new();
    map.insert("step".to_owned(), step.into());
    if let Ok(Value::Object(fields)) = serde_json::to_value(report) {
        map.extend(fields.into_iter().map(|(key, value)| (format!("eval_{key}"), value)));
    }
    if !report.nll.is_finite() {
        map.insert("nan".to_owned(), Value::Bool(true));
    }
    Value::Object(map)
}

/// Returns the resident memory of this process in bytes; `None` without `/proc`.
pub(crate) fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_number_that_is_not_finite_is_null_and_flagged() {
        let record = StepRecord { step: 3, loss: f64::NAN, lm_loss: 1.5, ..StepRecord::default() };
        let line = step_line(&record);
        let found = (&line["loss"], &line["lm_loss"], &line["nan"]);
        assert_eq!(found, (&Value::Null, &json!(1.5), &json!(true)));
        assert!(line.get("activation_ratio").is_none());
        let line = step_line(&StepRecord { activation_ratio: Some(0.5), ..StepRecord::default() });
        assert_eq!((&line["activation_ratio"], line.get("nan")), (&json!(0.5), None));
    }

    #[test]
    fn resuming_cuts_later_steps_and_torn_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        let header = json!({"format_version": 1});
        let resumed = |text: &str, step, evaluates| {
            std::fs::write(&path, text).unwrap();
            let mut metrics = Metrics::resume(&path, step, evaluates, &header).unwrap();
            metrics.line(&json!({"step": 99})).unwrap();
            std::fs::read_to_string(&path).unwrap()
        };
        let head = "{\"format_version\":1}\n";
        let steps = "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"eval_nll\":1}\n";
        for (text, step, kept) in [
            (format!("{head}{steps}{{\"step\":3}}\n"), 2, steps),
            (format!("{head}{steps}{{\"st"), 5, steps),
            (format!("{head}{{\"step\":3}}\n"), 0, ""),
            (format!("{head}{steps}{{\"step\":3,\"x\":[{}0]}}\n", "0,".repeat(MOST_VALUES)), 5, steps),
            ("{\"form".to_owned(), 4, ""),
        ] {
            let start = &text[..text.len().min(100)];
            assert_eq!(resumed(&text, step, false), format!("{head}{kept}{{\"step\":99}}\n"), "{start}");
        }
        // The evaluation after the step was done, and was not in the checkpoint.
        let again = format!("{head}{{\"step\":1}}\n{{\"step\":2}}\n{{\"step\":99}}\n");
        assert_eq!(resumed(&format!("{head}{steps}{{\"step\":3}}\n"), 2, true), again);
        std::fs::remove_file(&path).unwrap();
        Metrics::resume(&path, 4, false, &header).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), head);
    }

    #[cfg(unix)]
    #[test]
    fn a_device_is_no_file_of_metrics() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let message = Metrics::resume(&path, 4, false, &json!({})).unwrap_err().to_string();
        assert!(message.contains(METRICS_FILE) && message.contains("not a regular file"), "{message}");
        assert_eq!(last_evaluation(dir.path()), None);
    }

    #[test]
    fn this_process_is_resident() {
        if cfg!(target_os = "linux") {
            assert!(resident_bytes().unwrap() > 1 << 20);
        }
    }
}
