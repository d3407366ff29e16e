//! Text for DSMoE: tokenizers, corpora (text, JSONL, gz, zst), packed windows, held-out splits, token cache.
#![forbid(unsafe_code)]
