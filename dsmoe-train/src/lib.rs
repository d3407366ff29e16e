//! Continued training of DSMoE: AdamW, schedules, budget control, metrics, checkpoints that resume bit for bit, evaluation.
#![forbid(unsafe_code)]
