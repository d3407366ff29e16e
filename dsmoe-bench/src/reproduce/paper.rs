//! The numbers of the paper (arXiv 2502.12455), as its tables print them.

use super::profile::{PaperModel, PaperRow};

/// A row of table 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Table1 {
    pub(crate) row: PaperRow,
    /// Billions of parameters.
    pub(crate) params: f64,
    pub(crate) activated: f64,
    pub(crate) ppl: f64,
}

const fn one(row: PaperRow, params: f64, activated: f64, ppl: f64) -> Table1 {
    Table1 { row, params, activated, ppl }
}

/// Tables of the 1B and of the 7B model.
const TABLE1: [[Table1; 6]; 2] = [
    [
        one(PaperRow::Dense, 1.24, 1.24, 5.67),
        one(PaperRow::LlmPrunerChannel, 0.889, 0.889, 7.51),
        one(PaperRow::LlmPrunerBlock, 0.735, 0.735, 7.46),
        one(PaperRow::Sparsegpt, 1.24, 0.735, 9.82),
        one(PaperRow::LlamaMoe, 1.24, 0.736, 7.45),
        one(PaperRow::Dsmoe, 1.24, 0.735, 7.41),
    ],
    [
        one(PaperRow::Dense, 6.74, 6.74, 3.40),
        one(PaperRow::LlmPrunerChannel, 3.95, 3.95, 4.01),
        one(PaperRow::LlmPrunerBlock, 3.94, 3.94, 4.01),
        one(PaperRow::Sparsegpt, 6.74, 3.93, 3.96),
        one(PaperRow::LlamaMoe, 6.74, 3.98, 4.12),
        one(PaperRow::Dsmoe, 6.74, 3.93, 3.91),
    ],
];

/// The benchmarks of table 2 in its order: the names in lm-evaluation-harness, and the paper's short names.
pub(crate) const TASKS: [(&str, &str); 10] = [
    ("hellaswag", "HellaSwag"),
    ("lambada_openai", "LAMBADA"),
    ("piqa", "PIQA"),
    ("social_iqa", "SIQA"),
    ("storycloze_2016", "StoryCloze"),
    ("winogrande", "Wino"),
    ("gsm8k", "GSM8K"),
    ("nq_open", "NaturalQs"),
    ("triviaqa", "TriviaQA"),
    ("webqs", "WebQs"),
];

/// Percentages of right items in the benchmarks of [`TASKS`].
type Scores = [f64; 10];

const TABLE2: [[(PaperRow, Scores); 6]; 2] = [
    [
        (PaperRow::Dense, [64.09, 61.05, 75.51, 42.47, 72.58, 60.85, 4.85, 12.52, 36.08, 22.49]),
        (PaperRow::LlmPrunerChannel, [53.44, 45.04, 71.43, 40.94, 68.67, 58.45, 1.44, 6.98, 17.46, 14.56]),
        (PaperRow::LlmPrunerBlock, [51.05, 46.28, 71.71, 41.04, 68.62, 56.27, 1.36, 7.28, 18.46, 14.56]),
        (PaperRow::Sparsegpt, [54.01, 56.49, 71.10, 40.68, 68.05, 57.30, 1.51, 5.29, 14.44, 11.61]),
        (PaperRow::LlamaMoe, [49.06, 44.84, 70.02, 41.05, 65.47, 55.64, 1.62, 5.76, 13.49, 11.27]),
        (PaperRow::Dsmoe, [50.92, 48.12, 72.36, 41.14, 68.78, 56.35, 1.67, 8.17, 25.52, 18.21]),
    ],
    [
        (PaperRow::Dense, [76.39, 72.34, 79.05, 44.67, 79.15, 70.87, 14.70, 26.28, 61.89, 32.82]),
        (PaperRow::LlmPrunerChannel, [66.41, 61.63, 74.97, 43.19, 75.30, 66.85, 4.85, 12.63, 36.02, 20.57]),
        (PaperRow::LlmPrunerBlock, [67.93, 62.02, 76.22, 44.26, 75.46, 63.53, 1.81, 12.96, 38.77, 21.65]),
        (PaperRow::Sparsegpt, [73.60, 67.43, 77.36, 44.21, 76.37, 70.48, 8.33, 17.61, 47.83, 24.90]),
        (PaperRow::LlamaMoe, [63.89, 60.49, 74.10, 43.29, 72.90, 61.17, 3.26, 11.58, 31.25, 19.09]),
        (PaperRow::Dsmoe, [70.22, 67.61, 78.12, 44.31, 76.37, 66.77, 6.41, 22.04, 57.94, 29.92]),
    ],
];

/// Table 3, of the 1B model, with and without the straight-through estimator. Its StoryCloze with the estimator is 68.67;
/// that of table 2 is 68.78.
pub(crate) const TABLE3: [(f64, Scores); 2] = [
    (7.41, [50.92, 48.12, 72.36, 41.14, 68.67, 56.35, 1.67, 8.17, 25.52, 18.21]),
    (12.75, [32.29, 27.79, 62.73, 39.30, 57.14, 50.83, 0.38, 2.47, 2.95, 1.00]),
];

/// A row of table 4.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Table4 {
    pub(crate) threshold: f64,
    pub(crate) ppl: f64,
    /// Percentage of all parameters.
    pub(crate) activated: f64,
}

const fn at(threshold: f64, ppl: f64, activated: f64) -> Table4 {
    Table4 { threshold, ppl, activated }
}

const TABLE4: [[Table4; 7]; 2] = [
    [
        at(0.2, 7.22, 64.19),
        at(0.3, 7.24, 62.32),
        at(0.4, 7.29, 60.79),
        at(0.5, 7.41, 59.35),
        at(0.6, 7.61, 57.87),
        at(0.7, 8.01, 56.34),
        at(0.8, 8.85, 54.37),
    ],
    [
        at(0.2, 3.82, 65.45),
        at(0.3, 3.83, 62.70),
        at(0.4, 3.85, 60.43),
        at(0.5, 3.91, 58.46),
        at(0.6, 4.02, 56.54),
        at(0.7, 4.28, 54.77),
        at(0.8, 5.09, 52.54),
    ],
];

/// Tables 5 and 6: billions of tokens, of 10, and perplexity.
pub(crate) const TABLE5: [(f64, f64); 6] =
    [(2.2, 7.384), (3.8, 7.323), (5.4, 7.481), (7.0, 7.488), (7.8, 7.445), (8.6, 7.422)];
pub(crate) const TABLE6: [(f64, f64); 6] =
    [(2.4, 4.091), (3.2, 4.029), (4.8, 3.994), (6.4, 3.975), (8.0, 3.929), (9.6, 3.916)];

pub(crate) fn table1(model: PaperModel) -> &'static [Table1] {
    &TABLE1[model as usize]
}

pub(crate) fn table2(model: PaperModel) -> &'static [(PaperRow, Scores)] {
    &TABLE2[model as usize]
}

pub(crate) fn table4(model: PaperModel) -> &'static [Table4] {
    &TABLE4[model as usize]
}
