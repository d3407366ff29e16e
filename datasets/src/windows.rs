//! Windows over a token stream: what an evaluation scores, and what a training step sees.

use crate::error::{Error, Result};
use crate::tokens::Tokens;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use sha2::{Digest, Sha256};
use std::ops::Range;

/// Documents are cut into pieces of at most this many tokens (or one window) to be held out.
const MAX_PIECE: usize = 8192;

/// Largest number of windows in a batch.
const MAX_BATCH: usize = 1 << 20;

/// One forward pass of an evaluation: tokens `start..end` go in, tokens `first_target..end` are scored, each from
/// those before it in the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalWindow {
    /// First token of the window.
    pub start: usize,
    /// One past its last token.
    pub end: usize,
    /// First token that is scored; at least `start + 1`.
    pub first_target: usize,
}

/// Computes the windows for an evaluation of `len` tokens: windows of `window` tokens that start every `stride`; the
/// last may be shorter. The first token of a window is context only. With `stride == window` the windows do not
/// overlap; with a smaller stride every token but the first is scored once, in the first window that reaches it.
///
/// # Errors
/// `len` below 2, `window` below 2, or a stride that is 0 or larger than the window.
pub fn eval_windows(len: usize, window: usize, stride: usize) -> Result<Vec<EvalWindow>> {
    if window < 2 {
        return Err(Error::setting_range("seq", window, "at least 2"));
    }
    if stride == 0 || stride > window {
        return Err(Error::setting_range("stride", stride, "1 to seq"));
    }
    if len < 2 {
        return Err(Error::TooFewTokens { side: "evaluation text", tokens: len, window: 2 });
    }
    let mut windows: Vec<EvalWindow> = Vec::new();
    let mut scored = 1;
    for start in (0..len).step_by(stride) {
        let end = len.min(start.saturating_add(window));
        let first_target = scored.max(start + 1);
        if first_target < end {
            windows.push(EvalWindow { start, end, first_target });
            scored = end;
        }
        if end == len {
            break;
        }
    }
    Ok(windows)
}

/// Options for splitting text into training and held-out sides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SplitOptions {
    /// Inputs per window.
    pub seq: usize,
    /// Share of the tokens that is held out, in [0, 1).
    pub valid_fraction: f64,
    /// The largest number of windows held out.
    pub valid_samples: u64,
}

/// A token stream cut into a training side and a held-out side that share no piece of text.
///
/// Documents are cut into pieces; the pieces whose content has the smallest SHA-256 are held out until their share, or
/// the most that is wanted, is reached. Equal pieces have equal hashes and so stay together: text that occurs twice is
/// never on both sides. The training side stays where the stream is, the held-out side is in memory.
#[derive(Debug)]
pub struct Split {
    tokens: Tokens,
    train: Runs,
    valid: Vec<u32>,
    seq: usize,
}

/// Ranges of a stream, one after the other as one text.
#[derive(Debug, Default)]
struct Runs {
    /// The begin of each range in the text, and the range.
    ranges: Vec<(usize, Range<usize>)>,
    len: usize,
}

impl Runs {
    fn new(ranges: impl IntoIterator<Item = Range<usize>>) -> Runs {
        let mut runs = Runs::default();
        for range in ranges {
            runs.len += range.len();
            match runs.ranges.last_mut() {
                Some((_, last)) if last.end == range.start => last.end = range.end,
                _ => runs.ranges.push((runs.len - range.len(), range)),
            }
        }
        runs
    }

    /// Appends the ids `start..end` of the text to `out`.
    fn read(&self, tokens: &Tokens, start: usize, end: usize, out: &mut Vec<u32>) -> Result<()> {
        let first = self.ranges.partition_point(|(begin, _)| *begin <= start).saturating_sub(1);
        for (begin, range) in &self.ranges[first..] {
            if *begin >= end {
                break;
            }
            let from = range.start + start.saturating_sub(*begin);
            tokens.read(from..range.end.min(range.start + end - begin), out)?;
        }
        Ok(())
    }
}

