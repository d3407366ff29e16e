//! The records of a run: its resolved configuration, its metrics, and its events for TensorBoard.

use dsmoe_core::Model;
use dsmoe_datasets::Mixture;
use serde_json::{Value, json};

use super::directory::CONFIG_FILE;
use super::options::RunOptions;
use crate::checkpoint::{FORMAT_VERSION, State};
use crate::error::Result;
use crate::eval::EvalReport;
use crate::files;
use crate::metrics::{METRICS_FILE, Metrics, StepRecord, eval_line};
use crate::tensorboard::EventWriter;

/// The files that tell the history of a run.
pub(super) struct Records {
    pub(super) metrics: Metrics,
    events: EventWriter,
}

impl Records {
    /// Writes run.toml, and opens the others where the checkpoint of step `saved` left them. `header` is what run.toml begins
    /// with and the first line of the metrics.
    pub(super) fn open(
        options: &RunOptions,
        state: &State,
        saved: Option<u64>,
        header: (&str, &Value),
    ) -> Result<Records> {
        let (origin, header) = header;
        let resolved = format!("{origin}{}", state.config.to_toml());
        files::replace(&options.out.join(CONFIG_FILE), resolved.as_bytes())?;
        let path = options.out.join(METRICS_FILE);
        let metrics = match saved {
            Some(step) => Metrics::resume(&path, step, state.left.is_some(), header)?,
            None => Metrics::create(&path, header)?,
        };
        let events = EventWriter::create(&options.out, options.resume.then_some(state.step))?;
        Ok(Records { metrics, events })
    }

    pub(super) fn events_of(&mut self, record: &StepRecord) -> Result<()> {
        let mut values = vec![
            ("train/loss", record.loss),
            ("train/lm_loss", record.lm_loss),
            ("train/learning_rate", record.lr),
            ("train/grad_norm", record.grad_norm),
            ("train/tokens_per_s", record.tokens_per_s),
        ];
        let routing = [
            ("train/kl", record.kl),
            ("train/separability_loss", record.separability_loss),
            ("train/gate_entropy", record.gate_entropy),
            ("train/share_loss", record.share_loss),
            ("train/router_temperature", record.router_temperature),
            ("train/budget", record.budget),
            ("train/threshold_logit", record.threshold_logit),
            ("train/sparsity_loss", record.sparsity_loss),
            ("train/sparsity_weight", record.sparsity_weight),
            ("train/balance_loss", record.balance_loss),
            ("train/activation_ratio", record.activation_ratio),
            ("train/zero_active_share", record.zero_active_share),
            ("train/router_grad_norm", record.router_grad_norm),
        ];
        values.extend(routing.into_iter().filter_map(|(tag, value)| value.map(|value| (tag, value))));
        self.events.scalars(record.step, &values)
    }

    pub(super) fn evaluation(&mut self, step: u64, report: &EvalReport) -> Result<()> {
        self.metrics.line(&eval_line(step, report))?;
        let mut values = vec![("eval/nll", report.nll), ("eval/ppl", report.ppl)];
        values.extend(report.active_ratio.map(|ratio| ("eval/activation_ratio", ratio)));
        let tags: Vec<(String, f64)> =
            report.domains.iter().map(|domain| (format!("eval/ppl/{}", domain.name), domain.ppl)).collect();
        values.extend(tags.iter().map(|(tag, ppl)| (&tag[..], *ppl)));
        self.events.scalars(step, &values)
    }
}

/// Returns the first line of the metrics file.
pub(super) fn header(model: &Model, mixture: &Mixture, state: &State) -> Value {
    let mut header = json!({
        "format_version": FORMAT_VERSION, "program": concat!("dsmoe-train ", env!("CARGO_PKG_VERSION")),
        "model_sha256": state.model_sha256, "data_sha256": state.data_sha256,
        "params": model.layout().entries().iter().map(|entry| entry.range.len()).sum::<usize>(),
        "num_experts": model.num_experts(), "train_tokens": mixture.train_len(),
        "valid_tokens": mixture.valid_len(), "config": state.config,
    });
    if let Some(teacher) = &state.teacher {
        header["teacher"] = json!(teacher);
    }
    if mixture.parts().len() > 1 || mixture.filtered() {
        let part = |part: &dsmoe_datasets::mixture::Part| {
            json!({
                "name": part.name, "share": part.share, "removed": part.removed,
                "train_tokens": part.split.train_len(), "valid_tokens": part.split.valid_tokens().len(),
            })
        };
        header["sources"] = mixture.parts().iter().map(part).collect();
    }
    header
}
