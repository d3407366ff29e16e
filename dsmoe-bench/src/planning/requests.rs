//! Requests, cut out of text, and what was measured of them.

use anyhow::{Result, bail};
use dsmoe_datasets::TokenSource;
use dsmoe_datasets::tasks::sha256;
use serde::{Deserialize, Serialize};

/// Tokens of a request: prompt and continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// The number of its source.
    pub(crate) source: usize,
    pub(crate) ids: Vec<u32>,
}

/// Cuts requests of `len` tokens out of the sources, `most` of each or as many as there are, spread evenly.
///
/// # Errors
/// A source has fewer than two; its tokens cannot be read.
pub(crate) fn cut(sources: &[TokenSource], most: usize, len: usize) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    for (number, source) in sources.iter().enumerate() {
        let windows = source.tokens.len() / len;
        let count = most.min(windows);
        if count < 2 {
            let (name, tokens) = (&source.name, source.tokens.len());
            bail!("{tokens} tokens of {name} are fewer than two requests of {len}; give more text");
        }
        for i in 0..count {
            let start = i * windows / count * len;
            let mut ids = Vec::with_capacity(len);
            source.tokens.read(start..start + len, &mut ids)?;
            requests.push(Request { source: number, ids });
        }
    }
    Ok(requests)
}

/// Returns a hash of the tokens of requests.
pub(crate) fn hash(requests: &[Request]) -> String {
    let ids: String = requests.iter().flat_map(|request| &request.ids).map(|id| format!("{id} ")).collect();
    sha256(&ids)
}

/// One request, with an entry for each budget, ascending.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profiled {
    /// The number of its source.
    pub(crate) source: usize,
    pub(crate) features: Vec<f64>,
    /// Shares of the experts that it opened, prompt and continuation. Profiles of earlier versions have none.
    #[serde(default)]
    pub(crate) active: Vec<f64>,
    /// Mean losses of the continuation, nats.
    pub(crate) losses: Vec<f64>,
}

impl Profiled {
    /// Returns what every budget adds to the loss of the largest.
    pub(crate) fn extra(&self) -> Vec<f64> {
        let least = self.losses.last().copied().unwrap_or(0.0);
        self.losses.iter().map(|loss| loss - least).collect()
    }
}

/// How much requests differ in what a budget adds to the loss of the largest, nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) mean: f64,
    /// Standard deviation over all requests.
    pub(crate) deviation: f64,
    /// Standard deviation over the requests of a source, the root of the mean square over all of them.
    pub(crate) within: f64,
}

/// Returns the spread at every budget.
pub(crate) fn spreads(rows: &[Profiled]) -> Vec<Spread> {
    let extra: Vec<Vec<f64>> = rows.iter().map(Profiled::extra).collect();
    let (count, budgets) = (rows.len() as f64, extra.first().map_or(0, Vec::len));
    let sources = rows.iter().map(|row| row.source + 1).max().unwrap_or(0);
    let of = |j: usize| {
        let all: Vec<f64> = extra.iter().map(|extra| extra[j]).collect();
        let of_source = |source: usize| -> Vec<f64> {
            let own = rows.iter().zip(&all).filter(|(row, _)| row.source == source);
            own.map(|(_, extra)| *extra).collect()
        };
        let within: f64 = (0..sources).map(|source| squares(&of_source(source))).sum();
        let deviation = (squares(&all) / count).sqrt();
        Spread { mean: mean(&all), deviation, within: (within / count).sqrt() }
    };
    (0..budgets).map(of).collect()
}

/// Returns the sum of the squared differences from the mean.
fn squares(values: &[f64]) -> f64 {
    let mean = mean(values);
    values.iter().map(|value| (value - mean).powi(2)).sum()
}

/// Returns the mean; NaN of nothing.
pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use dsmoe_datasets::TokenStream;

    use super::*;

    fn source(name: &str, tokens: u32) -> TokenSource {
        let stream = TokenStream { ids: (0..tokens).collect(), doc_starts: vec![0] };
        TokenSource { name: name.to_owned(), weight: 1.0, tokens: stream.into() }
    }

    #[test]
    fn requests_are_spread_over_a_source_and_do_not_overlap() {
        let found = cut(&[source("a", 33), source("b", 9)], 3, 4).unwrap();
        let starts: Vec<(usize, u32)> = found.iter().map(|one| (one.source, one.ids[0])).collect();
        // Eight windows of a, of which 0, 2 and 5 are taken, and the two of b.
        assert_eq!(starts, [(0, 0), (0, 8), (0, 20), (1, 0), (1, 4)]);
        assert!(found.iter().all(|one| one.ids.len() == 4 && one.ids[3] == one.ids[0] + 3));
        assert_ne!(hash(&found), hash(&found[1..]));
        let error = cut(&[source("a", 33), source("b", 7)], 3, 4).unwrap_err().to_string();
        assert_eq!(error, "7 tokens of b are fewer than two requests of 4; give more text");
    }

    #[test]
    fn spreads_are_those_of_all_requests_and_of_one_source() {
        let row = |source, losses: [f64; 2]| Profiled {
            source,
            features: vec![0.0],
            active: vec![0.5, 1.0],
            losses: losses.to_vec(),
        };
        // The extra losses are 1 and 3 of one source, and 5 and 7 of the other.
        let rows = [row(0, [2.0, 1.0]), row(0, [3.0, 0.0]), row(1, [7.0, 2.0]), row(1, [8.0, 1.0])];
        let found = spreads(&rows);
        // Squares from the mean of 4: 9 + 1 + 1 + 9; from 2 and 6: 1 each.
        assert_eq!(found[0], Spread { mean: 4.0, deviation: 5f64.sqrt(), within: 1.0 });
        assert_eq!(found[1], Spread { mean: 0.0, deviation: 0.0, within: 0.0 });
        assert!(spreads(&[]).is_empty());
    }
}