/// The pieces of a stream, by side.
pub(crate) struct Pieces {
    pub(crate) train: Vec<Range<usize>>,
    pub(crate) valid: Vec<Range<usize>>,
}

impl Pieces {
    /// Cuts `tokens` into pieces and holds some out.
    pub(crate) fn of(tokens: &Tokens, options: SplitOptions) -> Result<Pieces> {
        let SplitOptions { seq, valid_fraction, valid_samples } = options;
        if !(0.0..1.0).contains(&valid_fraction) {
            return Err(Error::setting_range("valid_fraction", valid_fraction, "0 or more and below 1"));
        }
        let total = tokens.len();
        let window = match seq.checked_add(1) {
            Some(window) if seq > 0 => window,
            _ => return Err(Error::setting_range("seq", seq, "at least 1")),
        };
        if total < window {
            return Err(Error::TooFewTokens { side: "training text", tokens: total, window });
        }
        let piece_len = window.max((total / 64).min(MAX_PIECE));
        let starts = tokens.doc_starts();
        let ends = starts.iter().skip(1).copied().chain([total]);
        let pieces = starts.iter().zip(ends).flat_map(|(&start, end)| {
            (start..end).step_by(piece_len).map(move |at| at..end.min(at.saturating_add(piece_len)))
        });
        if valid_fraction == 0.0 || valid_samples == 0 {
            return Ok(Pieces { train: pieces.collect(), valid: Vec::new() });
        }
        let mut order = Vec::new();
        let mut ids = Vec::new();
        for range in pieces {
            ids.clear();
            tokens.read(range.clone(), &mut ids)?;
            order.push((hash(&ids), range));
        }
        // Among equal pieces the order of the text.
        order.sort_by_key(|(hash, _)| *hash);

        let wanted = ((valid_fraction * total as f64).ceil() as usize).max(2);
        let wanted = wanted.min(usize::try_from(valid_samples).unwrap_or(usize::MAX).saturating_mul(window));
        let (mut held, mut held_tokens) = (0, 0);
        while held < order.len() && (held_tokens < wanted || (held > 0 && order[held - 1].0 == order[held].0))
        {
            held_tokens += order[held].1.len();
            held += 1;
        }
        let side = |pieces: &[(u128, Range<usize>)]| {
            let mut side: Vec<Range<usize>> = pieces.iter().map(|(_, range)| range.clone()).collect();
            side.sort_unstable_by_key(|range| range.start);
            side
        };
        Ok(Pieces { train: side(&order[held..]), valid: side(&order[..held]) })
    }
}

impl Split {
    /// Splits `tokens`.
    ///
    /// # Errors
    /// An option outside its range, fewer tokens left to train on than one window, `seq + 1`, or tokens that cannot be
    /// read.
    pub fn new(tokens: &Tokens, options: SplitOptions) -> Result<Split> {
        Split::of(tokens, Pieces::of(tokens, options)?, options.seq)
    }

    pub(crate) fn of(tokens: &Tokens, pieces: Pieces, seq: usize) -> Result<Split> {
        let mut valid = Vec::new();
        for range in pieces.valid {
            tokens.read(range, &mut valid)?;
        }
        let split = Split { tokens: tokens.clone(), train: Runs::new(pieces.train), valid, seq };
        if split.train.len <= seq {
            return Err(Error::TooFewTokens {
                side: "training text without the held-out part",
                tokens: split.train.len,
                window: seq + 1,
            });
        }
        Ok(split)
    }

    /// Inputs per window.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Returns the number of training windows, at least 1. Tokens after the last whole window are not trained on.
    pub fn num_windows(&self) -> usize {
        (self.train.len - 1) / self.seq
    }

