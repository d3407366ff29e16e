//! Checks of calibration text.

use crate::error::{Error, Result};

/// A router that learns from fewer tokens is refused.
const FEWEST_TOKENS: usize = 256;

/// Checks that there are `at_least` sequences, all of one length of at least 2 tokens. `need` names their use.
///
/// # Errors
/// There are fewer, or they are shorter.
pub(crate) fn check(sequences: &[Vec<u32>], at_least: usize, need: &str) -> Result<()> {
    let problem = if sequences.len() < at_least {
        format!("{} sequences are too few for {need}", sequences.len())
    } else if let Some(i) = sequences.iter().position(|ids| ids.len() < 2 || ids.len() != sequences[0].len())
    {
        format!("sequence {i} has {} tokens and the first {}", sequences[i].len(), sequences[0].len())
    } else {
        return Ok(());
    };
    let help = format!("give {at_least} or more sequences of one length, at least 2 tokens");
    Err(Error::Calibration { problem, help })
}

/// Checks the text that routers learn from, and returns the number of its tokens.
///
/// # Errors
/// As [`check`]; also fewer than 256 tokens.
pub(crate) fn check_for_routers(sequences: &[Vec<u32>]) -> Result<usize> {
    check(sequences, 1, "routers")?;
    let tokens = sequences.iter().map(Vec::len).sum();
    match tokens < FEWEST_TOKENS {
        true => Err(Error::Calibration {
            problem: format!("{tokens} tokens are too few for routers"),
            help: format!("give {FEWEST_TOKENS} tokens or more"),
        }),
        false => Ok(tokens),
    }
}
