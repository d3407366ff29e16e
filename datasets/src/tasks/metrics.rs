//! Metrics of documents, their aggregates over a task, and standard errors.

use std::sync::LazyLock;

use rayon::prelude::*;
use regex::Regex;

use super::random::Random;

/// Resamples of a bootstrap, in chunks that each have a generator of their own.
const BOOTSTRAP: [u32; 2] = [100, 1000];

/// A metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    /// The likeliest choice is the right one; the last word would be generated.
    Acc,
    /// The likeliest choice per character is the right one.
    AccNorm,
    /// The likeliest choice per byte is the right one.
    AccBytes,
    /// exp of the mean negative log-likelihood of a document.
    Perplexity,
    /// The same by its old name.
    Ppl,
    /// The generated answer equals a right one.
    ExactMatch,
    /// A right answer would be generated.
    AnyMatch,
    /// The same by its old name.
    AnyAcc,
    /// The generated number equals the right one.
    AccOfNumber,
    /// exp of the negative log-likelihood per word.
    WordPerplexity,
    /// exp of the negative log-likelihood per byte.
    BytePerplexity,
    /// Negative log-likelihood per byte in bits.
    BitsPerByte,
}

/// A document's part of a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) value: f64,
    pub(crate) weight: f64,
}

impl Metric {
    /// Returns the name in the keys of results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Metric::Acc | Metric::AnyAcc | Metric::AccOfNumber => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::AccBytes => "acc_bytes",
            Metric::Perplexity => "perplexity",
            Metric::Ppl => "ppl",
            Metric::ExactMatch | Metric::AnyMatch => "exact_match",
            Metric::WordPerplexity => "word_perplexity",
            Metric::BytePerplexity => "byte_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// Returns true if more is better.
    pub(crate) fn higher_is_better(self) -> bool {
        !matches!(
            self,
            Metric::Perplexity
                | Metric::Ppl
                | Metric::WordPerplexity
                | Metric::BytePerplexity
                | Metric::BitsPerByte
        )
    }

    /// Returns the metric of a task of which these are the documents, and its standard error where one is defined.
    pub(crate) fn aggregate(self, parts: &[Part]) -> (f64, Option<f64>) {
        let values: Vec<f64> = parts.iter().map(|part| part.value).collect();
        let weighted = || values.iter().sum::<f64>() / parts.iter().map(|part| part.weight).sum::<f64>();
        let several = values.len() > 1;
        match self {
            Metric::Perplexity | Metric::Ppl => (perplexity(&values), several.then(|| bootstrap(&values))),
            Metric::WordPerplexity | Metric::BytePerplexity => ((-weighted()).exp(), None),
            Metric::BitsPerByte => (-weighted() / std::f64::consts::LN_2, None),
            _ => (mean(&values), several.then(|| deviation(&values) / (values.len() as f64).sqrt())),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Computes the standard error of the mean over several groups of documents from those of the groups, as the harness does.
pub(crate) fn pooled(errors: &[f64], sizes: &[usize]) -> f64 {
    let all: usize = sizes.iter().sum();
    let squares = errors.iter().zip(sizes).map(|(error, &n)| (n - 1) as f64 * error * error * n as f64);
    (squares.sum::<f64>() / (all - sizes.len()) as f64 / all as f64).sqrt()
}

fn perplexity(values: &[f64]) -> f64 {
    (-mean(values)).exp()
}

/// Computes the standard deviation of a sample.
fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

/// Computes the standard error of the perplexity, by resampling.
fn bootstrap(values: &[f64]) -> f64 {
    let [chunks, size] = BOOTSTRAP;
    let n = values.len() as f64;
    let resampled = |chunk| {
        let mut random = Random::new(chunk);
        let mut resample = move |_| {
            let sum: f64 = (0..values.len()).map(|_| values[(random.uniform() * n) as usize]).sum();
            (-(sum / n)).exp()
        };
        (0..size).map(&mut resample).collect::<Vec<f64>>()
    };
    deviation(&(0..chunks).into_par_iter().map(resampled).collect::<Vec<_>>().concat())
}

/// Returns the index of the largest value, the first of equal ones.
pub(crate) fn argmax(values: impl IntoIterator<Item = f64>) -> usize {
    let mut values = values.into_iter().enumerate();
    let first = values.next().unwrap_or((0, 0.0));
    values.fold(first, |best, next| if next.1 > best.1 { next } else { best }).0
}

/// Parts of texts that a comparison ignores.
#[derive(Clone, Debug)]
pub(crate) enum Ignored {
    Commas,
    Dollars,
    /// All before the number behind the last `#### `.
    Working,
    /// A dot at the very end.
    LastDot,
    Articles,
    /// Every match.
    Matches(Regex),
}

impl Ignored {
    fn remove(&self, text: &str) -> String {
        static WORKING: LazyLock<Regex> = LazyLock::new(|| Regex::new("(?s).*#### ").expect("a constant"));
        static ARTICLES: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r"\b(?:The |the |An |A |a |an )").expect("a constant"));
        match self {
            Ignored::Commas => text.replace(',', ""),
            Ignored::Dollars => text.replace('$', ""),
            Ignored::Working => WORKING.replace_all(text, "").into_owned(),
            // Python's `$` also stands before a line end at the very end.
            Ignored::LastDot => match text.strip_suffix('\n').and_then(|line| line.strip_suffix('.')) {
                Some(line) => format!("{line}\n"),
                None => text.strip_suffix('.').unwrap_or(text).to_owned(),
            },
            Ignored::Articles => ARTICLES.replace_all(text, "").into_owned(),
            Ignored::Matches(regex) => regex.replace_all(text, "").into_owned(),
        }
    }
}

/// Options for comparing texts.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExactMatch {
    /// Removed first, in this order.
    pub(crate) ignored: Vec<Ignored>,
    pub(crate) ignore_case: bool,
    /// Removed last; ASCII only.
    pub(crate) ignore_punctuation: bool,
}

