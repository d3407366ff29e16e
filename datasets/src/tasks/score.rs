//! From responses to metrics.

use std::collections::BTreeMap;

use super::filter::Filter;
use super::item::{Ask, Item};
use super::load::Loaded;
use super::metrics::{Metric, Part, argmax, pooled};
use super::request::{Request, Response};
use super::rules::Rules;

/// A metric of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The harness's name of the metric.
    pub metric: &'static str,
    /// The filter that answers passed through.
    pub filter: &'static str,
    /// The value.
    pub value: f64,
    /// Its standard error, where one is defined.
    pub stderr: Option<f64>,
    /// True if more is better.
    pub higher_is_better: bool,
}

/// A task's scores.
#[derive(Clone, Debug)]
pub struct Scored {
    /// The metrics.
    pub scores: Vec<Score>,
    /// The parts of a task that consists of several, by name: `mmlu` of its subjects.
    pub groups: Vec<Group>,
    /// Documents that could not be scored, by id, and why; they count in no metric.
    pub unscored: Vec<(usize, String)>,
    pub(crate) samples: Vec<Sample>,
}

/// The scores of a part of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// The name: that of the task, then that of the part, as in `mmlu_anatomy`.
    pub name: String,
    /// Documents that were scored.
    pub documents: usize,
    /// The metrics.
    pub scores: Vec<Score>,
}

/// A document under one filter.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// Index of the document.
    pub(crate) document: usize,
    pub(crate) filter: &'static str,
    pub(crate) responses: Vec<Response>,
    pub(crate) filtered: Vec<Response>,
    pub(crate) parts: Vec<(Metric, Part)>,
}

impl Loaded {
    /// Scores `responses`, one list per document as its requests, each a response or why there is none.
    ///
    /// # Panics
    /// The lists do not fit the documents and their requests.
    pub fn score(&self, responses: &[Vec<Result<Response, String>>]) -> Scored {
        assert_eq!(responses.len(), self.documents.len(), "{}: responses and documents", self.name);
        let mut scored =
            Scored { scores: Vec::new(), groups: Vec::new(), unscored: Vec::new(), samples: Vec::new() };
        let mut answered = Vec::new();
        for (i, (document, responses)) in self.documents.iter().zip(responses).enumerate() {
            assert_eq!(responses.len(), document.requests.len(), "{}: responses to document {i}", self.name);
            match responses.iter().cloned().collect::<Result<Vec<Response>, String>>() {
                Ok(responses) => answered.push((i, responses)),
                Err(reason) => scored.unscored.push((document.id, reason)),
            }
        }
        for filter in &self.rules.filters {
            let first = scored.samples.len();
            for (i, responses) in &answered {
                let (filtered, parts) = judge(&self.documents[*i].item, responses, filter, &self.rules);
                let (filter, responses) = (filter.name, responses.clone());
                scored.samples.push(Sample { document: *i, filter, responses, filtered, parts });
            }
            if answered.is_empty() {
                continue;
            }
            let samples = &scored.samples[first..];
            let groups = self.groups(samples);
            for (at, metric) in self.rules.metrics.iter().enumerate() {
                let score = |samples: &[&Sample]| {
                    let parts: Vec<Part> = samples.iter().map(|sample| sample.parts[at].1).collect();
                    let (value, stderr) = metric.aggregate(&parts);
                    let higher_is_better = metric.higher_is_better();
                    Score { metric: metric.name(), filter: filter.name, value, stderr, higher_is_better }
                };
                let mut whole = score(&samples.iter().collect::<Vec<_>>());
                let scores: Vec<Score> = groups.values().map(|samples| score(samples)).collect();
                if !scores.is_empty() {
                    let errors: Option<Vec<f64>> = scores.iter().map(|score| score.stderr).collect();
                    let sizes: Vec<usize> = groups.values().map(Vec::len).collect();
                    whole.stderr = errors.map(|errors| pooled(&errors, &sizes));
                }
                scored.scores.push(whole);
                for ((name, samples), score) in groups.iter().zip(scores) {
                    let name = format!("{}_{}", self.name, name.replace(' ', "_"));
                    match scored.groups.iter_mut().find(|group| group.name == name) {
                        Some(group) => group.scores.push(score),
                        None => {
                            scored.groups.push(Group { name, documents: samples.len(), scores: vec![score] });
                        }
                    }
                }
            }
        }
        scored
    }

