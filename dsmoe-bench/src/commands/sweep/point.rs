//! The measurements at one share of active experts.

use anyhow::Result;
use dsmoe_core::Inference;
use dsmoe_datasets::Tokenizer;
use dsmoe_datasets::tasks::Loaded;
use dsmoe_train::eval::{Agreement, EvalOptions, agreement};
use serde::{Deserialize, Serialize};

use crate::cli::sweep::Sweep;
use crate::evaluation::measure;
use crate::progress::{Progress, Unit};
use crate::reproduce::measure::{self as measured, TaskScore};
use crate::reproduce::speed::{decode, prefill};
use crate::ui::Ui;

/// The text of one source.
pub(super) struct Text {
    pub(super) name: String,
    /// Share of the weights of all sources.
    pub(super) share: f64,
    pub(super) ids: Vec<u32>,
}

/// The measurements of a model at one share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Point {
    /// The share that was asked for; none for the dense model.
    pub(super) active: Option<f64>,
    /// The share that was found on the texts.
    pub(super) active_ratio: Option<f64>,
    pub(super) params_activated: f64,
    pub(super) flops_per_token: f64,
    /// Mean over the texts by their shares, nats.
    pub(super) nll: f64,
    pub(super) ppl: f64,
    pub(super) texts: Vec<TextPoint>,
    pub(super) tasks: Vec<TaskScore>,
    pub(super) times: Option<Times>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct TextPoint {
    pub(super) name: String,
    pub(super) nll: f64,
    pub(super) ppl: f64,
    pub(super) active_ratio: Option<f64>,
    /// The distance from the dense model.
    pub(super) agreement: Option<Agreement>,
}

/// Median speeds, tokens per second, and those of the dense model in turns with them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Times {
    pub(super) prefill: f64,
    pub(super) decode: f64,
    pub(super) dense: Option<[f64; 2]>,
}

impl Point {
    /// Returns the mean percentage of right items over tasks.
    pub(super) fn tasks_mean(&self) -> Option<f64> {
        let sum: f64 = self.tasks.iter().map(|task| 100.0 * task.value).sum();
        (!self.tasks.is_empty()).then(|| sum / self.tasks.len() as f64)
    }
}

/// The measurements that a sweep makes.
pub(super) struct Work<'a> {
    pub(super) args: &'a Sweep,
    pub(super) texts: &'a [Text],
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) tasks: &'a [Loaded],
    pub(super) seq: usize,
    pub(super) ui: &'a Ui,
}

impl Work<'_> {
    /// Measures `model`, whose gates are set to the share `active`, beside the dense model if there is one.
    pub(super) fn measure(
        &self,
        model: &Inference,
        active: Option<f64>,
        dense: Option<&Inference>,
    ) -> Result<Point> {
        let name = active.map_or("dense".to_owned(), |active| format!("{} %", 100.0 * active));
        self.ui.note(format_args!("measuring {name}"));
        let (mut nll, mut ratio, mut activated, mut flops) = (0.0, Some(0.0), 0.0, 0.0);
        let mut texts = Vec::new();
        for text in self.texts {
            let report = measure(model, &text.ids, EvalOptions::new(self.seq), self.ui)?;
            nll += text.share * report.nll;
            ratio = ratio.zip(report.active_ratio).map(|(all, one)| all + text.share * one);
            activated += text.share * report.params_activated;
            flops += text.share * report.flops_per_token;
            let compare = |dense| {
                Progress::during(self.ui, "comparing", Unit::Windows, |show| {
                    let show = &mut |done, total| show(done as u64, total as u64);
                    agreement(model, dense, &text.ids, self.seq, show)
                })
            };
            texts.push(TextPoint {
                name: text.name.clone(),
                nll: report.nll,
                ppl: report.ppl,
                active_ratio: report.active_ratio,
                agreement: dense.map(compare).transpose()?,
            });
        }
        let tasks = Progress::during(self.ui, "tasks", Unit::Parts, |show| {
            measured::tasks(model, self.tokenizer, self.tasks, &mut |done, all| show(done as u64, all as u64))
        })?;
        let (active_ratio, times) = (ratio, self.times(model, dense)?);
        let (params_activated, flops_per_token, ppl) = (activated, flops, nll.exp());
        Ok(Point { active, active_ratio, params_activated, flops_per_token, nll, ppl, texts, tasks, times })
    }

    /// Times the model, in turns with the dense one.
    fn times(&self, model: &Inference, dense: Option<&Inference>) -> Result<Option<Times>> {
        let Sweep { repeats, prefill: length, decode: tokens, batch, .. } = *self.args;
        if repeats == 0 {
            return Ok(None);
        }
        let all = self.texts.iter().flat_map(|text| &text.ids).copied();
        let most = length.min(model.config().max_position);
        let ids: Vec<u32> = all.take(most).collect();
        let mut found: [Vec<f64>; 4] = Default::default();
        for _ in 0..repeats {
            for (at, model) in [Some(model), dense].into_iter().enumerate() {
                let Some(model) = model else { continue };
                found[2 * at].push(prefill(model, &ids, ids.len())?);
                found[2 * at + 1].push(decode(model, &ids, tokens, batch)?);
            }
        }
        let [prefill, decode, dense_prefill, dense_decode] = found.map(median);
        let dense = dense.map(|_| [dense_prefill, dense_decode]);
        Ok(Some(Times { prefill, decode, dense }))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