impl ExactMatch {
    fn normal(&self, text: &str) -> String {
        let mut text = self.ignored.iter().fold(text.to_owned(), |text, ignored| ignored.remove(&text));
        if self.ignore_case {
            text = text.to_lowercase();
        }
        if self.ignore_punctuation {
            text.retain(|c| !c.is_ascii_punctuation());
        }
        text
    }

    /// Returns true if `text` equals one of `answers`.
    pub(crate) fn any(&self, text: &str, answers: &[String]) -> bool {
        let text = self.normal(text);
        answers.iter().any(|answer| self.normal(answer) == text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(values: &[f64]) -> Vec<Part> {
        values.iter().map(|&value| Part { value, weight: 2.0 }).collect()
    }

    /// `python3 -c "import math; x = [...]; ..."` by the harness's formulas.
    #[test]
    fn aggregates_are_those_of_the_harness() {
        let (acc, stderr) = Metric::Acc.aggregate(&parts(&[1.0, 0.0, 0.0, 1.0, 1.0]));
        assert_eq!((acc, stderr), (0.6, Some(0.24494897427831783)));
        assert_eq!(Metric::Acc.aggregate(&parts(&[1.0])), (1.0, None));
        let (word, none) = Metric::WordPerplexity.aggregate(&parts(&[-3.0, -5.0]));
        assert_eq!((word, none), (2.0f64.exp(), None));
        assert_eq!(Metric::BitsPerByte.aggregate(&parts(&[-4.0f64.ln()])).0, 1.0);
    }

    #[test]
    fn the_bootstrap_is_that_of_the_harness() {
        let (perplexity, stderr) = Metric::Perplexity.aggregate(&parts(&[-1.0, -2.5, -0.25]));
        assert!((perplexity - 3.4903429574618414).abs() < 1e-14, "{perplexity}");
        assert!((stderr.unwrap() - 2.3934410612066515).abs() < 1e-12, "{stderr:?}");
    }

    #[test]
    fn the_first_of_equals_is_chosen() {
        assert_eq!(argmax([-2.0, -1.0, -1.0]), 1);
        assert_eq!(argmax([f64::NEG_INFINITY, f64::NEG_INFINITY]), 0);
    }

    #[test]
    fn what_is_ignored_does_not_count() {
        let number = ExactMatch {
            ignored: vec![Ignored::Commas, Ignored::Dollars, Ignored::Working, Ignored::LastDot],
            ignore_case: true,
            ignore_punctuation: false,
        };
        let gold = ["She has 3.\n#### 1,234".to_owned()];
        assert!(number.any("$1,234.", &gold) && number.any("#### 5 #### 1234", &gold));
        assert!(!number.any("1234.\n", &gold) && !number.any(" 1234", &gold));
        let answer =
            ExactMatch { ignored: vec![Ignored::Articles], ignore_case: true, ignore_punctuation: true };
        assert!(answer.any("the U.S.", &["US".to_owned()]) && answer.any("A (cat)", &["an cat".to_owned()]));
        // Articles go before case does.
        assert!(!answer.any("THE US", &["the US".to_owned()]));
        assert!(!answer.any("US ", &["US".to_owned()]));
    }
}