    /// Appends training window `index` to `out`: `seq + 1` tokens, of which `[..seq]` are the inputs and `[1..]` the
    /// targets.
    ///
    /// # Errors
    /// Tokens that cannot be read.
    ///
    /// # Panics
    /// If `index` is not below [`Split::num_windows`].
    pub fn window(&self, index: usize, out: &mut Vec<u32>) -> Result<()> {
        assert!(index < self.num_windows(), "window {index} of {}", self.num_windows());
        self.train.read(&self.tokens, index * self.seq, (index + 1) * self.seq + 1, out)
    }

    /// Returns the number of tokens of the training side.
    pub fn train_len(&self) -> usize {
        self.train.len
    }

    /// Returns all tokens of the held-out side, in the order of the corpus; empty if nothing is held out.
    pub fn valid_tokens(&self) -> &[u32] {
        &self.valid
    }
}

/// Computes the first half of the SHA-256 of a piece.
fn hash(piece: &[u32]) -> u128 {
    let bytes: Vec<u8> = piece.iter().flat_map(|id| id.to_le_bytes()).collect();
    let mut first = [0; 16];
    first.copy_from_slice(&Sha256::digest(bytes)[..16]);
    u128::from_be_bytes(first)
}

/// The order of training windows. Each epoch is a permutation of all windows, a function of the seed and the epoch.
/// Epochs follow one another and are cut into batches. The step number is the whole state.
pub struct Batches {
    num_windows: usize,
    batch: usize,
    seed: u64,
    /// The permutation used last, and its epoch.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Batches {
    /// Batches of `batch` out of `num_windows` windows.
    ///
    /// # Errors
    /// A batch of 0 or above 2^20 windows, or no window at all.
    pub fn new(num_windows: usize, batch: usize, seed: u64) -> Result<Batches> {
        if batch == 0 || batch > MAX_BATCH {
            return Err(Error::setting_range("batch", batch, "1 to 1048576"));
        }
        if num_windows == 0 {
            return Err(Error::TooFewTokens { side: "training text", tokens: 0, window: 1 });
        }
        Ok(Batches { num_windows, batch, seed, epoch: None })
    }

    /// Returns the windows of step `step`, counted from 0. They depend on nothing but the arguments of
    /// [`Batches::new`] and
    /// `step`.
    pub fn batch_at(&mut self, step: u64) -> impl Iterator<Item = usize> + '_ {
        let first = u128::from(step) * self.batch as u128;
        (first..first + self.batch as u128).map(|sample| {
            let epoch = (sample / self.num_windows as u128) as u64;
            let at = (sample % self.num_windows as u128) as usize;
            self.permutation(epoch)[at]
        })
    }

    fn permutation(&mut self, epoch: u64) -> &[usize] {
        let (kept, mut order) = self.epoch.take().unwrap_or_default();
        if kept != epoch || order.is_empty() {
            shuffle(&mut order, self.num_windows, self.seed, epoch);
        }
        &self.epoch.insert((epoch, order)).1
    }
}

/// Sets `order` to a permutation of 0..len, by Fisher-Yates on raw PCG output: the order does not depend on the version
/// of a library.
fn shuffle(order: &mut Vec<usize>, len: usize, seed: u64, epoch: u64) {
    let mut rng = stream(seed, epoch, 0);
    order.clear();
    order.extend(0..len);
    for last in (1..len).rev() {
        let other = (u128::from(rng.next_u64()) * (last as u128 + 1)) >> 64;
        order.swap(last, other as usize);
    }
}

/// Returns random stream `number` of an epoch, or of a block of samples.
pub(crate) fn stream(seed: u64, epoch: u64, number: u128) -> Pcg64 {
    Pcg64::new(u128::from(mix(seed)) << 64 | u128::from(mix(epoch)), number)
}

