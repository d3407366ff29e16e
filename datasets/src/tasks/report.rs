//! Results and samples in the shape of the harness's files.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::item::Ask;
use super::load::Loaded;
use super::request::{Request, Response};
use super::score::{Sample, Score, Scored};
use super::text::{float, repr_list};
use crate::files::hex;

/// Computes the SHA-256 of a text in hexadecimal.
pub fn sha256(text: &str) -> String {
    hex(&Sha256::digest(text))
}

impl Loaded {
    /// Returns the task's object under `results`: `"acc,none"` and so on.
    pub fn results(&self, scored: &Scored) -> Value {
        results((&self.name, &self.name), self.documents.len(), &scored.scores)
    }

    /// Returns the objects under `results` of the parts of the task, by their names.
    pub fn group_results<'s>(&'s self, scored: &'s Scored) -> impl Iterator<Item = (&'s str, Value)> {
        scored.groups.iter().map(|group| {
            let part = group.name.strip_prefix(&self.name).unwrap_or(&group.name).trim_start_matches('_');
            (group.name.as_str(), results((&group.name, part), group.documents, &group.scores))
        })
    }

    /// Returns the task's object under `configs`.
    pub fn config(&self) -> Value {
        let metrics: Vec<Value> = self
            .rules
            .metrics
            .iter()
            .map(|m| json!({ "metric": m.name(), "higher_is_better": m.higher_is_better() }))
            .collect();
        let filters: Vec<&str> = self.rules.filters.iter().map(|filter| filter.name).collect();
        let mut config = json!({
            "task": self.name,
            "data_files": self.origin.files,
            "split": self.origin.split,
            "fewshot_split": self.origin.shot_split,
            "fewshot_files": self.origin.shot_files,
            "num_fewshot": self.shots,
            "description": self.rules.description.source(),
            "target_delimiter": " ",
            "fewshot_delimiter": self.rules.delimiter,
            "output_type": self.documents[0].item.ask.output_type(),
            "metric_list": metrics,
            "filter_list": filters,
            "metadata": { "version": self.task.version },
        });
        if !self.rules.until.is_empty() {
            config["generation_kwargs"] = generation(self.rules.until);
        }
        config
    }

    /// Returns the task's object under `higher_is_better`.
    pub fn higher_is_better(&self) -> Value {
        let metrics = self.rules.metrics.iter();
        Value::Object(metrics.map(|m| (m.name().to_owned(), m.higher_is_better().into())).collect())
    }

    /// Returns the task's object under `n-samples`.
    pub fn sample_counts(&self, scored: &Scored) -> Value {
        json!({ "original": self.original, "effective": self.documents.len() - scored.unscored.len() })
    }

    /// Returns the lines of the task's file of samples, as JSON objects.
    pub fn sample_rows(&self, scored: &Scored) -> impl Iterator<Item = Value> {
        scored.samples.iter().map(|sample| self.sample_row(sample))
    }

    /// Returns the task's entry under `task_hashes`: of all documents, prompts and targets.
    pub fn hash(&self, scored: &Scored) -> String {
        let all = self.sample_rows(scored).fold(String::new(), |all, row| {
            ["doc_hash", "prompt_hash", "target_hash"]
                .iter()
                .fold(all, |all, key| all + row[*key].as_str().unwrap_or(""))
        });
        sha256(&all)
    }

    fn sample_row(&self, sample: &Sample) -> Value {
        let document = &self.documents[sample.document];
        let target = target(&document.item.ask);
        let arguments: Map<String, Value> = (0..)
            .zip(&document.requests)
            .map(|(i, request): (usize, _)| {
                let arguments = match request {
                    Request::LogLikelihood { context, continuation } => {
                        json!({ "arg_0": **context, "arg_1": continuation })
                    }
                    Request::Rolling { text } => json!({ "arg_0": text }),
                    Request::Generate { context, until, .. } => {
                        json!({ "arg_0": **context, "arg_1": generation(until) })
                    }
                };
                (format!("gen_args_{i}"), arguments)
            })
            .collect();
        let doc = Value::Object(document.fields.clone());
        let prompt = match &document.requests[0] {
            Request::Rolling { text } => text,
            request => request.context(),
        };
        let mut row = json!({
            "doc_id": document.id,
            "doc": doc,
            "target": target,
            "arguments": arguments,
            "resps": sample.responses.iter().map(|response| json!([logged(response)])).collect::<Vec<_>>(),
            "filtered_resps": sample.filtered.iter().map(logged).collect::<Vec<_>>(),
            "filter": sample.filter,
            "metrics": sample.parts.iter().map(|(metric, _)| metric.name()).collect::<Vec<_>>(),
            "doc_hash": sha256(&serde_json::to_string_pretty(&doc).unwrap_or_default()),
            "prompt_hash": sha256(prompt),
            "target_hash": sha256(&target),
        });
        for (metric, part) in &sample.parts {
            row[metric.name()] = match document.item.ask {
                Ask::Rolling { .. } => json!([part.value, part.weight]),
                _ => part.value.into(),
            };
        }
        row
    }
}

/// Returns an object under `results`.
fn results((name, alias): (&str, &str), documents: usize, scores: &[Score]) -> Value {
    let mut fields = Map::new();
    fields.insert("name".into(), name.into());
    fields.insert("alias".into(), alias.into());
    fields.insert("sample_len".into(), documents.into());
    for score in scores {
        fields.insert(format!("{},{}", score.metric, score.filter), score.value.into());
        let stderr = score.stderr.map_or_else(|| "N/A".into(), Value::from);
        fields.insert(format!("{}_stderr,{}", score.metric, score.filter), stderr);
    }
    Value::Object(fields)
}

/// Returns a response as samples show it: everything is text.
fn logged(response: &Response) -> Value {
    match response {
        Response::LogLikelihood { sum, greedy } => {
            json!([float(*sum), if *greedy { "True" } else { "False" }])
        }
        Response::Rolling { sum } => float(*sum).into(),
        Response::Generated { text } => text.clone().into(),
    }
}

/// Returns the right answer as samples show it.
fn target(ask: &Ask) -> String {
    match ask {
        Ask::Choice { gold, .. } => gold.to_string(),
        Ask::Gap { ending, .. } => ending.trim_start().to_owned(),
        Ask::LastWord { word } => word.clone(),
        Ask::AnyGreedy { answers } => {
            let all: Vec<String> = (0..answers.len()).map(|i| i.to_string()).collect();
            format!("[{}]", all.join(", "))
        }
        Ask::Generate { answers, list: true } => repr_list(answers),
        Ask::Generate { answers, list: false } => answers[0].clone(),
        Ask::Rolling { .. } => String::new(),
    }
}

fn generation(until: &[&str]) -> Value {
    json!({ "until": until, "do_sample": false, "temperature": 0.0 })
}