    /// Divides samples by the parts of the task; none where it has no parts.
    fn groups<'s>(&self, samples: &'s [Sample]) -> BTreeMap<&str, Vec<&'s Sample>> {
        let mut groups: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
        for sample in samples {
            if let Some(group) = &self.documents[sample.document].group {
                groups.entry(group).or_default().push(sample);
            }
        }
        groups
    }
}

impl Loaded {
    /// Returns the mean negative log-likelihood of the right answers, in nats by document. A task that does not
    /// compare the likelihoods of its answers has none.
    pub fn gold_nll(&self, scored: &Scored) -> Option<f64> {
        let first = scored.samples.first()?.filter;
        let samples = scored.samples.iter().filter(|sample| sample.filter == first);
        let of = |sample: &Sample| {
            let right = match self.documents[sample.document].item.ask {
                Ask::Choice { gold, .. } | Ask::Gap { gold, .. } => gold,
                Ask::LastWord { .. } => 0,
                _ => return None,
            };
            Some(-sum(&sample.responses[right]))
        };
        let all: Vec<f64> = samples.map(of).collect::<Option<_>>()?;
        Some(all.iter().sum::<f64>() / all.len() as f64)
    }
}

/// Returns the filtered responses to a document, and its part of every metric.
fn judge(
    item: &Item,
    responses: &[Response],
    filter: &Filter,
    rules: &Rules,
) -> (Vec<Response>, Vec<(Metric, Part)>) {
    let filtered: Vec<Response> = responses
        .iter()
        .map(|response| match response {
            Response::Generated { text } => Response::Generated { text: filter.apply(text) },
            other => other.clone(),
        })
        .collect();
    let parts = rules.metrics.iter().map(|&metric| (metric, part(metric, item, &filtered, (filter, rules))));
    let parts = parts.collect();
    (filtered, parts)
}

fn part(metric: Metric, item: &Item, responses: &[Response], (filter, rules): (&Filter, &Rules)) -> Part {
    let yes = |right: bool| Part { value: f64::from(u8::from(right)), weight: 1.0 };
    let sums = || responses.iter().map(sum);
    match (metric, &item.ask) {
        (Metric::Acc, Ask::Choice { gold, .. } | Ask::Gap { gold, .. }) => yes(argmax(sums()) == *gold),
        (Metric::AccNorm | Metric::AccBytes, Ask::Choice { choices, gold }) => {
            let in_bytes = metric == Metric::AccBytes;
            let length = |choice: &String| if in_bytes { choice.len() } else { choice.chars().count() };
            let lengths = choices.iter().map(|choice| length(choice) as f64);
            yes(argmax(sums().zip(lengths).map(|(sum, length)| sum / length)) == *gold)
        }
        (Metric::Acc, Ask::LastWord { .. }) | (Metric::AnyMatch | Metric::AnyAcc, Ask::AnyGreedy { .. }) => {
            yes(responses.iter().any(|r| matches!(r, Response::LogLikelihood { greedy: true, .. })))
        }
        (Metric::Perplexity | Metric::Ppl, Ask::LastWord { .. }) => {
            Part { value: sum(&responses[0]), weight: 1.0 }
        }
        (Metric::ExactMatch, Ask::Generate { answers, .. }) => {
            yes(rules.exact.any(generated(&responses[0]), answers))
        }
        (Metric::AccOfNumber, Ask::Generate { answers, .. }) => {
            yes(generated(&responses[0]) == filter.apply(&answers[0]))
        }
        (Metric::WordPerplexity, Ask::Rolling { words, .. }) => {
            Part { value: sum(&responses[0]), weight: *words as f64 }
        }
        (Metric::BytePerplexity | Metric::BitsPerByte, Ask::Rolling { bytes, .. }) => {
            Part { value: sum(&responses[0]), weight: *bytes as f64 }
        }
        (metric, ask) => panic!("{metric:?} of {ask:?}"),
    }
}

fn sum(response: &Response) -> f64 {
    match response {
        Response::LogLikelihood { sum, .. } | Response::Rolling { sum } => *sum,
        Response::Generated { .. } => panic!("a text where a likelihood was asked for"),
    }
}

fn generated(response: &Response) -> &str {
    match response {
        Response::Generated { text } => text,
        _ => panic!("a likelihood where a text was asked for"),
    }
}

impl Request {
    /// Returns the text before the answer.
    pub fn context(&self) -> &str {
        match self {
            Request::LogLikelihood { context, .. } | Request::Generate { context, .. } => context,
            Request::Rolling { .. } => "",
        }
    }
}
