//! Learns byte-pair merges with a total order on candidates, so that equal texts give equal merges in any process.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet};

/// A pair of adjacent token ids.
type Pair = (u32, u32);

/// A pair seen less often than this is not merged.
const MIN_COUNT: i64 = 2;

/// A learned vocabulary: `tokens[id]`, and the merges in the order in which they were learned.
pub(crate) struct Vocabulary {
    pub(crate) tokens: Vec<String>,
    pub(crate) merges: Vec<(String, String)>,
}

/// Learns merges on `words` (word, how often it occurs) until there are `vocab_size` tokens or no pair repeats.
/// `tokens` holds what is there before: special tokens, then every single character that occurs in a word.
pub(crate) fn learn(mut tokens: Vec<String>, words: &BTreeMap<String, i64>, vocab_size: usize) -> Vocabulary {
    let mut id_of: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();
    let mut word_ids: Vec<Vec<u32>> = words
        .keys()
        .map(|word| word.chars().map(|c| id_of[c.encode_utf8(&mut [0; 4]) as &str]).collect())
        .collect();
    let word_counts: Vec<i64> = words.values().copied().collect();

    let mut pair_counts: HashMap<Pair, i64> = HashMap::new();
    let mut words_with: HashMap<Pair, Vec<usize>> = HashMap::new();
    for (word, ids) in word_ids.iter().enumerate() {
        for pair in pairs(ids) {
            *pair_counts.entry(pair).or_default() += word_counts[word];
            words_with.entry(pair).or_default().push(word);
        }
    }
    let mut queue: BinaryHeap<(i64, Reverse<Pair>)> =
        pair_counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();
    let mut merges = Vec::new();
    let mut merged = HashSet::new();

    while tokens.len() < vocab_size {
        let Some((count, Reverse(pair))) = queue.pop() else { break };
        if pair_counts.get(&pair) != Some(&count) {
            continue;
        }
        if count < MIN_COUNT {
            break;
        }
        let (left, right) = (&tokens[pair.0 as usize], &tokens[pair.1 as usize]);
        let text = format!("{left}{right}");
        // Another pair of parts can give the same string: the two must share one id.
        if merged.insert(pair) {
            merges.push((left.clone(), right.clone()));
        }
        let id = *id_of.entry(text.clone()).or_insert_with(|| {
            tokens.push(text);
            (tokens.len() - 1) as u32
        });

        let mut changed = BTreeSet::new();
        for word in words_with.remove(&pair).unwrap_or_default() {
            let ids = &mut word_ids[word];
            if !pairs(ids).any(|other| other == pair) {
                continue;
            }
            for old in pairs(ids) {
                *pair_counts.entry(old).or_default() -= word_counts[word];
                changed.insert(old);
            }
            *ids = merge(ids, pair, id);
            for new in pairs(ids) {
                *pair_counts.entry(new).or_default() += word_counts[word];
                changed.insert(new);
                if new.0 == id || new.1 == id {
                    words_with.entry(new).or_default().push(word);
                }
            }
        }
        queue.extend(changed.into_iter().map(|pair| (pair_counts[&pair], Reverse(pair))));
    }
    Vocabulary { tokens, merges }
}

fn pairs(ids: &[u32]) -> impl Iterator<Item = Pair> {
    ids.windows(2).map(|pair| (pair[0], pair[1]))
}

/// Replaces every `pair` in `ids` by `id`, from the left.
fn merge(ids: &[u32], pair: Pair, id: u32) -> Vec<u32> {
    let mut out = Vec::with_capacity(ids.len());
    let mut rest = ids;
    while let Some((&first, tail)) = rest.split_first() {
        if tail.first() == Some(&pair.1) && first == pair.0 {
            out.push(id);
            rest = &tail[1..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_come_by_count_then_by_id() {
        let words = BTreeMap::from([("aab".to_string(), 3), ("ab".to_string(), 1), ("ca".to_string(), 4)]);
        let tokens = ["a", "b", "c"].map(String::from).to_vec();
        let learned = learn(tokens, &words, 6);
        // (a,b) and (c,a) occur four times each, (a,a) three times: ids break the tie.
        assert_eq!(learned.tokens, ["a", "b", "c", "ab", "ca", "aab"]);
        let expected = [("a", "b"), ("c", "a"), ("a", "ab")].map(|(l, r)| (l.to_string(), r.to_string()));
        assert_eq!(learned.merges, expected);
    }

    #[test]
    fn pairs_that_do_not_repeat_stay_apart() {
        let words = BTreeMap::from([("ab".to_string(), 1)]);
        let learned = learn(["a", "b"].map(String::from).to_vec(), &words, 100);
        assert_eq!(learned.tokens.len(), 2);
        assert!(learned.merges.is_empty());
    }

    #[test]
    fn overlapping_pairs_merge_from_the_left() {
        assert_eq!(merge(&[1, 1, 1, 2], (1, 1), 9), [9, 1, 2]);
        assert_eq!(merge(&[1, 1, 1, 1], (1, 1), 9), [9, 9]);
    }
}
