//! Groups of calibration sequences of similar content: k-means on TF-IDF vectors of their tokens, groups of equal size.
//!
//! ```text
//! weight(token, sequence) = tf idf,  tf = share of the sequence,  idf = ln((1 + S) / (1 + df)) + 1
//! ```
//! S sequences, df of which hold the token. Vectors are of length 1.

use std::collections::BTreeMap;

use dsmoe_core::partition::clusters;

/// The largest number of tokens used: those of the largest weights, summed over sequences.
const MOST_TOKENS: usize = 4096;

/// Returns the group of each sequence.
///
/// # Panics
/// There are fewer sequences than groups.
pub(crate) fn groups(sequences: &[Vec<u32>], num_groups: usize, seed: u64) -> Vec<usize> {
    let (vectors, dim) = tf_idf(sequences);
    clusters::balanced(&vectors, dim, num_groups, seed).labels
}

/// `[sequences, tokens that count]` and their number.
fn tf_idf(sequences: &[Vec<u32>]) -> (Vec<f32>, usize) {
    let count = |ids: &Vec<u32>| {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        ids.iter().for_each(|&id| *counts.entry(id).or_default() += 1);
        counts
    };
    let counts: Vec<BTreeMap<u32, usize>> = sequences.iter().map(count).collect();
    let mut holding: BTreeMap<u32, usize> = BTreeMap::new();
    counts.iter().flat_map(BTreeMap::keys).for_each(|&id| *holding.entry(id).or_default() += 1);
    let weight = |ids: &[u32], id: u32, count: usize| {
        let idf = ((1 + sequences.len()) as f64 / (1 + holding[&id]) as f64).ln() + 1.0;
        count as f64 / ids.len() as f64 * idf
    };
    let mut totals: BTreeMap<u32, f64> = BTreeMap::new();
    for (ids, counts) in sequences.iter().zip(&counts) {
        for (&id, &count) in counts {
            *totals.entry(id).or_default() += weight(ids, id, count);
        }
    }
    let mut ranked: Vec<(u32, f64)> = totals.into_iter().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked.truncate(MOST_TOKENS);
    let columns: BTreeMap<u32, usize> = ranked.iter().map(|&(id, _)| id).zip(0..).collect();
    let dim = columns.len().max(1);
    let mut vectors = vec![0.0; sequences.len() * dim];
    for ((row, ids), counts) in vectors.chunks_exact_mut(dim).zip(sequences).zip(&counts) {
        for (&id, &count) in counts {
            if let Some(&column) = columns.get(&id) {
                row[column] = weight(ids, id, count) as f32;
            }
        }
    }
    (clusters::normalized(vectors, dim), dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_formula() {
        let (vectors, dim) = tf_idf(&[vec![7, 7, 9], vec![9, 9, 9]]);
        // Token 9 is in both: idf 1; token 7 in one: idf ln(3/2) + 1.
        let idf = 1.5f64.ln() + 1.0;
        let (a, b) = (2.0 / 3.0 * idf, 1.0 / 3.0);
        let norm = a.hypot(b);
        let want = [b / norm, a / norm, 1.0, 0.0];
        assert_eq!(dim, 2);
        for (got, want) in vectors.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{vectors:?}");
        }
    }

    #[test]
    fn sequences_of_one_vocabulary_are_one_group() {
        // Sequence i draws from one of three ranges of tokens; token 0 is everywhere.
        let sequence =
            |i: u32| (0..40).map(move |t| if t % 4 == 0 { 0 } else { 1 + 100 * (i % 3) + t * (i + 3) % 17 });
        let sequences: Vec<Vec<u32>> = (0..12).map(|i| sequence(i).collect()).collect();
        for seed in 0..5 {
            let labels = groups(&sequences, 3, seed);
            for (i, label) in labels.iter().enumerate() {
                assert_eq!(*label, labels[i % 3], "{labels:?}");
            }
            assert_eq!(labels, groups(&sequences, 3, seed));
        }
    }
}