/// Applies the finaliser of SplitMix64: near seeds and epochs give far states.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenStream;
    use proptest::collection::{hash_set, vec};
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn eval_windows_by_hand() {
        let window = |start, end, first_target| EvalWindow { start, end, first_target };
        assert_eq!(eval_windows(9, 4, 4).unwrap(), [window(0, 4, 1), window(4, 8, 5)]);
        assert_eq!(eval_windows(10, 4, 4).unwrap(), [window(0, 4, 1), window(4, 8, 5), window(8, 10, 9)]);
        assert_eq!(eval_windows(7, 4, 2).unwrap(), [window(0, 4, 1), window(2, 6, 4), window(4, 7, 6)]);
        assert_eq!(eval_windows(3, 8, 8).unwrap(), [window(0, 3, 1)]);
    }

    #[test]
    fn eval_windows_out_of_range() {
        for (len, window, stride) in [(1, 4, 4), (0, 4, 4), (9, 1, 1), (9, 4, 0), (9, 4, 5)] {
            assert!(eval_windows(len, window, stride).is_err(), "{len} {window} {stride}");
        }
        assert_eq!(
            eval_windows(1, 4, 4).unwrap_err().to_string(),
            "evaluation text: 1 tokens are fewer than one window of 2; give more text, or a smaller seq"
        );
        assert_eq!(eval_windows(4, usize::MAX, usize::MAX).unwrap().len(), 1);
    }

    fn split(stream: &TokenStream, seq: usize, valid_fraction: f64) -> Result<Split> {
        Split::new(&stream.into(), SplitOptions { seq, valid_fraction, valid_samples: u64::MAX })
    }

    fn train_tokens(split: &Split) -> Vec<u32> {
        let mut tokens = Vec::new();
        split.train.read(&split.tokens, 0, split.train.len, &mut tokens).unwrap();
        tokens
    }

    #[test]
    fn no_more_is_held_out_than_samples_are_wanted() {
        let ids: Vec<u32> = (0..20_000).collect();
        let stream = TokenStream { doc_starts: (0..20_000).step_by(50).collect(), ids };
        let held = |valid_samples| {
            let options = SplitOptions { seq: 99, valid_fraction: 0.5, valid_samples };
            Split::new(&Tokens::from(&stream), options).unwrap().valid_tokens().len()
        };
        assert_eq!([held(0), held(3), held(100), held(5000)], [0, 300, 10_000, 10_000]);
    }

    #[test]
    fn split_out_of_range() {
        let stream = TokenStream { ids: (0..100).collect(), doc_starts: vec![0, 50] };
        assert!(split(&stream, 0, 0.1).is_err());
        assert!(split(&stream, usize::MAX, 0.1).is_err());
        for fraction in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            assert!(split(&stream, 8, fraction).is_err(), "{fraction}");
        }
        let error = split(&stream, 100, 0.0).err().unwrap().to_string();
        assert!(["100 tokens", "101", "smaller seq"].iter().all(|part| error.contains(part)), "{error}");
        let short = TokenStream { ids: (0..10).collect(), doc_starts: vec![0] };
        assert!(split(&short, 9, 0.0).is_ok());
        assert!(split(&short, 9, 0.5).is_err(), "the only piece is held out");
    }

    #[test]
    fn batches_are_a_function_of_seed_and_step() {
        let new = |seed| Batches::new(10, 4, seed).unwrap();
        let at = |batches: &mut Batches, step| batches.batch_at(step).collect::<Vec<_>>();
        let mut batches = new(7);
        let late = at(&mut batches, 1000);
        let steps: Vec<_> = (0..5).map(|step| at(&mut batches, step)).collect();
        assert_eq!(at(&mut batches, 1000), late);
        assert_eq!(at(&mut new(7), 3), steps[3]);
        let other: Vec<_> = (0..5).map(|step| at(&mut new(8), step)).collect();
        assert_ne!(other, steps);
        // Fixed for good: a checkpoint of an older version resumes on the same windows.
        let mut order = Vec::new();
        shuffle(&mut order, 10, 7, 0);
        assert_eq!(order, [4, 9, 0, 5, 3, 8, 7, 2, 1, 6]);
        assert_eq!(at(&mut batches, u64::MAX).len(), 4);
        assert!(Batches::new(10, 0, 7).is_err() && Batches::new(0, 4, 7).is_err());
    }

    proptest! {
        #[test]
        fn every_target_is_scored_once(len in 2usize..300, window in 2usize..40, stride in 1usize..40) {
            prop_assume!(stride <= window);
            let windows = eval_windows(len, window, stride).unwrap();
            let mut scored = vec![0; len];
            for w in &windows {
                prop_assert!(w.end - w.start <= window && w.start < w.first_target && w.first_target < w.end);
                scored[w.first_target..w.end].iter_mut().for_each(|count| *count += 1);
            }
            for (at, count) in scored.into_iter().enumerate() {
                let context_only = at == 0 || (stride == window && at % window == 0);
                prop_assert_eq!(count, usize::from(!context_only), "token {}", at);
            }
        }

        #[test]
        fn an_epoch_covers_every_window_once(n in 1usize..60, batch in 1usize..70, seed: u64, epoch in 0usize..4) {
            let mut batches = Batches::new(n, batch, seed).unwrap();
            let steps = ((epoch + 1) * n).div_ceil(batch);
            let samples: Vec<usize> = (0..steps).flat_map(|step| batches.batch_at(step as u64).collect::<Vec<_>>()).collect();
            let seen: HashSet<usize> = samples[epoch * n..(epoch + 1) * n].iter().copied().collect();
            prop_assert_eq!(seen, (0..n).collect::<HashSet<_>>());
        }

        #[test]
        fn split_sides_are_disjoint_and_whole(
            starts in hash_set(1usize..2000, 0..30),
            len in 600u32..2000,
            seq in 1usize..12,
            fraction in 0.0f64..0.6,
        ) {
            let mut doc_starts: Vec<usize> = starts.into_iter().filter(|&s| s < len as usize).chain([0]).collect();
            doc_starts.sort_unstable();
            let stream = TokenStream { ids: (0..len).collect(), doc_starts };
            let Ok(split) = split(&stream, seq, fraction) else { return Ok(()) };

            let (train, valid) = (train_tokens(&split), split.valid_tokens());
            prop_assert_eq!(split.train_len(), train.len());
            let mut both = [&train[..], valid].concat();
            both.sort_unstable();
            prop_assert_eq!(both, stream.ids);
            prop_assert!(train.is_sorted() && valid.is_sorted());
            prop_assert!(valid.len() as f64 >= fraction * f64::from(len));
            prop_assert_eq!(valid.is_empty(), fraction == 0.0);

            let window = |index| {
                let mut window = Vec::new();
                split.window(index, &mut window).unwrap();
                window
            };
            let windows: Vec<Vec<u32>> = (0..split.num_windows()).map(window).collect();
            prop_assert!(windows.iter().all(|w| w.len() == seq + 1));
            let inputs: Vec<u32> = windows.iter().flat_map(|w| w[..seq].to_vec()).collect();
            prop_assert_eq!(&inputs[..], &train[..inputs.len()]);
            let targets: Vec<u32> = windows.iter().flat_map(|w| w[1..].to_vec()).collect();
            prop_assert_eq!(&targets[..], &train[1..=targets.len()]);
        }

        #[test]
        fn equal_documents_stay_on_one_side(documents in vec(vec(0u32..4, 1..6), 8..60), fraction in 0.05f64..0.5) {
            let mut stream = TokenStream { ids: vec![], doc_starts: vec![] };
            for (index, document) in documents.iter().enumerate() {
                // The first token marks a document's content, so that it can be found again on a side.
                stream.doc_starts.push(stream.ids.len());
                let marker = 100 + documents.iter().position(|d| d == document).unwrap_or(index) as u32;
                stream.ids.extend([marker].into_iter().chain(document.iter().copied()));
            }
            let Ok(split) = split(&stream, 8, fraction) else { return Ok(()) };
            let markers = |side: &[u32]| side.iter().copied().filter(|&id| id >= 100).collect::<HashSet<_>>();
            prop_assert!(markers(&train_tokens(&split)).is_disjoint(&markers(split.valid_tokens())));
        }
    }
}
